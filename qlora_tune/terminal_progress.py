"""Progress in the terminal: of training, of rows read, of answers. Plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from qlora_tune.terminal import console, say


class TrainProgress:
    """Live progress of training: loss, tokens/s, memory, time left. Plain lines where there is no terminal."""

    def __init__(self, resumed: bool = False) -> None:
        self._resumed = resumed
        self._progress = Progress(
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=20)] if console.width >= 110 else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=console,
        )
        self._task = self._progress.add_task("loading the base", total=None, figures="")
        self._heldout = ""
        self._printed = -1.0

    def __enter__(self) -> TrainProgress:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stopping(self) -> None:
        """Say that a stop was asked."""
        say("stopping after this step, then saving …")

    def update(self, entry: dict[str, Any]) -> None:
        """Take one entry of metrics.jsonl."""
        if self._resumed:
            before = entry["step"] - 1
            say(f"going on after step {before}" if before else "no whole checkpoint was left: starting at step 1 again")
            self._resumed = False
        if "slept_s" in entry:
            slept = timedelta(seconds=int(entry["slept_s"]))
            say(f"the computer slept for {slept} before step {entry['step']}; the run is saved there and goes on")
        if "eval_loss" in entry:
            self._heldout = f"  held-out {entry['eval_loss']:.3f}"
            return
        left = timedelta(seconds=int(entry["left_s"]))
        figures = (
            f"loss {entry['loss']:.3f}{self._heldout}  {entry.get('tokens_per_s', 0):,.0f} tokens/s  "
            f"{entry['memory_bytes'] / 2**30:.1f} GiB  {left} left"
        )
        step, total = entry["step"], entry["total_steps"]
        if console.is_terminal:
            self._progress.update(self._task, description="train", total=total, completed=step, figures=figures)
        elif step == total or step / total - self._printed >= 0.1:
            self._printed, self._heldout = step / total, ""  # each held-out loss is printed once
            console.print(f"step {step}/{total}  {figures}", soft_wrap=True)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[], None]]:
    """A count that runs on, with its speed, where how much is to come is not known."""
    shown = TextColumn("{task.completed:,} {task.description}, {task.speed:,.0f}/s")
    with Progress(shown, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, seen = progress.add_task(what), 0

        def update() -> None:
            nonlocal seen
            seen += 1
            if seen % 100 == 0:
                progress.update(task, completed=seen)

        yield update


@contextlib.contextmanager
def scoring_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for answering the held-out rows, base first, then tuned."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def update(who: str, done: int, total: int) -> None:
            if who not in tasks:
                tasks[who] = progress.add_task(f"answering: {who}", total=total)
            progress.update(tasks[who], completed=done)

        yield update
