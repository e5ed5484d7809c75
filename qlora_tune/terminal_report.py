"""What the terminal shows of data: the report of `check`, a mixture's coverage, a selection. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Column, Table

from qlora_tune.check import CheckReport
from qlora_tune.data import label_files
from qlora_tune.lengths import Histogram
from qlora_tune.mixture import Coverage
from qlora_tune.quality import DEFECTS
from qlora_tune.repair import Repair
from qlora_tune.shapes import NO_TASK
from qlora_tune.terminal import console, say
from qlora_tune.text_signs import printable

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
_LINES_SHOWN = 6
_COVERAGE = {
    "rows": "rows_in",
    "rejected": "rejected",
    "held out": "heldout",
    "unseen": "unseen",
    "dropped": "dropped",
    "capped": "capped",
    "train": "train",
    "share": "share",
    "templates": "templates",
    "reversed": "reversed",
}
_TASKS_SHOWN = 30


def show_check(report: CheckReport) -> None:
    """Files, rows by shape and task, lengths, and each kind of defect with the first lines that show it."""
    for file in report.files:
        if file.refused:
            console.print(f"[red]refused[/] {escape(printable(file.refused))}", soft_wrap=True)
            continue
        figures = f"{file.rows_in:,} rows = {file.kept:,} kept + {file.rows_in - file.kept:,} rejected"
        say(f"{file.path}: {figures}")
        for note in file.notes:
            say(f"  {note}")
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in report.shapes.most_common())
    unknown = report.rows_in - report.shapes.total()
    if shapes:
        say(f"shapes: {shapes}" + (f", {unknown:,} that are no row" if unknown else ""))
    _show_tasks(report)
    if report.lengths:
        _show_lengths(report.lengths)
    _show_defects(report)
    for note in report.notes:
        say(note)
    counts = {severity: report.count(severity) for severity in _COLOURS}
    totals = (f"{count:,} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())
    console.print(f"[bold]{', '.join(totals)}[/]")


def show_repair(repair: Repair) -> None:
    """What a repair did, in figures that add up."""
    say(
        f"{repair.rows_in:,} rows = {repair.kept:,} kept + {repair.repaired:,} repaired + {repair.dropped:,} dropped\n"
        f"repaired copy: {repair.output}\nevery changed and dropped row, as it was: {repair.log}"
    )


def show_coverage(name: str, coverage: Iterable[Coverage]) -> None:
    """What each source, or each task, gives to a mixture; the figures of a row add up."""
    lines = list(coverage)
    shown = {title: field for title, field in _COVERAGE.items() if any(getattr(line, field) for line in lines)}
    table = Table(Column(name, overflow="fold", min_width=12), box=None)
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(escape(printable(line.name)), *(_figure(getattr(line, field)) for field in shown.values()))
    console.print(table)


def _one_line(name: str) -> str:
    return " ".join(printable(name).split())


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if value <= 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _show_tasks(report: CheckReport) -> None:
    tasks = [(task, count) for task, count in report.tasks.most_common() if task != NO_TASK]
    if not tasks:
        return
    shown = ", ".join(f"{_one_line(task)} {count:,}" for task, count in tasks[:_TASKS_SHOWN])
    more = f" and {len(tasks) - _TASKS_SHOWN} more" if len(tasks) > _TASKS_SHOWN else ""
    say(f"{len(tasks)} tasks: {shown}{more}")


def _show_lengths(lengths: Histogram) -> None:
    """The histogram as bars; those beyond max_length in red."""
    highest = max(lengths.counts)
    say(f"length of the examples [{lengths.unit}]: median {lengths.median:,}, longest {lengths.longest:,}")
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        cut = lengths.limit is not None and low > lengths.limit
        bar = "█" * round(40 * count / highest) or ("▏" if count else "")
        console.print(f"  [dim]{low:>7,} to {high - 1:>9,}[/] [{'red' if cut else 'green'}]{bar}[/] {count:,}")
    if lengths.limit is not None:
        say(f"  max_length is {lengths.limit:,} tokens")


def _show_defects(report: CheckReport) -> None:
    if not report.counts:
        return
    table = Table("", Column("rows", justify="right"), "defect", "lines, and what was seen", box=None, padding=(0, 1))
    named = [finding.file for found in report.findings.values() for finding in found]
    labels = label_files([*(file.path for file in report.files), *named])
    several = len(labels) > 1
    for kind, defect in DEFECTS.items():
        if kind not in report.counts:
            continue
        found = report.findings[kind]
        shown = found[: _LINES_SHOWN // 2 if several else _LINES_SHOWN]
        places = [f"{labels[one.file]}:{one.line}" if several else str(one.line) for one in shown if one.line]
        seen = [one.detail for one in shown if one.detail]
        more = " …" if report.counts[kind] > len(shown) else ""
        lines = [escape(printable(", ".join(places))) + more] if places else []
        # What concerns a whole file has no line: then each is said; else the first stands for all.
        said = (seen[:1] if places else seen) + ([] if places or not more else ["…"])
        lines += [f"[dim]{escape(printable(detail[:240]))}[/]" for detail in said]
        severity = f"[{_COLOURS[defect.severity]}]{defect.severity}[/]"
        table.add_row(severity, f"{report.counts[kind]:,}", escape(kind), "\n".join(lines))
    console.print(table)
