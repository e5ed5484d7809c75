"""Tokenizer, 4-bit base model and adapter: found, loaded and checked against each other.

Station between the tokenized rows and training, scoring and chat. Only safetensors are read, and code that comes
with a model is never run.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

from qlora_tune.base import BaseModel
from qlora_tune.chat_format import IGNORED, ChatFormat, ensure_chat_template
from qlora_tune.errors import ModelError

_P = ParamSpec("_P")
_R = TypeVar("_R")
Precision = Literal["bfloat16", "float16", "float32"]
REWARD_HEAD = "base_model.model.score.weight"  # beside a reward model's LoRA weights, in the same file
ADAPTER_RECORD = "qlora_tune.json"  # beside adapter_config.json: the base's fingerprint, and how it was quantized


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


def quiet_stack(log_file: Path | None = None) -> None:
    """Send what the libraries have to say to a log file, away from the terminal; no usage reports.

    Must be called before they are imported. Only one GPU is shown to the process: TRL refuses several in one.
    """
    if "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
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
    handler: logging.Handler = logging.FileHandler(log_file, encoding="utf-8") if log_file else logging.NullHandler()
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
    import psutil
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        precision: Precision = "bfloat16" if properties.major >= 8 else "float16"
        return Device("cuda", properties.name, properties.total_memory, precision)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    memory, threads = psutil.virtual_memory().total, torch.get_num_threads()
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


def attach_adapter(
    model: Any,
    *,
    lora_r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str],
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int = 42,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """Put a fresh LoRA adapter (arXiv 2106.09685) on a base model. Raises ModelError for unknown layer names."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    if targets != "all-linear":
        _check_targets(model, target_modules)
    config = LoraConfig(
        task_type=task_type,
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
    )
    return get_peft_model(model, config)


def _check_targets(model: Any, target_modules: Sequence[str]) -> None:
    """Every name must mean a linear layer: PEFT passes over unknown ones, and TRL's loss over an adapted head."""
    head = model.get_output_embeddings()
    linear = {name for name, part in model.named_modules() if "Linear" in type(part).__name__ and part is not head}
    if unknown := unknown_names(target_modules, linear):
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"lora_target_modules: {', '.join(unknown)} is no linear layer of this model. Expected all-linear, or some "
            f"of {', '.join(known)}."
        )


def is_named(layer: str, target: str) -> bool:
    """Whether a target means a layer, by PEFT's rule: its whole name, or the last parts of it."""
    return layer == target or layer.endswith(f".{target}")


def unknown_names(targets: Sequence[str], layers: Collection[str]) -> list[str]:
    """Those of the targets that mean none of the layers."""
    return [target for target in targets if not any(is_named(layer, target) for layer in layers)]


def keep_adapter_in_fp32(model: Any) -> None:
    """Cast everything that is trained to float32.

    TRL casts QLoRA adapters to bfloat16, where small steps round to nothing: at a learning rate of 2e-5 only 13 %
    of lora_A had moved after 10 steps, against 100 % in float32 (docs/log.md).
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


@contextmanager
def only_learned(model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs with which the output head scores only the positions whose next token is learned.

    The loss ignores all others. TRL drops them itself where Triton runs; elsewhere they took a fifth of a step.
    """
    from torch.nn.functional import pad

    targets = pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    learned = targets != IGNORED

    def select(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[learned].unsqueeze(0)
        return output

    kept = {name: value for name, value in inputs.items() if name != "labels"}
    hook = model.get_base_model().base_model.register_forward_hook(select)
    try:
        yield kept | {"shift_labels": targets[learned].unsqueeze(0)}
    finally:
        hook.remove()


RECORD_KEYS = {
    *("base_model", "base_revision", "base_fingerprint", "precision"),
    *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
}


def write_adapter_record(folder: Path, base: BaseModel, quantization: Quantization, precision: Precision) -> None:
    """Keep beside an adapter which base it belongs to, and how that was held: what else it meets is another model."""
    record = {
        "base_model": base.name,
        "base_revision": base.revision,
        "base_fingerprint": base.fingerprint,
        "load_in_4bit": quantization.load_in_4bit,
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "precision": precision,
    }
    (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_adapter_record(folder: Path) -> dict[str, Any]:
    """Read what write_adapter_record wrote. Raises ModelError when the folder holds no adapter of ours."""
    files = ("adapter_model.safetensors", "adapter_config.json", ADAPTER_RECORD)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder}: no adapter made by qlora-tune ({', '.join(missing)} missing). Expected a run's adapter "
            "folder or an unpacked export."
        )
    try:
        record = json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not set(record) >= RECORD_KEYS:
        raise ModelError(f"{folder / ADAPTER_RECORD}: is damaged. Export the adapter again.")
    return record


@one_at_a_time
def load_adapter(model: Any, folder: Path, base: BaseModel, name: str = "default") -> Any:
    """Put an adapter on its base, also beside others. Raises ModelError for another base or for other tensors."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    record = read_adapter_record(folder)
    if record["base_fingerprint"] != base.fingerprint:
        refuse_other_base(folder, record, base)
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, name)
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter is damaged: {error}") from None
    expected = {
        parameter.replace(f".{name}.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        for parameter, _ in model.named_parameters()
        if "lora_" in parameter and f".{name}." in parameter
    }
    if stored - {REWARD_HEAD} != expected:
        raise ModelError(
            f"{folder}: the adapter file has {len(stored)} tensors, the model expects {len(expected)}, and "
            f"{len(stored ^ expected)} names differ. The file is incomplete or was changed."
        )
    return model


def refuse_other_base(folder: Path, record: dict[str, Any], base: BaseModel) -> NoReturn:
    """Raise ModelError naming both bases."""
    raise ModelError(
        f"{folder}: this adapter was trained on {record['base_model']} (weights {record['base_fingerprint'][:12]}), "
        f"but the base given is {base.name} (weights {base.fingerprint[:12]}). On another base it answers nonsense; "
        "give the base it was trained on."
    )


def _keep_4bit_weights_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when the model is first evaluated on an AVX512-BF16 CPU.

    The repacked weights stay in place, and later training steps get wrong gradients from them without an error:
    25 of 28 adapter gradients differed after one evaluation (docs/log.md). tests/test_model.py guards it.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
