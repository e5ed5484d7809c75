"""JSON values one by one from a text that need not fit into memory, each with the line it starts on.

Rows are read strictly: a key that stands twice, NaN and Infinity are refused, because each reader of the file would
understand them differently.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from qlora_tune.errors import DataError

WRAPPERS = ("data", "rows")  # keys under which whole files hold their rows
_CHUNK = 1 << 20  # characters read at once
MAX_DEPTH = 100
_ARRAY_OF = re.compile(r"\[\s*(\S)")
_SPACE = re.compile(r"[ \t\n\r]*")
_TAIL = 16  # an error this near to the end may only mean that a number, word or escape goes on in the next chunk


def decode_row(text: str) -> Any:
    """Decode one whole JSON text. Raises ValueError, also for a key that stands twice and for NaN."""
    value = _STRICT.decode(text)
    _refuse_deep(value, text.count("[") + text.count("{"))
    return value


def decode_line(content: bytes) -> tuple[Any, str]:
    """Decode one line of JSON Lines: its value, or its text where it has none, and what is wrong with it."""
    try:
        return decode_row(content.decode()), ""
    except UnicodeDecodeError as error:
        return content.decode(errors="backslashreplace"), f"not UTF-8 text (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return content.decode(), f"not valid JSON: {json_reason(error)}"


def unwrap_row(value: Any) -> tuple[Any, str]:
    """A row out of what the hub's viewer puts around it, and what is wrong with it (empty: nothing)."""
    if not (isinstance(value, dict) and "row_idx" in value and isinstance(value.get("row"), dict)):
        return value, ""
    if cut := value.get("truncated_cells"):
        return value, f"the hub's viewer cut off the text of {json.dumps(cut)}"
    return value["row"], ""


def json_reason(error: Exception) -> str:
    """Why a text is no JSON, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


class JsonStream:
    """A window on a JSON text that holds an array of rows, {"data" or "rows": an array of rows}, or one row."""

    def __init__(self, file: IO[str], name: str) -> None:
        self.notes: list[str] = []
        self._file, self._name = file, name
        self._buffer, self._position, self._line, self._ended = "", 0, 1, False

    def read_rows(self) -> Iterator[tuple[Any, int, str]]:
        """Each row's value, the line it starts on, and what is wrong with it (empty: nothing).

        Raises DataError where the text breaks off or goes wrong so that the rows behind can't be read.
        """
        self._take("\ufeff")
        opening = self._peek()
        if opening == "[":
            yield from self._array()
        elif opening == "{":
            yield from self._object()
        elif opening:
            yield (*self._value(), "")
        if self._peek():
            raise DataError(
                f"{self._name}:{self._line}: more text after the end of the JSON. Put the rows into one array."
            )

    def _array(self) -> Iterator[tuple[Any, int, str]]:
        self._take("[")
        while self._peek() not in ("]", ""):
            yield self._row()
            if not self._take(",") and self._peek() not in ("]", ""):
                raise self._broken("Expecting ',' delimiter")
        if not self._take("]"):
            raise DataError(f'{self._name}: the array has no closing "]": the file is cut off. Get a whole copy.')

    def _object(self) -> Iterator[tuple[Any, int, str]]:
        """One row, or the rows under a key of WRAPPERS."""
        begun, fields, wrapper, problem = self._line, {}, "", ""
        self._take("{")
        while self._peek() not in ("}", ""):
            key, _ = self._value()
            if not isinstance(key, str) or not self._take(":"):
                raise self._broken("Expecting a key and ':'")
            if key in WRAPPERS and self._peek() == "[" and self._holds_rows():
                wrapper = key
                yield from self._array()
            elif key in fields:
                problem = f'not valid JSON: the key "{key}" stands twice in one object'
                self._value()
            else:
                fields[key], _, found = self._row()
                problem = problem or found
            if not self._take(",") and self._peek() not in ("}", ""):
                raise self._broken("Expecting ',' delimiter")
        if not self._take("}"):
            raise DataError(f'{self._name}: the object has no closing "}}": the file is cut off. Get a whole copy.')
        if not wrapper:
            yield fields, begun, problem
        elif fields:
            self.notes.append(f'rows are those under "{wrapper}"; not read: {", ".join(fields)}')

    def _holds_rows(self) -> bool:
        """Whether the array that begins here is one of objects; any other is a value of the one row."""
        while not (found := _ARRAY_OF.match(self._buffer, self._position)):
            if not self._more():
                return False
        return found[1] in "{]"

    def _row(self) -> tuple[Any, int, str]:
        """One value by the strict rules; where only they refuse it, as it is, with the reason."""
        self._peek()
        start = self._line
        try:
            value, _ = self._value(_STRICT)
            return value, start, ""
        except _RefusedError as refused:
            value, _ = self._value()
            return value, start, f"not valid JSON: {refused}"

    def _value(self, decoder: json.JSONDecoder | None = None) -> tuple[Any, int]:
        """The next value and the line it starts on."""
        self._peek()
        line = self._line
        while True:
            try:
                value, end = (decoder or _LENIENT).raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _TAIL
                if unfinished and self._more():
                    continue
                raise self._broken(error.msg) from None
            except _RefusedError:
                raise
            except (ValueError, RecursionError) as error:  # a number too long for Python is a ValueError, too
                raise self._broken(json_reason(error)) from None
            brackets = self._buffer.count("[", self._position, end) + self._buffer.count("{", self._position, end)
            if decoder is _STRICT:
                _refuse_deep(value, brackets)
            if end >= len(self._buffer) - _TAIL and not isinstance(value, dict | list | str) and self._more():
                continue  # a number may go on
            self._move(end)
            return value, line

    def _broken(self, reason: str) -> DataError:
        return DataError(
            f"{self._name}:{self._line}: not valid JSON: {reason}. In an array no row after it can be read: mend "
            "it there, or save the rows as JSON Lines (.jsonl), where a bad line costs only itself."
        )

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            self._move(match.end() if match else self._position)
            if self._position < len(self._buffer) or not self._more():
                return self._buffer[self._position : self._position + 1]

    def _take(self, mark: str) -> bool:
        if self._peek() != mark:
            return False
        self._position += 1
        return True

    def _move(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _more(self) -> bool:
        """Read on, as much again as is held, so that a long value is not decoded too often."""
        if self._ended:
            return False
        rest = self._buffer[self._position :]
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        if chunk:  # else positions that were found stay right
            self._buffer, self._position = rest + chunk, 0
        return not self._ended


class _RefusedError(ValueError):
    """A value that is JSON by its grammar, but not one that all readers understand alike."""


def _refuse_deep(value: Any, brackets: int) -> None:
    """Refuse what is nested so deep that a program that walks through it may fail; no row needs that."""
    layer = [value] if brackets > MAX_DEPTH else []
    for _ in range(MAX_DEPTH):
        layer = [inner for outer in layer if isinstance(outer, dict | list) for inner in _held_in(outer)]
    if any(isinstance(inner, dict | list) for inner in layer):
        raise _RefusedError("nested too deep")


def _held_in(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), -float("inf")):
        raise _RefusedError(f"{text} is too large a number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RefusedError(f'the key "{twice}" stands twice in one object')
    return row


def _no_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()
