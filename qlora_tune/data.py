"""Files to examples: read rows, turn each into a conversation, report what became of it, hold some out.

First station of a row's journey. Nothing is dropped silently: every row read becomes an Example or a DataProblem
that names file, line and reason.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qlora_tune.errors import DataError, join_problems
from qlora_tune.shapes import KNOWN_SHAPES, DataProblem, Example, Row, RowError, reject_example, to_example, type_name


@dataclass
class DataReport:
    """What became of every row: rows_in == kept + rejected."""

    rows_in: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    problems: list[DataProblem] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        return sum(problem.action == "rejected" for problem in self.problems)

    @property
    def changed(self) -> int:
        return sum(problem.action == "changed" for problem in self.problems)

    @property
    def kept(self) -> int:
        return self.rows_in - self.rejected

    def group_problems(self) -> list[tuple[int, DataProblem]]:
        """Problems of one reason together (figures apart): how many, and the first of them; the most frequent first."""
        groups: dict[tuple[str, str], list[DataProblem]] = {}
        for problem in self.problems:
            groups.setdefault((problem.action, re.sub(r"\d+", "0", problem.reason)), []).append(problem)
        return sorted(((len(group), group[0]) for group in groups.values()), key=lambda found: -found[0])


def read_rows(path: Path) -> Iterator[Row | DataProblem]:
    """Read one .jsonl or .json file row by row, in file order; a bad row becomes a DataProblem.

    What the file is decides its content, not its name: JSON Lines (streamed) where its first line is a whole value
    and more follow, else one array or object. Raises DataError when it can't be read, or when a broken array leaves
    open how many rows were lost.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file. Give the path of a .jsonl or .json file.")
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Expected a .jsonl or .json file; name the files in it.")
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise DataError(f'{path}: files ending in "{path.suffix}" are not read. Expected .jsonl or .json.')
    try:
        with path.open("rb") as file:
            as_lines = _is_json_lines(file, path)
            file.seek(0)
            if as_lines:
                yield from _read_lines(file, str(path))
            else:
                yield from _read_array(_decode_whole(file.read(), path), str(path))
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from None


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


def load_examples(
    paths: Sequence[str | Path], labels: Mapping[str, str] | None = None
) -> tuple[list[Example], DataReport]:
    """Read files into examples and a report. Raises DataError when no row at all can be used.

    `labels` gives the names that sources carry, where more files than these must be told apart.
    """
    examples: list[Example] = []
    report = DataReport()
    labels = labels or label_files(paths)
    for path in paths:
        for row in read_rows(Path(path)):
            report.rows_in += 1
            if isinstance(row, DataProblem):
                report.problems.append(row)
                continue
            try:
                example, shape, change = to_example(row, labels[str(path)])
            except RowError as error:
                report.problems.append(DataProblem(row.file, row.line, str(error), original=row.fields))
                continue
            if change:
                report.problems.append(DataProblem(row.file, row.line, change, "changed", row.fields))
            examples.append(example)
            report.shapes[shape] += 1
            report.tasks[example.task or "(none)"] += 1
    if not examples:
        names = ", ".join(str(path) for path in paths)
        found = [str(problem) for problem in report.problems] or [f"{names}: the file has no rows."]
        raise DataError(join_problems(f"No usable row in {names}. Expected {KNOWN_SHAPES}.", found))
    return examples, report


def duplicate_key(example: Example) -> str:
    """What makes two examples copies for the split: system and first user turn, without case and spacing."""
    opening = [turn["content"] for turn in example.messages if turn["role"] == "system"]
    opening += [turn["content"] for turn in example.messages if turn["role"] == "user"][:1]
    return re.sub(r"\s+", " ", "\n".join(opening)).strip().casefold()


def split_heldout(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about `share` of each task's examples, whole duplicate groups at a time.

    Returns (train, heldout), both in file order. No duplicate group stands on both sides; a group larger than its
    task's budget stays in training. What a task is too small to give up is carried to the next one, so that the
    share holds over many small tasks. One group at least is held out where there are two, and one always trained on.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(duplicate_key(example), []).append(index)
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


def drop_seen(train: Sequence[Example], heldout: Sequence[Example]) -> tuple[list[Example], list[DataProblem]]:
    """Leave out held-out examples whose duplicate group also stands in training: they would flatter the score."""
    seen = {duplicate_key(example): example.source for example in train}
    clean = [example for example in heldout if duplicate_key(example) not in seen]
    leaks = [example for example in heldout if duplicate_key(example) in seen]
    return clean, [
        reject_example(example, f"held out, but the same prompt is trained on at {seen[duplicate_key(example)]}")
        for example in leaks
    ]


def _is_json_lines(file: IO[bytes], path: Path) -> bool:
    filled = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
    first = next((line for line in filled if line), b"")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # A bad first line of JSON Lines, or an array or object that goes on: then it ends on a later line.
        return not first.startswith(b"[") and not (first.startswith(b"{") and path.suffix.lower() == ".json")
    return isinstance(value, dict) or any(filled)


def _decode_whole(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text. Save the file as UTF-8.") from None


def _read_lines(lines: Iterable[bytes], name: str) -> Iterator[Row | DataProblem]:
    for number, content in enumerate(lines, start=1):
        content = content.removeprefix(codecs.BOM_UTF8).strip()
        if not content:
            continue
        try:
            yield _as_row(_DECODER.decode(content.decode()), name, number)
        except UnicodeDecodeError as error:
            lossy = content.decode(errors="backslashreplace")
            yield DataProblem(name, number, f"not UTF-8 text (byte {error.start} of the line)", original=lossy)
        except (ValueError, RecursionError) as error:
            yield DataProblem(name, number, f"not valid JSON: {_json_reason(error)}", original=content.decode())


def _read_array(text: str, name: str) -> Iterator[Row | DataProblem]:
    """Decode array elements one by one, so that each keeps the line it starts on."""
    alone = text.lstrip().startswith("{")
    position = _skip(text, 0, "" if alone else "[")
    line, counted = 1, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{line}: not valid JSON: {_json_reason(error)}. In an array no row after it can be read: mend "
                "it there, or save the rows as JSON Lines (.jsonl), where a bad line costs only itself."
            ) from None
        yield _as_row(value, name, line)
        position = _skip(text, end, "" if alone else ",")
        if alone:
            break
    if not alone and position >= len(text):
        raise DataError(f'{name}: the array has no closing "]": the file is cut off. Get a whole copy.')
    rest = text[position + (not alone) :].strip()
    if rest:
        last = line + text.count("\n", counted, len(text) - len(text[position:].lstrip("]").lstrip()))
        raise DataError(f"{name}:{last}: more text after the end of the JSON. Put the rows into one array.")


def _skip(text: str, position: int, mark: str) -> int:
    match = re.compile(rf"\s*{re.escape(mark)}?\s*").match(text, position)
    return match.end() if match else position


def _as_row(value: Any, name: str, line: int) -> Row | DataProblem:
    if isinstance(value, dict):
        return Row(value, name, line)
    return DataProblem(name, line, f"is a {type_name(value)}, expected an object", original=value)


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object')
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
