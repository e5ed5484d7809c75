"""2,000 files, broken at random: each is read or refused in words, no row is lost, no value changes in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.check import check_files
from qlora_tune.containers import read_rows
from qlora_tune.data import load_examples
from qlora_tune.errors import DataError
from qlora_tune.shapes import Row

FILES_A_CONTAINER = 250
ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hi, please", "input": "", "output": "hi\nthere"},
    {"instruction": 'Quote "this"', "input": "a;b\tc", "output": "“this” — é"},
    {"instruction": "Übersetze: 你好", "input": "N/A", "output": "Hallo 🙂"},
    {"instruction": "Sum 007 and 1e5", "input": "NULL", "output": "100007.0"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "a", "weight": 1},
        ],
        "tools": [{"name": "f"}],
    },
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "S"},
    {"instruction": "i", "instances": [{"input": "x", "output": "y"}, {"input": "", "output": "z"}]},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
]
INSERTS = [
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\r", b"\t", b";", b"\x00", b"\xff", b"\xe9"),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\\ud800",
        b"NaN",
        b"null",
        b"1e999",
        b"[" * 3000,
        b'""',
        b"\xe2\x80\xa8",
        b"true",
    ),
    *(b'"input":', b'"output": 5,', b"<|im_end|>", b" " * 50, b'{"a": 1}', b"'", b"0" * 60),
]


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SEEDS = {
    "a.jsonl": LINES.encode(),
    "b.json": json.dumps(ROWS, indent=1).encode(),
    "c.csv": as_csv(","),
    "d.tsv": as_csv("\t"),
    "e.jsonl": "".join(json.dumps(row) + "\r\n" for row in CHAT).encode(),
    "f.json": json.dumps({"version": 1, "data": [*ROWS, *CHAT]}).encode(),
    "g.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "h.jsonl": LINES.encode("utf-16"),
}


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to four random edits of bytes."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        span = draw.randrange(1, 40)
        kind = draw.randrange(6)
        if kind == 0:
            content = content[:at] + draw.choice(INSERTS) + content[at:]
        elif kind == 1:
            content = content[:at] + content[at + span :]
        elif kind == 2:
            content = content[:at] + content[at : at + span] + content[at:]
        elif kind == 3:
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        elif kind == 4:
            content = content[:at]
        else:
            lines = content.splitlines(keepends=True)
            draw.shuffle(lines)
            content = b"".join(lines)
    return content


def stands_in(row: Row, path: Path) -> bool:
    """Whether an independent reader finds the same row, value for value and type for type."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else json.detect_encoding(content[:4])
    if path.suffix in (".csv", ".tsv"):
        return all(isinstance(cell, str) for cell in row.fields.values()) and in_text(row, content)
    text = content.decode(encoding, errors="surrogateescape").removeprefix("\ufeff")
    decoder = json.JSONDecoder(object_pairs_hook=once)
    starts = [index for index, character in enumerate(text) if character == "{"]
    for start in starts:
        try:
            value = decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
        if json.dumps(value) == json.dumps(row.fields):
            return True
    return False


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that stands twice has no one value."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def in_text(row: Row, content: bytes) -> bool:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252")
    plain = text.replace('""', '"')
    return all(cell in text or cell in plain for cell in row.fields.values())


@pytest.mark.parametrize("name", SEEDS)
def test_a_broken_file_is_read_or_refused_and_every_row_is_accounted_for(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    outcomes = Counter[str]()
    for number in range(FILES_A_CONTAINER):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(mutate(SEEDS[name], draw))
        try:
            rows = list(read_rows(path))
        except DataError as error:
            outcomes["refused" if str(path) in str(error) else "refused without a name"] += 1
            continue
        outcomes["read"] += 1
        for row in rows:
            if isinstance(row, Row):
                assert stands_in(row, path), (path.read_bytes(), row)
        report = check_files([path])
        assert (
            report.rows_in == report.kept + report.rejected == sum(getattr(r, "action", "") != "skipped" for r in rows)
        )
        try:
            examples, found = load_examples([path])
        except DataError:
            assert report.kept == 0
            continue
        assert found.rows_in == found.kept + found.rejected == report.rows_in
        assert len(examples) >= found.kept
    assert outcomes["read"] > 20
    assert not outcomes["refused without a name"]
