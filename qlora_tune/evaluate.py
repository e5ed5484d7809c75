"""Proof: base and tuned model answer the same held-out rows, scored by task."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import RunError
from qlora_tune.generate import decode_answer, generate_answers
from qlora_tune.runs import Run, read_json, write_json
from qlora_tune.shapes import NO_TASK, Example
from qlora_tune.turns import Message


@dataclass(frozen=True)
class Answered:
    """One held-out row with both answers. The prompt is the conversation up to its last learned answer."""

    source: str
    task: str
    prompt: tuple[Message, ...]
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class TaskScore:
    """Exact matches of one task: counts of rows, and of rows answered right."""

    task: str
    rows: int
    base: int
    tuned: int


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same rows."""

    answers: list[Answered]

    def by_task(self) -> list[TaskScore]:
        """Scores by task, in alphabetical order."""
        tasks: dict[str, list[Answered]] = {}
        for answer in self.answers:
            tasks.setdefault(answer.task, []).append(answer)
        return [_score(task, tasks[task]) for task in sorted(tasks)]

    def total(self) -> TaskScore:
        """The score over all rows."""
        return _score("all", self.answers)


def compare(
    model: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    *,
    score_rows: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    on_progress: Callable[[str, int, int], None] = lambda who, done, total: None,
) -> Comparison:
    """Let an adapter's model answer held-out rows with the adapter and without it.

    At most `score_rows` rows, drawn by seed. One loaded base serves both: with the adapter disabled it is the base,
    to the last bit. Answers end at the longest reference plus 16 tokens (beyond it none could match), or at
    `max_new_tokens`. `on_progress` gets "base" or "tuned", rows answered and rows in all.
    """
    chosen = _draw(examples, score_rows, seed)
    conversations = [_through_learned(example) for example in chosen]
    prompts = [turns[:-1] for turns in conversations]
    references = [_reference(chat, turns, example) for turns, example in zip(conversations, chosen, strict=True)]
    lengths = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    limit = min(max_new_tokens, max(lengths, default=0) + 16)

    def answer(who: str) -> list[str]:
        return generate_answers(
            model,
            chat,
            prompts,
            max_new_tokens=limit,
            batch_size=batch_size,
            tools=[example.tools for example in chosen],
            on_progress=lambda done: on_progress(who, done, len(prompts)),
        )

    with model.disable_adapter():
        base = answer("base")
    tuned = answer("tuned")
    return Comparison(
        [
            Answered(example.source, example.task or NO_TASK, prompt, reference, before, after)
            for example, prompt, reference, before, after in zip(chosen, prompts, references, base, tuned, strict=True)
        ]
    )


def is_exact_match(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, but for Unicode composition and white space. Case counts."""
    return _normalise(answer) == _normalise(reference)


def write_comparison(run: Run, comparison: Comparison, name: str = "") -> Path:
    """Keep a comparison in the run: scores.json for programs, comparison.md for people. Returns the latter.

    A `name` is set behind both, for rows that are not the run's own held-out ones.
    """
    end = f"-{name}" if name else ""
    total = comparison.total()
    scores = {
        "metric": "exact match",
        "rows": total.rows,
        "base": total.base / max(total.rows, 1),
        "tuned": total.tuned / max(total.rows, 1),
        "by_task": [asdict(score) for score in comparison.by_task()],
        "answers": [asdict(answer) for answer in comparison.answers],
    }
    write_json(run.path / f"scores{end}.json", scores)
    answers = run.path / f"comparison{end}.md"
    answers.write_text(to_markdown(comparison), encoding="utf-8")
    return answers


def read_comparison(run: Run, name: str = "") -> Comparison:
    """Read what write_comparison kept. Raises RunError where the run was not scored, or the file is damaged."""
    path = run.path / f"scores{f'-{name}' if name else ''}.json"
    if not path.exists():
        raise RunError(f"{run.name} was not scored. Score it with: python -m qlora_tune evaluate {run.path}")
    answers = read_json(path).get("answers", [])
    try:
        return Comparison([Answered(**{**answer, "prompt": tuple(answer["prompt"])}) for answer in answers])
    except (TypeError, KeyError):
        raise RunError(f"{path}: holds answers of another form. Score the run again.") from None


def pick_answers(
    comparison: Comparison, which: Literal["best", "worst", "random"], count: int, seed: int = 0
) -> list[Answered]:
    """Some answers to look at: those of the tuned model that are nearest to the reference, farthest, or any.

    Nearness is the share of characters that stay in an optimal alignment (indel similarity), best first; among equals
    those come first that the base got more wrong (best) or less (worst).
    """
    from rapidfuzz.distance import Indel

    if which == "random":
        return random.Random(seed).sample(comparison.answers, min(count, len(comparison.answers)))

    def key(answer: Answered) -> tuple[float, float]:
        tuned, base = (
            Indel.normalized_similarity(_normalise(text), _normalise(answer.reference))
            for text in (answer.tuned, answer.base)
        )
        return tuned, -base

    return sorted(comparison.answers, key=key, reverse=which == "best")[:count]


def to_markdown(comparison: Comparison) -> str:
    """The score table and all answers side by side, as markdown."""
    sides = [
        "| row | prompt | expected | base | tuned | |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_side_by_side(answer) for answer in comparison.answers),
    ]
    return "\n".join(
        [
            "# Base against tuned",
            "",
            "Exact match on held-out rows, greedy answers.",
            "",
            score_table([*comparison.by_task(), comparison.total()]),
            "",
            "## Answers side by side",
            "",
            *sides,
            "",
        ]
    )


def score_table(scores: Iterable[TaskScore]) -> str:
    """Scores as a markdown table."""
    lines = ["| task | rows | base | tuned |", "| --- | ---: | ---: | ---: |"]
    for score in scores:
        rows = max(score.rows, 1)
        cells = [table_cell(score.task), str(score.rows), f"{score.base / rows:.1%}", f"{score.tuned / rows:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    if len(examples) <= count:
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def _through_learned(example: Example) -> tuple[Message, ...]:
    """The conversation as far as something in it is to be learned: an answer of weight 0 is no reference."""
    learned = [i for i, t in enumerate(example.messages) if t["role"] == "assistant" and t.get("learn", True)]
    return example.messages[: learned[-1] + 1]


def _reference(chat: ChatFormat, turns: Sequence[Message], example: Example) -> str:
    """What the last turn says; where it calls functions, as the model is to write it."""
    if not turns[-1].get("tool_calls"):
        return turns[-1]["content"]
    return decode_answer(chat, chat.encode_answer(turns, example.tools))


def _score(task: str, answers: Sequence[Answered]) -> TaskScore:
    base = sum(is_exact_match(answer.base, answer.reference) for answer in answers)
    tuned = sum(is_exact_match(answer.tuned, answer.reference) for answer in answers)
    return TaskScore(task, len(answers), base, tuned)


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _plain(turn: Message) -> str:
    calls = [f"{call['name']}({call['arguments']})" for call in turn.get("tool_calls", [])]
    return "\n".join(filter(None, [turn["content"], *calls]))


def _side_by_side(answer: Answered) -> str:
    prompt = " ⏎ ".join(f"{turn['role']}: {_plain(turn)}" for turn in answer.prompt)
    mark = "✓" if is_exact_match(answer.tuned, answer.reference) else "✗"
    cells = [answer.source, prompt, answer.reference, answer.base, answer.tuned, mark]
    return "| " + " | ".join(table_cell(cell) for cell in cells) + " |"


def table_cell(text: str, longest: int = 300) -> str:
    """One markdown table cell: plain text on one line; HTML and pipes can't act, long text is cut in sight."""
    shown = text if len(text) <= longest else text[:longest] + " …"
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\r", ""), ("\n", " ⏎ "), ("`", "\\`")):
        shown = shown.replace(old, new)
    return shown.replace("![", "!\\[")
