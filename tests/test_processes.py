"""Several processes: the same training as in one, written and said once, stopped and refused together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, settings
from safetensors.torch import load_file

from qlora_tune.errors import ConfigError
from qlora_tune.prepare import prepare
from qlora_tune.processes import deal_micro_batches, together
from qlora_tune.runs import Run, keep_whole_checkpoints, new_run
from qlora_tune.train import train
from qlora_tune.trainer import _collate

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "qlora_tune"]
WORDS = ["the", "red", "cat", "sat", "on", "a", "big", "mat", "and", "the", "dog", "ran", "to", "town"]
# 64 rows, 6 of them held out: 6 steps an epoch, the last of 8 rows, and 2 more.
SETTINGS = {"dtype": "float32", "score_rows": "0", "eval_steps": "4", "max_steps": "8"}
SETTINGS |= {"per_device_train_batch_size": "5", "gradient_accumulation_steps": "2"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths, and a run in one process on them: runs/one."""
    place = tmp_path_factory.mktemp("processes")
    draw = random.Random(0)
    rows = [
        {
            "instruction": f"Say {number}: {' '.join(draw.choices(WORDS, k=draw.randint(1, 25)))}",
            "output": " ".join(draw.choices(WORDS, k=draw.randint(1, 15))),
        }
        for number in range(64)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data": [str(place / "rows.jsonl")], "runs_dir": str(place / "runs"), "run_name": "one", **SETTINGS}
    config = settings(**flags)
    train(config, new_run(config), prepare(config))
    return place


def losses(run: Run, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in run.read_metrics() if name in entry]


def assert_same_training(run: Run, one: Run, adapter_within: float) -> None:
    for name in ("loss", "eval_loss", "grad_norm"):
        steps, values = zip(*losses(run, name), strict=True)
        expected_steps, expected = zip(*losses(one, name), strict=True)
        assert steps == expected_steps
        assert values == pytest.approx(expected, abs=1e-3)
    found, wanted = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, one))
    assert found.keys() == wanted.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < adapter_within


def test_two_processes_train_as_one_does_and_only_the_main_one_writes_and_speaks(folder: Path) -> None:
    done = launch(folder, "train", "rows.jsonl", "--preset", "builtin", *FLAGS, "--run-name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8/8") == 1
    assert "5 x 2 = 10 rows in 2 processes" in done.stdout
    assert "Traceback" not in done.stderr
    one, two = Run(folder / "runs" / "one"), Run(folder / "runs" / "two")
    assert_same_training(two, one, 2e-3)
    assert two.read_state()["status"] == "finished"
    assert two.read_state()["peak_bytes"] > 0
    files = {path.name for path in one.path.iterdir()} | {"log.txt"}  # which the command line makes
    assert {path.name for path in two.path.iterdir()} == files
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["one", "two"]
    checkpoint = keep_whole_checkpoints(two)[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((checkpoint / "manifest.json").read_text()))


@pytest.mark.reliability
def test_a_signal_to_one_process_saves_and_stops_both_and_one_process_goes_on_alone(folder: Path) -> None:
    run = Run(folder / "runs" / "stopped")
    command = [*LAUNCH, "train", "rows.jsonl", "--preset", "builtin", *FLAGS, "--run-name", "stopped"]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as launched:
        while len(run.read_metrics()) < 2:
            assert launched.poll() is None
            time.sleep(0.05)
        second = next(
            child for child in psutil.Process(launched.pid).children(True) if child.environ().get("RANK") == "1"
        )
        second.send_signal(signal.SIGTERM)
        printed = launched.communicate(timeout=600)[0]
    assert printed.count("stopped and saved") == 1
    assert run.read_state()["status"] == "stopped"
    assert 2 <= losses(run, "loss")[-1][0] < 8
    config = run.read_config()
    train(config, run, prepare(config), resume=True)
    assert_same_training(run, Run(folder / "runs" / "one"), 2e-3)


def test_a_bad_flag_is_said_once_and_ends_both(folder: Path) -> None:
    before = sorted((folder / "runs").iterdir())
    done = launch(folder, "train", "rows.jsonl", "--lora-r", "0")
    assert done.returncode
    assert done.stderr.count("error:") == 1
    assert "lora_r" in done.stderr
    assert "exitcode  : 2 " in done.stderr
    assert "[rank" not in done.stderr
    assert sorted((folder / "runs").iterdir()) == before


def test_each_process_gets_rows_of_its_own_and_all_of_them_together_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    rows: list[dict[str, list[int]]] = []
    for number in range(11):
        ids = [number + 1] * draw.randint(2, 40)
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})

    def deal(index: int, count: int) -> dict[str, Any]:
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        return _collate(64, False, rows)

    def held(dealt: dict[str, Any]) -> list[int]:
        return [row for batch in dealt["micro_batches"] for row in set(batch.input_ids[0].tolist())]

    whole = deal(0, 1)
    for count in (2, 3, 16):
        parts = [deal(index, count) for index in range(count)]
        assert sorted(row for part in parts for row in held(part)) == sorted(held(whole)) == list(range(1, 12))
        assert {(part["learned"], part["tokens"]) for part in parts} == {(whole["learned"], whole["tokens"])}
        learned = sum(len(batch.targets) for part in parts for batch in part["micro_batches"])
        assert learned == whole["learned"] == sum(label != -100 for row in rows for label in row["labels"][1:])


def test_what_several_processes_cannot_do_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def refused(command: str) -> str:
        with pytest.raises(ConfigError) as caught, together([command]):
            pytest.fail("was not refused")
        return str(caught.value)

    assert "only `train`" in refused("prefer")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP" in refused("train")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "one machine" in refused("train")
    assert deal_micro_batches(4) == 2
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 3"):
        deal_micro_batches(3)
