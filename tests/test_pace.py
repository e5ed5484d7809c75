"""How long a run will take, from earlier runs of the same work or from its arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune.base import BaseModel
from qlora_tune.model import Device
from qlora_tune.pace import estimate_seconds
from qlora_tune.runs import Run, new_run

CPU = Device("cpu", "CPU, 2 threads", 16_000_000_000, "bfloat16")
GPU = Device("cuda", "NVIDIA GeForce RTX 3060", 12_000_000_000, "bfloat16")
SUMMARY = {"train_tokens": 135_171, "train_sequences": 2096}


def seconds(base: BaseModel, *earlier: Run, device: Device = CPU, **changes: Any) -> float:
    return estimate_seconds(base, settings(**changes), device, "bfloat16", SUMMARY, 262, earlier)


def write_run(config: Any, base: BaseModel, speed: float, **state: Any) -> Run:
    run = new_run(config)
    known = {"base_fingerprint": base.fingerprint, "device": CPU.name, "precision": "bfloat16"}
    run.update_state(status="finished", **known | state)
    run.add_metrics({"step": 1, "tokens_per_s": 1.0, "elapsed_s": 1.0})
    run.add_metrics({"step": 2, "tokens_per_s": speed, "elapsed_s": 2.0})
    run.add_metrics({"step": 2, "eval_loss": 1.0, "elapsed_s": 3.0})
    return run


def test_the_speed_of_the_newest_earlier_run_of_the_same_work_is_used(builtin: Any, tmp_path: Path) -> None:
    base, config = builtin[0], settings(runs_dir=str(tmp_path))
    slower = write_run(config, base, 500.0, created=1.0)
    newest = write_run(config, base, 1000.0, created=2.0)
    others = [
        write_run(config, base, 7.0, created=3.0, base_fingerprint="another"),
        write_run(config, base, 7.0, created=3.0, device="CPU, 64 threads"),
        write_run(settings(runs_dir=str(tmp_path), activation_checkpointing="on"), base, 7.0, created=3.0),
        write_run(settings(runs_dir=str(tmp_path), fast="false"), base, 7.0, created=3.0),
    ]
    broken = write_run(config, base, 7.0, created=3.0)
    (broken.path / "state.json").write_text("{")
    assert seconds(base, newest, slower, *others, broken) == pytest.approx(2 * 135_171 / 1000)
    assert seconds(base, *others, broken) == seconds(base)


def test_the_built_in_base_takes_about_a_minute_without_an_earlier_run(builtin: Any) -> None:
    assert 25 < seconds(builtin[0]) < 120
    assert seconds(builtin[0], fast="false") > seconds(builtin[0])
    assert seconds(builtin[0], activation_checkpointing="on") > seconds(builtin[0])
    assert seconds(builtin[0], device=GPU) < seconds(builtin[0])
