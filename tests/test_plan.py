"""The card beside Start: what a run would do and take, or the exact reason why it can't; never an exception."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune import model as models
from qlora_tune.config import load_preset
from qlora_tune.launch import lock_device
from qlora_tune.model import Device
from qlora_tune.plan import Plan, pick_here, plan_run
from qlora_tune.prepare import prepare
from qlora_tune.runs import new_run


def facts(plan: Plan) -> dict[str, str]:
    return dict(plan.facts)


def write_rows(path: Path, count: int = 40) -> str:
    path.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": f"{n}"}) + "\n" for n in range(count)))
    return str(path)


def told(plan: Plan) -> str:
    assert plan.problems
    return "\n".join(plan.problems)


def test_the_built_in_sample_is_ready_with_its_facts_and_memory() -> None:
    plan = plan_run({"preset": "builtin"})
    assert plan.problems == []
    summary = prepare(settings()).data.summary()
    shown = facts(plan)
    assert shown["preset"] == "builtin: as asked"
    assert shown["base model"] == "builtin, in 4-bit nf4, LoRA r 32"
    assert shown["data"] == "sample.jsonl, sample_heldout.jsonl"
    assert shown["rows"] == f"{summary['rows_in']:,} read, 0 rejected, 0 changed"
    held_out = f"{summary['rows_heldout']:,} held out (all of sample_heldout.jsonl)"
    assert shown["split"] == f"{summary['train_sequences']:,} to train on, {held_out}"
    assert f"{summary['train_tokens']:,}, of which {summary['learned_tokens']:,} are learned" in shown["tokens"]
    assert shown["steps"] == "262 of 16 × 1 = 16 rows (effective batch)"
    assert shown["time"].startswith("about ")
    assert shown["download"] == "none: the base is on this machine"
    assert plan.memory is not None
    assert plan.device is not None
    assert plan.memory_share == plan.memory.peak_bytes / plan.device.memory_bytes
    assert 0 < plan.memory_share < 1
    assert plan.command == "python -m qlora_tune train --preset builtin"
    assert set(plan.changes) == set(load_preset("builtin").settings)
    assert plan.changes["learning_rate"] == "0.002"


def test_without_a_word_the_preset_is_that_of_this_machine() -> None:
    plan = plan_run({})
    name, reason = pick_here()
    assert plan.preset == name
    assert facts(plan)["preset"] == f"{name}: {reason}"


def test_steps_and_split_follow_the_settings(tmp_path: Path) -> None:
    flags = {"preset": "builtin", "data": [write_rows(tmp_path / "d.jsonl")], "runs_dir": str(tmp_path)}
    plan = plan_run({**flags, "heldout_share": 0.25, "gradient_accumulation_steps": 2, "num_train_epochs": 3})
    assert plan.problems == []
    assert facts(plan)["split"] == "30 to train on, 10 held out"
    assert facts(plan)["steps"].startswith("3 of 16 × 2 = 32 rows")
    assert facts(plan_run({**flags, "max_steps": 7}))["steps"].startswith("7 of")
    assert not list(tmp_path.glob("*/state.json"))


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    flags = {"preset": "builtin", "data": [write_rows(tmp_path / "d.jsonl", 40)]}
    assert facts(plan_run(flags))["rows"].startswith("40 read")
    write_rows(tmp_path / "d.jsonl", 41)
    assert facts(plan_run(flags))["rows"].startswith("41 read")


def test_a_larger_batch_takes_more_memory_and_too_large_a_one_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (plan_run({"preset": "builtin", "per_device_train_batch_size": n}) for n in (1, 512))
    assert small.memory is not None
    assert large.memory is not None
    assert small.memory.peak_bytes < large.memory.peak_bytes
    tiny = Device("cpu", "a small machine", small.memory.peak_bytes - 1, "float32")
    monkeypatch.setattr(models, "detect_device", lambda: tiny)
    plan = plan_run({"preset": "builtin", "per_device_train_batch_size": 1, "dtype": "bfloat16"})
    assert "more memory than there is" in told(plan)
    assert plan.memory_share > 1
    assert facts(plan)["steps"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_r": 0, "learning_rate": "fast"}, ["lora_r = 0", "learning_rate = 'fast'"]),
        ({"learning_rate": "none"}, ["learning_rate = None"]),
        ({"no_such_thing": 1}, ["no such setting"]),
        ({"run_name": "../x"}, ["should be a plain folder name"]),
        ({"preset": "bultin"}, ['Did you mean "builtin"']),
        ({"data": ["nowhere.jsonl"]}, ["nowhere.jsonl: No such file"]),
        ({"heldout_data": ["nowhere.jsonl"]}, ["nowhere.jsonl: No such file"]),
        ({"preset": "gpu-8gb"}, ["is for a CUDA GPU with 8 GB"]),
        ({"model_name_or_path": "./no/base", "preset": "none"}, ["no such folder"]),
        ({"max_length": 4096}, ["--max-length 256 or less"]),
        ({"dtype": "float16"}, ["float16 does not train on a CPU"]),
        ({"data": ["{empty}"]}, ["the file has no rows"]),
        ({"data": ["{bad}"]}, ["No usable row"]),
        ({"data": ["{folder}"]}, ["{folder}"]),
        ({"data": ["{rows}", "{rows}"]}, ["given twice"]),
        ({"map": ["nonsense"]}, ["nonsense"]),
        ({"encoding": "klingon"}, ["klingon"]),
        pytest.param(
            {"lora_target_modules": ["typo"]},
            ["typo"],
        ),
        ({"early_stopping_patience": 2, "load_best_model_at_end": False}, ["needs load_best"]),
        ({"max_length": 16}, ["No row is left to train on"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told_as_a_problem(flags: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n' * 3)
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "rows.jsonl")
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("empty", "bad", "rows")}
    places["folder"] = str(tmp_path / "folder")
    filled = {k: [e.format(**places) for e in v] if isinstance(v, list) else v for k, v in flags.items()}
    plan = plan_run({"preset": "builtin", **filled})
    for word in words:
        assert word.format(**places) in told(plan)
    assert plan.command.startswith("python -m qlora_tune train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_a_problem(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    Path(file).chmod(0)
    assert "rows.jsonl" in told(plan_run({"preset": "builtin", "data": [file]}))


def test_a_base_on_the_hub_is_a_problem_while_offline() -> None:
    plan = plan_run({"preset": "cpu-small"})
    assert "SmolLM2-135M" in told(plan)
    assert "builtin works offline" in told(plan)
    assert facts(plan)["base model"].startswith("HuggingFaceTB/SmolLM2-135M")
    assert plan.memory is None
    assert plan.memory_share == 0


def test_a_busy_device_is_a_problem_with_the_name_of_its_run(tmp_path: Path) -> None:
    run = new_run(settings(runs_dir=str(tmp_path), run_name="busy one"))
    lock = lock_device("cpu")
    try:
        lock.write_holder(run)
        plan = plan_run({"preset": "builtin"})
        assert f"{tmp_path / 'busy one'} is running" in told(plan)
        assert facts(plan)["steps"]  # the card still says what it would do
    finally:
        lock.release()
    assert plan_run({"preset": "builtin"}).problems == []


def test_a_plan_leaves_the_device_free_and_makes_no_run(tmp_path: Path) -> None:
    plan_run({"preset": "builtin", "runs_dir": str(tmp_path)})
    lock_device("cpu").release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_name_that_is_taken_is_a_problem_before_start(tmp_path: Path) -> None:
    new_run(settings(runs_dir=str(tmp_path), run_name="mine"))
    assert "exists" in told(plan_run({"preset": "builtin", "runs_dir": str(tmp_path), "run_name": "mine"}))


def test_the_command_on_the_card_prints_the_same_settings_in_a_terminal(tmp_path: Path) -> None:
    name = "my \"rows\" & 'more'.jsonl"
    flags = {"preset": "builtin", "data": [write_rows(tmp_path / name)], "load_in_4bit": False, "eval_steps": 0.5}
    flags |= {"lora_target_modules": ["q_proj", "v_proj"], "runs_dir": str(tmp_path / "my runs")}
    plan = plan_run(flags)
    assert plan.problems == []
    words = shlex.split(plan.command)
    assert words[:4] == ["python", "-m", "qlora_tune", "train"]
    shown = subprocess.run(
        [sys.executable, "-m", "qlora_tune", "config", "--data", *words[4:]],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "400"},
    )
    assert shown.returncode == 0, shown.stderr
    for setting, value in (("load_in_4bit", "false"), ("lora_target_modules", "q_proj, v_proj"), ("data", name)):
        line = next(line for line in shown.stdout.splitlines() if line.split()[:1] == [setting])
        assert value in line
        assert "flag" in line


def test_a_second_look_at_the_same_data_is_quick(tmp_path: Path) -> None:
    flags = {"preset": "builtin", "data": [write_rows(tmp_path / "d.jsonl", 3000)]}
    seconds = []
    for rate in (1e-3, 2e-3):
        began = time.perf_counter()
        assert facts(plan_run({**flags, "learning_rate": rate}))["rows"].startswith("3,000 read")
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < seconds[0] / 2
