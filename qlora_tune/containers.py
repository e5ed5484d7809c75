"""Files to rows: every usual container, in any usual encoding, each row with the line it starts on.

First station of a row's journey. Values stay what they are in the file: CSV cells are text, and a file that can't be
read without guessing what was lost is refused. Files are read as streams, so that they may be larger than memory.
"""

from __future__ import annotations

import codecs
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_tune.delimited import read_delimited, refuse_twice
from qlora_tune.encoded_files import Container, settle_encoding
from qlora_tune.errors import DataError
from qlora_tune.json_stream import WRAPPERS, JsonStream, decode_line, unwrap_row
from qlora_tune.shapes import DataProblem, Row
from qlora_tune.turns import type_name

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
EXPECTED = ".jsonl, .json, .csv, .tsv, .parquet or ChatML as .txt, also with .gz behind"
_SNIFFED = 1 << 16  # characters of a text file looked at for ChatML


def list_files(path: Path) -> list[Path]:
    """The data files of a folder and those below it, by name; a file is its own list.

    Raises DataError when there is nothing.
    """
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
    shown = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    found = [file for file in shown if _suffix(file) != ".txt" or _holds_chatml(Container(file))]  # a README is no data
    if not found:
        raise DataError(f"{path}: the folder holds no data file. Expected {EXPECTED}.")
    return found


def read_rows(
    path: Path, columns: Iterable[str] = (), encoding: str = "auto", notes: list[str] | None = None
) -> Iterator[Row | DataProblem]:
    """Read one file row by row, in file order; a bad row becomes a DataProblem.

    `columns` are names that a CSV file's first line may have besides those that are known. `notes` gets what was
    found out about the file. Raises DataError when it can't be read, or is damaged so that it stays open how many
    rows were lost.
    """
    container = _examine(path, encoding)
    container.check_whole()
    container.notes = notes if notes is not None else container.notes
    last = 0
    try:
        for row in _READERS[_suffix(path)](container, columns):
            last = row.line
            yield row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}{_locate_undecodable(container, last)}: not {container.encoding.removesuffix('-sig')} text "
            f"({error.reason}). Save it as UTF-8, or name its encoding with --encoding."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}.") from None


def _examine(path: Path, encoding: str) -> Container:
    if not path.exists():
        raise DataError(f"{path}: no such file. Give the path of a data file ({EXPECTED}) or folder.")
    if not path.is_file():
        raise DataError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}, expected a file.")
    if _suffix(path) not in SUFFIXES:
        raise DataError(f'{path}: files ending in "{path.suffix}" are not read. Expected {EXPECTED}.')
    container = Container(path)
    try:
        container.find_encoding(encoding)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}.") from None
    return container


def _locate_undecodable(container: Container, last: int) -> str:
    """Where the first bytes stand that are no text; in UTF-16 and UTF-32, behind which row."""
    if container.encoding.startswith(("utf-16", "utf-32")) or _suffix(container.path) == ".parquet":
        return f" after line {last}"
    with container.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(container.encoding)
            except UnicodeDecodeError:
                return f":{number}"
    return ""


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


# JSON


def _read_json(container: Container, columns: Iterable[str]) -> Iterator[Row | DataProblem]:
    """What the file is decides its content, not its name: JSON Lines, or one array or object."""
    if _is_json_lines(container):
        yield from _read_lines(container)
        return
    with container.open_text() as file:
        # A file that breaks off is refused before any of its rows was used.
        before, numbered = 0, False
        for _, line, _ in JsonStream(file, str(container.path)).read_rows():
            before, numbered = line, numbered or line == before
    if numbered:
        container.notes.append("several rows stand on one line: the lines given are the numbers of rows")
    with container.open_text() as file:
        stream = JsonStream(file, str(container.path))
        for number, (value, line, problem) in enumerate(stream.read_rows(), start=1):
            yield _as_row(value, problem, str(container.path), number if numbered else line)
        container.notes += stream.notes


def _is_json_lines(container: Container) -> bool:
    """Whether the first line is a whole value and more follow (or it is an object)."""
    first = ""
    with container.open_text(errors="replace") as file:
        try:
            first = next((line.strip() for line in iter(lambda: file.readline(1 << 20), "") if line.strip()), "")
            first = first.removeprefix("\ufeff")
            value = json.loads(first)
        except (ValueError, RecursionError):
            # A bad first line of JSON Lines, or an array or object that goes on: then it ends on a later line.
            whole = first.startswith("{") and _suffix(container.path) == ".json"
            return not first.startswith("[") and not whole
        held = [value.get(key) for key in WRAPPERS] if isinstance(value, dict) else []
        wrapped = any(isinstance(rows, list) and all(isinstance(row, dict) for row in rows[:1]) for rows in held)
        return (isinstance(value, dict) and not wrapped) or any(line.strip() for line in file)


def _read_lines(container: Container) -> Iterator[Row | DataProblem]:
    name = str(container.path)
    with container.open() as binary:
        lines: Iterable[bytes] = binary
        if not container.encoding.startswith("utf-8"):
            lines = (line.encode() for line in io.TextIOWrapper(binary, container.encoding, newline="\n"))
        for number, content in enumerate(lines, start=1):
            content = content.removeprefix(codecs.BOM_UTF8).strip()
            blank = DataProblem(name, number, "blank line", "skipped")
            yield _as_row(*decode_line(content), name, number) if content else blank


def _as_row(value: Any, problem: str, name: str, line: int) -> Row | DataProblem:
    value, cut = unwrap_row(value)
    problem = problem or cut or ("" if isinstance(value, dict) else f"is {type_name(value)}, expected an object")
    return DataProblem(name, line, problem, original=value) if problem else Row(value, name, line)


# Parquet and text


def _read_parquet(container: Container, columns: Iterable[str]) -> Iterator[Row | DataProblem]:
    """Rows of a Parquet file; their line is their number, from 1."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with container.open() as content, parquet.ParquetFile(content) as file:
            refuse_twice(file.schema_arrow.names, str(container.path))
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, str(container.path), number)
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        raise DataError(f"{container.path}: not a whole Parquet file: {str(error).splitlines()[0]}") from None


def _holds_chatml(container: Container) -> bool:
    try:
        with container.open_text(errors="replace") as file:
            return "<|im_start|>" in file.read(_SNIFFED)
    except (OSError, EOFError, zlib.error):
        return True  # reading it will say what is wrong


def _read_text(container: Container, columns: Iterable[str]) -> Iterator[Row | DataProblem]:
    """Conversations of a ChatML text; one begins with a system turn, or behind an empty line."""
    settle_encoding(container)
    name, begun, lines, blank = str(container.path), 0, list[str](), True
    with container.open_text(newline=None) as file:
        if "<|im_start|>" not in file.read(_SNIFFED):
            raise DataError(
                f"{name}: plain text, with no answers to learn. Make pairs of it first: qlora_tune pairs {name}"
            )
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.startswith("<|im_start|>system") or (line.startswith("<|im_start|>") and blank):
                if text := "".join(lines).strip():
                    yield Row({"text": text}, name, begun)
                lines, begun = [], number
            begun = begun if lines else number
            lines += [line] if lines or line.strip() else []
            blank = not line.strip()
    if text := "".join(lines).strip():
        yield Row({"text": text}, name, begun)


_READERS = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
