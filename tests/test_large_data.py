"""A file of a gigabyte is examined as a stream: the memory that it takes doesn't follow its size."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

GIGABYTE = 1_000_000_000
LIMIT = 500_000_000


def write_rows(path: Path, size: int) -> int:
    """Rows of sentences drawn at random, 1.6 kB each in the mean, until a file has that size. Returns how many."""
    draw = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(4000)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(6, 18))).capitalize() + "." for _ in range(20_000)]
    count = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            fields = {"instruction": (1, 4), "input": (0, 6), "output": (2, 24)}
            row = {name: " ".join(draw.choices(sentences, k=draw.randint(*few))) for name, few in fields.items()}
            written += file.write(json.dumps(row) + "\n")
            count += 1
    return count


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_a_gigabyte_is_examined_in_less_than_half_of_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", GIGABYTE)
    command = [sys.executable, "-m", "qlora_tune", "check", str(tmp_path / "rows.jsonl")]
    process = psutil.Popen([*command, "--json", str(tmp_path / "report.json")], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with suppress(psutil.Error):  # it may have ended meanwhile
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.2)
    assert process.returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows_in"] == report["kept"] == rows
    assert LIMIT / 20 < peak < LIMIT
