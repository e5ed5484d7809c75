"""Whether training can work on this machine: each part is tried out rather than asked after.

What keeps training from working is told apart from what only costs time or needs a look.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qlora_tune import system_memory
from qlora_tune.base import find_base
from qlora_tune.errors import TuneError
from qlora_tune.launch import refuse_busy_device
from qlora_tune.model import Device, detect_device
from qlora_tune.plan import pick_here

_WRITTEN = 64 << 20  # bytes written to measure the disk: beyond a drive's own cache, a second on a slow one
_SLOW_MB_S = 20  # an SD card; a checkpoint of an 8B base's adapter, 0.5 GB, then takes half a minute
_LITTLE_DISK = 2 << 30  # bytes: three checkpoints of an 8B base's adapter with its optimizer
_ROUNDING = 2e-2  # of a 4-bit product: bfloat16 rounds to one part in 256
_NF4_NOISE = (0.05, 0.15)  # relative error of nf4 on normal weights, 0.09 to 0.10 (arXiv 2305.14314, measured)


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: what was found, and what to do about it (empty: nothing)."""

    what: str
    found: str
    advice: str = ""
    fatal: bool = False  # training can't work like this


def examine(runs_dir: str | Path) -> Iterator[Finding]:
    """Try everything that training needs, in the order in which it needs it. A part that fails ends none of the others.

    Asks the model hub for an answer unless HF_HUB_OFFLINE is set, and writes one file of 64 MiB into RUNS_DIR, or the
    folder that it will be made in, and removes it.
    """
    parts: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("device", _device),
        ("4-bit product", _product),
        ("memory", _memory),
        ("disk", lambda: _disk(Path(runs_dir))),
        ("base model", _base),
        ("cache", _cache),
        ("network", _network),
    ]
    for what, examine_part in parts:
        try:
            yield from examine_part()
        except Exception as error:  # whatever a broken installation raises is a finding
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            advice = (
                "Install again in a fresh virtual environment." if not isinstance(error, TuneError | OSError) else ""
            )
            yield Finding(what, words.splitlines()[0][:300], advice, fatal=what not in ("cache", "network"))


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("Python", f"{sys.version.split()[0]} on {sys.platform}")
    wanted = [Requirement(text) for text in metadata.requires("qlora-tune") or []]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not one.specifier.contains(found, prereleases=True):
            yield Finding(one.name, f"{found}, needs {one.specifier}", f'pip install "{one.name}{one.specifier}"', True)
    shown = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    yield Finding("libraries", ", ".join(f"{name} {metadata.version(name)}" for name in shown))


def _device() -> Iterator[Finding]:
    import torch

    device, advice = detect_device(), ""
    words = f"{device.name}, computes in {device.precision}"
    if device.kind == "cuda":
        major, minor = torch.cuda.get_device_capability(0)
        words += f", compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        words += "; there is an NVIDIA driver, which this torch doesn't use"
        advice = "Install the CUDA build of torch (pytorch.org), or look at CUDA_VISIBLE_DEVICES."
    yield Finding("device", words, advice)
    try:
        refuse_busy_device(device.kind)
    except TuneError as error:
        yield Finding("device", "in use", str(error))


def _product() -> Iterator[Finding]:
    """Multiply by weights in nf4 and compare with full precision: nothing else shows a broken bitsandbytes."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device = detect_device()
    kind, dtype = device.kind, getattr(torch, device.precision)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(256, 256, generator=generator) for _ in range(2))
    layer = Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight.data = weight.to(dtype)
    layer = layer.to(kind)
    with torch.inference_mode(False):
        held = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
        given = x.to(kind, dtype).requires_grad_()  # as in training: with a gradient
        product = layer(given)
        product.float().sum().backward()
    gradient = given.grad
    rounding = max(
        _relative(product.detach().float().cpu(), x @ held.T),
        _relative(gradient.float().cpu(), held.sum(0).expand(256, 256)) if gradient is not None else 1.0,
    )
    noise = _relative(held, weight)
    words = f"off by {rounding:.1e} from the same weights in full precision, which 4 bits changed by {noise:.1%}"
    right = rounding < _ROUNDING and _NF4_NOISE[0] < noise < _NF4_NOISE[1]
    advice = "" if right else "bitsandbytes computes wrongly here: install another version of it, or --no-load-in-4bit."
    yield Finding("4-bit product", words, advice, fatal=not right)


def _relative(one: object, other: object) -> float:
    """Size of the difference over the size of the second, by the norm."""
    return float((one - other).norm() / other.norm())  # type: ignore[operator, attr-defined]


def _memory() -> Iterator[Finding]:
    import torch

    device: Device = detect_device()
    free = torch.cuda.mem_get_info()[0] if device.kind == "cuda" else system_memory.available_bytes()
    name, reason = pick_here()
    share = f"{free / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB free"
    yield Finding("memory", f"{share}; preset {name} ({reason})")


def _disk(runs_dir: Path) -> Iterator[Finding]:
    place = next(folder for folder in (runs_dir.resolve(), *runs_dir.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    advice = "Free some space: checkpoints of a large base need a few GB." if free < _LITTLE_DISK else ""
    yield Finding("disk", f"{free / 2**30:.1f} GiB free for {runs_dir}", advice)
    block = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=place) as file:
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = _WRITTEN / (time.perf_counter() - begin) / 1e6
    advice = "" if speed > _SLOW_MB_S else "Choose a faster disk (--runs-dir), or fewer checkpoints (--save-steps)."
    yield Finding("writing", f"{speed:,.0f} MB/s", advice)


def _base() -> Iterator[Finding]:
    base = find_base("builtin")
    yield Finding("base model", f"the built-in one is whole ({base.fingerprint[:12]})")


def _cache() -> Iterator[Finding]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import CacheNotFound

    try:
        kept = scan_cache_dir()
    except CacheNotFound:
        yield Finding("cache", "no base was downloaded yet")
        return
    bases = sum(repo.repo_type == "model" for repo in kept.repos)
    advice = "" if os.access(HF_HUB_CACHE, os.W_OK) else "Nothing can be downloaded into it: set HF_HOME."
    yield Finding("cache", f"{bases} models, {kept.size_on_disk / 1e9:.1f} GB", advice)


def _network() -> Iterator[Finding]:
    import httpx
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    at_home = "The built-in base, and bases in folders or in the cache, work without."
    if HF_HUB_OFFLINE:
        yield Finding("network", "switched off by HF_HUB_OFFLINE", at_home)
        return
    try:
        httpx.head(ENDPOINT, timeout=5, follow_redirects=True)
    except httpx.HTTPError as error:
        yield Finding("network", f"the model hub doesn't answer ({type(error).__name__})", at_home)
    else:
        yield Finding("network", "the model hub answers")
