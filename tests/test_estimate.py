"""What a run will take, before it: parts of the memory, a really measured peak, speeds of earlier runs."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, settings

from qlora_tune import train
from qlora_tune.base import BaseModel
from qlora_tune.estimate import SHORT_ROWS, estimate_memory, estimate_seconds, read_shape
from qlora_tune.model import Device
from qlora_tune.prepare import prepare_data
from qlora_tune.runs import Run, new_run

CPU = Device("cpu", "CPU, 2 threads", 16_000_000_000, "bfloat16")
GPU = Device("cuda", "NVIDIA GeForce RTX 3060", 12_000_000_000, "bfloat16")
SUMMARY = {"train_tokens": 135_171, "train_sequences": 2096}


def peak(base: BaseModel, longest: int = 200, device: Device = CPU, **changes: Any) -> int:
    return estimate_memory(base, settings(**changes), device, "bfloat16", longest).peak_bytes


def seconds(base: BaseModel, *earlier: Run, device: Device = CPU, **changes: Any) -> float:
    return estimate_seconds(base, settings(**changes), device, "bfloat16", SUMMARY, 262, earlier)


def write_base(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> BaseModel:
    """A base of headers alone: no weight is ever read."""
    entries = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "config.json").write_text(json.dumps(config))
    return BaseModel("odd", None, folder, "0")


def write_run(config: Any, base: BaseModel, speed: float, **state: Any) -> Run:
    run = new_run(config)
    known = {"base_fingerprint": base.fingerprint, "device": CPU.name, "precision": "bfloat16"}
    run.update_state(status="finished", **known | state)
    run.add_metrics({"step": 1, "tokens_per_s": 1.0, "elapsed_s": 1.0})
    run.add_metrics({"step": 2, "tokens_per_s": speed, "elapsed_s": 2.0})
    run.add_metrics({"step": 2, "eval_loss": 1.0, "elapsed_s": 3.0})
    return run


def test_the_peak_is_the_sum_of_its_parts(builtin: Any) -> None:
    estimate = estimate_memory(builtin[0], settings(), CPU, "bfloat16", 200)
    assert estimate.peak_bytes == sum(estimate.parts.values())
    assert {"4-bit base", "adapter and optimizer", "activations", "loss head", "libraries"} <= set(estimate.parts)
    assert min(estimate.parts.values()) >= 0


def test_parameters_are_counted_exactly(builtin: Any) -> None:
    shape = read_shape(builtin[0])
    assert (shape.layers, shape.hidden, shape.mlp, shape.vocabulary) == (8, 192, 512, 2048)
    assert shape.other == 2048 * 192 + 17 * 192  # embeddings, which are the head too, and norms
    assert shape.in_layers == 8 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    parts = estimate_memory(builtin[0], settings(lora_r="32"), CPU, "bfloat16", 200).parts
    adapter = 8 * 32 * (2 * 384 + 2 * 256 + 3 * 704)
    assert parts["adapter and optimizer"] == adapter * 18  # float32 weight, gradient, Adam's two; a copy in 16 bits


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_more_rows_longer_rows_and_a_larger_rank_cost_more(builtin: Any, device: Device) -> None:
    base = builtin[0]
    usual = peak(base, device=device)
    assert peak(base, device=device, per_device_train_batch_size="32") > usual
    assert peak(base, 256, device=device) > usual
    assert peak(base, device=device, lora_r="64") > usual
    assert peak(base, device=device, lora_target_modules="q_proj,v_proj") < usual


def test_rows_are_short_where_training_finds_them_short() -> None:
    assert SHORT_ROWS == train.SHORT_ROWS


def test_plain_attention_costs_more_than_sdpa_of_hardly_longer_rows(builtin: Any) -> None:
    assert peak(builtin[0], 256) > peak(builtin[0], 272)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_activation_checkpointing_costs_less(builtin: Any, device: Device) -> None:
    on, off = (peak(builtin[0], device=device, activation_checkpointing=word) for word in ("on", "off"))
    assert on < off
    assert peak(builtin[0], device=device) == (on if device is GPU else off)


def test_4_bit_costs_less_than_16_bit_on_a_gpu(builtin: Any) -> None:
    assert peak(builtin[0], device=GPU) < peak(builtin[0], device=GPU, load_in_4bit="false")
    assert peak(builtin[0], device=GPU) < peak(builtin[0], device=GPU, bnb_4bit_use_double_quant="false")


def test_on_a_cpu_the_mapped_file_is_a_part_of_its_own(builtin: Any) -> None:
    parts = estimate_memory(builtin[0], settings(), CPU, "bfloat16", 200).parts
    size = (builtin[0].path / "model.safetensors").stat().st_size
    assert parts["base's file, kept mapped"] + parts["unquantized layers"] == size


@pytest.mark.parametrize("config", [{}, {"hidden_size": None, "num_attention_heads": "many"}, {"text_config": []}])
def test_an_odd_config_still_gets_an_estimate(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors = {"h.0.attn.weight": [128, 128], "h.1.attn.weight": [128, 128], "wte.weight": [1000, 128], "norm": [128]}
    base = write_base(tmp_path, config, tensors)
    shape = read_shape(base)
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.other) == (2, 128, 1000, 128_128)
    assert peak(base) > 0
    assert seconds(base) > 0
    assert peak(write_base(tmp_path, config, {})) > 0


def test_the_speed_of_the_newest_earlier_run_of_the_same_work_is_used(builtin: Any, tmp_path: Path) -> None:
    base, config = builtin[0], settings(runs_dir=str(tmp_path))
    slower = write_run(config, base, 500.0, created=1.0)
    newest = write_run(config, base, 1000.0, created=2.0)
    others = [
        write_run(config, base, 7.0, created=3.0, base_fingerprint="another"),
        write_run(config, base, 7.0, created=3.0, device="CPU, 64 threads"),
        write_run(settings(runs_dir=str(tmp_path), activation_checkpointing="on"), base, 7.0, created=3.0),
    ]
    broken = write_run(config, base, 7.0, created=3.0)
    (broken.path / "state.json").write_text("{")
    assert seconds(base, newest, slower, *others, broken) == pytest.approx(2 * 135_171 / 1000)
    assert seconds(base, *others, broken) == seconds(base)


def test_the_built_in_base_takes_about_two_minutes_without_an_earlier_run(builtin: Any) -> None:
    assert 60 < seconds(builtin[0]) < 180
    assert seconds(builtin[0], activation_checkpointing="on") > seconds(builtin[0])
    assert seconds(builtin[0], device=GPU) < seconds(builtin[0])


def test_the_estimate_is_close_to_a_measured_peak(builtin: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n} " + "red and blue " * 18, "output": "green and grey " * 18} for n in range(90)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(data=str(data), max_steps="4", score_rows="0", runs_dir=str(tmp_path / "runs"))
    summary = prepare_data(config, builtin[2]).summary()
    learned = summary["learned_tokens"] / summary["train_tokens"]
    flags = ["--preset", "builtin", "--max-steps", "4", "--score-rows", "0", "--runs-dir", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "qlora_tune", "train", str(data), *flags]
    log = (os.POSIX_SPAWN_OPEN, 1, str(tmp_path / "out.txt"), os.O_CREAT | os.O_WRONLY, 0o600)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    child = os.posix_spawn(sys.executable, command, environment, file_actions=[log, (os.POSIX_SPAWN_DUP2, 1, 2)])
    _, status, usage = os.wait4(child, 0)
    assert status == 0, (tmp_path / "out.txt").read_text()
    from qlora_tune.model import detect_device

    device = detect_device()
    estimate = estimate_memory(builtin[0], config, device, device.precision, summary["longest_sequence"], learned)
    assert estimate.peak_bytes == pytest.approx(usage.ru_maxrss * 1024, rel=0.25)
