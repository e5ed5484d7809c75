"""How likely a model finds a text: sums of log-likelihoods over learned tokens, with the output head at those alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from qlora_tune.chat_format import IGNORED

LEARNED_TOKENS = 1024  # a batch has no more, unless one sequence does: each takes a vocabulary's worth of memory
LOSS_ROWS = 256  # so many positions at once are raised to float32


class PackedSequence(NamedTuple):
    """Token ids and labels as 32-bit integers; bytes, so that equal ones are found and many fit into memory."""

    ids: bytes
    labels: bytes

    @property
    def learned(self) -> int:
        """How many of the tokens are learned."""
        return sum(label != IGNORED for label in memoryview(self.labels).cast("i"))


def pack_sequence(ids: Sequence[int], labels: Sequence[int]) -> PackedSequence:
    """Pack token ids and their labels, IGNORED where a token is not learned."""
    return PackedSequence(array("i", ids).tobytes(), array("i", labels).tobytes())


def score_sequences(
    model: Any,
    sequences: Sequence[PackedSequence],
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[PackedSequence, float]:
    """Negative log-likelihood [nats] of each sequence's learned tokens, by a model as it is.

    The longest go first: a device whose memory is too small fails at once, not at the end. `on_progress` gets
    sequences done and sequences in all.
    """
    import torch

    model.eval()
    nll: dict[PackedSequence, float] = {}
    ordered = sorted(sequences, key=lambda sequence: -len(sequence.ids))
    with torch.inference_mode():
        for batch in _split_batches(ordered, batch_size):
            nll.update(zip(batch, _score_batch(model, batch), strict=True))
            on_progress(len(nll), len(ordered))
    return nll


def _split_batches(sequences: Iterable[PackedSequence], batch_size: int) -> Iterator[list[PackedSequence]]:
    batch: list[PackedSequence] = []
    learned = 0
    for sequence in sequences:
        more = sequence.learned
        if batch and (len(batch) == batch_size or learned + more > LEARNED_TOKENS):
            yield batch
            batch, learned = [], 0
        batch.append(sequence)
        learned += more
    if batch:
        yield batch


def _score_batch(model: Any, batch: Sequence[PackedSequence]) -> list[float]:
    """One forward pass, with the output head at learned positions only.

    The head is reached through the model's own forward, which scales or caps the logits in some families.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    def to_tensors(packed: Iterable[bytes]) -> list[Any]:
        return [torch.frombuffer(bytearray(row), dtype=torch.int32).long() for row in packed]

    # Padding stands on the right, where causal attention doesn't see it: no mask needed, and any token serves.
    ids = pad_sequence(to_tensors(row.ids for row in batch), batch_first=True).to(model.device)
    labels = pad_sequence(to_tensors(row.labels for row in batch), batch_first=True, padding_value=IGNORED)
    targets = labels[:, 1:].to(model.device)
    learned = targets != IGNORED

    def keep_learned(module: Any, arguments: Any, output: Any) -> Any:
        states = output.last_hidden_state[:, -ids.shape[1] : -1]  # without those of virtual tokens
        output.last_hidden_state = states[learned].unsqueeze(0)
        return output

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = causal.base_model.register_forward_hook(keep_learned)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    pieces = zip(logits.split(LOSS_ROWS), targets[learned].split(LOSS_ROWS), strict=True)
    losses = torch.cat([cross_entropy(piece.float(), wanted, reduction="none") for piece, wanted in pieces])
    return [float(row.sum()) for row in losses.cpu().split(learned.sum(dim=1).tolist())]
