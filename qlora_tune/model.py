"""Tokenizer and 4-bit base model: found and loaded.

Station between the tokenized rows and the adapter. Only safetensors are read, and code that comes
with a model is never run.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from qlora_tune import processes, system_memory
from qlora_tune.base import BaseModel
from qlora_tune.chat_format import ChatFormat, ensure_chat_template
from qlora_tune.errors import ModelError

_P = ParamSpec("_P")
_R = TypeVar("_R")
Precision = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Device:
    """Where the model runs. memory_bytes is the GPU's, or the machine's on a CPU."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    precision: Precision


@dataclass(frozen=True)
class Quantization:
    """How the base's linear layers are held in memory."""

    load_in_4bit: bool = True
    quant_type: str = "nf4"
    double_quant: bool = True


# Transformers imports its parts on first use, which fails when two threads of the page do it at once.
_loading = threading.RLock()


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let one thread at a time load a tokenizer or a model."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _loading:
            return function(*args, **kwargs)

    return call


class _LogFile(logging.FileHandler):
    """A log that goes without what a full disk doesn't take: it would fill the terminal with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def quiet_stack(log_file: Path | None = None) -> None:
    """Send what the libraries have to say to a log file, away from the terminal; no usage reports.

    Must be called before they are imported. Only one GPU is shown to the process: TRL refuses several in one. Where
    several processes train together, each takes its own (processes.py).
    """
    if processes.count() == 1 and "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TRL_DISABLE_TELEMETRY", "DO_NOT_TRACK", "BITSANDBYTES_NOWELCOME"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that wait by spinning starve each other as soon as another process wants a core: the usual spin
    # trained at a tenth of the speed beside one busy process. This short one costs 10 % on an idle machine, and a
    # quarter beside a busy process against the shortest (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    handler: logging.Handler = _LogFile(log_file, encoding="utf-8") if log_file else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    _keep_freed_memory()


def _keep_freed_memory(largest: int = 32 << 20) -> None:
    """Let glibc keep what was freed, of blocks up to this size [bytes], and 256 MiB of its heap lie idle.

    Otherwise every step gave its buffers back to the kernel and faulted them in again: a tenth of training's CPU time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(-3, largest)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


@contextmanager
def whole_heap() -> Iterator[None]:
    """Give blocks from 128 KiB back to the kernel when they are freed, as long as the block runs.

    In glibc's heap they would leave holes that later ones, with something small put into them, don't fit in.
    """
    _keep_freed_memory(128 << 10)
    try:
        yield
    finally:
        _keep_freed_memory()


def detect_device() -> Device:
    """The device that training will use, and the precision that it really computes in.

    bfloat16 needs compute capability 8 on CUDA (older GPUs emulate it) and AVX512-BF16 or AMX on a CPU (without
    them bfloat16 is about 4 times slower than float32).
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        precision: Precision = "bfloat16" if properties.major >= 8 else "float16"
        return Device("cuda", properties.name, properties.total_memory, precision)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    memory, threads = system_memory.total_bytes(), torch.get_num_threads()
    return Device(
        "cpu", f"CPU, {threads} thread{'s' if threads > 1 else ''}", memory, "bfloat16" if fast_bf16 else "float32"
    )


def free_memory() -> None:
    """Give memory that nobody holds any longer back to the device: of models, and what loading left in the heap."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


@one_at_a_time
def load_tokenizer(folder: Path, chat_template: Literal["auto", "chatml", "plain"] = "auto") -> tuple[Any, ChatFormat]:
    """Load a base's or an adapter's tokenizer, with a chat template and a padding token, and probe its template."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    # It writes to the terminal past the root logger unless told not to.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {error}") from None
    ensure_chat_template(tokenizer, chat_template)
    chat = ChatFormat.probe(tokenizer)
    if tokenizer.pad_token is None:
        # Padding never meets the loss: labels are made before padding, and the attention mask covers it.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or chat.end_of_turn
    tokenizer.padding_side = "left"
    return tokenizer, chat


@one_at_a_time
def load_base(
    base: BaseModel, device: Device, precision: Precision, quantization: Quantization, *, scalar: bool = False
) -> Any:
    """Load a base, its linear layers in 4 bits unless that is off; `scalar`: with a score head instead of words."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    kind, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if scalar else (AutoModelForCausalLM, {})
    dtype = getattr(torch, precision)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )
    try:
        with whole_heap():  # each weight comes in full precision, and is gone once quantized
            model = kind.from_pretrained(
                base.path,
                **more,
                dtype=dtype,
                device_map={"": 0 if device.kind == "cuda" else "cpu"},
                quantization_config=config if quantization.load_in_4bit else None,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except torch.cuda.OutOfMemoryError:
        raise ModelError(
            f'Base model "{base.name}" does not fit into {device.memory_bytes / 2**30:.1f} GiB of GPU memory. '
            "Choose a smaller preset (qlora_tune presets)."
        ) from None
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f'Base model "{base.name}" can\'t be loaded: {error}') from None
    _keep_4bit_weights_trainable(model)
    if device.kind == "cpu":
        _let_go_of_file(model)
        free_memory()
    model.config.use_cache = False
    return model


def _let_go_of_file(model: Any) -> None:
    """Copy what was not quantized, which is read in place: as long as one tensor is, all of the base's file is held."""
    for parameter in model.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()


def _keep_4bit_weights_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when the model is first evaluated on an AVX512-BF16 CPU.

    The repacked weights stay in place, and later training steps get wrong gradients from them without an error:
    25 of 28 adapter gradients differed after one evaluation (docs/log.md). tests/test_model.py guards it.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
