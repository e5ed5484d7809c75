"""The report on data files: what is in them, what is wrong with which line, what a base would cut, what leaks.

Reads each file once as a stream and keeps numbers only, so that files may be larger than memory. Nothing is changed
here; `repair` writes the mended copy.
"""

from __future__ import annotations

import math
import re
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_tune.data import DataReport, convert_rows, label_files, load_examples
from qlora_tune.duplicates import Copies, DuplicateFinder, LeakFinder
from qlora_tune.errors import DataError
from qlora_tune.lengths import Histogram, count_lengths
from qlora_tune.quality import DEFECTS, ends_in_prose, find_defects, last_words
from qlora_tune.shapes import FIELDS, NO_TASK, Example, Row, parse_source

LISTED = 1000  # findings of one kind that are kept with their line; beyond it only counted
# What near duplicates may take unasked: some 100,000 rows of Alpaca's length. A gigabyte is examined in 360 MB.
NEAR_BYTES = 300_000_000
_READ_KEYS = {
    *FIELDS,
    "category",
    "instances",
    "conversation",
    "functions",
    "label",
    "response_j",
    "response_k",
    "turns",
}
_WORD = re.compile(r"[a-z]+")
_WORDS_KEPT = 300_000


@dataclass(frozen=True)
class Finding:
    """One defect of one row."""

    file: str
    line: int
    detail: str


@dataclass
class FileCheck:
    """What one file held."""

    path: str
    rows_in: int = 0
    kept: int = 0
    notes: list[str] = field(default_factory=list)
    refused: str = ""  # why it could not be read


@dataclass
class CheckReport:
    """All that was found. rows_in == kept + rejected."""

    files: list[FileCheck] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # findings by kind
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    lengths: Histogram | None = None
    notes: list[str] = field(default_factory=list)
    dropped: dict[tuple[str, int], list[str]] = field(default_factory=dict)  # rows that a repair leaves out, and why
    lines: dict[tuple[str, str], array[int]] = field(default_factory=dict)  # of all findings, by kind and file

    @property
    def rows_in(self) -> int:
        return sum(file.rows_in for file in self.files)

    @property
    def kept(self) -> int:
        return sum(file.kept for file in self.files)

    @property
    def rejected(self) -> int:
        return self.rows_in - self.kept

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(number for kind, number in self.counts.items() if DEFECTS[kind].severity == severity)

    def add(self, kind: str, file: str, line: int, detail: str) -> None:
        """Note one finding."""
        self.counts[kind] += 1
        self.lines.setdefault((kind, file), array("Q")).append(line)
        kept = self.findings.setdefault(kind, [])
        if len(kept) < LISTED:
            kept.append(Finding(file, line, detail))
        if DEFECTS[kind].fix == "drop":
            self.dropped.setdefault((file, line), []).append(f"{kind}: {detail}" if detail else kind)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values, for a file."""
        return {
            "rows_in": self.rows_in,
            "kept": self.kept,
            "rejected": self.rejected,
            "files": [asdict(file) for file in self.files],
            "shapes": dict(self.shapes),
            "tasks": dict(self.tasks),
            "lengths": asdict(self.lengths) if self.lengths else None,
            "notes": self.notes,
            "defects": [
                {
                    "kind": kind,
                    "severity": DEFECTS[kind].severity,
                    "meaning": DEFECTS[kind].meaning,
                    "count": self.counts[kind],
                    "rows": [asdict(finding) for finding in self.findings[kind]],
                }
                for kind in DEFECTS
                if kind in self.counts
            ],
        }


def check_files(
    paths: Sequence[str | Path],
    heldout: Sequence[str | Path] = (),
    *,
    columns: Mapping[str, str] | None = None,
    encoding: str = "auto",
    near: bool | None = None,
    heldout_share: float = 0.1,
    measure: Callable[[Example], int] | None = None,
    max_length: int | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Examine files, and whether the rows of `heldout` files also stand in them.

    `measure` counts an example's tokens, for a base's max_length; without it lengths are in characters. `near` says
    whether near duplicates are searched; None: up to some 100,000 rows. A file that can't be read is reported, the
    others go on. Raises DataError where held-out rows can't be read.
    """
    check = _Check(CheckReport(), columns, encoding, measure, max_length)
    check.watch_heldout(heldout)
    finder = DuplicateFinder(near=near is not False, limit=None if near else NEAR_BYTES)
    for path in dict.fromkeys(paths):
        for example in check.read(path):
            finder.add(example)
            on_row()
    check.finish(finder.find(), heldout_share)
    if finder.gave_up:
        check.report.notes.append(f"near duplicates were not searched: {len(finder):,} rows; --near-duplicates does")
    return check.report


@dataclass
class _Columns:
    """Shapes and columns of one file's rows, and where the rare ones are."""

    ignored: set[str]  # columns that --map reads
    shapes: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)  # those that no reader looks at
    lines_of_shape: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lines_of_key: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def look_at(self, row: Row, shape: str) -> None:
        """Count one row."""
        self.shapes[shape] += 1
        if len(self.lines_of_shape[shape]) < LISTED:
            self.lines_of_shape[shape].append(row.line)
        for key in row.fields:
            if key not in _READ_KEYS and key not in self.ignored and isinstance(key, str):
                self.keys[key] += 1
                if len(self.lines_of_key) < LISTED and len(self.lines_of_key[key]) < LISTED:
                    self.lines_of_key[key].append(row.line)


class _Check:
    """One pass over files: everything that is known only when all rows were seen."""

    def __init__(
        self,
        report: CheckReport,
        columns: Mapping[str, str] | None,
        encoding: str,
        measure: Callable[[Example], int] | None,
        max_length: int | None,
    ) -> None:
        self.report = report
        self._columns, self._encoding = columns, encoding
        self._measure, self._max_length = measure, max_length
        self._files: list[str] = []
        self._labels: dict[str, str] = {}
        self._file_of, self._line_of = array("H"), array("Q")  # of each example, by its number
        self._flaws = array("B")  # how many defects each shows, so that the better of two copies is kept
        self._lengths = array("Q")
        self._words: Counter[str] = Counter()
        self._breaks: list[tuple[str, int, str, str]] = []  # answers that may break off within a word
        self._leaks: LeakFinder | None = None
        self._heldout: list[tuple[str, int]] = []
        self._odd: set[tuple[str, int]] = set()
        self._several: dict[tuple[str, int], int] = {}  # rows of more than one example, and how many
        self._copied: Counter[tuple[str, int]] = Counter()

    def watch_heldout(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            return
        examples, _ = load_examples(paths, {str(path): str(path) for path in paths}, self._columns, self._encoding)
        self._heldout = [parse_source(example.source) for example in examples]
        self._leaks = LeakFinder(examples)

    def read(self, path: str | Path) -> Iterator[Example]:
        """Examine one file; yields its examples for what needs them all."""
        name, found, file = str(path), DataReport(), FileCheck(str(path))
        columns = _Columns(ignored={*(self._columns or {}).values()})
        self.report.files.append(file)
        self._files.append(name)
        try:
            for row, conversion in convert_rows(Path(path), found, name, self._columns, self._encoding, keep=False):
                columns.look_at(row, conversion.shape)
                for change in conversion.changes:
                    self.report.add(_kind_of(change), name, row.line, change)
                if len(conversion.examples) > 1:
                    self._several[name, row.line] = len(conversion.examples)
                for example in conversion.examples:
                    self._look_at(example, name, row.line, bool(conversion.changes))
                    yield example
                self._note_problems(found, name)
        except DataError as error:
            file.refused = str(error)
        self._note_problems(found, name)
        file.rows_in, file.notes = found.rows_in, found.notes.get(name, [])
        self._note_odd_rows(columns, name)
        file.kept = found.rows_in - found.rejections
        self.report.shapes += found.shapes
        self.report.tasks += found.tasks

    def finish(self, copies: Copies, heldout_share: float) -> None:
        """Add what only shows when all rows are known."""
        self._note_breaks()
        self._note_copies(copies)
        self._note_leaks()
        self._note_tasks(heldout_share)
        self.report.lengths = count_lengths(
            self._lengths, "tokens" if self._measure else "characters", self._max_length
        )
        order = {file: number for number, file in enumerate(self._files)}
        for found in self.report.findings.values():
            found.sort(key=lambda finding: (order.get(finding.file, len(order)), finding.line))
        self.report.counts = Counter({kind: self.report.counts[kind] for kind in DEFECTS if self.report.counts[kind]})

    def _look_at(self, example: Example, name: str, line: int, changed: bool) -> None:
        flaws = int(changed)
        for kind, detail in find_defects(example):
            self.report.add(kind, name, line, detail)
            flaws += 1
        length = self._measure(example) if self._measure else len(example.prompt) + len(example.answer)
        if self._measure and self._max_length and length > self._max_length:
            self.report.add("longer than max_length", name, line, f"{length} tokens, max_length is {self._max_length}")
        self._file_of.append(len(self._files) - 1)
        self._line_of.append(line)
        self._flaws.append(min(flaws, 255))
        self._lengths.append(length)
        if self._leaks:
            self._leaks.add(example)
        answer = example.answer
        words = _WORD.findall(answer[:4000].lower())
        if len(self._words) < _WORDS_KEPT:
            self._words.update(words)
        if len(self._breaks) < 20 * LISTED and words and ends_in_prose(answer):
            self._breaks.append((name, line, _WORD.findall(answer.lower())[-1], last_words(answer)))

    def _note_problems(self, found: DataReport, name: str) -> None:
        for problem in found.problems:
            if problem.action == "rejected":
                self.report.add("unreadable row", name, problem.line, problem.reason)
                found.rejections += 1
            elif problem.action == "skipped":
                self.report.add("blank line", name, problem.line, "")
        found.problems.clear()

    def _place(self, number: int) -> tuple[str, int]:
        return self._files[self._file_of[number]], self._line_of[number]

    def _label(self, file: str) -> str:
        if len(self._labels) != len(self._files):
            self._labels = label_files(self._files)
        return self._labels[file]

    def _where(self, number: int, seen_from: int) -> str:
        file, line = self._place(number)
        return f"of line {line}" if self._place(seen_from)[0] == file else f"of {self._label(file)}:{line}"

    def _is_copied(self, number: int) -> bool:
        """Whether all examples of a row are copies: else the row holds something of its own."""
        place = self._place(number)
        return self._copied[place] >= self._several.get(place, 1)

    def _note_copies(self, copies: Copies) -> None:
        """Of each group of copies the row with the fewest defects stays, the first of them; the others are named."""
        for group, kinds in copies.groups():
            keeper = min(group, key=lambda number: (self._flaws[number] + (self._place(number) in self._odd), number))
            for number in group:
                self._copied[self._place(number)] += number != keeper
                if number != keeper and self._place(number) != self._place(keeper) and self._is_copied(number):
                    kind = kinds.get(number) or kinds.get(keeper, "near duplicate")
                    self.report.add(kind, *self._place(number), self._where(keeper, number))
        for number, first in copies.conflicting.items():
            self.report.add("conflicting answers", *self._place(number), f"the prompt {self._where(first, number)}")

    def _note_leaks(self) -> None:
        for leak in self._leaks.find() if self._leaks else ():
            file, line = self._place(leak.train)
            self.report.dropped.setdefault((file, line), []).append(f"leak: {leak.kind} as a held-out row")
            self.report.add(
                f"leak: {leak.kind}", *self._heldout[leak.heldout], f"trained on at {self._label(file)}:{line}"
            )

    def _note_breaks(self) -> None:
        """An answer may end within a word: one that no other answer has, while others have a longer one like it."""
        ordered = sorted(self._words)
        for name, line, word, shown in self._breaks:
            if len(word) >= 2 and self._words[word] <= 1 and _begins_another(word, ordered):
                self.report.add("cut-off answer", name, line, shown)

    def _note_odd_rows(self, columns: _Columns, file: str) -> None:
        """Rows of one file that are unlike most of it."""
        kept = max(columns.shapes.total(), 1)
        usual = columns.shapes.most_common(1)[0][0] if columns.shapes else ""
        for shape, lines in columns.lines_of_shape.items():
            if shape != usual and columns.shapes[shape] < 0.1 * kept:
                for line in lines:
                    self.report.add("unusual shape", file, line, f"{shape}, most rows are {usual}")
                    self._odd.add((file, line))
        odd: dict[int, list[str]] = defaultdict(list)
        for key, lines in columns.lines_of_key.items():
            if columns.keys[key] < 0.5 * kept:
                for line in lines:
                    odd[line].append(key)
        for line, keys in sorted(odd.items()):
            self.report.add("unused columns", file, line, ", ".join(keys))
            self._odd.add((file, line))
        always = [key for key, count in columns.keys.items() if count >= 0.5 * kept]
        if always:
            self.report.files[-1].notes.append(f"columns that are not read: {', '.join(always)}")

    def _note_tasks(self, heldout_share: float) -> None:
        tasks = {task: count for task, count in self.report.tasks.items() if task != NO_TASK}
        if len(tasks) < 2 or not self.report.files:
            return
        file, needed = self.report.files[0].path, math.ceil(1 / heldout_share) if heldout_share else 2
        for task, count in tasks.items():
            if count < needed:
                detail = f"{task}: {count} rows, {needed} give one to hold out at a share of {heldout_share:g}"
                self.report.add("small task", file, 0, detail)
        most, least = max(tasks, key=lambda t: tasks[t]), min(tasks, key=lambda t: tasks[t])
        if tasks[most] > 20 * tasks[least]:
            self.report.add("uneven tasks", file, 0, f"{most} has {tasks[most]} rows, {least} has {tasks[least]}")


def _kind_of(change: str) -> str:
    """Under which kind of defect a change on reading is reported."""
    if "end-of-text mark" in change:
        return "end-of-text mark behind the answer"
    return "no input" if "treated as no" in change else "changed on reading"


def _begins_another(word: str, ordered: Sequence[str]) -> bool:
    """Whether another word goes on by more than an ending such as -s or -ed."""
    for other in ordered[bisect_right(ordered, word) :]:
        if not other.startswith(word):
            return False
        if other[len(word) :] not in ("s", "d", "ed", "er", "es", "ly", "ing", "'s"):
            return True
    return False
