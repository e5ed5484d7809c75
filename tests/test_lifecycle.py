"""Signals end a run after the step that it is in; a sleep of the computer is noticed, said and saved."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import settings

from qlora_tune import lifecycle
from qlora_tune.cli import main
from qlora_tune.errors import RunError
from qlora_tune.lifecycle import stop_on_signal
from qlora_tune.model import detect_device
from qlora_tune.runs import MANIFEST, Run, new_run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_asks_to_stop_once_and_the_third_interrupts(number: signal.Signals) -> None:
    asked: list[None] = []
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # the tests themselves may run under nohup
    with stop_on_signal(lambda: asked.append(None)) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert len(asked) == 1
    assert signal.getsignal(number) == signal.default_int_handler
    signal.signal(number, before)


def test_a_closed_terminal_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(lambda: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def sleep_after(monkeypatch: pytest.MonkeyPatch, readings: int) -> None:
    """Let the clock of sleep jump by 2,000 s after some readings; no test can put its computer to sleep."""
    clock = itertools.chain([5.0] * readings, itertools.repeat(2005.0))
    monkeypatch.setattr(lifecycle, "asleep_s", lambda: next(clock))


def test_a_sleep_of_the_computer_is_said_and_the_run_is_saved_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}", "output": f"I say {n}."}) for n in range(20)))
    sleep_after(monkeypatch, 3)  # the training's begin, its first step, and the end of that
    few = ("--max-steps", "4", "--eval-steps", "4", "--score-rows", "0", "--gradient-accumulation-steps", "1")
    assert main(["train", str(rows), "--runs-dir", str(tmp_path), "--run-name", "a", *few]) == 0
    run = Run(tmp_path / "a")
    assert "the computer slept for 0:33:20 before step 2; the run is saved" in capfd.readouterr().out
    assert [(entry["step"], entry["slept_s"]) for entry in run.read_metrics() if "slept_s" in entry] == [(2, 2000)]
    assert {path.parent.name for path in run.checkpoints.glob(f"*/{MANIFEST}")} == {"checkpoint-2", "checkpoint-4"}


def test_a_gpu_that_did_not_outlast_a_sleep_is_said_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(runs_dir=str(tmp_path), run_name="a")
    run = new_run(config)
    lost = "CUDA error: unspecified launch failure"
    with pytest.raises(RuntimeError, match=lost), lifecycle.failures_recorded(run, config, detect_device()):
        raise RuntimeError(lost)
    sleep_after(monkeypatch, 1)
    way_on = f"the computer slept.*saved up to step 0. Go on with: {re.escape(run.resume_command())}"
    with pytest.raises(RunError, match=way_on), lifecycle.failures_recorded(run, config, detect_device()):
        raise RuntimeError(lost)
    assert re.search(way_on, run.read_state()["reason"])


def test_the_clock_of_sleep_stands_still_while_the_computer_is_awake() -> None:
    before = lifecycle.asleep_s()
    os.sched_yield()
    assert abs(lifecycle.asleep_s() - before) < 1
