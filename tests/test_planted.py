"""Defects and leaks planted in real rows are found by line, and clean rows are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.check import CheckReport, check_files
from qlora_tune.quality import DEFECTS


@pytest.fixture
def planted(shared_data: Path) -> Path:
    folder = shared_data / "planted"
    if not folder.is_dir():
        pytest.skip("the files with planted defects are not present")
    return folder


def read_key(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flagged(report: CheckReport, *severities: str) -> set[int]:
    return {
        finding.line
        for kind, findings in report.findings.items()
        if DEFECTS[kind].severity in severities
        for finding in findings
    }


def keys_of(folder: Path, kind: str) -> list[Path]:
    return [path for path in sorted(folder.glob("*.key.jsonl")) if kind in read_key(path)[0]]


def test_planted_defects_are_found_by_line_and_clean_rows_are_no_errors(planted: Path) -> None:
    for key in keys_of(planted, "defect"):
        data = key.with_name(key.name.replace(".key", ""))
        report, entries = check_files([data]), read_key(key)
        lines = {entry["line"] for entry in entries}
        missed = lines - flagged(report, "error", "warning", "note")
        assert len(missed) <= 0.05 * len(lines), [entry for entry in entries if entry["line"] in missed]
        originals = {entry["copy_of_line"] for entry in entries if "copy_of_line" in entry}
        clean = set(range(1, len(data.read_bytes().splitlines()) + 1)) - lines - originals
        assert len(flagged(report, "error") & clean) <= 0.02 * len(clean), flagged(report, "error") & clean


def test_planted_leaks_are_found_by_line_and_hardly_any_others(planted: Path) -> None:
    for key in keys_of(planted, "eval_line"):
        stem = key.name.removesuffix(".key.jsonl")
        train, heldout = (planted / f"{stem}_{part}.jsonl" for part in ("train", "eval"))
        report = check_files([train], [heldout])
        found = {finding.line for kind, rows in report.findings.items() if kind.startswith("leak") for finding in rows}
        expected = {entry["eval_line"] for entry in read_key(key)}
        assert not expected - found
        assert len(found - expected) <= 2
