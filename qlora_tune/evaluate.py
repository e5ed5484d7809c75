"""Proof: base and tuned model answer the same held-out rows, measured by task and in all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlora_tune.chat_format import IGNORED, ChatFormat
from qlora_tune.comparison import Answered, Comparison
from qlora_tune.contracts import NO_CONTRACTS, Contracts
from qlora_tune.forgetting import measure_forgetting
from qlora_tune.generate import answer_prompts, context_length, decode_answer, faster_answers
from qlora_tune.likelihood import PackedSequence, pack_sequence, score_sequences
from qlora_tune.shapes import NO_TASK, Example
from qlora_tune.turns import Message

_Row = TypeVar("_Row")


def compare(
    model: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    *,
    score_rows: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    contracts: Contracts = NO_CONTRACTS,
    plain_text: Path | None = None,
    on_progress: Callable[[str, int, int], None] = lambda who, done, total: None,
) -> Comparison:
    """Let an adapter's model answer held-out rows with the adapter and without it; a plain model, as "tuned", alone.

    At most `score_rows` rows, drawn by seed. One loaded base serves both: with the adapter disabled it is the base,
    to the last bit. Answers end at the longest reference plus 16 tokens (beyond it none could match), or at
    `max_new_tokens`. Both also read the file `plain_text`. `on_progress` gets "base" or "tuned", rows answered and
    rows in all.
    """
    chosen = draw(examples, score_rows, seed)
    conversations = [through_learned(example) for example in chosen]
    offered = [example.tools for example in chosen]
    encoded = [chat.encode_answer(turns, tools) for turns, tools in zip(conversations, offered, strict=True)]
    limit = min(max_new_tokens, max(map(len, encoded), default=0) + 16)
    prompts = [chat.encode_prompt(turns[:-1], tools) for turns, tools in zip(conversations, offered, strict=True)]
    context = context_length(model)
    whole = [
        pack_sequence([*prompt, *answer], [IGNORED] * len(prompt) + answer)
        if len(prompt) + len(answer) <= context
        else None
        for prompt, answer in zip(prompts, encoded, strict=True)
    ]

    def ask(who: str) -> tuple[list[tuple[str, bool]], dict[PackedSequence, float]]:
        found = answer_prompts(
            model,
            chat,
            prompts,
            max_new_tokens=limit,
            batch_size=batch_size,
            on_progress=lambda done: on_progress(who, done, len(prompts)),
        )
        with faster_answers(model):
            return found, score_sequences(model, [*dict.fromkeys(filter(None, whole))], batch_size)

    before: Sequence[tuple[str | None, bool | None]] = [(None, None)] * len(prompts)
    base_nll: dict[PackedSequence, float] = {}
    if has_base := hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            before, base_nll = ask("base")
    after, tuned_nll = ask("tuned")
    return Comparison(
        [
            Answered(
                source=example.source,
                task=example.task or NO_TASK,
                prompt=turns[:-1],
                reference=write_reference(chat, turns, answer),
                base=base,
                tuned=tuned,
                base_ended=base_ended,
                tuned_ended=tuned_ended,
                tokens=len(answer),
                base_nll=base_nll.get(sequence) if sequence else None,
                tuned_nll=tuned_nll.get(sequence) if sequence else None,
            )
            for example, turns, answer, sequence, (base, base_ended), (tuned, tuned_ended) in zip(
                chosen, conversations, encoded, whole, before, after, strict=True
            )
        ],
        contracts,
        measure_forgetting(model, chat.tokenizer, plain_text, batch_size) if plain_text and has_base else None,
    )


def draw(rows: Sequence[_Row], count: int, seed: int) -> list[_Row]:
    """At most so many rows, drawn by seed, in their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def through_learned(example: Example) -> tuple[Message, ...]:
    """The conversation as far as something in it is to be learned: an answer of weight 0 is no reference."""
    learned = [i for i, t in enumerate(example.messages) if t["role"] == "assistant" and t.get("learn", True)]
    return example.messages[: learned[-1] + 1]


def write_reference(chat: ChatFormat, turns: Sequence[Message], encoded: list[int]) -> str:
    """What the last turn says; where it calls functions, as the model is to write it."""
    return decode_answer(chat, encoded) if turns[-1].get("tool_calls") else turns[-1]["content"]
