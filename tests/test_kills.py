"""A run that is killed goes on to the same losses and the same adapter, wherever the kill fell.

The processes come from a server that has everything imported, so that hundreds can be killed in minutes. An ordinary
run of the tests kills a few times, the reliability tier two hundred times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, keep_whole_checkpoints, new_run, open_run
from qlora_tune.train import train

# What Python tells of each file that is made, opened to be written, renamed or removed (PEP 578)
BOUNDARIES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"}
STEPS = 3  # with two evaluations and as many saves, and the oldest checkpoint is removed


def config_in(folder: Path, name: str) -> Any:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = [json.dumps({"instruction": f"Say {n}", "output": f"I say {n}.", "task": "say"}) for n in range(12)]
        rows.write_text("\n".join(lines))
    return settings(
        data=[str(rows)], runs_dir=str(folder / "runs"), run_name=name, max_steps=str(STEPS), eval_steps="1",
        per_device_train_batch_size="2", gradient_accumulation_steps="1", score_rows="0",
    )  # fmt: skip


def train_until(folder: Path, name: str, boundary: int) -> None:
    """Train in this process and kill it at so many writes into the run's folder (-1: never, and note their number)."""
    count = 0

    def at_boundary(event: str, arguments: Any) -> None:
        nonlocal count
        if event not in BOUNDARIES or f"/runs/{name}/" not in f"{arguments[0]}/":
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if count == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    sys.addaudithook(at_boundary)
    config = config_in(folder, name)
    train(config, new_run(config), prepare(config))
    (folder / "boundaries").write_text(str(count))


def resume(folder: Path, name: str) -> None:
    run = open_run(name, folder / "runs")
    train(run.read_config(), run, prepare(run.read_config()), resume=True)


def in_process(function: Any, *arguments: Any, kill_after_s: float | None = None) -> int:
    """Run a function in a process of its own. Returns its exit code, negative after a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qlora_tune.train", "torch", "transformers", "trl", "peft", "bitsandbytes"])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
    process.join()
    return int(process.exitcode or 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int, float]:
    """A run that nobody killed, how many writes it makes, and how long it takes [s]."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert in_process(train_until, folder, "a", -1) == 0
    run = open_run("a", folder / "runs")
    return run, int((folder / "boundaries").read_text()), time.monotonic() - begin


def check_goes_on(whole: Run, folder: Path, name: str) -> bool:
    """Resume a killed run and compare. False where it was killed before there was a run to resume."""
    run = Run(folder / "runs" / name)
    whole_ones = [path.name for path in run.checkpoints.glob("checkpoint-*") if (path / "manifest.json").is_file()]
    if not (run.path / "state.json").is_file():
        assert not whole_ones
        return False
    if run.read_state()["status"] == "finished":
        return False
    assert in_process(resume, folder, name) == 0, f"{name}: {whole_ones}"
    for key in ("loss", "eval_loss"):
        alone, resumed = ([(e["step"], e[key]) for e in one.read_metrics() if key in e] for one in (whole, run))
        assert resumed == alone, name
    weights = [(one.adapter / "adapter_model.safetensors").read_bytes() for one in (whole, run)]
    assert weights[0] == weights[1], name
    assert run.read_state()["status"] == "finished"
    assert keep_whole_checkpoints(run)
    return True


@pytest.mark.parametrize("share", [26, pytest.param(1, marks=pytest.mark.reliability)], ids=["some", "all"])
@pytest.mark.timeout(3600)
def test_a_run_killed_at_any_write_goes_on_to_the_same_adapter(
    whole: tuple[Run, int, float], tmp_path: Path, share: int
) -> None:
    run, boundaries, _ = whole
    assert boundaries > 20
    resumed = 0
    for boundary in range(share // 2, boundaries, share):
        name = f"at-{boundary}"
        assert in_process(train_until, tmp_path, name, boundary) == -signal.SIGKILL
        resumed += check_goes_on(run, tmp_path, name)
    assert resumed


@pytest.mark.parametrize("kills", [2, pytest.param(125, marks=pytest.mark.reliability)])
@pytest.mark.timeout(3600)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_adapter(
    whole: tuple[Run, int, float], tmp_path: Path, kills: int
) -> None:
    run, _, lasts_s = whole
    moments = random.Random(0)
    for number in range(kills):
        in_process(train_until, tmp_path, f"random-{number}", -1, kill_after_s=moments.uniform(0.2, 1) * lasts_s)
        check_goes_on(run, tmp_path, f"random-{number}")
