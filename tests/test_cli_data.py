"""The commands on data, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tune.cli import main

GOOD = [{"instruction": f"Say the number {n} in words", "output": f"number {n} it is"} for n in range(30)]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    bad = [
        GOOD[0],
        {"instruction": "Tell me", "output": "I'm sorry, but I can't help with that."},
        {"instruction": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, *bad]))
    return path


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_check_names_defects_with_lines_and_fix_drops_and_logs_them(
    rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, page, report = tmp_path / "clean.jsonl", tmp_path / "r.html", tmp_path / "r.json"
    shown = output_of(
        capsys, "check", rows_file, "--fix", clean, "--drop", "refusal", "--html", page, "--json", report, "--tokens"
    )
    assert "33 rows = 32 kept + 1 rejected" in shown
    assert "33 rows = 30 kept + 0 repaired + 3 dropped" in shown
    assert "max_length is 256 tokens" in shown
    defects = {
        defect["kind"]: [row["line"] for row in defect["rows"]] for defect in json.loads(report.read_text())["defects"]
    }
    assert {kind: defects[kind] for kind in ("exact duplicate", "refusal", "unreadable row")} == {
        "exact duplicate": [31],
        "refusal": [32],
        "unreadable row": [33],
    }
    assert [json.loads(line) for line in clean.read_text().splitlines()] == GOOD
    assert "exact duplicate" in page.read_text()


def test_check_finds_held_out_rows_that_are_trained_on(
    rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps(GOOD[3]) + "\n" + json.dumps({"instruction": "New?", "output": "Yes, all new."}))
    shown = output_of(capsys, "check", rows_file, "--heldout-data", heldout)
    assert "leak: same conversation" in shown
    assert "rows.jsonl:4" in shown.replace("\n", "").replace(" ", "")


def test_columns_of_other_names_are_checked_and_trained_on_with_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("frage,antwort\n" + "".join(f"frage {n}?,antwort {n}\n" for n in range(8)))
    mapping = ("--map", "prompt=frage", "--map", "completion=antwort")
    assert "8 rows = 8 kept" in output_of(capsys, "check", path, *mapping)
    assert "antwort" in output_of(capsys, "preview", path, *mapping, "--preset", "builtin", "--rows", 1)


def test_a_mixture_a_selection_and_pairs_are_written(
    rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text('[[source]]\npath = "rows.jsonl"\ntask = "numbers"\n')
    shown = output_of(capsys, "mix", tmp_path / "recipe.toml", tmp_path / "mixed.jsonl")
    assert "numbers" in shown
    mixed = len((tmp_path / "mixed.jsonl").read_text().splitlines())
    assert mixed + len((tmp_path / "mixed_heldout.jsonl").read_text().splitlines()) == 32
    best = tmp_path / "best.jsonl"
    output_of(capsys, "select", rows_file, "--by", "length", "--rows", 5, "--output", best)
    assert len(best.read_text().splitlines()) == 5
    assert len((tmp_path / "best_left_out.jsonl").read_text().splitlines()) == 27
    output_of(capsys, "select", rows_file, "--rows", 5, "--output", tmp_path / "ifd.jsonl")
    assert all(json.loads(line)["ifd"] < 1 for line in (tmp_path / "ifd.jsonl").read_text().splitlines())
    (tmp_path / "doc.md").write_text("# Bread\n\nBread is made of flour.\n\n## Oven\n\nAn oven is hot inside.\n")
    output_of(capsys, "pairs", tmp_path / "doc.md", "--output", tmp_path / "pairs.jsonl")
    assert "pairs.jsonl" in output_of(capsys, "check", tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["check", "ROWS", "--drop", "refusal"], "--drop needs --fix"),
        (["check", "ROWS", "--fix", "X", "--drop", "ugly"], "no such defect"),
        (["check", "ROWS", "--fix", "ROWS"], "is one of the files that are read"),
        (["check", "ROWS", "--json", "ROWS"], "is one of the files that are read"),
        (["select", "ROWS", "--rows", "2", "--output", "ROWS"], "is one of the files that are read"),
        (["pairs", "ROWS", "--output", "ROWS"], "is one of the files that are read"),
        (["check", "ROWS", "--map", "question"], "expected FIELD=COLUMN"),
        (["check", "ROWS", "--map", "topic=x"], '"topic" is no field'),
        (["check", "ROWS", "--encoding", "utf-99"], "is no encoding"),
        (["check", "nobody/nothing-here"], "no dataset of the hub that can be had"),
        (["pairs", "--output", "X"], "Name the documents"),
        (["pairs", "ROWS", "--output", "X", "--endpoint", "http://localhost:1/v1"], "together with --model"),
        (["pairs", "ROWS", "--output", "X", "--rows", "3", "--api-key-env", "K"], "--rows, --api-key-env: only an end"),
        (["mix", "nowhere.toml", "X"], "no such file"),
        (["select", "ROWS", "--rows", "2", "--output", "X", "--by", "length", "--run", "a"], "By length it says"),
        (
            ["select", "ROWS", "--rows", "2", "--output", "X", "--run", "a", "--runs-dir", "elsewhere"],
            "in elsewhere yet",
        ),
        (["select", "ROWS", "--rows", "0", "--output", "X"], "rows"),
    ],
)
def test_what_a_user_can_mend_is_said_in_words(
    rows_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    before = rows_file.read_bytes()
    assert main([str(rows_file) if a == "ROWS" else a for a in arguments]) == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")
    assert rows_file.read_bytes() == before


def test_check_loads_no_heavy_library_without_a_tokenizer(rows_file: Path) -> None:
    code = f"import sys; from qlora_tune.cli import main; main(['check', {str(rows_file)!r}]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "qlora_tune.check" in loaded
    assert not {"torch", "transformers", "datasets", "pyarrow", "trl"} & set(loaded)
