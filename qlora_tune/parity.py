"""Whether what leaves answers as what was trained: the same tokens, greedy answers and distributions.

Station before export, which keeps nothing that fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ExportError
from qlora_tune.generate import generate_answers, stop_ids
from qlora_tune.layers import only_adapter, weight_of
from qlora_tune.model import load_tokenizer
from qlora_tune.runs import Run, read_json
from qlora_tune.shapes import Example
from qlora_tune.turns import Message

ROWS = 100
ANSWER_TOKENS = 32
BATCH = 25  # rows that are answered at once
ROUNDING = 4e-3  # of a weight in bfloat16, which keeps 8 bits
POSITIONS = 64  # so many distributions are compared at once: each has a number for every word


@dataclass(frozen=True)
class Parity:
    """How two models agree on the same rows; the divergences are of next-token distributions [nats]."""

    prompts: int
    same: int  # greedy answers
    mean_kl: float
    max_kl: float

    def describe(self) -> str:
        """In words, for people and the model card."""
        return (
            f"{self.same} of {self.prompts} greedy answers equal; KL divergence of next tokens "
            f"{self.mean_kl:.1e} nats in the mean, {self.max_kl:.1e} at most"
        )


def compared_rows(run: Run) -> list[Example]:
    """Held-out rows to compare on, answers and all; one of our own where the run held none out."""
    question = Message(role="user", content="What can you do?")
    answer = Message(role="assistant", content="I can talk.")
    return run.read_heldout()[:ROWS] or [Example((question, answer), None, "")]


def measure_parity(
    trained: Callable[[], Any], exported: Callable[[], Any], chat: ChatFormat, rows: Sequence[Example]
) -> Parity:
    """Let two models answer the same prompts, and compare what they find likely at every token of the rows.

    Each is given as what makes it ready and returns it, so that both may be adapters on one base.
    """
    import torch

    prompts, tools = [row.messages[:-1] for row in rows], [row.tools for row in rows]
    answers = [
        generate_answers(ready(), chat, prompts, tools=tools, max_new_tokens=ANSWER_TOKENS, batch_size=BATCH)
        for ready in (trained, exported)
    ]
    same = sum(one == other for one, other in zip(*answers, strict=True))
    found = []
    for row in rows:
        tokens = torch.tensor([chat.tokenize_example(row.messages, tools=row.tools)[-1].input_ids])
        logits = []
        for ready in (trained, exported):
            model = ready()
            with torch.inference_mode():
                logits.append(model(tokens.to(model.device)).logits[0].cpu())
        for pieces in zip(*(each.split(POSITIONS) for each in logits), strict=True):
            p, q = (torch.log_softmax(piece.double(), dim=-1) for piece in pieces)
            found.append((p.exp() * (p - q)).sum(-1))
    divergences = torch.cat(found)
    return Parity(len(rows), same, float(divergences.mean()), float(divergences.max()))


def refuse_other_format(chat: ChatFormat, folder: Path, rows: Sequence[Example]) -> None:
    """Raise ExportError where an exported folder's chat template or stop tokens are not those of training."""
    _, other = load_tokenizer(folder)
    for row in rows:
        prompts = [each.encode_prompt(row.messages[:-1], row.tools) for each in (chat, other)]
        if prompts[0] != prompts[1]:
            raise ExportError(
                f"The exported tokenizer and chat template make other tokens of the prompt of {row.source} than in "
                f"training ({len(prompts[1])}, not {len(prompts[0])}). It was not kept."
            )
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    missing = set(stop_ids(chat)) - set(stops if isinstance(stops, list) else [stops])
    if missing:
        words = ", ".join(repr(chat.tokenizer.decode([token])) for token in sorted(missing))
        raise ExportError(f"The exported generation config does not end answers at {words}. It was not kept.")


def refuse_other_weights(tuned: Any, merged: Any) -> None:
    """Raise ExportError where a merged weight is not the base's plus the product of the adapter's matrices.

    Answers and divergence alone don't tell: with a weight a tenth too large, up to 100 of 100 answers were equal, and
    most mean divergences stayed below what rounding is allowed (docs/log.md). DoRA's layers, which are no such sum, are
    left to the answers.
    """
    import torch

    for name, layer in tuned.get_base_model().named_modules():
        adapter = only_adapter(layer) if hasattr(layer, "get_base_layer") else None
        if adapter is None:
            continue
        found = merged.get_submodule(name).weight
        first, second = (matrices[adapter].weight.detach().float() for matrices in (layer.lora_A, layer.lora_B))
        with torch.inference_mode():
            expected = weight_of(layer.get_base_layer(), False)().float() + layer.scaling[adapter] * (second @ first)
            distance = torch.linalg.vector_norm(found.float().to(expected.device) - expected)
            share = float(distance / torch.linalg.vector_norm(expected))
        if not share <= ROUNDING:
            raise ExportError(
                f"{name}: the merged weight is {share:.1%} away from base and adapter together, rounding is at most "
                f"{ROUNDING:.1%}. It was not kept."
            )
