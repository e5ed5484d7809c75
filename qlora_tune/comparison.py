"""What answers to the same rows are worth, measured by task and in all, for programs and people. Needs no model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import mul, sub
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_tune.contracts import NO_CONTRACTS, Contracts, make_contracts
from qlora_tune.errors import ConfigError, RunError
from qlora_tune.forgetting import Forgetting
from qlora_tune.runs import Run, read_json, write_json
from qlora_tune.scores import (
    METRIC,
    METRICS,
    Interval,
    bootstrap_mean,
    find_labels,
    is_exact_match,
    measure_answer,
    measure_macro_f1,
    normalise,
    normalise_label,
    write_value,
)
from qlora_tune.turns import Message

HEADLINE = "exact_match"
BY_TASK = ("contract", "label_accuracy", "macro_f1", "json_valid", "json_f1", "chrf", "loss")  # beside it, by task


@dataclass(frozen=True)
class Answered:
    """One row with both answers; `base` is None where a model was asked alone.

    The prompt is the conversation up to its last learned answer. `tokens` are those of the reference with its end of
    turn, and base_nll and tuned_nll their negative log-likelihoods [nats]; None where the row is longer than the
    base's context. What is not known is None.
    """

    source: str
    task: str
    prompt: tuple[Message, ...]
    reference: str
    base: str | None
    tuned: str
    base_ended: bool | None = None
    tuned_ended: bool | None = None
    tokens: int = 0
    base_nll: float | None = None
    tuned_nll: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """Measures of one task, by the names of scores.METRICS; `change` is tuned minus base, row by row."""

    task: str
    rows: int
    base: dict[str, float]
    tuned: dict[str, float]
    change: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same rows."""

    answers: list[Answered]
    contracts: Contracts = NO_CONTRACTS
    forgetting: Forgetting | None = None

    def by_task(self) -> list[TaskScore]:
        """Scores by task, in alphabetical order."""
        return self._scores[1:]

    def total(self) -> TaskScore:
        """The score over all rows."""
        return self._scores[0]

    @cached_property
    def _scores(self) -> list[TaskScore]:
        tasks: dict[str, list[Answered]] = {}
        for answer in self.answers:
            tasks.setdefault(answer.task, []).append(answer)
        measured = {task: _measure_task(tasks[task], self.contracts) for task in sorted(tasks)}
        rows = [pair for found in measured.values() for pair in found]
        by_task = [_score(task, tasks[task], found) for task, found in measured.items()]
        return [_score("all", [], rows), *by_task]


def write_comparison(run: Run, comparison: Comparison, name: str = "") -> Path:
    """Keep a comparison in the run: scores.json for programs, comparison.md for people. Returns the latter.

    A `name` is set behind both, for rows that are not the run's own held-out ones.
    """
    end = f"-{name}" if name else ""
    scores = {
        "metrics": {metric.name: metric.meaning for metric in METRICS},
        "all": asdict(comparison.total()),
        "by_task": [asdict(score) for score in comparison.by_task()],
        "contracts": comparison.contracts.to_tables(),
        "forgetting": asdict(comparison.forgetting) if comparison.forgetting else None,
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
    content = read_json(path)
    try:
        answers = [Answered(**{**answer, "prompt": tuple(answer["prompt"])}) for answer in content.get("answers", [])]
        forgetting = content.get("forgetting")
        return Comparison(
            answers,
            make_contracts(content.get("contracts", []), str(path)),
            Forgetting(**{**forgetting, "change": Interval(*forgetting["change"])}) if forgetting else None,
        )
    except (TypeError, KeyError, ConfigError):
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
            Indel.normalized_similarity(normalise(text or ""), normalise(answer.reference))
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
            "Greedy answers to held-out rows. Changes are tuned minus base on the same rows, with the interval in",
            "which they lie with 95 % confidence (paired bootstrap over rows).",
            "",
            score_table([*comparison.by_task(), comparison.total()]),
            "",
            "## All measures",
            "",
            measure_table(comparison.total()),
            "",
            *([f"{comparison.forgetting.describe().capitalize()}.", ""] if comparison.forgetting else []),
            "## Answers side by side",
            "",
            *sides,
            "",
        ]
    )


def score_table(scores: Sequence[TaskScore]) -> str:
    """Scores by task as a markdown table: exact match with its change, then what else the tasks are measured by."""
    more = [METRIC[name] for name in BY_TASK if any(name in score.tuned for score in scores)]
    heads = ["task", "rows", "base", "tuned", "change (95 %)", *(metric.label for metric in more)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for score in scores:
        cells = [table_cell(score.task), str(score.rows), *write_values(score, HEADLINE)]
        lines.append(f"| {' | '.join([*cells, *(write_from_to(score, metric.name) for metric in more)])} |")
    return "\n".join(lines)


def measure_table(score: TaskScore) -> str:
    """Every measure of a score as a markdown table, with what it says."""
    lines = ["| measure | base | tuned | change (95 %) | |", "| --- | ---: | ---: | ---: | --- |"]
    for metric in METRICS:
        if metric.name in score.tuned:
            cells = [metric.label, *write_values(score, metric.name), metric.meaning]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_values(score: TaskScore, name: str) -> list[str]:
    """A measure of base and of tuned, and its change, in words: 0 without rows, empty for a base that was not asked."""
    asked = score.base or not score.tuned
    before = write_value(name, score.base.get(name, 0.0)) if asked else ""
    return [before, write_value(name, score.tuned.get(name, 0.0)), write_change(score, name)]


def write_change(score: TaskScore, name: str) -> str:
    """Tuned minus base in words, with its interval; none for what has no value for each row."""
    if name not in score.change:
        return ""
    mean, low, high = (write_value(name, value, signed=True) for value in score.change[name])
    return f"{mean} ({low} to {high})" if low != high else f"{mean} (all rows alike)"


def write_from_to(score: TaskScore, name: str) -> str:
    """A measure of base and tuned in short, shares in percent; empty where a task doesn't have it."""
    if name not in score.tuned:
        return ""
    sides = (side for side in (score.base, score.tuned) if name in side)
    return " → ".join(write_value(name, side[name]).removesuffix(" %") for side in sides)


class _Measured(NamedTuple):
    """The measures of one row's answers, and its tokens, by which it weighs in the loss."""

    base: dict[str, float]
    tuned: dict[str, float]
    tokens: float


def _measure_task(answers: Sequence[Answered], contracts: Contracts) -> list[_Measured]:
    """The measures of each of a task's rows."""
    labels = find_labels([answer.reference for answer in answers])
    contract = contracts.find(answers[0].task)
    measured = []
    for answer in answers:
        prompt = "\n".join(_plain(turn) for turn in answer.prompt)
        sides: list[dict[str, float]] = []
        for text, ended, nll in (
            (answer.base, answer.base_ended, answer.base_nll),
            (answer.tuned, answer.tuned_ended, answer.tuned_nll),
        ):
            if text is None:
                sides.append({})
                continue
            found = measure_answer(text, answer.reference, prompt)
            if contract:
                found["contract"] = float(not contract.find_breaches(text))
            if labels:
                found["label_accuracy"] = float(normalise_label(text) == normalise_label(answer.reference))
            if nll is not None and math.isfinite(nll) and answer.tokens:
                found["loss"] = nll / answer.tokens
            if ended is not None:
                found["ended"] = float(ended)
            sides.append(found)
        measured.append(_Measured(sides[0], sides[1], float(answer.tokens)))
    return measured


def _score(task: str, answers: Sequence[Answered], measured: Sequence[_Measured]) -> TaskScore:
    """Means over rows, of the loss over tokens, and the intervals of their changes; F1 over a task's labels."""
    base: dict[str, float] = {}
    tuned: dict[str, float] = {}
    change = {}
    alone = not any(row.base for row in measured)
    for name in METRIC:
        rows = [row for row in measured if name in row.tuned and (alone or name in row.base)]
        if not rows:
            continue
        weights = [row.tokens if name == "loss" else 1.0 for row in rows]
        after = [row.tuned[name] for row in rows]
        tuned[name] = sum(map(mul, after, weights)) / sum(weights)
        if not alone:
            before = [row.base[name] for row in rows]
            base[name] = sum(map(mul, before, weights)) / sum(weights)
            change[name] = bootstrap_mean([*map(sub, after, before)], weights)
    references = [answer.reference for answer in answers]
    labels = find_labels(references)
    for means, texts in ((base, [each.base or "" for each in answers]), (tuned, [each.tuned for each in answers])):
        if "loss" in means:
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        if labels and means:
            means["macro_f1"] = measure_macro_f1(texts, references, labels)
    return TaskScore(task, len(measured), base, tuned, change)


def _plain(turn: Message) -> str:
    calls = [f"{call['name']}({call['arguments']})" for call in turn.get("tool_calls", [])]
    return "\n".join(filter(None, [turn["content"], *calls]))


def _side_by_side(answer: Answered) -> str:
    prompt = " ⏎ ".join(f"{turn['role']}: {_plain(turn)}" for turn in answer.prompt)
    mark = "✓" if is_exact_match(answer.tuned, answer.reference) else "✗"
    cells = [answer.source, prompt, answer.reference, answer.base or "", answer.tuned, mark]
    return "| " + " | ".join(table_cell(cell) for cell in cells) + " |"


def table_cell(text: str, longest: int = 300) -> str:
    """One markdown table cell: plain text on one line; HTML and pipes can't act, long text is cut in sight."""
    shown = text if len(text) <= longest else text[:longest] + " …"
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\r", ""), ("\n", " ⏎ "), ("`", "\\`")):
        shown = shown.replace(old, new)
    return shown.replace("![", "!\\[")
