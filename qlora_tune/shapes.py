"""One row: recognise its shape and turn it into conversations.

A row of any shape becomes one or more Examples, or a reason why it can't be trained on. The turns themselves are
read in `turns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_tune.shape_readers import READERS, Shape
from qlora_tune.turns import NOT_TEXT, Message, RowError, check_turns, has_surrogate, read_tools, strip_end_mark

KNOWN_SHAPES = (
    'alpaca ("instruction", "output", maybe "input"), "prompt" with "completion", "question" with "answer", '
    '"messages" with role and content, or "conversations" with from and value'
)
# What `--map FIELD=COLUMN` may name: the fields that the readers below look for.
FIELDS = (
    "instruction",
    "input",
    "output",
    "system",
    "task",
    "prompt",
    "completion",
    "question",
    "context",
    "answer",
    "response",
    "messages",
    "conversations",
    "tools",
    "text",
    "chosen",
    "rejected",
)
NO_TASK = "(none)"  # how reports call rows that name none
_SOURCE = re.compile(r"(?s)(.*):(\d+)(#\d+)?")


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
    source: str  # "sample.jsonl:7"; "seed.jsonl:7#2" for the second example of one row
    tools: tuple[dict[str, Any], ...] = ()  # functions that the assistant may call, as JSON schemas

    @property
    def prompt(self) -> str:
        """What stands before the last answer, as plain text."""
        return "\n\n".join(turn["content"] for turn in self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer, as plain text; the calls where it calls functions."""
        last = self.messages[-1]
        calls = [f"{call['name']}({call['arguments']})" for call in last.get("tool_calls", [])]
        return "\n".join(filter(None, [last["content"], *calls]))


@dataclass(frozen=True)
class Conversion:
    """What became of one row: its examples, the shape it had, and what was changed on the way."""

    examples: tuple[Example, ...]
    shape: Shape
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataProblem:
    """A row that was rejected or changed, with the reason and the row as it stood; or a blank line, skipped."""

    file: str
    line: int
    reason: str
    action: Literal["rejected", "changed", "skipped"] = "rejected"
    original: Any = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def detect_format(fields: dict[str, Any]) -> Shape | None:
    """Recognise one row's shape by its fields; None when it is none that is known."""
    return _recognise(fields)[0]


def map_columns(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give columns the names that the readers look for: {"instruction": "question"} reads question as instruction.

    A row without such columns stays as it is where its own names tell its shape (files of several kinds may stand
    together). Raises RowError where neither helps.
    """
    missing = [column for column in columns.values() if column not in fields]
    if missing:
        if detect_format(fields) not in (None, "plain text", "prompt only"):
            return fields
        raise RowError(f'has no column "{missing[0]}", which --map names; its columns: {_names(fields)}')
    # What was mapped decides the shape, not a column that happens to be called messages.
    taken = {*columns, *columns.values(), "messages", "conversations", "conversation"}
    rest = {name: value for name, value in fields.items() if name not in taken}
    return {**rest, **{name: fields[column] for name, column in columns.items()}}


def to_examples(row: Row, label: str = "") -> Conversion:
    """Turn a row into examples whose source is `label` (or the file's name) and line.

    Raises RowError with the reason when the row can't be used.
    """
    shape, fields = _recognise(row.fields)
    if shape is None:
        keys = _names(fields)
        raise RowError(f"its keys ({keys}) are no known shape; expected {KNOWN_SHAPES}, or name its columns with --map")
    _refuse_other_media(fields)
    changes: list[str] = []
    pairs = READERS[shape](fields, changes)
    named = (fields.get(name) for name in ("task", "category"))
    task = next((name for name in named if isinstance(name, str) and name.strip()), None)
    tools = read_tools(fields)
    if has_surrogate(tools):
        raise RowError('"tools" holds half a character (a lone surrogate), which is no text')
    source = f"{label or Path(row.file).name}:{row.line}"
    examples: list[Example] = []
    reasons: list[str] = []
    for number, messages in enumerate(pairs, start=1):
        try:
            if isinstance(messages, RowError):
                raise messages
            turns = _leave_out_end_marks(_leave_out_last_question(messages, changes), changes)
            check_turns(turns)
        except RowError as error:
            reasons.append(str(error) if len(pairs) == 1 else f"instance {number}: {error}")
            continue
        examples.append(Example(tuple(turns), task, source if len(pairs) == 1 else f"{source}#{number}", tools))
    if not examples:
        raise RowError("; ".join(reasons) or "holds no pair")
    return Conversion(tuple(examples), shape, (*changes, *(f"left out: {reason}" for reason in reasons)))


def _leave_out_end_marks(messages: list[Message], changes: list[str]) -> list[Message]:
    """Answers without the end-of-text mark of somebody's template: as text it would be learned and spelled out."""
    kept: list[Message] = []
    for turn in messages:
        content = strip_end_mark(turn["content"]) if turn["role"] == "assistant" else turn["content"]
        if content != turn["content"]:
            changes.append(f"an end-of-text mark was left out: {turn['content'][len(content) :].strip()}")
        kept.append({**turn, "content": content})
    return kept


def parse_source(source: str) -> tuple[str, int]:
    """The file's label and the line that an example's source names."""
    found = _SOURCE.fullmatch(source)
    return (found[1], int(found[2])) if found else (source, 0)


def reject_example(example: Example, reason: str, action: Literal["rejected", "changed"] = "rejected") -> DataProblem:
    """Report an example that a later station had to leave out or change."""
    name, line = parse_source(example.source)
    original: dict[str, Any] = {"messages": list(example.messages), "task": example.task}
    if example.tools:
        original["tools"] = list(example.tools)
    return DataProblem(name, line, reason, action, original)


def _recognise(fields: dict[str, Any]) -> tuple[Shape | None, dict[str, Any]]:
    """A row's shape and the fields to read it from.

    Files that bring several shapes into one table give each row every column, so that null is no sign of a shape;
    but where nothing to learn is found without it, it is what is wrong with the row.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for known in (given, fields):
        shape = next((shape for shape, fits in _SIGNS.items() if fits(known)), None)
        if shape not in (None, "prompt only", "plain text"):
            return shape, known
    return shape, fields


def _names(fields: Iterable[str]) -> str:
    names = [f'"{name}"' for name in fields]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda fields: all(name in fields for name in names)


def _turn_list(*keys: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a row holds a list of turns whose first one says who speaks by one of these keys (or has no turn)."""

    def fits(fields: dict[str, Any]) -> bool:
        turns = next((fields[name] for name in ("messages", "conversations", "conversation") if name in fields), None)
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, dict) and any(key in first for key in keys)

    return fits


def _is_text(*marks: str) -> Callable[[dict[str, Any]], bool]:
    return lambda fields: isinstance(fields.get("text"), str) and any(mark in fields["text"] for mark in marks)


def _is_kto(fields: dict[str, Any]) -> bool:
    labels = (value for name, value in fields.items() if str(name).lower() in ("label", "kto_tag"))
    judged = any(isinstance(label, bool) or str(label).strip().lower() in ("true", "false") for label in labels)
    return judged and any(name in fields for name in _ANSWERED)


# Fields that hold an answer: beside a judgement true or false it must not be learned as if it were good.
_ANSWERED = (
    "messages",
    "conversations",
    "conversation",
    "instances",
    "text",
    "completion",
    "response",
    "output",
    "answer",
)
_PREFERENCES = (("chosen", "rejected"), ("response_j", "response_k"), ("preferred_output", "non_preferred_output"))

# The first that fits decides. Preferences come first: their rows also hold a prompt or a conversation, and an answer
# that people rejected must never be learned.
_SIGNS: dict[Shape, Callable[[dict[str, Any]], bool]] = {
    "preference": lambda fields: (
        any(_has(*names)(fields) for names in _PREFERENCES) or isinstance(fields.get("rejected"), str | list)
    ),
    "kto": _is_kto,
    "sharegpt": lambda fields: (
        _turn_list("from")(fields) or ("conversations" in fields and not _turn_list("role")(fields))
    ),
    "messages": lambda fields: "messages" in fields or _turn_list("role")(fields),
    "self-instruct": _has("instruction", "instances"),
    "alpaca": _has("instruction", "output"),
    "dolly": _has("instruction", "response"),
    "prompt-completion": lambda fields: "prompt" in fields and ("completion" in fields or "response" in fields),
    "question-answer": lambda fields: "question" in fields and ("answer" in fields or "response" in fields),
    "chatml": _is_text("<|im_start|>"),
    "transcript": _is_text("### Assistant:", "### Response:"),
    "prompt only": lambda fields: any(name in fields for name in ("instruction", "prompt", "question", "turns")),
    "plain text": lambda fields: "text" in fields,
}


def _refuse_other_media(fields: dict[str, Any]) -> None:
    found = next((name for name in NOT_TEXT if fields.get(name)), None)
    if found:
        raise RowError(f'holds "{found}", which is not text; only text can be trained on')


def _leave_out_last_question(messages: list[Message], changes: list[str]) -> list[Message]:
    kept = list(messages)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if len(kept) < len(messages) and kept:
        changes.append("a last turn without an answer was left out")
    return kept
