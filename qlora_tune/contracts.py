"""A task's contract: what every answer of it must hold, whatever its content. Read from a TOML file that a user writes.

    [[contract]]
    task = "section"            # the task that it is for; "*" is for all tasks without one of their own
    labels = ["ALLERGY", "PLAN"]
    regex = "[A-Z]+"            # of the whole answer
    json_schema = {type = "object", required = ["name"]}
    max_words = 40
    max_characters = 200

An answer keeps its contract when it holds all that stands there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_tune.config import read_toml
from qlora_tune.errors import ConfigError
from qlora_tune.scores import INVALID, normalise, normalise_label, parse_json, split_words

ANY_TASK = "*"
SHAPE = "expected [[contract]] tables with task, and any of labels, regex, json_schema, max_words, max_characters"


class _Table(BaseModel):
    """One [[contract]] as it must be written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str = Field(min_length=1)
    labels: list[str] = Field(default=[], min_length=1)
    regex: str | None = Field(default=None, min_length=1)
    json_schema: dict[str, Any] | None = None
    max_words: int | None = Field(default=None, ge=1)
    max_characters: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Contract:
    """What an answer of one task must hold. Nothing is asked where a field is empty."""

    task: str
    labels: tuple[str, ...] = ()
    regex: str | None = None
    json_schema: Mapping[str, Any] | None = None
    max_words: int | None = None
    max_characters: int | None = None

    def find_breaches(self, answer: str) -> list[str]:
        """Every way in which an answer breaks the contract, in words; none where it keeps it."""
        found = []
        text = answer.strip()
        if self.labels and normalise_label(text) not in set(map(normalise_label, self.labels)):
            found.append("is none of the labels")
        if self.regex is not None and not re.fullmatch(self.regex, text, re.DOTALL):
            found.append("does not match the regular expression")
        if self.json_schema is not None:
            found += self._check_json(text)
        if self.max_words is not None and (words := len(split_words(text))) > self.max_words:
            found.append(f"has {words} words, at most {self.max_words} are allowed")
        if self.max_characters is not None and (length := len(normalise(text))) > self.max_characters:
            found.append(f"has {length} characters, at most {self.max_characters} are allowed")
        return found

    def _check_json(self, text: str) -> list[str]:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
        from referencing import Registry

        value = parse_json(text)
        if value is INVALID:
            return ["is no JSON"]
        error = best_match(Draft202012Validator(self.json_schema, registry=Registry()).iter_errors(value))
        return [f"breaks the JSON schema at {error.json_path}: {error.message[:200]}"] if error else []


@dataclass(frozen=True)
class Contracts:
    """The contracts of a file, found by task."""

    contracts: tuple[Contract, ...] = ()

    def find(self, task: str) -> Contract | None:
        """The contract of a task: its own, or the one for any."""
        by_task = {contract.task: contract for contract in self.contracts}
        return by_task.get(task) or by_task.get(ANY_TASK)

    def to_tables(self) -> list[dict[str, Any]]:
        """As tables that make_contracts reads back."""
        found = (asdict(contract, dict_factory=_leave_out_empty) for contract in self.contracts)
        return [{**table, "labels": list(table["labels"])} if "labels" in table else table for table in found]


NO_CONTRACTS = Contracts()


def _leave_out_empty(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value not in (None, ())}


def read_contracts(path: Path) -> Contracts:
    """Read a TOML file of contracts. Raises ConfigError with the table and what is wrong with it."""
    content = read_toml(path)
    tables = content.pop("contract", None)
    if not isinstance(tables, list) or not tables or content:
        found = ", ".join(sorted(content)) or "no [[contract]]"
        raise ConfigError(f"{path}: holds {found}; {SHAPE}.")
    return make_contracts(tables, str(path))


def make_contracts(tables: Sequence[Any], where: str) -> Contracts:
    """Contracts from tables as they stand in a file. Raises ConfigError, which names `where`."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    contracts: dict[str, Contract] = {}
    for number, table in enumerate(tables, 1):
        place = f"{where}: contract {number}"
        try:
            given = _Table.model_validate(table).model_dump(exclude_none=True)
            if all(value == [] for name, value in given.items() if name != "task"):
                raise ConfigError(f"{place} asks for nothing; {SHAPE}.")
            contract = Contract(**{**given, "labels": tuple(given.get("labels", ()))})
            re.compile(contract.regex or "")
            Draft202012Validator.check_schema(contract.json_schema if contract.json_schema is not None else True)
            _follow_references(contract.json_schema)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "the table"
            raise ConfigError(
                f"{place}: {name}: {first['msg']}, found {str(first['input'])[:80]!r}; {SHAPE}."
            ) from None
        except re.error as error:
            raise ConfigError(f"{place}: regex can't be read: {error}.") from None
        except SchemaError as error:
            raise ConfigError(f"{place}: json_schema is no JSON schema: {error.message[:200]}.") from None
        except Unresolvable as error:
            raise ConfigError(
                f"{place}: json_schema refers to {error.ref}, which it doesn't hold; nothing is fetched. Write it "
                'under "$defs", and refer to it as #/$defs/NAME.'
            ) from None
        if contract.task in contracts:
            raise ConfigError(f'{place} is the second one for task "{contract.task}".')
        contracts[contract.task] = contract
    return Contracts(tuple(contracts.values()))


def _follow_references(schema: Any) -> None:
    """Raise Unresolvable where a schema refers to what it doesn't hold: with no registry, nothing is fetched."""
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(reference := part.get("$ref"), str):
                resolver.lookup(reference)
            parts += part.values()
        elif isinstance(part, list):
            parts += part
