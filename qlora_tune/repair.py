"""Write a repaired copy of data files, and a log from which the input can be rebuilt.

What is mended and what is dropped is decided by the report (`check`): text that can be restored is mended, rows that
teach nothing or stand twice are dropped, everything else stays as it is and keeps its warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune.check import CheckReport
from qlora_tune.containers import read_rows
from qlora_tune.quality import mend_encoding, strip_invisible
from qlora_tune.row_files import open_unfinished, refuse_overwriting, to_line
from qlora_tune.shape_readers import NO_INPUT
from qlora_tune.shapes import DataProblem, Row, map_columns, to_examples
from qlora_tune.text_signs import CONTROL
from qlora_tune.turns import ROLES, RowError, strip_end_mark

_ANSWERS = ("output", "completion", "response", "answer")
_SAID = ("content", "value")
_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85]")


@dataclass(frozen=True)
class Repair:
    """What became of every row: rows_in == kept + repaired + dropped. The copy holds those kept and repaired."""

    output: Path
    log: Path
    rows_in: int
    kept: int
    repaired: int
    dropped: int


def repair_files(
    report: CheckReport,
    output: Path,
    *,
    columns: Mapping[str, str] | None = None,
    encoding: str = "auto",
    also_drop: Sequence[str] = (),
) -> Repair:
    """Write the rows of a report's files as JSON Lines, mended, without those that a repair drops.

    The log stands beside the copy (NAME.log.jsonl): one object for each changed, dropped or blank line, with file,
    line, reasons and the row as it was; rows that are not in it stand in the copy as they were. `also_drop` names
    further kinds of defects whose rows are dropped. Raises ConfigError rather than overwrite one of the files.
    """
    log = output.with_name(output.name.removesuffix(".jsonl") + ".log.jsonl")
    refuse_overwriting((output, log), [file.path for file in report.files])
    dropped = {place: list(reasons) for place, reasons in report.dropped.items()}
    for (kind, name), lines in report.lines.items():
        for line in lines if kind in also_drop else ():
            dropped.setdefault((name, line), []).append(kind)
    counts = {"kept": 0, "repaired": 0, "dropped": 0}
    with open_unfinished(output) as rows, open_unfinished(log) as notes:
        for file in report.files:
            if file.refused:
                continue
            for row in read_rows(Path(file.path), (columns or {}).values(), encoding):
                done = _repair_row(row, dropped.get((row.file, row.line), []), columns)
                if done.action != "skipped":
                    counts[done.action] += 1
                if done.fields is not None:
                    rows.write(to_line(done.fields))
                if done.action != "kept":
                    original = row.original if isinstance(row, DataProblem) else row.fields
                    entry = {"file": row.file, "line": row.line, "action": done.action, "reasons": done.reasons}
                    notes.write(to_line({**entry, "original": original}))
    return Repair(output, log, sum(counts.values()), **counts)


def mend_text(text: str) -> tuple[str, list[str]]:
    """Restore badly decoded characters, take out what can't be seen, end lines with LF; and what was done."""
    done: list[str] = []
    mended = text
    if not text.isascii():
        mended = _step(mend_encoding(mended), mended, "badly decoded text", done)
        # Where such characters stand for the spaces, taking them out would run the words together.
        visible = strip_invisible(mended)
        if len(mended) - len(visible) <= max(mended.count(" "), 1):
            mended = _step(visible, mended, "invisible characters", done)
    # What once broke lines or pages parts words still.
    parted = _BREAKS.sub("\n", mended.replace("\r\n", "\n"))
    return _step(CONTROL.sub("", parted), mended, "control characters", done), done


@dataclass(frozen=True)
class _Done:
    action: str  # kept, repaired, dropped or skipped
    fields: dict[str, Any] | None
    reasons: list[str]


def _repair_row(row: Row | DataProblem, reasons: list[str], columns: Mapping[str, str] | None) -> _Done:
    if isinstance(row, DataProblem):
        return _Done("skipped" if row.action == "skipped" else "dropped", None, [row.reason])
    if reasons:
        return _Done("dropped", None, reasons)
    done: list[str] = []
    fields = _mend(row.fields, done)
    for name in ("input", "context"):
        value = fields.get(name)
        if isinstance(value, str) and NO_INPUT.fullmatch(value):
            fields[name] = ""
            done.append(f'"{name}" said {value.strip()!r}')
    if not done:
        return _Done("kept", row.fields, [])
    try:
        to_examples(row._replace(fields=map_columns(fields, columns) if columns else fields))
    except RowError as error:
        return _Done("dropped", None, [*dict.fromkeys(done), f"then nothing was left to use: {error}"])
    return _Done("repaired", fields, list(dict.fromkeys(done)))


def _mend(value: Any, done: list[str], is_answer: bool = False) -> Any:
    """All text inside a value, keys left as they are; end-of-text marks go from answers only."""
    if isinstance(value, str):
        text, steps = mend_text(value)
        text = _step(strip_end_mark(text), text, "end-of-text mark", steps) if is_answer else text
        done += steps
        return text
    if isinstance(value, dict):
        says = ROLES.get(str(value.get("role", value.get("from"))).lower()) == "assistant"
        return {key: _mend(held, done, key in _ANSWERS or (says and key in _SAID)) for key, held in value.items()}
    return [_mend(inner, done) for inner in value] if isinstance(value, list) else value


def _step(after: str, before: str, name: str, done: list[str]) -> str:
    if after != before:
        done.append(name)
    return after
