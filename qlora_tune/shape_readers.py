"""How each shape of row is read into turns, or why it is kept out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from qlora_tune.turns import Message, RowError, read_text, read_turns, split_chatml, split_roles, type_name

Shape = Literal[
    "alpaca",
    "dolly",
    "self-instruct",
    "prompt-completion",
    "question-answer",
    "messages",
    "sharegpt",
    "chatml",
    "transcript",
    "preference",
    "kto",
    "plain text",
    "prompt only",
]
# How datasets say that an instruction has no input (Alpaca's cleaned copies list these spellings).
NO_INPUT = re.compile(
    r"\W*(no\s*inputs?( (is )?(needed|required|provided|necessary))?|n/?a|none|nil|null|not applicable)\W*", re.I
)
# The conversations of a row, or for one of them why it can't be used; a reader appends what it changed.
Readings = list[list[Message] | RowError]
Reader = Callable[[dict[str, Any], list[str]], Readings]


class ShapeError(RowError):
    """Why a row of a known shape is no pair to learn from."""

    def __init__(self, reason: str, shape: Shape) -> None:
        super().__init__(reason)
        self.shape = shape


def _pair(fields: dict[str, Any], question: str, answer: str, changes: list[str]) -> list[Message]:
    """One exchange from columns; "context" and "input" go behind the question, an empty line between."""
    texts = [read_text(fields, question)]
    for extra in ("context", "input"):
        more = read_text(fields, extra) if fields.get(extra) is not None else ""
        if more.strip() and NO_INPUT.fullmatch(more):
            changes.append(f'"{extra}" says {more.strip()!r}: treated as no {extra}')
        else:
            texts.append(more)
    user = Message(role="user", content="\n\n".join(text for text in texts if text.strip()))
    return [*_system(fields), *_history(fields), user, Message(role="assistant", content=read_text(fields, answer))]


def _history(fields: dict[str, Any]) -> list[Message]:
    """LLaMA-Factory's earlier exchanges: a list of [question, answer]."""
    history = fields.get("history")
    if not isinstance(history, list):
        return []
    turns: list[Message] = []
    for exchange in history:
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise RowError('"history" is no list of [question, answer]')
        turns += [Message(role="user", content=exchange[0]), Message(role="assistant", content=exchange[1])]
    return turns


def _system(fields: dict[str, Any]) -> list[Message]:
    system = read_text(fields, "system") if fields.get("system") is not None else ""
    return [Message(role="system", content=system)] if system.strip() else []


def _read_pair(question: str, *answers: str) -> Reader:
    """A reader of one exchange: the question's column, and the answer's, the first that the row has."""

    def read(fields: dict[str, Any], changes: list[str]) -> Readings:
        return [_pair(fields, question, next(name for name in answers if name in fields), changes)]

    return read


def _read_self_instruct(fields: dict[str, Any], changes: list[str]) -> Readings:
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances:
        raise RowError(f'"instances" is {"empty" if instances == [] else type_name(instances)}, expected a list')
    readings: Readings = []
    for instance in instances:
        try:
            if not isinstance(instance, dict):
                raise RowError(f"is {type_name(instance)}, expected an object")
            readings.append(_pair({**fields, **instance}, "instruction", "output", changes))
        except RowError as error:
            readings.append(error)
    return readings


def _read_prompt_completion(fields: dict[str, Any], changes: list[str]) -> Readings:
    answer = "completion" if "completion" in fields else "response"
    if isinstance(fields["prompt"], list) and isinstance(fields[answer], list):
        return [[*_system(fields), *read_turns([*fields["prompt"], *fields[answer]], "prompt", changes)]]
    return [_pair(fields, "prompt", answer, changes)]


def _read_messages(fields: dict[str, Any], changes: list[str]) -> Readings:
    name = next(name for name in ("messages", "conversations", "conversation") if name in fields)
    turns = read_turns(fields[name], name, changes)
    opening = _system(fields)
    return [turns if turns and turns[0]["role"] == "system" else [*opening, *turns]]


def _read_chatml(fields: dict[str, Any], changes: list[str]) -> Readings:
    return [split_chatml(fields["text"])]


def _read_transcript(fields: dict[str, Any], changes: list[str]) -> Readings:
    return [split_roles(fields["text"])]


def _refuse(shape: Shape, reason: str) -> Reader:
    def refuse(fields: dict[str, Any], changes: list[str]) -> Readings:
        raise ShapeError(reason, shape)

    return refuse


READERS: dict[Shape, Reader] = {
    "alpaca": _read_pair("instruction", "output"),
    "dolly": _read_pair("instruction", "response"),
    "self-instruct": _read_self_instruct,
    "prompt-completion": _read_prompt_completion,
    "question-answer": _read_pair("question", "answer", "response"),
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "chatml": _read_chatml,
    "transcript": _read_transcript,
    "preference": _refuse(
        "preference", "is a preference pair (two answers, one preferred): kept out of instruction tuning"
    ),
    "kto": _refuse("kto", "is a judged answer (label true or false): kept out of instruction tuning"),
    "plain text": _refuse(
        "plain text",
        "is plain text without an answer to learn: kept out. `qlora_tune pairs` makes pairs of .txt, .md and .csv",
    ),
    "prompt only": _refuse("prompt only", "has a prompt but no answer to learn"),
}
