"""The fast path of training: the same mathematics as TRL's plain way, in fewer passes.

Station between the tokenized rows and the trainer. Rows are laid end to end without padding and attend only to
themselves; the loss is computed on learned positions only, in chunks; layers that are known save passes over memory
(fused.py, attention.py). Each piece is first compared with the stock one on this very model, and left out where it
differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from qlora_tune.chat_format import IGNORED
from qlora_tune.layers import find_replacements, is_same, rotate_faster, rotating
from qlora_tune.layout import BATCH_ROUND, BLOCK_ROUND, group_blocks, group_rows

ATTENTION = "qlora_tune_rows"  # the name of its attention in Transformers' table
# Settings of models whose attention or head does what the fast path's does not.
UNKNOWN = (
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
)


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end: n tokens, of which m are followed by a learned one."""

    input_ids: Any  # [1, n]
    position_ids: Any  # [1, n], from 0 in each row
    blocks: list[list[int]]  # lengths of the rows that attend in one product, fillers among them; sum n
    learned: Any  # [m] positions
    targets: Any  # [m] the tokens to predict there
    tokens: int  # without fillers

    @property
    def lengths(self) -> list[int]:
        """Lengths of all rows and fillers, in order."""
        return [length for block in self.blocks for length in block]


def split_batch(rows: Sequence[dict[str, list[int]]], max_tokens: int, on_cpu: bool) -> list[MicroBatch]:
    """Lay the rows of an effective batch out as micro-batches of up to max_tokens, rows of similar length together.

    A row that is longer gets a micro-batch of its own.
    """
    groups = group_rows([len(row["input_ids"]) for row in rows], max_tokens)
    return [_lay_out([rows[index] for index in group], on_cpu) for group in groups]


def count_learned(row: dict[str, list[int]]) -> int:
    """Tokens that are learned, all but the first, which nothing predicts."""
    return len(row["labels"]) - 1 - row["labels"][1:].count(IGNORED)


def _lay_out(rows: Sequence[dict[str, list[int]]], on_cpu: bool) -> MicroBatch:
    """Lay rows end to end; on a CPU in blocks, with fillers that nothing is learned from."""
    import torch

    blocks = [[row] for row in rows]
    if on_cpu:
        blocks = [[rows[index] for index in block] for block in group_blocks([len(row["input_ids"]) for row in rows])]
        for block in blocks:
            _fill(block, BLOCK_ROUND)
        blocks.append([])
        _fill(blocks[-1], BATCH_ROUND, sum(len(row["input_ids"]) for block in blocks for row in block))
    laid = [row for block in blocks for row in block]
    following = torch.tensor([label for row in laid for label in [*row["labels"][1:], IGNORED]])
    learned = (following != IGNORED).nonzero().squeeze(1)
    return MicroBatch(
        torch.tensor([[token for row in laid for token in row["input_ids"]]]),
        torch.cat([torch.arange(len(row["input_ids"])) for row in laid]).unsqueeze(0),
        [[len(row["input_ids"]) for row in block] for block in blocks if block],
        learned,
        following[learned],
        sum(len(row["input_ids"]) for row in rows),
    )


def _fill(block: list[dict[str, list[int]]], multiple: int, already: int = 0) -> None:
    """Append a filler, so that the block's length, or what is there already, becomes a multiple."""
    missing = -(already or sum(len(row["input_ids"]) for row in block)) % multiple
    if missing:
        block.append({"input_ids": [0] * missing, "labels": [IGNORED] * missing})


class FastModel:
    """A model with an adapter, as the fast path runs it. `fast_path` makes it."""

    def __init__(self, model: Any, arena: Any, neftune_noise_alpha: float | None = None) -> None:
        self.model = model
        self.backbone = model.get_base_model().base_model
        self.embeddings = model.get_input_embeddings()
        self.noise = neftune_noise_alpha
        self.arena = arena
        self._rows: Any = None

    def loss_sum(self, batch: MicroBatch) -> Any:
        """Sum over the learned tokens of their negative log-likelihoods, float32 [nats].

        Where activations are recomputed its backward pass comes before the next micro-batch.
        """
        from qlora_tune import fused

        self.arena.used = True  # not before: weights that are kept, joined while the path is set up, would fill places
        return fused.CrossEntropy.apply(*self._learned(batch), self.arena)

    def log_likelihoods(self, rows: Sequence[dict[str, list[int]]]) -> Any:
        """The log-likelihood of each row's learned tokens together, float32 [nats]; all rows in one micro-batch."""
        import torch

        from qlora_tune import fused

        # Without gradients nothing lasts; in the arena it would lie on top of what waits for its backward pass.
        self.arena.used = torch.is_grad_enabled()
        hidden, head, targets = self._learned(_lay_out(rows, self.embeddings.weight.device.type == "cpu"))
        counts = [count_learned(row) for row in rows]
        each = zip(hidden.split(counts), targets.split(counts), strict=True)
        sums = [fused.CrossEntropy.apply(states, head, wanted, self.arena) for states, wanted in each]
        self.arena.used = True
        return -torch.stack(sums)

    def _learned(self, batch: MicroBatch) -> tuple[Any, Any, Any]:
        """The states [m, d] that predict learned tokens, the output head, and those tokens [m]."""
        hidden, head = self.hidden(batch), self.model.get_output_embeddings().weight
        learned = hidden.index_select(0, batch.learned.to(hidden.device))
        return learned, head, batch.targets.to(hidden.device)

    def hidden(self, batch: MicroBatch) -> Any:
        """The last layer's states [n, d]."""
        from qlora_tune.attention import plan_rows

        device = self.embeddings.weight.device
        embedded = self.embeddings(batch.input_ids.to(device))
        if self.noise and self.backbone.training:
            embedded = embedded + _noise(self.noise, embedded, batch.lengths)
        self._rows = plan_rows(batch.blocks, embedded.dtype, device, self.arena)
        positions = batch.position_ids.to(device)
        found = self.backbone(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        return found.last_hidden_state.squeeze(0)  # an index would give its gradient a copy more

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        """Attention as Transformers calls it: query [1, heads, n, d], key and value alike, to [1, n, heads, d]."""
        from qlora_tune import attention

        found = attention.attend(query.squeeze(0), key.squeeze(0), value.squeeze(0), self._rows, scaling)
        return found.unsqueeze(0), None


@contextmanager
def fast_path(
    model: Any,
    *,
    longest: int,
    keep_weights: bool,
    checkpointing: bool = False,
    offload: bool = False,
    neftune_noise_alpha: float | None = None,
) -> Iterator[FastModel | None]:
    """Put the fast parts in place while the block runs; None, and nothing in place, where the loss would differ.

    `longest` is the longest row [tokens]. With `keep_weights`, 4-bit weights are dequantized once for all. With
    `checkpointing` only the layers' inputs are kept, and the backward pass makes the layers again; with `offload`
    they wait in the host's memory.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from qlora_tune.arena import Arena
    from qlora_tune.recompute import recompute_layers

    inner = model.get_base_model()
    fast = FastModel(model, Arena(), neftune_noise_alpha)
    with ExitStack() as stack:
        usable = _rows_may_touch(inner.config.get_text_config(), longest)
        # The loss has no place for a bias, whose effect on the sample's loss may be too small to be seen.
        usable = usable and getattr(model.get_output_embeddings(), "bias", None) is None
        if usable:
            sample = _sample(inner)
            expected = _stock_loss(inner, sample)
            ALL_ATTENTION_FUNCTIONS[ATTENTION] = fast.attend
            stack.callback(ALL_ATTENTION_FUNCTIONS.pop, ATTENTION)  # it would keep the model in memory
            stack.callback(inner.set_attn_implementation, inner.config._attn_implementation)
            inner.set_attn_implementation(ATTENTION)
            for module, forward in find_replacements(model, keep_weights, fast.arena):
                stack.enter_context(patch.object(module, "forward", forward))
            for place in rotating(inner):
                stack.enter_context(
                    patch.object(place, "apply_rotary_pos_emb", rotate_faster(place.apply_rotary_pos_emb, fast.arena))
                )
            if checkpointing:
                stack.enter_context(recompute_layers(inner, offload))
            usable = _keeps_rows_apart(fast, sample) and is_same(expected, _fast_loss(fast, sample), inner.dtype)
        if not usable:
            stack.close()
        yield fast if usable else None


def _noise(alpha: float, embedded: Any, lengths: Sequence[int]) -> Any:
    """NEFTune's uniform noise (arXiv 2310.05914): the longer a row, the smaller."""
    import torch

    sizes = [alpha / math.sqrt(length * embedded.shape[-1]) for length in lengths for _ in range(length)]
    scale = torch.tensor(sizes, dtype=embedded.dtype, device=embedded.device).unsqueeze(-1)
    return torch.empty_like(embedded).uniform_(-1, 1).mul_(scale)


def _rows_may_touch(config: Any, longest: int) -> bool:
    """Whether a model's layers keep rows that lie end to end apart: all attend to everything before, and only that."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = {"full_attention", "sliding_attention"} if window is None or window >= longest else {"full_attention"}
    windowed = window is not None and window < longest and getattr(config, "use_sliding_window", True)
    return kinds <= known and not windowed and not any(getattr(config, name, None) for name in UNKNOWN)


def _sample(inner: Any) -> MicroBatch:
    """Three short rows to compare losses on."""
    import torch

    chance = torch.Generator().manual_seed(0)
    words = inner.get_input_embeddings().weight.shape[0]
    drawn = [torch.randint(words, (length,), generator=chance).tolist() for length in (23, 9, 5)]
    return _lay_out([{"input_ids": ids, "labels": ids} for ids in drawn], on_cpu=False)


def _stock_loss(inner: Any, sample: MicroBatch) -> Any:
    """The sample's loss by the model's own forward, row by row."""
    import torch

    total = torch.zeros(())
    with _still(inner):
        for row in sample.input_ids[0].split(sample.lengths):
            ids = row.to(inner.get_input_embeddings().weight.device)
            logits = inner(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").cpu()
    return total


def _fast_loss(fast: FastModel, sample: MicroBatch) -> Any:
    with _still(fast.model):
        return fast.loss_sum(sample).cpu()


@contextmanager
def _still(model: Any) -> Iterator[None]:
    """Neither gradients nor chance, which would make two losses differ: dropout, noise on embeddings."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _keeps_rows_apart(fast: FastModel, sample: MicroBatch) -> bool:
    """Whether other tokens in the first row leave all other rows' states as they are, to the last bit."""
    import torch

    first = sample.blocks[0][0]
    other = sample.input_ids.clone()
    other[0, :first] = other[0, :first].flip(0)
    with _still(fast.model):
        before, after = (fast.hidden(replace(sample, input_ids=ids))[first:] for ids in (sample.input_ids, other))
    return bool(torch.equal(before, after))
