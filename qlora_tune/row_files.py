"""Examples to files: one object a line, read back as the same conversation, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from qlora_tune.errors import ConfigError, DataError
from qlora_tune.shapes import Example
from qlora_tune.turns import Message


def to_row(example: Example) -> dict[str, Any]:
    """An example in the words of the data files, with where it came from."""
    row = {"messages": [to_turn(turn) for turn in example.messages], "task": example.task, "source": example.source}
    return {**row, "tools": list(example.tools)} if example.tools else row


def to_line(row: Mapping[str, Any]) -> str:
    """One line of JSON; what is no JSON (a date or NaN out of a Parquet file) as text or null."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return to_line(_without_nan(row))
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character: only an escape can hold it
        text = json.dumps(row, default=str)
    return text + "\n"


def write_rows(parts: Mapping[Path, Iterable[Mapping[str, Any]]]) -> None:
    """Write the rows of each file. Raises DataError where that fails, and then leaves every file as it was."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_unfinished(path)) for path in parts}
        for path, rows in parts.items():
            files[path].writelines(to_line(row) for row in rows)


@contextmanager
def open_unfinished(path: Path) -> Iterator[IO[str]]:
    """A file to write that gets its name only when it is whole. Raises DataError where the disk or folder refuses."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"{path}: can't be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def append_rows(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    is_whole: Callable[[bytes], bool],
    is_done: Callable[[], bool] = lambda: False,
) -> bool:
    """Put rows behind those of a file, on the disk before this returns: a kill costs those being written at most.

    A last line without its end is what such a kill left, and taken out, unless it `is_whole`. Where the file `is_done`,
    asked while nobody else may write, it stays as it is, and False is returned.
    """
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two terminals may write into one file
        if is_done():
            return False
        _end_last_line(file, is_whole)
        file.write("".join(map(to_line, rows)).encode())
        file.flush()
        os.fsync(file.fileno())
    return True


def _end_last_line(file: BinaryIO, is_whole: Callable[[bytes], bool]) -> None:
    file.seek(0)
    before, end, last = file.read().rpartition(b"\n")
    if is_whole(last):
        file.write(b"\n")
    elif last:
        file.truncate(len(before + end))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raise ConfigError where a file that would be written is one of those that are read."""
    read = {Path(path).resolve() for path in inputs}
    for output in outputs:
        if output.resolve() in read:
            raise ConfigError(f"{output}: is one of the files that are read. Give what is written another name.")


def to_turn(turn: Message) -> dict[str, Any]:
    """A turn whose calls are written as OpenAI writes them, and whose weight of 0 says that it is context only."""
    row: dict[str, Any] = {name: value for name, value in turn.items() if name not in ("learn", "tool_calls")}
    if calls := turn.get("tool_calls"):
        row["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])}}
            for call in calls
        ]
    return row if turn.get("learn", True) else {**row, "weight": 0}
