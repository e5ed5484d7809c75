"""Instruction templates: the same exchange asked in other words, and sometimes the other way round.

Between the mix and the tokenizer in a row's journey: files -> rows -> Example -> quality -> split -> mix -> here ->
tokenize -> train. What stands in a row is only ever put in, never read as a template.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qlora_tune.config import read_toml, suggest
from qlora_tune.containers import read_rows
from qlora_tune.data import duplicate_key
from qlora_tune.errors import ConfigError, join_problems
from qlora_tune.shapes import DataProblem, Example
from qlora_tune.turns import Message

FIELDS = ("prompt", "answer", "task", "system")
EVERY_TASK = "*"
_Tables = TypeVar("_Tables", bound=BaseModel)


class InstructionTemplate(BaseModel):
    """How one task's rows are worded: texts with {prompt} (the user's turn), {answer}, {task} and {system}.

    Without `system` a row keeps its own. `{{` and `}}` stand for braces.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: str = Field(min_length=1, description='The task whose rows it is for; "*" for every task.')
    system: str | None = None
    user: str = "{prompt}"
    assistant: str = "{answer}"

    @field_validator("system", "user", "assistant")
    @classmethod
    def _known_fields(cls, text: str | None) -> str | None:
        _parse(text or "")
        return text

    @model_validator(mode="after")
    def _something_to_learn(self) -> InstructionTemplate:
        content = {"prompt", "answer"}
        if not _fields_of(self.user) & content:
            raise ValueError("its user text holds neither {prompt} nor {answer}, so that every row would ask the same")
        if not _fields_of(self.assistant) & content - _fields_of(self.user, self.system):
            raise ValueError("its assistant text needs {answer} or {prompt}, and one that is not shown before")
        return self

    @property
    def fields(self) -> frozenset[str]:
        """The fields that a row must have text for."""
        return _fields_of(self.system, self.user, self.assistant)

    @property
    def is_reversed(self) -> bool:
        """Whether the answer is given and the prompt is asked for."""
        return "answer" in _fields_of(self.user) and "prompt" in _fields_of(self.assistant)


@dataclass(frozen=True)
class MixedExample(Example):
    """An example of a mixture."""

    template: int | None = None  # its template's number in its file, from 1; None: as it was in its own file


class _TemplateFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    template: list[InstructionTemplate] = Field(min_length=1)


def load_templates(path: Path) -> tuple[InstructionTemplate, ...]:
    """Read templates from TOML ([[template]] tables) or JSON Lines (one object a line).

    Raises ConfigError listing every problem with the template's number.
    """
    if path.suffix.lower() not in (".toml", ".jsonl"):
        raise ConfigError(f"{path}: templates are read from .toml ([[template]] tables) or .jsonl (one object a line).")
    content = read_toml(path) if path.suffix.lower() == ".toml" else {"template": _read_lines(path)}
    return tuple(parse_tables(_TemplateFile, content, path).template)


def parse_tables(model: type[_Tables], content: Mapping[str, Any], path: Path) -> _Tables:
    """Validate what a file of tables holds. Raises ConfigError listing every problem with the table's number."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_explain(dict(item), model) for item in error.errors()]
    raise ConfigError(join_problems(f"{path}: this can't be used:", problems))


def expand_templates(
    examples: Sequence[Example],
    templates: Sequence[InstructionTemplate],
    seed: int,
    per_row: int = 1,
    seen: Collection[str] = frozenset(),
) -> list[MixedExample]:
    """Put every single exchange into a template of its task, dealt out by chance and evenly often.

    Gives up to `per_row` copies of a row, each in another template. A template fits where the row has text for all its
    fields; rows that none fits, conversations of several turns and rows with tools stay as they are. Where there is
    a choice, none is taken that makes a prompt whose duplicate_key is in `seen`. Source: FLAN, arXiv 2109.01652.
    """
    draw = random.Random(f"{seed}:templates")
    by_task: dict[str | None, list[int]] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    fields = [template.fields for template in templates]
    for index, example in enumerate(examples):
        if example.task not in by_task:
            by_task[example.task] = [n for n, t in enumerate(templates) if t.task in (example.task, EVERY_TASK)]
        given = {name for name, text in _values(example).items() if text.strip()}
        fitting = (number for number in by_task[example.task] if fields[number] <= given)
        groups.setdefault(tuple(fitting) if _is_one_exchange(example) else (), []).append(index)
    made: dict[int, list[MixedExample]] = {}
    for numbers, members in groups.items():
        deck = draw.sample(numbers, len(numbers))
        for place, index in enumerate(draw.sample(members, len(members))):
            first = place * per_row % len(deck) if deck else 0
            turned = deck[first:] + deck[:first]
            tried = turned if seen else turned[:per_row]
            worded = [_word(examples[index], templates[number], number + 1) for number in tried]
            fresh = [example for example in worded if duplicate_key(example) not in seen] if seen else worded
            made[index] = fresh[:per_row] or worded[:1] or [_keep(examples[index])]
    return [example for index in range(len(examples)) for example in made[index]]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Expected instruction templates, one JSON object a line.")
    rows = list(read_rows(path))
    problems = [f"line {row.line}: {row.reason}" for row in rows if isinstance(row, DataProblem)]
    if problems:
        raise ConfigError(join_problems(f"{path}: these lines are no templates:", problems))
    return [row.fields for row in rows if not isinstance(row, DataProblem)]


def _explain(item: dict[str, Any], model: type[BaseModel]) -> str:
    """One of pydantic's problems in words: where (tables counted from 1), what was found, what was expected."""
    place = "".join(f" {part + 1}" if isinstance(part, int) else f": {part}" for part in item["loc"]).removeprefix(": ")
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if item["type"] == "missing":
        return f"{place} is missing"
    if item["type"] == "extra_forbidden":
        return f"{place}: no such key.{_suggest_key(item['loc'], model)}"
    found = "" if isinstance(item["input"], dict | BaseModel) else f" = {reprlib.repr(item['input'])}"
    return f"{place}{found}: {message}"


def _suggest_key(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    key, top = str(loc[-1]), [field.alias or name for name, field in model.model_fields.items()]
    if len(loc) == 1:
        return suggest(key, top)
    if key in top:
        return f" Move it above the first [[{loc[0]}]]: what stands below a table's heading belongs to the table."
    table = get_args(model.model_fields[str(loc[0])].annotation)[0]
    return suggest(key, [field.alias or name for name, field in table.model_fields.items()])


def _parse(text: str) -> list[tuple[str, str | None]]:
    """A template's pieces: literal text, and the field behind it. Raises ValueError naming every unknown field."""
    try:
        pieces = list(Formatter().parse(text))
    except ValueError:
        raise ValueError("a brace stands alone; write {{ or }} for a brace itself") from None
    shown = [
        f"{{{field}{'!' if conversion else ''}{conversion or ''}{':' if spec else ''}{spec}}}"
        for _, field, spec, conversion in pieces
        if field is not None and (field not in FIELDS or spec or conversion)
    ]
    if shown:
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ValueError(f"unknown field {', '.join(shown)}; known are {known}. Write {{{{ for a brace itself")
    return [(literal, field) for literal, field, _, _ in pieces]


def _fields_of(*texts: str | None) -> frozenset[str]:
    return frozenset(field for text in texts for _, field in _parse(text or "") if field)


def _values(example: Example) -> dict[str, str]:
    def said(role: str) -> str:
        return next((turn["content"] for turn in example.messages if turn["role"] == role), "")

    return {
        "prompt": said("user"),
        "answer": said("assistant"),
        "task": example.task or "",
        "system": said("system"),
    }


def _is_one_exchange(example: Example) -> bool:
    roles = [turn["role"] for turn in example.messages if turn["role"] != "system"]
    return roles == ["user", "assistant"] and not example.tools and "tool_calls" not in example.messages[-1]


def _word(example: Example, template: InstructionTemplate, number: int) -> MixedExample:
    values = _values(example)

    def fill(text: str) -> str:
        return "".join(literal + (values[field] if field else "") for literal, field in _parse(text))

    system = values["system"] if template.system is None else fill(template.system)
    turns = [Message(role="system", content=system)] if system.strip() else []
    turns.append(Message(role="user", content=fill(template.user)))
    turns.append(Message(role="assistant", content=fill(template.assistant)))
    return MixedExample(tuple(turns), example.task, example.source, template=number)


def _keep(example: Example) -> MixedExample:
    return MixedExample(example.messages, example.task, example.source, example.tools)
