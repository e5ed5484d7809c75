"""CSV and TSV to rows: the delimiter, quotes and column names are found out, and every cell stays the text it is."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora_tune.encoded_files import Container, settle_encoding
from qlora_tune.errors import DataError, join_problems
from qlora_tune.shapes import FIELDS, DataProblem, Row

_DELIMITERS = ",\t;|"
_SNIFFED = 1 << 16  # characters looked at to tell a delimiter
_NOT_A_NAME = re.compile(r"[.?!:;\n]|^\s*$|^[\d\s.,+-]+$")


def read_delimited(container: Container, columns: Iterable[str]) -> Iterator[Row | DataProblem]:
    settle_encoding(container)
    dialect = _find_dialect(container)
    name, header = str(container.path), None
    for line, cells in _records(container, dialect):
        if not cells:
            yield DataProblem(name, line, "blank line", "skipped")
            continue
        if header is None:
            if re.fullmatch("sep=.", dialect["delimiter"].join(cells)):
                continue  # Excel's word on the delimiter
            header, is_header = _name_columns(cells, columns)
            refuse_twice(header, name)
            shown = ", ".join(header)
            container.notes.append(f"columns: {shown} (line {line})" if is_header else f"no header; columns: {shown}")
            if is_header:
                continue
        if len(cells) == len(header):
            yield Row(dict(zip(header, cells, strict=True)), name, line)
        else:
            reason = f"has {len(cells)} cells, expected {len(header)} ({', '.join(header)})"
            yield DataProblem(name, line, reason, original=cells)


def _find_dialect(container: Container) -> dict[str, Any]:
    """The delimiter that gives the first records most cells, equally many each; quotes as cells show them.

    Else as in RFC 4180: quotes around cells, doubled inside them, and nothing is guessed.
    """
    with container.open_text(newline="") as file:
        sample = file.read(_SNIFFED)
    fits = {delimiter: _cells_of(sample, delimiter) for delimiter in _DELIMITERS}
    is_tsv = ".tsv" in container.path.name.lower()[-7:] and fits["\t"][1] > 1
    dialect: dict[str, Any] = {"delimiter": "\t" if is_tsv else max(fits, key=lambda name: fits[name]), "strict": True}
    if dialect["delimiter"] == "\t" and _is_unquoted(container):
        return {**dialect, "quoting": csv.QUOTE_NONE}
    try:
        deque(_records(container, dialect), maxlen=0)
    except csv.Error as error:
        raise DataError(f"{container.path}:{error}") from None
    return dialect


def _cells_of(sample: str, delimiter: str) -> tuple[float, int]:
    """How well a delimiter fits: the share of records with the commonest number of cells, and that number."""
    records = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    counts = Counter(len(cells) for cells in records if cells)
    cells, common = counts.most_common(1)[0] if counts else (1, 1)
    return (common / counts.total(), cells) if cells > 1 else (0.0, 1)


def _is_unquoted(container: Container) -> bool:
    """Whether quotes are mere text, as in most TSV: each line has as many cells, and some open a quote only."""
    widths: set[int] = set()
    opened = closed = 0
    with container.open_text() as file:
        for line in file:
            if not line.strip():
                continue
            cells = line.rstrip("\r\n").split("\t")
            widths.add(len(cells))
            opening = [cell for cell in cells if cell.startswith('"')]
            opened += len(opening)
            closed += sum(len(cell) > 1 and cell.endswith('"') for cell in opening)
    return len(widths) == 1 and opened > closed


def _records(container: Container, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Records with the line they begin on, without cells where all are empty. Raises csv.Error naming the line."""
    csv.field_size_limit(1 << 30)
    with container.open_text(newline="") as file:
        reader = csv.reader(file, **dialect)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise csv.Error(
                    f"{line}: a quote is not closed, or text follows a closed one ({error}). Double the quotes "
                    "inside cells, or save the file as JSON Lines."
                ) from None
            if cells is None:
                return
            yield line, cells if any(cell.strip() for cell in cells) else []


def _name_columns(cells: Sequence[str], columns: Iterable[str]) -> tuple[list[str], bool]:
    """Names for the columns, and whether the first record gave them: it does where it holds names only.

    It does not where `columns` has the names that are given to a file without any; a column that has none, as the
    index that pandas writes and the empty ones that Excel does, is numbered, too.
    """
    known = {*FIELDS, *columns}
    numbered = [f"column_{number}" for number in range(1, len(cells) + 1)]
    names = [
        name if name in known else name.lower() if name.lower() in known else name for name in map(str.strip, cells)
    ]
    titles = names if names[0] else names[1:]
    is_header = any(name in known for name in names) or (
        known.isdisjoint(numbered) and not any(_NOT_A_NAME.search(title) or len(title) > 60 for title in titles)
    )
    return (
        ([name or number for name, number in zip(names, numbered, strict=True)], True)
        if is_header
        else (numbered, False)
    )


def refuse_twice(header: Sequence[str], name: str) -> None:
    """Raise DataError where two columns have one name."""
    twice = [f'the column "{column}" stands twice' for column, n in Counter(header).items() if n > 1]
    if twice:
        raise DataError(join_problems(f"{name}: its columns can't be told apart.", twice))
