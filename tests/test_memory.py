"""What a run will take: parts of the memory, how it is made to fit, and a really measured peak."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, settings

from qlora_tune import fast
from qlora_tune import train as training
from qlora_tune.base import BaseModel
from qlora_tune.base_shape import read_shape
from qlora_tune.errors import MemoryLimitError
from qlora_tune.memory import Fit, choose_fit, estimate_memory, possible_fits
from qlora_tune.model import Device, detect_device
from qlora_tune.prepare import prepare, prepare_data
from qlora_tune.runs import new_run

CPU = Device("cpu", "CPU, 2 threads", 16_000_000_000, "bfloat16")
GPU = Device("cuda", "NVIDIA GeForce RTX 3060", 12_000_000_000, "bfloat16")


def peak(base: BaseModel, longest: int = 200, device: Device = CPU, fit: Fit | None = None, **changes: Any) -> int:
    config = settings(**changes)
    rows = [longest] * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return estimate_memory(base, config, device, "bfloat16", rows, fit=fit).peak_bytes


def write_base(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> BaseModel:
    """A base of headers alone: no weight is ever read."""
    entries = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "config.json").write_text(json.dumps(config))
    return BaseModel("odd", None, folder, "0")


def write_rows(path: Path, count: int = 90) -> str:
    rows = [{"instruction": f"Say {n} " + "red and blue " * 18, "output": "green and grey " * 18} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_peak_is_the_sum_of_its_parts(builtin: Any) -> None:
    estimate = estimate_memory(builtin[0], settings(), CPU, "bfloat16", [200] * 16)
    assert estimate.peak_bytes == sum(estimate.parts.values())
    assert {"4-bit base", "adapter and optimizer", "activations", "libraries"} <= set(estimate.parts)
    assert min(estimate.parts.values()) >= 0


def test_parameters_are_counted_exactly(builtin: Any) -> None:
    shape = read_shape(builtin[0])
    assert (shape.layers, shape.hidden, shape.mlp, shape.vocabulary) == (8, 192, 512, 2048)
    assert shape.other == 2048 * 192 + 17 * 192  # embeddings, which are the head too, and norms
    assert shape.in_layers == 8 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    parts = estimate_memory(builtin[0], settings(lora_r="32"), CPU, "bfloat16", [200]).parts
    adapter = 8 * 32 * (2 * 384 + 2 * 256 + 3 * 704)
    assert parts["adapter and optimizer"] == adapter * 16  # float32 weight, gradient, Adam's two
    assert parts["adapter in compute precision"] == adapter * 2


def test_config_json_alone_tells_the_same_as_the_weights(builtin: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((builtin[0].path / "config.json").read_text())
    assert read_shape(BaseModel("far away", None, tmp_path, "")) == read_shape(builtin[0])


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("way", ["true", "false"], ids=["fast", "plain"])
def test_more_rows_longer_rows_and_a_larger_rank_cost_more(builtin: Any, device: Device, way: str) -> None:
    base = builtin[0]
    few = {"per_device_train_batch_size": "4", "fast": way, "device": device}
    usual = peak(base, **few)
    assert peak(base, **few | {"per_device_train_batch_size": "8"}) > usual
    assert peak(base, 256, **few) > usual
    assert peak(base, **few, lora_r="64") > usual
    assert peak(base, **few, lora_target_modules="q_proj,v_proj") < usual


@pytest.mark.parametrize("way", ["true", "false"], ids=["fast", "plain"])
def test_activation_checkpointing_costs_less(builtin: Any, way: str) -> None:
    on, off = (peak(builtin[0], fit=Fit(2048, checkpointing, False), fast=way) for checkpointing in (True, False))
    assert on < off


def test_4_bit_costs_less_than_16_bit_on_a_gpu(builtin: Any) -> None:
    assert peak(builtin[0], device=GPU) < peak(builtin[0], device=GPU, bnb_4bit_use_double_quant="false")
    lean = Fit(2048, False, False)
    assert peak(builtin[0], device=GPU, fit=lean) < peak(builtin[0], device=GPU, fit=lean, load_in_4bit="false")


@pytest.mark.parametrize("config", [{}, {"hidden_size": None, "num_attention_heads": "many"}, {"text_config": []}])
def test_an_odd_config_still_gets_an_estimate(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors = {"h.0.attn.weight": [128, 128], "h.1.attn.weight": [128, 128], "wte.weight": [1000, 128], "norm": [128]}
    base = write_base(tmp_path, config, tensors)
    shape = read_shape(base)
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.other) == (2, 128, 1000, 128_128)
    assert peak(base) > 0
    assert peak(write_base(tmp_path, config, {})) > 0


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_fits_begin_fast_and_end_with_one_row_and_recomputed_activations(device: Device) -> None:
    fits = possible_fits(settings(gradient_accumulation_steps="4"), device, 300)
    assert fits[0] == Fit(4096 if device is CPU else 8192, False, True)
    assert fits[-1] == Fit(300, True, False, offload=device is GPU)
    assert {fit.max_tokens >= 300 for fit in fits} == {True}
    assert not any(fit.checkpointing for fit in possible_fits(settings(activation_checkpointing="off"), device, 300))
    assert all(fit.checkpointing for fit in possible_fits(settings(activation_checkpointing="on"), device, 300))


def test_the_fastest_fit_within_the_free_memory_is_chosen(builtin: Any) -> None:
    config, rows = settings(), [200] * 16

    def chosen(free: int) -> Fit:
        return choose_fit(builtin[0], config, CPU, "bfloat16", rows, free)[0]

    fits = possible_fits(config, CPU, 200)
    assert chosen(16_000_000_000) == fits[0]
    costs = [estimate_memory(builtin[0], config, CPU, "bfloat16", rows, fit=fit).peak_bytes for fit in fits]
    for fit, cost in zip(fits, costs, strict=True):
        assert costs[fits.index(chosen(cost))] <= cost
        assert fits.index(chosen(cost)) <= fits.index(fit)
    assert costs[fits.index(chosen(0))] == min(costs)


def test_out_of_memory_leads_to_the_next_smaller_setting_and_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a CPU can't be made to run out, so a micro-batch above 300 tokens is said to."""
    changes = {"data": [write_rows(tmp_path / "rows.jsonl", 40)], "max_steps": "3", "heldout_share": "0"}
    losses, notes = [], []
    loss_sum = fast.FastModel.loss_sum

    def limited(model: Any, batch: Any) -> Any:
        if batch.tokens > 300:
            raise torch.OutOfMemoryError("no memory left")
        return loss_sum(model, batch)

    for name in ("enough", "little"):
        config = settings(**changes, runs_dir=str(tmp_path / name), run_name=name)
        run = new_run(config)
        training.train(config, run, prepare(config), on_note=notes.append)
        losses.append([entry["loss"] for entry in run.read_metrics()])
        monkeypatch.setattr(fast.FastModel, "loss_sum", limited)
    assert run.read_state()["fit"]["max_tokens"] <= 300
    assert sum("out of memory" in note for note in notes) >= 2
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_memory_that_never_suffices_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_fits", lambda *_: False)
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    changes = {"max_steps": "1", "activation_checkpointing": "on"}  # fewer settings to try
    config = settings(data=[rows], runs_dir=str(tmp_path / "runs"), **changes)
    run = new_run(config)
    with pytest.raises(MemoryLimitError, match="ran out of memory"):
        training.train(config, run, prepare(config))
    assert run.read_state()["status"] == "failed"


def test_the_estimate_is_close_to_a_measured_peak(builtin: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    config = settings(data=data, max_steps="4", score_rows="0", runs_dir=str(tmp_path / "runs"))
    prepared = prepare_data(config, builtin[2])
    flags = ["--preset", "builtin", "--max-steps", "4", "--score-rows", "0", "--runs-dir", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "qlora_tune", "train", data, *flags]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (state,) = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/state.json")]
    device = detect_device()
    learned = prepared.learned_share()
    estimate = estimate_memory(builtin[0], config, device, device.precision, prepared.lengths(), learned)
    assert estimate.peak_bytes == pytest.approx(state["peak_bytes"], rel=0.2)
    assert f"memory: {state['peak_bytes'] / 1e9:.2f} GB at most" in done.stdout
