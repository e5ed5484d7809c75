"""Prompts with the answers of several answerers, and the files that such answers are kept in and read from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune.containers import read_rows
from qlora_tune.errors import DataError, join_problems
from qlora_tune.row_files import to_turn, write_rows
from qlora_tune.scores import is_exact_match
from qlora_tune.shapes import DataProblem, Row
from qlora_tune.turns import Message, RowError, read_text, read_tools, read_turns, type_name
from qlora_tune.votes import key_prompt

LETTERS = "ABCDEFGHIJKLMOPRSUVWXYZ"  # without those that vote otherwise: n for none, q to stop, t for tie
ANSWER_FORM = '{"prompt": text or a list of turns, "answer": text}, maybe with "answerer", "reference", "task"'


@dataclass(frozen=True)
class Question:
    """One prompt for all answerers; reference and task are None where the row names none."""

    prompt: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: str | None
    task: str | None
    source: str

    @property
    def key(self) -> str:
        """What its answers in files, and its votes, are found by."""
        return key_prompt(self.prompt, self.tools)


@dataclass(frozen=True)
class Answers:
    """One question with the answers by answerer."""

    question: Question
    answers: dict[str, str]

    def letter(self, seed: int | None) -> dict[str, str]:
        """The answerers by letter; where a seed is given, each question has an order of its own."""
        names = list(self.answers)
        if seed is not None:
            random.Random(f"{seed} {self.question.key}").shuffle(names)
        return dict(zip(LETTERS, names, strict=False))


def count_exact(answers: Sequence[Answers], name: str) -> tuple[int, int]:
    """How many of an answerer's answers are the reference, and how many rows have one."""
    pairs = [(row.answers[name], row.question.reference) for row in answers if row.question.reference is not None]
    return sum(is_exact_match(answer, reference) for answer, reference in pairs), len(pairs)


def write_answers(path: Path, answers: Sequence[Answers]) -> None:
    """Keep answers, one line each with who gave it, so that read_answers reads them back. Raises DataError."""
    lines = []
    for row in answers:
        question = row.question
        about: dict[str, Any] = {"reference": question.reference, "task": question.task, "source": question.source}
        about |= {"tools": list(question.tools)} if question.tools else {}
        prompt = [to_turn(turn) for turn in question.prompt]
        lines += [{"prompt": prompt, "answer": text, "answerer": name, **about} for name, text in row.answers.items()]
    write_rows({path: lines})


def read_answers(path: Path, answerer: str = "") -> dict[str, tuple[Question, str]]:
    """Read a file of answers: each question with its answer, by the question's key.

    `answerer` says whose, where the lines name several. Raises DataError with the numbers of the lines that are no
    answers, or answer an earlier line's prompt in another way.
    """
    found: dict[str, dict[str, tuple[Question, str]]] = {}
    problems = []
    for row in read_rows(path):
        try:
            if isinstance(row, DataProblem):
                raise RowError(row.reason)
            name, question, text = _read_answer(row)
            if found.setdefault(name, {}).setdefault(question.key, (question, text))[1] != text:
                raise RowError("answers the prompt of an earlier line in another way")
        except RowError as error:
            problems.append(f"line {row.line}: {error}")
    if problems or not found:
        raise DataError(join_problems(f"{path}: expected lines of {ANSWER_FORM}.", problems or ["it has no lines"]))
    if answerer in found:
        return found[answerer]
    if not answerer and len(found) == 1:
        return next(iter(found.values()))
    what = f'no answers of "{answerer}"' if answerer else "answers of several"
    raise DataError(f"{path}: holds {what}. Say whose: {', '.join(f'{path}#{name}' for name in found if name) or path}")


def _read_answer(row: Row) -> tuple[str, Question, str]:
    """One line: the answerer that it names or "", what was asked, the answer."""
    fields = row.fields
    answer = read_text(fields, "answer")
    for name in ("answerer", "reference", "task", "source"):
        if not isinstance(fields.get(name), str | None):
            raise RowError(f'"{name}" is {type_name(fields[name])}, expected text')
    prompt = fields.get("prompt")
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else read_turns(prompt, "prompt", [])
    if turns[-1]["role"] not in ("user", "tool") or not turns[-1]["content"].strip():
        raise RowError('"prompt" is empty, or its last turn is none to be answered')
    source = fields.get("source") or f"{Path(row.file).name}:{row.line}"
    question = Question(tuple(turns), read_tools(fields), fields.get("reference"), fields.get("task"), source)
    return fields.get("answerer") or "", question, answer
