"""What a run will take, said before anything is loaded: its peak memory by part, and its training time.

Station before training, for the card beside Start. Reads a base's config.json and the headers of its safetensors,
never a weight.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_tune.base import BaseModel, read_header
from qlora_tune.config import TrainConfig
from qlora_tune.errors import TuneError
from qlora_tune.model import ONE_THREAD_HIDDEN, Device, Precision, is_named, unknown_names
from qlora_tune.prepare import PAD_TO, SHORT_ROWS, checkpoints_activations, optimizer_of
from qlora_tune.runs import Run

HEAD_TOKENS, HEAD_WORDS = 4096, 32768  # TRL's fused head goes over tiles of so many learned tokens x words

# Fitted to the peaks that estimate_memory names [bytes].
CPU_LIBRARIES = 600_000_000  # torch, transformers, peft, trl, bitsandbytes, datasets and oneDNN's kernels
CUDA_LIBRARIES = 600_000_000  # CUDA context and workspaces; DESIGN section 5, not measured here
TILE_COPIES = 8.6  # float32 copies of a tile of logits while its gradient is made without Triton
HEAP_COPIES, HEAP_LIMIT = 17, 540_000_000  # of tiles below 32 MiB, which glibc's heap keeps; model._keep_freed_memory
# oneDNN's kernels for each padded length beyond those of the first steps; seen for up to 14 lengths.
KERNELS, KERNELS_AT_FIRST, KERNELS_AT_MOST = 70_000_000, 6, 14
SLACK = {2: 1.3, 4: 1.6}  # of activations, by bytes of a number: temporary copies, and what the allocator keeps

# FLOP/s that training reaches. A CPU's are of one thread; a GPU's dense 16-bit peak is from its data sheet.
CPU_RATE: dict[Precision, float] = {"bfloat16": 1e11, "float16": 3.7e10, "float32": 3.7e10}
GPU_PEAK = {
    **{"T4": 65e12, "V100": 125e12, "A10": 125e12, "L4": 121e12, "L40": 181e12, "A100": 312e12},
    **{"H100": 989e12, "H200": 989e12, "3060": 25e12, "3090": 71e12, "4060": 30e12, "4090": 165e12},
}
UNKNOWN_GPU_PEAK = 30e12
GPU_SHARE = 0.25
LAYER_SECONDS = {"cpu": 0.034, "cuda": 0.005}  # per layer and micro-batch, beside the arithmetic

# bytes of optimizer state per adapter parameter, beside 4 of the weight and 4 of its gradient
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "adafactor": 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run holds when it holds most, by part in plain words."""

    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class BaseShape:
    """A base model's sizes [numbers of weights or units]."""

    linear: dict[str, tuple[int, int]]  # the layers' 2-D weights by module name
    other: int  # parameters that stay unquantized: embeddings, head, norms, biases
    layers: int
    hidden: int
    mlp: int
    heads: int
    query: int  # width of all query heads
    key_value: int  # width of all key, or value, heads
    vocabulary: int

    @property
    def in_layers(self) -> int:
        return sum(rows * columns for rows, columns in self.linear.values())


@lru_cache(maxsize=4)
def read_shape(base: BaseModel) -> BaseShape:
    """Read a base's sizes from its config.json and the headers of its safetensors; what one lacks the other tells."""
    config = base.read_config()
    tensors = dict(_read_headers(base))
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    inside = {name: shape for name, shape in tensors.items() if re.search(r"\.\d+\.", name)}
    linear = {name.removesuffix(".weight"): (s[0], s[1]) for name, s in inside.items() if len(s) == 2}
    outside = [(s[0], s[1]) for name, s in tensors.items() if name not in inside and len(s) == 2]
    words, width = max(outside, key=math.prod, default=(0, 0))
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or width
    heads = _number(config, "num_attention_heads", "n_head") or max(1, hidden // 64)
    head = _number(config, "head_dim") or hidden // heads
    return BaseShape(
        linear=linear,
        other=sum(math.prod(s) for s in tensors.values()) - sum(math.prod(s) for s in linear.values()),
        layers=len({match[1] for name in linear if (match := re.search(r"\.(\d+)\.", name))})
        or _number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        mlp=_number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        heads=heads,
        query=heads * head,
        key_value=(_number(config, "num_key_value_heads") or heads) * head,
        vocabulary=_number(config, "vocab_size") or words,
    )


def estimate_memory(
    base: BaseModel,
    config: TrainConfig,
    device: Device,
    precision: Precision,
    longest: int,
    learned_share: float = 0.5,
) -> MemoryEstimate:
    """Estimate the peak memory of training: of the GPU, or of the process on a CPU, its libraries included.

    `longest` is the longest row [tokens]; `learned_share` the share of a batch's positions that are learned.
    Scoring after training is not covered. On a CPU the base's file stays mapped, and counts: the kernel can drop
    those pages when memory gets short.
    Weights by QLoRA (arXiv 2305.14314); activations counted with saved-tensor hooks on Llama models. The constants
    were fitted to 21 peaks of 0.9 to 8.8 GB on a CPU with AMX (19 of them met within 15 %): bases of 3.5M, 25M, 135M
    and 179M parameters, rows of 220 to 1,024 tokens, 1 to 64 of them, six steps; the growth after those steps to
    one whole run of the built-in base; 30 steps of the 25M base, not fitted to, took 14 % less. The part for a GPU
    was not measured.
    """
    shape = read_shape(base)
    on_cpu = device.kind == "cpu"
    tokens = config.per_device_train_batch_size * (math.ceil(longest / PAD_TO) * PAD_TO if on_cpu else longest)
    adapted = _adapted(shape, config)
    unit = 4 if precision == "float32" else 2
    parts = _weight_bytes(base, shape, config, on_cpu, unit)
    parts["adapter and optimizer"] = _adapter_parameters(adapted, config) * _adapter_bytes(config, device, unit)
    parts["activations"] = int(tokens * _activation_bytes(shape, config, device, unit, longest))
    parts["loss head"] = _head_bytes(shape, int(tokens * learned_share), on_cpu, unit)
    if on_cpu:
        parts["kernels by row length"] = _kernel_bytes(config, longest)
    parts["libraries"] = CPU_LIBRARIES if on_cpu else CUDA_LIBRARIES
    return MemoryEstimate(parts)


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
    `earlier` of the same base, device, precision and activation checkpointing gives the speed, if there is one. Else
    4 N FLOPs a token, 6 N with activation checkpointing (QLoRA trains no weight of the base), and a time per layer
    and micro-batch. On a CPU fitted to a whole run of the built-in base and to six steps of bases of 25M and 135M
    parameters on one AMX thread, two processes side by side; a second thread adds 55 %. A GPU is taken at a quarter
    of its data sheet's peak, one that is not listed at a quarter of 30 TFLOP/s: not measured, a rough guess.
    """
    batch, micro_batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    an_epoch = math.ceil(math.ceil(summary["train_sequences"] / batch) / micro_batches)
    tokens = float(summary["train_tokens"] * total_steps / max(1, an_epoch))
    speed = _earlier_speed(base, config, device, precision, earlier)
    if speed:
        return tokens / speed
    shape = read_shape(base)
    passes = 6 if checkpoints_activations(config, device) else 4
    flops = passes * (shape.in_layers + shape.vocabulary * shape.hidden)
    waiting = total_steps * micro_batches * shape.layers * LAYER_SECONDS[device.kind]
    return tokens * flops / _rate(shape, device, precision) + waiting


def _earlier_speed(
    base: BaseModel, config: TrainConfig, device: Device, precision: Precision, earlier: Sequence[Run]
) -> float | None:
    """Tokens per second of the newest earlier run that did the same work; None where there is none."""
    same = {"base_fingerprint": base.fingerprint, "device": device.name, "precision": precision}
    newest: tuple[float, float] | None = None
    for run in earlier:
        with contextlib.suppress(TuneError, OSError):  # a folder that can't be read tells nothing
            state = run.read_state()
            alike = all(state.get(key) == value for key, value in same.items()) and (
                checkpoints_activations(run.read_config(), device) == checkpoints_activations(config, device)
            )
            created = float(state.get("created", 0))
            if not alike or (newest is not None and created < newest[0]):
                continue
            speeds = [entry["tokens_per_s"] for entry in run.read_metrics() if entry.get("tokens_per_s")]
            newest = (created, float(speeds[-1])) if speeds else newest
    return newest[1] if newest else None


def _rate(shape: BaseShape, device: Device, precision: Precision) -> float:
    """FLOP/s that training is likely to reach."""
    if device.kind == "cuda":
        peaks = [peak for name, peak in GPU_PEAK.items() if re.search(rf"\b{name}\b", device.name)]
        return GPU_SHARE * (peaks[0] if peaks else UNKNOWN_GPU_PEAK)
    found = re.search(r"(\d+) thread", device.name)
    threads = 1 if found is None or shape.hidden <= ONE_THREAD_HIDDEN else int(found[1])
    return CPU_RATE[precision] * float(threads**0.63)


def _read_headers(base: BaseModel) -> Iterator[tuple[str, list[int]]]:
    """Each tensor's name and shape."""
    for file in sorted(base.path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = read_header(stream)[1]
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is a number; 0 where none is."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _weight_bytes(base: BaseModel, shape: BaseShape, config: TrainConfig, on_cpu: bool, unit: int) -> dict[str, int]:
    """The base's bytes by part. On a CPU weights kept as they are stored are read in place, which maps the file."""
    if not config.load_in_4bit:
        return {"base": (shape.in_layers + shape.other) * unit}
    quantized = int(shape.in_layers * (0.516 if config.bnb_4bit_use_double_quant else 0.5625))
    parts = {"4-bit base": quantized, "unquantized layers": shape.other * unit}
    if on_cpu:
        stored = sum(file.stat().st_size for file in base.path.glob("*.safetensors"))
        kept = shape.other * unit if unit == 2 else 0
        parts["base's file, kept mapped"] = max(0, stored - kept)
    return parts


def _adapted(shape: BaseShape, config: TrainConfig) -> list[tuple[int, int]]:
    """Sizes of the linear layers that get an adapter, by PEFT's rule: the whole name, or its last parts."""
    names = config.lora_target_modules
    if names == ["all-linear"]:
        return list(shape.linear.values())
    return [size for name, size in shape.linear.items() if any(is_named(name, t) for t in names)]


def unknown_targets(base: BaseModel, targets: Sequence[str]) -> list[str]:
    """Those of lora_target_modules that mean no linear layer of a base."""
    return [] if list(targets) == ["all-linear"] else unknown_names(targets, read_shape(base).linear)


def _adapter_parameters(adapted: Sequence[tuple[int, int]], config: TrainConfig) -> int:
    return sum(config.lora_r * (rows + columns) + config.use_dora * rows for rows, columns in adapted)


def _adapter_bytes(config: TrainConfig, device: Device, unit: int) -> int:
    """Bytes per adapter parameter: float32 weight and gradient, optimizer, and autocast's copy in 16 bits."""
    return 8 + OPTIMIZER_BYTES.get(optimizer_of(config, device), 2) + (2 if unit == 2 else 0)


def _activation_bytes(shape: BaseShape, config: TrainConfig, device: Device, unit: int, longest: int) -> float:
    """Bytes that one token holds between forward and backward pass, over all layers.

    A layer keeps two float32 residuals for its norms, three MLP products, queries, keys and values, and the inputs
    of the adapters. Plain attention also keeps its scores: float32, and once more in 16 bits.
    """
    plain = device.kind == "cpu" and longest <= SHORT_ROWS
    adapted = _adapted(shape, config)
    share = len(adapted) / max(1, len(shape.linear))
    residuals = 8 * shape.hidden
    mlp = 3 * unit * shape.mlp
    if plain:
        attention = 4 * unit * shape.query + shape.heads * longest * (6 if unit == 2 else 4)
    else:
        attention = unit * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads
    lora = share * unit * (2 * shape.hidden + shape.mlp) + unit * config.lora_r * len(adapted) / max(1, shape.layers)
    layer = residuals + mlp + attention + lora
    if checkpoints_activations(config, device):
        return SLACK[unit] * (layer + shape.layers * unit * shape.hidden)
    return SLACK[unit] * shape.layers * layer


def _kernel_bytes(config: TrainConfig, longest: int) -> int:
    """Bytes of the kernels that oneDNN compiles for every padded length that batches can have."""
    lengths = min(math.ceil(longest / PAD_TO), KERNELS_AT_MOST)
    if config.max_steps > 0:
        lengths = min(lengths, config.max_steps)
    return KERNELS * max(0, lengths - KERNELS_AT_FIRST)


def _head_bytes(shape: BaseShape, learned: int, on_cpu: bool, unit: int) -> int:
    """Bytes of one tile of logits, and on a CPU of the float32 copies that its gradient goes through."""
    rows, words = min(learned, HEAD_TOKENS), min(shape.vocabulary, HEAD_WORDS)
    if not on_cpu:
        return rows * HEAD_WORDS * unit + learned * shape.hidden * 4
    tile = 4 * rows * words
    return int(TILE_COPIES * tile + min(HEAP_LIMIT, HEAP_COPIES * tile)) + 4 * (words + learned) * shape.hidden
