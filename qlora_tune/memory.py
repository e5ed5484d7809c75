"""What memory training will take, said before anything is loaded, and the settings by which it fits.

Station before training: the card beside Start shows it, and train.py runs by it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qlora_tune import processes, system_memory
from qlora_tune.adapters import is_named, unknown_names, virtual_tokens_of
from qlora_tune.base import BaseModel
from qlora_tune.base_shape import BaseShape, read_shape
from qlora_tune.config import TrainConfig
from qlora_tune.layout import BATCH_ROUND, BLOCK, HEAD_ROWS, HEAD_WORDS, LONGEST_PLAIN, WHOLE, group_rows, query_blocks
from qlora_tune.model import Device, Precision
from qlora_tune.prepare import PAD_TO, SHORT_ROWS, optimizer_of

CPU_TOKENS = 4096  # a tenth faster than 2,048 on a base of 135M, for 1.3 GB more
GPU_TOKENS = 8192
TRL_HEAD_TOKENS, TRL_HEAD_WORDS = 4096, 32768  # TRL's fused head goes over tiles of so many learned tokens x words

# Measured, or fitted to the peaks that estimate_memory names [bytes].
CPU_LIBRARIES = 630_000_000  # torch, transformers, peft, trl, bitsandbytes, datasets: a base of next to nothing
CUDA_BUILD = 360_000_000  # what libraries of a GPU take besides where torch's build for one runs on a CPU
# On a CPU what autograd keeps lies in an arena, to the byte. Around it are passing tensors, some in places there and
# some in glibc's heap, whose holes are larger than they; what the optimizer and torch's sums of gradients leave there,
# by the adapter's bytes; and where weights are not kept, those of a layer, dequantized at each use. By bytes of a
# number: in float32, for processors without bfloat16, products are MKL's, which copies less and compiles nothing.
PASSING, UNKEPT, HOLES = {2: 5.2, 4: 3.7}, {2: 10, 4: 1}, 1.3
LOOSE, AGAIN = 0.13, 1.4  # in float32, of activations what glibc's heap wastes; and of unquantized layers
# oneDNN's kernels: those of a short run, which a base of next to nothing hardly has, and those of each length of a
# micro-batch beyond. About 40 go with a length, and oneDNN keeps 1,024 of them.
FIRST_SHAPES, SHAPE, SHAPES_AT_FIRST, SHAPES_AT_MOST = 35_000_000, 24_000_000, 8, 25
CUDA_LIBRARIES = 600_000_000  # CUDA context and workspaces; DESIGN section 5, not measured here
TILE_COPIES = 8.6  # float32 copies of a tile of logits while its gradient is made without Triton
HEAP_COPIES, HEAP_LIMIT = 17, 540_000_000  # of tiles below 32 MiB, which glibc's heap keeps; model._keep_freed_memory
LENGTHS_FROM = 50  # steps
# oneDNN's kernels for each padded length beyond those of the first steps; seen for up to 14 lengths.
KERNELS, KERNELS_AT_FIRST, KERNELS_AT_MOST = 70_000_000, 6, 14
SLACK = {2: 1.3, 4: 1.6}  # of plain activations, by bytes of a number: temporary copies, and what the allocator keeps

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
class Fit:
    """How a run uses memory: settings that change its speed and its peak, and nothing of what is learned."""

    max_tokens: int  # of a micro-batch on the fast path
    checkpointing: bool  # recompute activations in the backward pass
    keep_weights: bool  # hold 4-bit weights dequantized as well
    offload: bool = False  # what recomputing begins with waits in the host's memory, not in the GPU's

    def describe(self) -> str:
        """In words, for the card and the log."""
        words = f"micro-batches of up to {self.max_tokens:,} tokens"
        if self.keep_weights:
            words += ", weights kept dequantized"
        words += ", activations recomputed" if self.checkpointing else ""
        return words + (" from the host's memory" if self.offload else "")


def possible_fits(config: TrainConfig, device: Device, longest: int) -> list[Fit]:
    """The fits to try, the fastest first: each takes less memory than the one before it."""
    asked = config.per_device_train_batch_size * longest
    effective = asked * config.gradient_accumulation_steps
    usual = min(asked, CPU_TOKENS) if device.kind == "cpu" else max(asked, min(effective, GPU_TOKENS))
    sizes = [max(longest, usual)]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    wanted = config.activation_checkpointing
    fits = [] if wanted == "on" else [Fit(sizes[0], False, True), *(Fit(size, False, False) for size in sizes)]
    if wanted != "off" and config.peft_type != "PREFIX_TUNING":
        fits += [Fit(size, True, False) for size in sizes]
        fits += [Fit(longest, True, False, offload=True)] if device.kind == "cuda" and config.fast else []
    return fits


def choose_fit(
    base: BaseModel,
    config: TrainConfig,
    device: Device,
    precision: Precision,
    lengths: Sequence[int],
    free_bytes: int,
    learned_share: float = 0.5,
) -> tuple[Fit, MemoryEstimate]:
    """The fastest fit whose estimated peak is within free_bytes, or the smallest there is; and its estimate."""
    tried = []
    for fit in possible_fits(config, device, max(lengths)):
        memory = estimate_memory(base, config, device, precision, lengths, learned_share, fit)
        if memory.peak_bytes <= free_bytes:
            return fit, memory
        tried.append((fit, memory))
    return min(tried, key=lambda each: each[1].peak_bytes)


def estimate_memory(
    base: BaseModel,
    config: TrainConfig,
    device: Device,
    precision: Precision,
    lengths: Sequence[int],
    learned_share: float = 0.5,
    fit: Fit | None = None,
) -> MemoryEstimate:
    """Estimate the peak memory of training: of the GPU, or of the process on a CPU, its libraries included.

    `lengths` are those of the rows [tokens]; `learned_share` the share of positions that are learned; `fit` by
    default the first possible one. Scoring after training is not covered. Weights by QLoRA (arXiv 2305.14314); what
    activations are held follows the functions in fused.py. On a CPU, the libraries taken off, within 10 % of the
    medians of 24 combinations in bfloat16 and within a fifth of single short runs (benchmarks/memory.py), to which four
    of the constants are fitted; in float32, three others, within 10 % of 18 of them. Loading the base, which for a
    moment holds all of its file, is not covered. Not measured on a GPU.
    """
    shape = read_shape(base)
    on_cpu = device.kind == "cpu"
    unit = 4 if precision == "float32" else 2
    fit = fit or possible_fits(config, device, max(lengths))[0]
    parts = _weight_bytes(shape, config, unit)
    parts["adapter and optimizer"] = _adapter_parameters(shape, config) * _adapter_bytes(config, device)
    if config.fast:
        parts |= _fast_bytes(shape, config, fit, lengths, learned_share, unit, on_cpu)
    else:
        parts |= _plain_bytes(shape, config, fit, max(lengths) + virtual_tokens_of(config), learned_share, unit, on_cpu)
    parts["libraries"] = cpu_libraries() if on_cpu else CUDA_LIBRARIES
    return MemoryEstimate(parts)


def cpu_libraries() -> int:
    """Bytes that the libraries take on a CPU before anything is loaded."""
    import torch

    return CPU_LIBRARIES + (CUDA_BUILD if torch.version.cuda else 0)


def _fast_bytes(
    shape: BaseShape,
    config: TrainConfig,
    fit: Fit,
    lengths: Sequence[int],
    learned_share: float,
    unit: int,
    on_cpu: bool,
) -> dict[str, int]:
    """What the fast path holds for its largest micro-batch: the longest rows, as many as fit."""
    adapted = _adapted(shape, config)
    inner = unit * config.lora_r * len(adapted) / max(1, shape.layers)
    # Rows that attend by sdpa keep no scores, so that shorter ones may hold more.
    found = [_largest_batch(config, fit.max_tokens, lengths)]
    if on_cpu and (plain := [length for length in lengths if length <= LONGEST_PLAIN]):
        found.append(_largest_batch(config, fit.max_tokens, plain))
    held, tokens = max(_held_bytes(shape, fit, rows, unit, inner, on_cpu) for rows in found)
    by_kernel = max(_held_by_sdpa(shape, fit, rows, unit, on_cpu) for rows in found)
    learned = int(tokens * learned_share)
    tile = min(HEAD_ROWS, learned) * min(HEAD_WORDS, shape.vocabulary) * (2 * unit + 4)
    copies = tokens * unit * (4 * shape.mlp + 2 * shape.hidden)
    if on_cpu:
        passing = PASSING[unit] * (copies + (tile if unit == 2 else 0))
    else:
        passing = max(copies, tile + learned * shape.hidden * (2 * unit + 8))
    parameters = _adapter_parameters(shape, config)
    parts = {
        "activations": int(held + by_kernel),
        "temporary copies and loss head": int(passing),
        "adapter in compute precision": parameters * unit,
    }
    if on_cpu and unit == 4:
        parts["holes in the heap"] = int(HOLES * 4 * parameters + LOOSE * (held + by_kernel))
        parts["copies of unquantized layers"] = int(AGAIN * unit * shape.other)
    elif on_cpu:
        parts["holes in the heap"] = int(HOLES * 4 * parameters)
        seen = min(_count_lengths(config, fit.max_tokens, lengths), SHAPES_AT_MOST)
        parts["kernels by length"] = FIRST_SHAPES + SHAPE * max(0, seen - SHAPES_AT_FIRST)
    if config.load_in_4bit and fit.keep_weights:
        parts["weights kept dequantized"] = shape.in_layers * unit
    elif config.load_in_4bit and on_cpu:
        parts["weights in use dequantized"] = int(UNKEPT[unit] * unit * shape.in_layers / max(1, shape.layers))
    return parts


def _held_bytes(
    shape: BaseShape, fit: Fit, rows: Sequence[int], unit: int, inner: float, on_cpu: bool
) -> tuple[float, int]:
    """What the fast path's functions keep of a micro-batch, fillers included, and its tokens."""
    tokens = sum(rows)
    if on_cpu:
        tokens = math.ceil(tokens / BATCH_ROUND) * BATCH_ROUND
    states = tokens * unit * shape.hidden
    layer = tokens * (unit * (4 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 2 * shape.mlp) + 8 + inner)
    if on_cpu:
        layer += unit * shape.heads * sum(map(_scores, rows))
    waiting = 0 if fit.offload else shape.layers * states
    return (layer + waiting if fit.checkpointing else shape.layers * layer) + 2 * states, tokens


def _held_by_sdpa(shape: BaseShape, fit: Fit, rows: Sequence[int], unit: int, on_cpu: bool) -> int:
    """What sdpa keeps beside that: keys and values once for each query head, its result, a number for each query.

    On a CPU these lie in the heap, and rows that attend otherwise don't use their memory.
    """
    tokens = sum(row for row in rows if not on_cpu or row > LONGEST_PLAIN)
    copies = 2 * max(0, shape.query - shape.key_value) + (shape.query if on_cpu else 0)
    return tokens * (unit * copies + 4 * shape.heads) * (1 if fit.checkpointing else shape.layers)


def _largest_batch(config: TrainConfig, max_tokens: int, lengths: Sequence[int]) -> list[int]:
    """Lengths of the largest micro-batch that these rows can make: the longest, and what still fits beside it."""
    rows: list[int] = []
    room = max_tokens
    for length in sorted(lengths, reverse=True):
        if not rows or length <= room:
            rows.append(length)
            room -= length
        if len(rows) == config.per_device_train_batch_size * config.gradient_accumulation_steps:
            break
    return rows


def _count_lengths(config: TrainConfig, max_tokens: int, lengths: Sequence[int]) -> int:
    """How many lengths micro-batches have, fillers included, in the first steps; later ones bring few new ones."""
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = min(config.max_steps, LENGTHS_FROM) if config.max_steps > 0 else LENGTHS_FROM
    batches = (lengths[start : start + effective] for start in range(0, len(lengths), effective))
    sums = (
        sum(batch[row] for row in group) for batch in islice(batches, steps) for group in group_rows(batch, max_tokens)
    )
    return len({math.ceil(tokens / BATCH_ROUND) for tokens in sums})


def _scores(length: int) -> int:
    """Attention's scores that a row keeps per head on a CPU."""
    if length > LONGEST_PLAIN:
        return 0
    return sum((end - start) * end for start, end in query_blocks(length, length if length <= WHOLE else BLOCK))


def _plain_bytes(
    shape: BaseShape, config: TrainConfig, fit: Fit, longest: int, learned_share: float, unit: int, on_cpu: bool
) -> dict[str, int]:
    """What the plain way holds: padded rows, full attention scores, TRL's loss head."""
    padded = math.ceil(longest / PAD_TO) * PAD_TO if on_cpu else longest
    tokens = config.per_device_train_batch_size * padded
    parts = {
        "activations": int(tokens * _activation_bytes(shape, config, fit.checkpointing, on_cpu, unit, longest)),
        "loss head": _head_bytes(shape, int(tokens * learned_share), on_cpu, unit),
        "adapter in compute precision": _adapter_parameters(shape, config) * (2 if unit == 2 else 0),
    }
    if on_cpu:
        parts["kernels by row length"] = _kernel_bytes(config, longest)
    return parts


def free_bytes(device: Device) -> int:
    """What this process may hold in all: what is free now and what it has already, less a little for others."""
    import psutil
    import torch

    if device.kind == "cuda":
        free = int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
    else:
        available = system_memory.available_bytes() // processes.count()
        free = available + int(psutil.Process().memory_info().rss)
    return int(free * 0.95)


def peak_bytes(device: Device) -> int:
    """The most that this process has held: allocated on a GPU, resident on a CPU."""
    import psutil
    import torch

    if device.kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent process held before exec
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: Device) -> None:
    """Let peak_bytes count anew from what is held now, before another run in the same process."""
    import torch

    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # where the kernel doesn't offer it, the peak is that of all runs so far
        Path("/proc/self/clear_refs").write_text("5")


def _weight_bytes(shape: BaseShape, config: TrainConfig, unit: int) -> dict[str, int]:
    """The base's bytes by part."""
    if not config.load_in_4bit:
        return {"base": (shape.in_layers + shape.other) * unit}
    quantized = int(shape.in_layers * (0.516 if config.bnb_4bit_use_double_quant else 0.5625))
    return {"4-bit base": quantized, "unquantized layers": shape.other * unit}


def _adapted(shape: BaseShape, config: TrainConfig) -> list[tuple[int, int]]:
    """Sizes of the linear layers that get an adapter, by PEFT's rule: the whole name, or its last parts."""
    names = config.lora_target_modules if config.peft_type == "LORA" else []
    if names == ["all-linear"]:
        return list(shape.linear.values())
    return [size for name, size in shape.linear.items() if any(is_named(name, t) for t in names)]


def unknown_targets(base: BaseModel, targets: Sequence[str]) -> list[str]:
    """Those of lora_target_modules that mean no linear layer of a base."""
    return [] if list(targets) == ["all-linear"] else unknown_names(targets, read_shape(base).linear)


def _adapter_parameters(shape: BaseShape, config: TrainConfig) -> int:
    each = shape.hidden if config.peft_type == "PROMPT_TUNING" else 2 * shape.layers * shape.key_value
    lora = sum(config.lora_r * (rows + columns) + config.use_dora * rows for rows, columns in _adapted(shape, config))
    return lora + virtual_tokens_of(config) * each


def _adapter_bytes(config: TrainConfig, device: Device) -> int:
    """Bytes per adapter parameter: float32 weight and gradient, and the optimizer's state."""
    return 8 + OPTIMIZER_BYTES.get(optimizer_of(config, device), 2)


def _activation_bytes(
    shape: BaseShape, config: TrainConfig, checkpointing: bool, on_cpu: bool, unit: int, longest: int
) -> float:
    """Bytes that one token holds between forward and backward pass, over all layers.

    A layer keeps two float32 residuals for its norms, three MLP products, queries, keys and values, and the inputs
    of the adapters. Plain attention also keeps its scores: float32, and once more in 16 bits.
    """
    plain = on_cpu and longest <= SHORT_ROWS
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
    if checkpointing:
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
    rows, words = min(learned, TRL_HEAD_TOKENS), min(shape.vocabulary, TRL_HEAD_WORDS)
    if not on_cpu:
        return rows * TRL_HEAD_WORDS * unit + learned * shape.hidden * 4
    tile = 4 * rows * words
    return int(TILE_COPIES * tile + min(HEAP_LIMIT, HEAP_COPIES * tile)) + 4 * (words + learned) * shape.hidden
