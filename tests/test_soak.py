"""Many starts at once and many stops, one after the other: always one run on a device, never a process left over."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from boundaries import begin_process
from test_launch import FOREVER, is_free, short, wait_for, wait_for_end, write_rows

from qlora_tune.cli import main
from qlora_tune.config import TrainConfig
from qlora_tune.errors import RunError
from qlora_tune.launch import launch_run, request_stop
from qlora_tune.runs import Run, list_runs

ORPHANS_S = 10.0
REFUSED = 2


def start_as_the_page(said: Path, locks: str, config: str) -> None:
    os.environ["XDG_RUNTIME_DIR"] = locks
    try:
        launch_run(TrainConfig.model_validate_json(config), "cpu")
    except RunError as error:
        said.write_text(str(error))
        sys.exit(REFUSED)


def start_in_a_terminal(said: Path, locks: str, arguments: list[str]) -> None:
    os.environ["XDG_RUNTIME_DIR"] = locks
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def refused(started: list[Any]) -> list[int]:
    """Which of the processes were refused."""
    return [number for number, process in enumerate(started) if process.exitcode == REFUSED]


def alive(runs_dir: Path) -> list[Run]:
    return [run for run in list_runs(runs_dir) if run.is_alive()]


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.reliability)])
@pytest.mark.timeout(7200)
def test_of_many_starts_at_once_one_runs_and_the_lock_of_a_dead_one_is_taken_over(tmp_path: Path, rounds: int) -> None:
    draw, runs_dir, locks = random.Random(0), tmp_path / "runs", os.environ["XDG_RUNTIME_DIR"]
    config = short(tmp_path, max_steps=FOREVER, eval_steps=FOREVER)
    terminal = ["train", write_rows(tmp_path / "rows.jsonl"), "--preset", "builtin", "--runs-dir", str(runs_dir)]
    terminal += ["--score-rows", "0", "--max-steps", FOREVER, "--heldout-share", "0"]
    for number in range(rounds):
        count = draw.randint(2, 8)
        said = [tmp_path / f"{number}-{one}.txt" for one in range(count)]
        started: list[Any] = [
            begin_process(start_as_the_page, file, locks, config.model_dump_json())
            if draw.random() < 0.5
            else begin_process(start_in_a_terminal, file, locks, terminal)
            for file in said
        ]
        try:
            wait_for(lambda: len(refused(started)) >= len(started) - 1, f"refusals in round {number}")  # noqa: B023
            wait_for(lambda: alive(runs_dir), f"run in round {number}")
            (run,) = alive(runs_dir)
            assert len(refused(started)) == count - 1
            for one in refused(started):
                assert f"Run {run.path} is running on this machine's CPU" in said[one].read_text().replace("\n", "")
        finally:
            for run in alive(runs_dir):
                os.kill(run.read_state()["pid"], signal.SIGKILL)  # its lock stays behind, as after a crash
            for process in started:
                process.kill()
                process.join()
        assert len(list(runs_dir.glob("2*"))) == number + 1, "a refused start leaves no folder"
        wait_for(is_free, "free device")


@pytest.mark.parametrize("stops", [1, pytest.param(30, marks=pytest.mark.reliability)])
@pytest.mark.timeout(7200)
def test_nothing_is_left_of_a_run_that_was_stopped_at_any_moment(
    tmp_path: Path, stops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draw = random.Random(1)
    for number in range(stops):
        config = short(tmp_path, max_steps=FOREVER, eval_steps="5", heldout_share="0.2", run_name=str(number))
        run = launch_run(config, "cpu")
        session = run.read_state()["pid"]
        time.sleep(draw.uniform(0, 12))
        request_stop(run)
        state = wait_for_end(run)
        assert state["status"] in ("stopped", "interrupted"), state
        time.sleep(0 if number % 5 else ORPHANS_S)
        left = [one for one in psutil.process_iter() if belongs(one, session)]
        wait_for(lambda: not any(one.is_running() for one in left), "end of all its processes")  # noqa: B023
        wait_for(is_free, "free device")
        if state["status"] == "stopped":
            assert list(run.checkpoints.glob("checkpoint-*/manifest.json"))


def belongs(process: psutil.Process, session: int) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session
    except (psutil.Error, OSError):
        return False
