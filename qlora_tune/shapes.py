"""One row: recognise its shape and turn it into a conversation.

A row of any shape becomes an Example, or a reason why it can't be one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

Shape = Literal["alpaca", "prompt-completion", "messages", "sharegpt"]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
KNOWN_SHAPES = (
    'alpaca ("instruction", "output", maybe "input"), "prompt" with "completion", '
    '"messages" with role and content, or "conversations" with from and value'
)


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


class Row(NamedTuple):
    """One row as it stood in its file."""

    fields: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class Example:
    """One conversation ready for the chat template; its last turn is the assistant's."""

    messages: tuple[Message, ...]
    task: str | None
    source: str  # "sample.jsonl:7"


@dataclass(frozen=True)
class DataProblem:
    """A row that was rejected or changed, with the reason and the row as it stood."""

    file: str
    line: int
    reason: str
    action: Literal["rejected", "changed"] = "rejected"
    original: Any = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """Why one row can't be used."""


def detect_format(fields: dict[str, Any]) -> Shape | None:
    """Recognise one row's shape by its keys; None when it is none of those that are read."""
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "prompt" in fields and "completion" in fields:
        return "prompt-completion"
    return None


def to_example(row: Row, label: str = "") -> tuple[Example, Shape, str | None]:
    """Turn a row into an Example whose source is `label` (or the file's name) and line.

    Returns it, the shape it had, and what was changed (None: nothing).

    Raises ValueError with the reason when the row can't be used.
    """
    shape = detect_format(row.fields)
    if shape is None:
        keys = ", ".join(f'"{key}"' for key in list(row.fields)[:8]) or "none"
        raise RowError(f"its keys ({keys}) are no known shape; expected {KNOWN_SHAPES}")
    messages = _READERS[shape](row.fields)
    change = None
    while messages and messages[-1]["role"] != "assistant":
        messages, change = messages[:-1], "a last turn without an answer was left out"
    _check_turns(messages)
    task = row.fields.get("task") or row.fields.get("category")
    source = f"{label or Path(row.file).name}:{row.line}"
    return Example(tuple(messages), task if isinstance(task, str) else None, source), shape, change


def reject_example(example: Example, reason: str, action: Literal["rejected", "changed"] = "rejected") -> DataProblem:
    """Report an example that a later station had to leave out or change."""
    name, _, line = example.source.rpartition(":")
    original = {"messages": list(example.messages), "task": example.task}
    return DataProblem(name, int(line), reason, action, original)


def type_name(value: Any) -> str:
    names = {list: "list", dict: "object", bool: "true/false value", int: "number", float: "number", str: "text"}
    return names.get(type(value), "null")


def _text(fields: dict[str, Any], key: str, what: str = "") -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise RowError(f'{what}"{key}" is a {type_name(value)}, expected text')
    return value


def _read_alpaca(fields: dict[str, Any]) -> list[Message]:
    system = _text(fields, "system") if fields.get("system") is not None else ""
    extra = _text(fields, "input") if fields.get("input") is not None else ""
    instruction = _text(fields, "instruction")
    user = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    opening = [Message(role="system", content=system)] if system.strip() else []
    answer = Message(role="assistant", content=_text(fields, "output"))
    return [*opening, Message(role="user", content=user), answer]


def _read_prompt_completion(fields: dict[str, Any]) -> list[Message]:
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        return _turns([*fields["prompt"], *fields["completion"]], "prompt", "role", "content", {})
    return [
        Message(role="user", content=_text(fields, "prompt")),
        Message(role="assistant", content=_text(fields, "completion")),
    ]


def _read_messages(fields: dict[str, Any]) -> list[Message]:
    return _turns(fields["messages"], "messages", "role", "content", {})


def _read_sharegpt(fields: dict[str, Any]) -> list[Message]:
    system = _text(fields, "system") if fields.get("system") is not None else ""
    opening = [Message(role="system", content=system)] if system.strip() else []
    return opening + _turns(fields["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)


def _turns(value: Any, key: str, role: str, content: str, roles: dict[str, str]) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f'"{key}" is {"empty" if value == [] else "a " + type_name(value)}, expected a list of turns')
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} is a {type_name(turn)}, expected an object")
        name = _text(turn, role, f"turn {number}: ")
        turns.append(Message(role=roles.get(name, name), content=_text(turn, content, f"turn {number}: ")))
    return turns


_READERS = {
    "alpaca": _read_alpaca,
    "prompt-completion": _read_prompt_completion,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
}


def _check_turns(messages: list[Message]) -> None:
    """Hold the order that every chat template can render: maybe system, then user and assistant by turns."""
    if not messages:
        raise RowError("has no assistant turn to learn from")
    expected = "user"
    for number, turn in enumerate(messages, start=1):
        role = turn["role"]
        if role not in ("system", "user", "assistant"):
            raise RowError(f'turn {number} has the role "{role}"; expected system, user or assistant')
        if role == "system" and number > 1:
            raise RowError(f"turn {number} is a system turn; only the first turn may be one")
        if role != "system" and role != expected:
            raise RowError(f"turn {number} is the {role}'s, expected the {expected}'s")
        if _SURROGATE.search(turn["content"]):
            raise RowError(f"turn {number} ({role}) holds half a character (a lone surrogate), which is no text")
        if not turn["content"].strip():
            raise RowError(f"turn {number} ({role}) is empty")
        expected = {"system": "user", "user": "assistant", "assistant": "user"}[role]
