"""Tasks that a run is never to see: their rows leave training and held-out rows, and are scored by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qlora_tune.config import suggest
from qlora_tune.duplicates import shingles
from qlora_tune.errors import ConfigError, DataError, join_problems
from qlora_tune.shapes import DataProblem, Example, reject_example

# A phrase asks for a task where at least so many of the task's rows, and this share of them, ask with it, and in
# no kept task more than a tenth of that share.
PHRASE_ROWS, PHRASE_SHARE, ELSEWHERE = 3, 0.03, 0.1


@dataclass(frozen=True)
class Parted:
    """Rows to train on, held-out rows of the same tasks, and rows of tasks that are not trained on."""

    train: list[Example]
    heldout: list[Example]
    unseen: list[Example]
    problems: list[DataProblem]


def part_tasks(train: Sequence[Example], heldout: Sequence[Example], tasks: Collection[str]) -> Parted:
    """Take the rows of some tasks out of training and held-out rows.

    Training chats in which an earlier question asks for one of these tasks, by its usual words, are left out with a
    reason: they would teach it under another task's name. Raises ConfigError for names that no row carries, and
    DataError where no row of another task is left to train on.
    """
    if not tasks:
        return Parted(list(train), list(heldout), [], [])
    _check_names({example.task for example in (*train, *heldout) if example.task}, tasks)
    unseen = [example for example in (*train, *heldout) if example.task in tasks]
    kept = [example for example in train if example.task not in tasks]
    if not kept:
        raise DataError("holdout_tasks names the tasks of all training rows; none is left to train on. Hold out fewer.")
    phrases = _find_phrases(kept, unseen)
    clean, problems = [], []
    for example in kept:
        asked = {task for question in _questions(example)[:-1] for task in _asks_for(question, phrases)}
        if asked:
            reason = f"an earlier question of this chat asks for a task that is held out ({', '.join(sorted(asked))})"
            problems.append(reject_example(example, reason))
        else:
            clean.append(example)
    if not clean:
        raise DataError(join_problems("No row is left to train on.", [str(problem) for problem in problems]))
    return Parted(clean, [example for example in heldout if example.task not in tasks], unseen, problems)


def _check_names(known: Collection[str], tasks: Collection[str]) -> None:
    unknown = [f'no row is of the task "{task}".{suggest(task, known)}' for task in tasks if task not in known]
    if unknown:
        listed = f"the rows' tasks: {', '.join(sorted(known)) or 'none'}"
        raise ConfigError(join_problems("holdout_tasks would hold out nothing:", [*unknown, listed]))


def _find_phrases(kept: Sequence[Example], unseen: Sequence[Example]) -> dict[str, set[str]]:
    """Runs of three words by which tasks are asked for and no kept task is: {phrase: tasks}."""
    shares = _share_phrases(unseen)
    highest: dict[str, float] = {}
    for found in _share_phrases(kept).values():
        for phrase, (_, share) in found.items():
            highest[phrase] = max(share, highest.get(phrase, 0.0))
    phrases: dict[str, set[str]] = {}
    for task, found in shares.items():
        for phrase, (rows, share) in found.items():
            if rows >= PHRASE_ROWS and share >= PHRASE_SHARE and highest.get(phrase, 0.0) <= ELSEWHERE * share:
                phrases.setdefault(phrase, set()).add(task)
    return phrases


def _share_phrases(examples: Sequence[Example]) -> dict[str, dict[str, tuple[int, float]]]:
    """By task: each phrase of its rows' own (last) questions, with the rows that hold it and their share."""
    rows = Counter(example.task or "" for example in examples)
    counts: dict[str, Counter[str]] = {task: Counter() for task in rows}
    for example in examples:
        counts[example.task or ""].update(shingles(_questions(example)[-1]))
    return {task: {phrase: (n, n / rows[task]) for phrase, n in found.items()} for task, found in counts.items()}


def _questions(example: Example) -> list[str]:
    return [turn["content"] for turn in example.messages if turn["role"] == "user"] or [""]


def _asks_for(question: str, phrases: dict[str, set[str]]) -> set[str]:
    return {task for phrase in shingles(question) for task in phrases.get(phrase, ())}
