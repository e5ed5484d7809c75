"""Files to examples: read rows, turn each into conversations, report what became of it, hold some out.

Second station of a row's journey. Nothing is dropped silently: every row read becomes an Example or a DataProblem
that names file, line and reason.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora_tune import system_memory
from qlora_tune.containers import SUFFIXES, list_files, read_rows
from qlora_tune.duplicates import find_near, find_related, join_pairs, sketch
from qlora_tune.errors import ConfigError, DataError, MemoryLimitError, join_problems
from qlora_tune.hub import fetch_dataset, is_dataset_id
from qlora_tune.shape_readers import ShapeError
from qlora_tune.shapes import (
    FIELDS,
    KNOWN_SHAPES,
    NO_TASK,
    Conversion,
    DataProblem,
    Example,
    Row,
    detect_format,
    map_columns,
    reject_example,
    to_examples,
)
from qlora_tune.turns import RowError, has_surrogate

# What rows take in memory for each byte of their file, at most: those of 350 bytes took 2.8, longer ones less
# (docs/log.md).
AS_EXAMPLES = 3
PACKED = 5  # times smaller a compressed file is, about


@dataclass
class DataReport:
    """What became of every row: rows_in == kept + rejected."""

    rows_in: int = 0
    rows_by_file: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    notes: dict[str, list[str]] = field(default_factory=dict)  # by file: what was found out about it
    problems: list[DataProblem] = field(default_factory=list)
    rejections: int = 0  # rejected rows whose problem is no longer held

    @property
    def rejected(self) -> int:
        return self.rejections + sum(problem.action == "rejected" for problem in self.problems)

    @property
    def changed(self) -> int:
        """Rows that were kept with a change; a row may have several."""
        return len({(problem.file, problem.line) for problem in self.problems if problem.action == "changed"})

    @property
    def kept(self) -> int:
        return self.rows_in - self.rejected

    def add(self, other: DataReport) -> None:
        """Take another report's rows in."""
        self.rows_in += other.rows_in
        self.rows_by_file += other.rows_by_file
        self.rejections += other.rejections
        self.shapes += other.shapes
        self.tasks += other.tasks
        self.notes |= other.notes
        self.problems += other.problems

    def group_problems(self) -> list[tuple[int, DataProblem]]:
        """Problems of one reason together (figures apart): how many, and the first of them; the most frequent first."""
        groups: dict[tuple[str, str], list[DataProblem]] = {}
        for problem in self.problems:
            groups.setdefault((problem.action, re.sub(r"\d+", "0", problem.reason)), []).append(problem)
        return sorted(((len(group), group[0]) for group in groups.values()), key=lambda found: -found[0])


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Read `instruction=question` pairs into {field: column}. Raises ConfigError naming every bad one."""
    split = [pair.partition("=") for pair in pairs]
    problems = [f'"{"".join(found)}": expected FIELD=COLUMN' for found in split if not found[0] or not found[2]]
    known = ", ".join(FIELDS)
    problems += [
        f'"{name}" is no field; expected one of {known}'
        for name, _, column in split
        if name and column and name not in FIELDS
    ]
    twice = [name for name, count in Counter(name for name, _, _ in split).items() if count > 1]
    problems += [f'"{name}" is mapped twice' for name in twice]
    if problems:
        raise ConfigError(join_problems("These columns can't be mapped:", problems))
    return {name: column for name, _, column in split}


def find_data(paths: Sequence[str | Path]) -> list[str]:
    """The files that data paths stand for: themselves, those of a folder, or a hub dataset's downloaded copy."""
    found: list[str] = []
    for path in map(str, paths):
        # A file's name with a slip in it is no dataset: it is not sent to the hub.
        if not Path(path).exists() and is_dataset_id(path) and not path.removesuffix(".gz").endswith(SUFFIXES):
            found.append(str(fetch_dataset(path)))
        else:
            files = [str(file.resolve()) for file in list_files(Path(path))]
            found += dict.fromkeys(files) if Path(path).is_dir() else files  # a folder may link to one file twice
    if odd := next(filter(has_surrogate, found), None):  # a run keeps its files' names as text
        raise DataError(f"{odd}: holds bytes that are no UTF-8 in its name or a folder's. Rename that.")
    return found


def label_files(paths: Sequence[str | Path]) -> dict[str, str]:
    """A short name for each file, by path as given: its name, with as many folders as tell it from the others."""
    distinct = list(dict.fromkeys(str(path) for path in paths))
    labels: dict[str, str] = {}
    for path in distinct:
        parts = Path(path).parts
        others = [Path(other).parts for other in distinct if other != path]
        tails = (parts[-length:] for length in range(1, len(parts) + 1))
        labels[path] = "/".join(next((t for t in tails if all(o[-len(t) :] != t for o in others)), parts))
    return labels


def require_memory(paths: Sequence[str | Path], per_byte: float) -> None:
    """Raise MemoryLimitError where rows take more memory than is free, `per_byte` for each byte of their files."""
    files = [Path(path) for path in paths if Path(path).is_file()]
    size = sum(file.stat().st_size * (PACKED if file.suffix.lower() in (".gz", ".parquet") else 1) for file in files)
    free = system_memory.available_bytes()
    if size * per_byte > free:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise MemoryLimitError(
            f"{paths[0]}{more}: {size / 1e9:,.1f} GB of rows take about {size * per_byte / 1e9:,.0f} GB of "
            f"memory here, and {free / 1e9:,.1f} GB are free. Take a part of them; of JSON Lines for example: "
            f"shuf -n 50000 ROWS.jsonl > part.jsonl. All of them can be looked at with: python -m qlora_tune check"
        )


def load_examples(
    paths: Sequence[str | Path],
    labels: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str = "auto",
) -> tuple[list[Example], DataReport]:
    """Read files into examples and a report. Raises DataError when no row at all can be used, and
    MemoryLimitError when they can't be held.

    `labels` gives the names that sources carry, where more files than these must be told apart; `columns` says which
    column is which field, where a file has names of its own.
    """
    require_memory(paths, AS_EXAMPLES)
    examples: list[Example] = []
    report = DataReport()
    labels = labels or label_files(paths)
    for path in paths:
        for row, conversion in convert_rows(Path(path), report, labels[str(path)], columns, encoding):
            report.problems += [DataProblem(row.file, row.line, c, "changed", row.fields) for c in conversion.changes]
            examples += conversion.examples
    if not examples:
        names = ", ".join(str(path) for path in paths)
        found = [f"{problem}{more}" for problem, more in _first_of_each(report)] or [f"{names}: the file has no rows."]
        raise DataError(join_problems(f"No usable row in {names}. Expected {KNOWN_SHAPES}.", found))
    return examples, report


def convert_rows(
    path: Path,
    report: DataReport,
    label: str = "",
    columns: Mapping[str, str] | None = None,
    encoding: str = "auto",
    keep: bool = True,
) -> Iterator[tuple[Row, Conversion]]:
    """Read one file as a stream: each row that gives examples; every other one goes into the report.

    `keep` says whether the report holds rows as they stood, which takes the memory of all that can't be used.
    """
    for row in read_rows(path, (columns or {}).values(), encoding, report.notes.setdefault(str(path), [])):
        counts = not (isinstance(row, DataProblem) and row.action == "skipped")
        report.rows_in += counts
        report.rows_by_file[str(path)] += counts
        if isinstance(row, DataProblem):
            report.problems.append(row if keep else replace(row, original=None))
            continue
        original = row
        try:
            row = row._replace(fields=map_columns(row.fields, columns)) if columns else row
            conversion = to_examples(row, label)
        except RowError as error:
            shape = error.shape if isinstance(error, ShapeError) else detect_format(row.fields)
            report.shapes[shape or "unknown"] += 1
            report.problems.append(
                DataProblem(row.file, row.line, str(error), original=original.fields if keep else None)
            )
            continue
        report.shapes[conversion.shape] += 1
        report.tasks[conversion.examples[0].task or NO_TASK] += 1
        yield original, conversion


def _first_of_each(report: DataReport) -> list[tuple[DataProblem, str]]:
    groups = report.group_problems()
    return [(first, f" (and {count - 1} more like it)" if count > 1 else "") for count, first in groups]


def duplicate_key(example: Example) -> str:
    """What makes two examples copies for the split: system and first user turn, without case and spacing."""
    opening = [turn["content"] for turn in example.messages if turn["role"] == "system"]
    opening += [turn["content"] for turn in example.messages if turn["role"] == "user"][:1]
    return re.sub(r"\s+", " ", "\n".join(opening)).strip().casefold()


def split_heldout(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about `share` of each task's examples, whole duplicate groups at a time.

    Returns (train, heldout), both in file order. No duplicate group (rows of one prompt, near copies, rows about one
    passage) stands on both sides; a group larger than its task's budget stays in training. What a task is too small
    to give up is carried to the next one, so that the share holds over many small tasks. One group at least is held
    out where there are two, and one always trained on.
    """
    if not share:
        return list(examples), []
    groups = _group_copies(examples)
    by_task: dict[str, list[list[int]]] = {}
    for key in sorted(groups):
        by_task.setdefault(examples[groups[key][0]].task or "", []).append(groups[key])
    draw = random.Random(seed)
    heldout: list[list[int]] = []
    carried = 0.0
    for task in sorted(by_task, key=lambda _: draw.random()):
        members = by_task[task]
        budget = share * sum(map(len, members)) + carried
        for group in draw.sample(members, len(members)):
            if len(group) <= budget + 1e-9:
                budget -= len(group)
                heldout.append(group)
        carried = min(budget, 1.0)
    if not heldout and share > 0 and len(groups) > 1:
        heldout.append(sorted(groups.values(), key=len)[0])
    if len(heldout) == len(groups):
        heldout = heldout[1:]
    chosen = {index for group in heldout for index in group}
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [example for index, example in enumerate(examples) if index in chosen]


def _group_copies(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Indices of examples by group: those of one prompt, and those that near copies or one passage bring together."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(duplicate_key(example), []).append(index)
    keys = list(groups)
    group_of = {index: number for number, members in enumerate(groups.values()) for index in members}
    near = ((row, earlier) for row, earlier, _ in find_near([sketch(example) for example in examples], best=False))
    pairs = ((group_of[row], group_of[earlier]) for row, earlier in (*near, *find_related(examples)))
    for number, first in join_pairs(pairs).items():
        if number != first:
            groups[keys[first]] += groups.pop(keys[number])
    return groups


def drop_seen(train: Sequence[Example], heldout: Sequence[Example]) -> tuple[list[Example], list[DataProblem]]:
    """Leave out held-out examples whose duplicate group also stands in training: they would flatter the score."""
    seen = {duplicate_key(example): example.source for example in train}
    clean = [example for example in heldout if duplicate_key(example) not in seen]
    leaks = [example for example in heldout if duplicate_key(example) in seen]
    return clean, [
        reject_example(example, f"held out, but the same prompt is trained on at {seen[duplicate_key(example)]}")
        for example in leaks
    ]
