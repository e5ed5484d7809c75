"""One row as it goes in and as it is trained on: raw fields, conversation, tokens with the learned ones marked.

What is shown comes from the same tokenizing that the trainer gets its rows from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_tune.base import find_base, is_local
from qlora_tune.chat_format import IGNORED, ChatFormat, tokenize_examples
from qlora_tune.check import CheckReport, check_files
from qlora_tune.config import TrainConfig
from qlora_tune.containers import read_rows
from qlora_tune.data import parse_columns
from qlora_tune.errors import DataError, ModelError
from qlora_tune.model import load_tokenizer
from qlora_tune.prepare import count_tokens, split_long_chats
from qlora_tune.shapes import DataProblem, Example, Row, map_columns, to_examples
from qlora_tune.turns import RowError


class Token(NamedTuple):
    """One token's text, whether the loss counts it, and whether it is a control token."""

    text: str
    learned: bool
    control: bool


@dataclass(frozen=True)
class RowView:
    """What one row of a file becomes. Tokens are one list a sequence; problems say why there is none, or less."""

    file: str
    line: int
    raw: Any
    shape: str = ""
    examples: list[Example] = field(default_factory=list)
    sequences: list[list[Token]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"


def mark_tokens(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Token]:
    """The tokens of one sequence, for people; `labels` is IGNORED where nothing is learned."""
    controls = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [
        Token(tokenizer.decode([token]), label != IGNORED, token in controls)
        for token, label in zip(ids, labels, strict=True)
    ]


def view_row(path: Path, line: int, config: TrainConfig, *, above: bool = False) -> RowView:
    """The row at a line of a file, or the next one below it; with `above` the last one above it, where there is one.

    Raises DataError where there is none.
    """
    columns, last = parse_columns(config.map), None
    for row in read_rows(path, columns.values(), config.encoding):
        if isinstance(row, DataProblem) and row.action == "skipped":
            continue
        if row.line >= line:
            return _view(last if above and last else row, config, columns)
        last = row
    if above and last:
        return _view(last, config, columns)
    raise DataError(f"{path.name}: has no row at line {line} or below it.")


def check_as_trained(
    config: TrainConfig, files: Sequence[str], on_row: Callable[[], None] = lambda: None
) -> CheckReport:
    """The report on files with lengths in tokens, as the settings' base and chat template count them."""
    chat = load_format(config)
    return check_files(
        files,
        columns=parse_columns(config.map),
        encoding=config.encoding,
        heldout_share=config.heldout_share,
        measure=lambda example: count_tokens(chat, example.messages, example.tools),
        max_length=config.max_length,
        on_row=on_row,
    )


def load_format(config: TrainConfig) -> ChatFormat:
    """The chat format of the settings' base. Raises ModelError where that would have to be downloaded first."""
    if not is_local(config.model_name_or_path):
        raise ModelError(
            f"Tokens are those of {config.model_name_or_path}, which is not on this machine yet. Choose builtin to "
            "look at the rows now."
        )
    return _load_format(config.model_name_or_path, config.model_revision, config.chat_template)


@lru_cache(maxsize=2)
def _load_format(name: str, revision: str | None, template: Literal["auto", "chatml", "plain"]) -> ChatFormat:
    return load_tokenizer(find_base(name, revision).path, template)[1]


def _view(row: Row | DataProblem, config: TrainConfig, columns: Mapping[str, str]) -> RowView:
    place = Path(row.file).name, row.line
    if isinstance(row, DataProblem):
        return RowView(*place, row.original, problems=[row.reason])
    try:
        conversion = to_examples(row._replace(fields=map_columns(row.fields, columns)) if columns else row)
    except RowError as error:
        return RowView(*place, row.fields, problems=[str(error)])
    chat, examples, split = load_format(config), list(conversion.examples), list[DataProblem]()
    if config.long_chats == "split":
        examples, split = split_long_chats(chat, examples, config.max_length)
    sequences, problems = tokenize_examples(chat, examples, config.max_length)
    tokens = [mark_tokens(chat.tokenizer, found.input_ids, found.labels) for found in sequences]
    told = [*conversion.changes, *(problem.reason for problem in (*split, *problems))]
    return RowView(*place, row.fields, conversion.shape, examples, tokens, told)
