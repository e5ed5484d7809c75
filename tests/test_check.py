"""The report adds up, its faces escape what they show, and a repair loses nothing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_data import GOOD, write_lines

from qlora_tune.check import CheckReport, check_files
from qlora_tune.check_page import write_check_page
from qlora_tune.cli import main
from qlora_tune.containers import read_rows
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.quality import DEFECTS
from qlora_tune.repair import repair_files
from qlora_tune.shapes import DataProblem

WORDS = [
    "river",
    "stone",
    "bread",
    "glass",
    "copper",
    "autumn",
    "winter",
    "garden",
    "window",
    "market",
    "harbour",
    "forest",
    "candle",
    "meadow",
]


def make_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"instruction": f"Tell me about {WORDS[n % 14]} {n}", "input": "", "output": f"{WORDS[n % 13]} is {n}.", **more}
        for n in range(count)
    ]


def lines_of(report: CheckReport, kind: str) -> list[int]:
    return [finding.line for finding in report.findings.get(kind, ())]


MESSY: list[Any] = [
    GOOD,
    {"instruction": "Where?", "input": "N/A", "output": "In the cafÃ© of the town\x07."},
    "{bad",
    {"instruction": "Which?", "input": None, "output": "Win\u200bter.<|im_end|>", "score": 0.5},
    "",
    GOOD,
    {"instruction": "Which one?", "output": ["x"]},
    {"instruction": "Sum 007", "input": "1e5", "output": "One\r\ntwo", "n": [1, {"a": None}]},
    {"instruction": "Only a mark", "output": "</s>"},
    "[1, 2]",
]


def test_the_figures_of_the_report_add_up(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", *MESSY)
    report = check_files([path])
    assert (report.rows_in, report.kept, report.rejected) == (9, 5, 4)
    assert lines_of(report, "unreadable row") == [3, 7, 9, 10]
    assert lines_of(report, "blank line") == [5]
    assert lines_of(report, "exact duplicate") == [6]
    assert lines_of(report, "no input") == [2]
    assert sum(report.count(severity) for severity in ("error", "warning", "note")) == sum(report.counts.values())
    assert report.lengths
    assert sum(report.lengths.counts) == report.kept


def test_a_refused_file_does_not_stop_the_others(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", GOOD)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([GOOD, GOOD])[:-5])
    report = check_files([broken, good])
    assert [bool(file.refused) for file in report.files] == [True, False]
    assert str(broken) in report.files[0].refused
    assert report.files[1].kept == 1


def test_a_copy_in_another_file_is_named_with_that_file(tmp_path: Path) -> None:
    one, two = write_lines(tmp_path / "a.jsonl", GOOD), write_lines(tmp_path / "b.jsonl", {"x": 1}, GOOD)
    (finding,) = check_files([one, two]).findings["exact duplicate"]
    assert (finding.file, finding.line, finding.detail) == (str(two), 2, "of a.jsonl:1")


def test_lengths_are_characters_or_what_is_measured_and_long_rows_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", *make_rows(5), {"instruction": "Long", "output": "word " * 50})
    plain = check_files([path]).lengths
    assert plain
    assert (plain.unit, plain.longest, plain.limit) == ("characters", 254, None)
    report = check_files([path], measure=lambda example: len(example.answer.split()), max_length=10)
    assert report.lengths
    assert (report.lengths.unit, report.lengths.longest, report.lengths.limit) == ("tokens", 50, 10)
    assert lines_of(report, "longer than max_length") == [6]
    assert report.lengths.edges[-1] > 50


def test_small_and_uneven_tasks_are_noted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", *make_rows(50, task="big"), *make_rows(2, task="tiny"))
    report = check_files([path], heldout_share=0.2)
    assert "tiny: 2 rows, 5 give one to hold out" in report.findings["small task"][0].detail
    assert len(report.findings["small task"]) == len(report.findings["uneven tasks"]) == 1
    assert "small task" not in check_files([path], heldout_share=0.5).counts


def test_a_rare_shape_and_rare_columns_are_named_and_usual_columns_once(tmp_path: Path) -> None:
    rows = make_rows(30, lang="en")
    rows[3] = {"question": "Why?", "answer": "Because."}
    rows[7]["score"] = 1
    report = check_files([write_lines(tmp_path / "d.jsonl", *rows)])
    assert lines_of(report, "unusual shape") == [4]
    assert [(f.line, f.detail) for f in report.findings["unused columns"]] == [(8, "score")]
    assert report.files[0].notes == ["columns that are not read: lang"]


def test_leaks_are_reported_at_the_held_out_line(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "t.jsonl", *make_rows(20))
    heldout = write_lines(tmp_path / "h.jsonl", {"instruction": "New", "output": "x"}, make_rows(5)[4])
    (finding,) = check_files([train], [heldout]).findings["leak: same conversation"]
    assert (finding.file, finding.line, finding.detail) == (str(heldout), 2, "trained on at t.jsonl:5")


def test_the_json_report_holds_every_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_lines(tmp_path / "d.jsonl", *MESSY), tmp_path / "new" / "r.json"
    assert main(["check", str(path), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report == json.loads(json.dumps(check_files([path.resolve()]).as_json()))
    assert report["rows_in"] == report["kept"] + report["rejected"] == 9
    assert [defect["kind"] for defect in report["defects"]] == [k for k in DEFECTS if k in check_files([path]).counts]
    assert "error" in capsys.readouterr().out


def test_the_page_escapes_what_rows_hold_and_loads_nothing(tmp_path: Path) -> None:
    nasty = '<script>alert("1")</script>\'"><img src=http://x.org/a.png>'
    rows = [*make_rows(3), {"instruction": "x", nasty: 1, "output": [1]}, {"instruction": "y", "output": "n", nasty: 1}]
    path = write_lines(
        tmp_path / "<b>'d.jsonl", *rows, {**GOOD, "task": nasty}, {**GOOD, "output": f"None {{{{{nasty}"}
    )
    write_check_page(check_files([path]), tmp_path / "new" / "page.html")
    html = (tmp_path / "new" / "page.html").read_text()
    assert "&lt;script&gt;alert(&#34;1&#34;)" in html
    assert not re.search(r"<(script|img|link|iframe|object|a)\b", html)
    assert not re.search(r"<[^>]*\b(src|href)=|url\(|@import", html)
    assert "default-src 'none'" in html


def test_a_broken_character_in_a_finding_does_not_stop_the_page(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", GOOD, '{"instruction": "a", "output": "b", "\\ud800": 1}', *make_rows(5))
    write_check_page(check_files([path]), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000


def rebuild(path: Path, copy: Path, log: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file from its repaired copy and the log: kept rows from the copy, all others from the log."""
    entries = {entry["line"]: entry for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    rows = map(json.loads, copy.read_text(encoding="utf-8").splitlines())
    for row in read_rows(path):
        entry = entries.get(row.line)
        if entry is None or entry["action"] == "repaired":
            stood = next(rows)
        yield row.line, entry["original"] if entry else stood
    assert next(rows, None) is None


def repair(path: Path, **options: Any) -> tuple[Any, Path, Path]:
    done = repair_files(check_files([path]), path.with_name("fixed.jsonl"), **options)
    return done, done.output, done.log


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(
            [*make_rows(3), {"instruction": "a;b", "input": "N/A", "output": "cafÃ©\nhere"}, make_rows(1)[0]]
        )
        writer.writerow({"instruction": "Empty", "input": "", "output": ""})
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_input_can_be_rebuilt_row_for_row_from_the_copy_and_the_log(tmp_path: Path, kind: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", *MESSY) if kind == "jsonl" else write_csv(tmp_path / "d.csv")
    done, copy, log = repair(path)
    originals = [(row.line, row.original if isinstance(row, DataProblem) else row.fields) for row in read_rows(path)]
    assert list(rebuild(path, copy, log)) == [(line, json.loads(json.dumps(row))) for line, row in originals]
    assert done.rows_in == done.kept + done.repaired + done.dropped == check_files([path]).rows_in
    assert len(copy.read_text().splitlines()) == done.kept + done.repaired
    assert done.kept
    assert done.repaired
    assert done.dropped


def test_what_can_be_mended_is_mended_and_the_rest_stays(tmp_path: Path) -> None:
    done, copy, log = repair(write_lines(tmp_path / "d.jsonl", *MESSY))
    assert [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()] == [
        GOOD,
        {"instruction": "Where?", "input": "", "output": "In the café of the town."},
        {"instruction": "Which?", "input": None, "output": "Winter.", "score": 0.5},
        {"instruction": "Sum 007", "input": "1e5", "output": "One\ntwo", "n": [1, {"a": None}]},
    ]
    entries = {entry["line"]: entry for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    assert {line: entry["action"] for line, entry in entries.items()} == {
        **dict.fromkeys((2, 4, 8), "repaired"),
        **dict.fromkeys((3, 6, 7, 9, 10), "dropped"),
        5: "skipped",
    }
    assert all(entry["reasons"] for entry in entries.values())
    assert done.dropped == 5


def test_a_second_check_of_the_copy_finds_nothing_to_drop_or_to_mend(tmp_path: Path) -> None:
    _, copy, _ = repair(write_lines(tmp_path / "d.jsonl", *MESSY))
    again = check_files([copy])
    assert not [kind for kind in again.counts if DEFECTS[kind].fix]
    assert not again.rejected


def test_sound_rows_are_copied_value_for_value(tmp_path: Path) -> None:
    rows = [{"instruction": "Ünïcode 你好 🙂", "output": "1e5 007 \\n", "n": 1.0, "flag": True}, *make_rows(5)]
    done, copy, log = repair(write_lines(tmp_path / "d.jsonl", *rows))
    assert copy.read_text(encoding="utf-8") == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert (done.kept, done.repaired, done.dropped, log.read_text()) == (6, 0, 0, "")


def test_rows_of_a_named_kind_are_dropped_too(tmp_path: Path) -> None:
    path, out = tmp_path / "d.jsonl", tmp_path / "out" / "fixed.jsonl"
    write_lines(path, *make_rows(3), {"instruction": "Help", "output": "I'm sorry, but I can't help with that."})
    assert main(["check", str(path), "--fix", str(out), "--drop", "refusal"]) == 0
    assert len(out.read_text().splitlines()) == 3
    (entry,) = map(json.loads, out.with_name("fixed.log.jsonl").read_text().splitlines())
    assert (entry["line"], entry["action"], entry["reasons"]) == (4, "dropped", ["refusal"])


def test_rows_of_a_named_kind_are_dropped_however_many_they_are(tmp_path: Path) -> None:
    rows = [{**row, "output": "I cannot help with that."} for row in make_rows(1100)]
    path = write_lines(tmp_path / "d.jsonl", GOOD, *rows)
    done = repair_files(check_files([path], near=False), tmp_path / "fixed.jsonl", also_drop=["refusal"])
    assert (done.kept, done.dropped) == (1, 1100)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--drop", "nonsense", "--fix", "x.jsonl"], "no such defect"), (["--drop", "refusal"], "--drop needs --fix")],
)
def test_a_drop_that_can_not_be_done_is_refused(
    tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write_lines(tmp_path / "d.jsonl", GOOD)), *flags]) != 0
    assert reason in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("name", ["d.jsonl", "sub/../d.jsonl"])
def test_a_repair_refuses_to_overwrite_its_input(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", GOOD)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="Give what is written another name"):
        repair_files(check_files([path]), tmp_path / name)
    log = write_lines(tmp_path / "e.log.jsonl", GOOD)
    with pytest.raises(ConfigError, match="another name"):
        repair_files(check_files([log]), tmp_path / "e.jsonl")
    assert path.read_text() == log.read_text() == json.dumps(GOOD) + "\n"


def test_a_repair_that_fails_leaves_no_file_and_an_older_copy_as_it_was(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", *make_rows(20))
    report, out = check_files([path]), tmp_path / "fixed.jsonl"
    path.unlink()
    with pytest.raises(DataError):
        repair_files(report, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("older")
    with pytest.raises(DataError):
        repair_files(report, out)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("fixed.jsonl", "older")]


def test_a_refused_file_or_no_usable_row_makes_the_command_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write_lines(tmp_path / "d.jsonl", {"x": 1}))]) != 0
    assert "No usable row" in " ".join("".join(capsys.readouterr()).split())
