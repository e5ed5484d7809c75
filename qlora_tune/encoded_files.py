"""One file as bytes or text: unpacked, and in the encoding that it shows, or that was named."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qlora_tune.errors import DataError

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LONG_RUN = re.compile(r"[^\x00-\x7f]{4,}")  # rare in Western languages, usual in all others


@dataclass
class Container:
    """One file: what was found out about it, and its rows."""

    path: Path
    encoding: str = "utf-8"
    notes: list[str] = field(default_factory=list)  # what a reader should know, such as columns taken from line 1

    def open(self) -> IO[bytes]:
        """The file's bytes, unpacked where it is gzip."""
        file = self.path.open("rb")
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.open(file) if packed else file  # type: ignore[return-value]

    def open_text(self, newline: str | None = "\n", errors: str = "strict") -> io.TextIOWrapper:
        """The file's text; line ends stay as they are."""
        return io.TextIOWrapper(self.open(), self.encoding, errors, newline)

    def check_whole(self) -> None:
        """Read a packed file to its end. Raises DataError where it is cut off, before any of its rows was used."""
        lines = 0
        try:
            with self.open() as file:
                while isinstance(file, gzip.GzipFile) and (chunk := file.read(1 << 13)):
                    lines += chunk.count(b"\n")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            where = f" after line {lines}" if lines else ""
            raise DataError(f"{self.path}: the gzip file is damaged or cut off{where}. Get a whole copy.") from None

    def find_encoding(self, wanted: str) -> None:
        """Take the encoding that was named, or (auto) the one that the first bytes show.

        Raises DataError where there is none of that name, OSError and EOFError where the file can't be read.
        """
        with self.open() as file:
            head = file.read(4)
        marked = next((name for mark, name in _BOMS.items() if head.startswith(mark)), "")
        if wanted == "auto":
            self.encoding = marked or (json.detect_encoding(head) if len(head) == 4 else "utf-8")
            return
        named = _known(wanted)
        # A mark is no text; and UTF-8 that was asked for is no guess that another encoding may replace.
        # Without a mark UTF-16 and UTF-32 are little-endian, as Windows and most machines write them.
        unmarked = {"utf-8": "utf-8-sig", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
        self.encoding = marked if marked.startswith(named[:6]) else unmarked.get(named, named)


def settle_encoding(container: Container) -> None:
    """A cell may go over lines, so that a file is in one encoding as a whole: UTF-8, else Windows-1252.

    Almost any bytes are Windows-1252, so that it must also look like a Western language.
    """
    if container.encoding != "utf-8" or _measure_runs(container) is not None:
        return
    container.encoding = "cp1252"
    share = _measure_runs(container)
    if share is None:
        container.encoding = "utf-8"  # reading it says where it is not
    elif share > 0.5:
        raise DataError(
            f"{container.path}: not UTF-8 text, and by its looks not Windows-1252. Save it as UTF-8, or name its "
            "encoding with --encoding, such as gb18030, shift_jis or cp1251."
        )
    else:
        container.notes.append("not UTF-8: read as Windows-1252 (cp1252); --encoding names another")


def _measure_runs(container: Container) -> float | None:
    """The share of characters beyond ASCII that stand in long runs; None where the file can't be decoded."""
    high = runs = 0
    try:
        with container.open_text() as file:
            while text := file.read(1 << 20):
                high += len(text) - len(text.encode("ascii", "ignore"))
                runs += sum(map(len, _LONG_RUN.findall(text)))
    except UnicodeDecodeError:
        return None
    return runs / max(high, 1)


def _known(encoding: str) -> str:
    try:
        "a".encode(encoding)  # hex and its like are codecs, but no text
        name = codecs.lookup(encoding).name
        if name in ("idna", "punycode", "undefined", "utf-7") or "escape" in name:
            raise LookupError(name)
        return name
    except (LookupError, ValueError):
        raise DataError(f'"{encoding}" is no encoding. Expected auto, utf-8, cp1252, or another by name.') from None
