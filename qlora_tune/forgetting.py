"""What tuning cost the model elsewhere: its loss on plain text, with the adapter and without.

A model that answers better and reads plain text worse has forgotten something. The text is a page that ships with the
package, or the user's own: nothing of it may be in the training rows, or it shows learning instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune.chat_format import IGNORED
from qlora_tune.generate import context_length, faster_answers
from qlora_tune.likelihood import PackedSequence, pack_sequence, score_sequences
from qlora_tune.scores import Interval, bootstrap_mean

WINDOW = 128  # tokens read at once; a window is a unit of the bootstrap


@dataclass(frozen=True)
class Forgetting:
    """Loss on plain text [nats per token] before and after; `change` is after minus before, with its interval."""

    text: str  # name of the file
    tokens: int
    base: float
    tuned: float
    change: Interval

    def describe(self) -> str:
        """In words, for people and the model card."""
        mean, low, high = self.change
        return (
            f"loss on plain text ({self.text}, {self.tokens:,} tokens): {self.base:.3f} before, {self.tuned:.3f} after "
            f"({mean:+.3f}; {low:+.3f} to {high:+.3f})"
        )


def measure_forgetting(model: Any, tokenizer: Any, path: Path, batch_size: int) -> Forgetting | None:
    """Read a text with the adapter and without it, in windows of WINDOW tokens.

    `model` is a PEFT model. Each window stands alone: its first token is given, the others are foretold. None for a
    text of a single token, which foretells nothing.
    """
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    width = min(WINDOW, context_length(model))
    windows = [ids[start : start + width] for start in range(0, len(ids), width)]
    packed = [pack_sequence(window, [IGNORED, *window[1:]]) for window in windows if len(window) > 1]
    if not packed:
        return None

    def read() -> dict[PackedSequence, float]:
        with faster_answers(model):
            return score_sequences(model, list(dict.fromkeys(packed)), batch_size)

    model.eval()
    with model.disable_adapter():
        before = read()
    after = read()
    lengths = [float(window.learned) for window in packed]
    changes = [(after[window] - before[window]) / length for window, length in zip(packed, lengths, strict=True)]
    return Forgetting(
        path.name,
        int(sum(lengths)),
        sum(map(before.__getitem__, packed)) / sum(lengths),
        sum(map(after.__getitem__, packed)) / sum(lengths),
        bootstrap_mean(changes, lengths),
    )
