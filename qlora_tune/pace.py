"""How long training will take, said before it starts: from earlier runs of the same work, else from its arithmetic.

Station before training, for the card beside Start.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tune.base import BaseModel
from qlora_tune.base_shape import read_shape
from qlora_tune.config import TrainConfig
from qlora_tune.errors import TuneError
from qlora_tune.model import Device, Precision
from qlora_tune.runs import Run

# FLOP/s that matrix products reach in training. A CPU's are of one thread with AMX; a second thread adds 55 %. A GPU's
# dense 16-bit peak is from its data sheet, and a quarter of it taken.
CPU_RATE: dict[Precision, float] = {"bfloat16": 4.4e11, "float16": 3.7e10, "float32": 3.7e10}
GPU_PEAK = {
    **{"T4": 65e12, "V100": 125e12, "A10": 125e12, "L4": 121e12, "L40": 181e12, "A100": 312e12},
    **{"H100": 989e12, "H200": 989e12, "3060": 25e12, "3090": 71e12, "4060": 30e12, "4090": 165e12},
}
UNKNOWN_GPU_PEAK = 30e12
GPU_SHARE = 0.25
# What else takes time, per layer: on the fast path per token (passes over memory; of one thread) and per step, on the
# plain way per micro-batch.
TOKEN_SECONDS = {"cpu": 26e-6, "cuda": 0.0}
STEP_SECONDS = 0.005
BATCH_SECONDS = {"cpu": 0.034, "cuda": 0.005}
PLAIN_SLOWER = 4  # the plain way's arithmetic on a CPU, where conversions and full logits dominate


def estimate_seconds(
    base: BaseModel,
    config: TrainConfig,
    device: Device,
    precision: Precision,
    summary: Mapping[str, Any],
    total_steps: int,
    earlier: Sequence[Run] = (),
) -> float:
    """Estimate the training time [s], evaluations included, scoring of answers not.

    `summary` is PreparedData.summary(): its train_tokens and train_sequences count one epoch. The newest run in
    `earlier` of the same base, device, precision and way of training gives the speed, if there is one. Else 4 N
    FLOPs a token, 6 N with activation checkpointing (QLoRA trains no weight of the base), and a time per layer. On a
    CPU fitted to bases of 7M, 30M and 135M parameters and to a whole run of the built-in one, on two AMX threads. A
    GPU was not measured: a rough guess.
    """
    batch, micro_batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    an_epoch = math.ceil(math.ceil(summary["train_sequences"] / batch) / micro_batches)
    tokens = float(summary["train_tokens"] * total_steps / max(1, an_epoch))
    speed = _earlier_speed(base, config, device, precision, earlier)
    if speed:
        return tokens / speed
    shape = read_shape(base)
    passes = 6 if config.activation_checkpointing == "on" else 4
    work = passes * (shape.in_layers + shape.vocabulary * shape.hidden) / _rate(device, precision)
    if config.fast:
        work += shape.layers * TOKEN_SECONDS[device.kind] / _speed_up(device)
        return tokens * work + total_steps * shape.layers * STEP_SECONDS
    slower = PLAIN_SLOWER if device.kind == "cpu" else 1
    return tokens * work * slower + total_steps * micro_batches * shape.layers * BATCH_SECONDS[device.kind]


def _earlier_speed(
    base: BaseModel, config: TrainConfig, device: Device, precision: Precision, earlier: Sequence[Run]
) -> float | None:
    """Tokens per second of the newest earlier run that did the same work; None where there is none."""
    same = {"base_fingerprint": base.fingerprint, "device": device.name, "precision": precision}
    newest: tuple[float, float] | None = None
    for run in earlier:
        with contextlib.suppress(TuneError, OSError):  # a folder that can't be read tells nothing
            state, other = run.read_state(), run.read_config()
            alike = (
                all(state.get(key) == value for key, value in same.items())
                and other.activation_checkpointing == config.activation_checkpointing
                and other.fast == config.fast
                and not other.preference_data
            )
            created = float(state.get("created", 0))
            if not alike or (newest is not None and created < newest[0]):
                continue
            speeds = [entry["tokens_per_s"] for entry in run.read_metrics() if entry.get("tokens_per_s")]
            newest = (created, float(speeds[-1])) if speeds else newest
    return newest[1] if newest else None


def _rate(device: Device, precision: Precision) -> float:
    """FLOP/s that training is likely to reach."""
    if device.kind == "cuda":
        peaks = [peak for name, peak in GPU_PEAK.items() if re.search(rf"\b{name}\b", device.name)]
        return GPU_SHARE * (peaks[0] if peaks else UNKNOWN_GPU_PEAK)
    return CPU_RATE[precision] * _speed_up(device)


def _speed_up(device: Device) -> float:
    """What a CPU's threads gain together over one."""
    found = re.search(r"(\d+) thread", device.name)
    return float(int(found[1]) ** 0.63) if found else 1.0
