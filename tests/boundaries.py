"""Processes of their own that train a short run, with something happening at one of its writes to the disk.

They come from a server that has everything imported, so that hundreds can be started in minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import settings

from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, keep_whole_checkpoints, new_run, open_run
from qlora_tune.train import train

# What Python tells of each file that is made, opened to be written, renamed or removed (PEP 578)
BOUNDARIES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"}
STEPS = 3  # with three evaluations and as many saves, and the oldest checkpoint is removed
FLAGS = {
    "max_steps": str(STEPS), "eval_steps": "1", "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1", "score_rows": "0",
}  # fmt: skip


def rows_in(folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = [json.dumps({"instruction": f"Say {n}", "output": f"I say {n}.", "task": "say"}) for n in range(12)]
        rows.write_text("\n".join(lines))
    return rows


def at_each_write(name: str, act: Callable[[int], None]) -> None:
    """From now on call `act` with the number of each write into the folder of the run of this name, before it."""
    count = 0

    def at_boundary(event: str, arguments: Any) -> None:
        nonlocal count
        if event not in BOUNDARIES or f"/runs/{name}/" not in f"{arguments[0]}/":
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        act(count)
        count += 1

    sys.addaudithook(at_boundary)


def train_here(folder: Path, name: str) -> None:
    (folder / "runs").mkdir(exist_ok=True)  # else making it is a write more, in the first run of a folder
    config = settings(data=[str(rows_in(folder))], runs_dir=str(folder / "runs"), run_name=name, **FLAGS)
    train(config, new_run(config), prepare(config))


def resume(folder: Path, name: str) -> None:
    run = open_run(name, folder / "runs")
    train(run.read_config(), run, prepare(run.read_config()), resume=True)


def begin_process(function: Any, *arguments: Any) -> Any:
    """Start a function in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qlora_tune.train", "torch", "transformers", "trl", "peft", "bitsandbytes"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def in_process(function: Any, *arguments: Any, kill_after_s: float | None = None) -> int:
    """Run a function in a process of its own. Returns its exit code, negative after a signal."""
    process = begin_process(function, *arguments)
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
    process.join()
    return int(process.exitcode or 0)


def check_goes_on(whole: Run, folder: Path, name: str) -> bool:
    """Resume a run and compare it with one that went through. False where there is no run to resume."""
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
