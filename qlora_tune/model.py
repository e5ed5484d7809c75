"""Tokenizer, 4-bit base model and adapter: found, loaded and checked against each other.

Station between the tokenized rows and training, scoring and chat. Only safetensors are read, and code that comes
with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from qlora_tune.chat_format import ChatFormat, ensure_chat_template
from qlora_tune.config import BUILTIN, shipped_path
from qlora_tune.errors import ModelError

Precision = Literal["bfloat16", "float16", "float32"]
WEIGHT_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
ADAPTER_RECORD = "qlora_tune.json"  # beside adapter_config.json: the base's fingerprint, and how it was quantized


@dataclass(frozen=True)
class Device:
    """Where the model runs. memory_bytes is the GPU's, or the machine's on a CPU."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    precision: Precision


@dataclass(frozen=True)
class BaseModel:
    """A base model's folder on this machine, the name it is known by, and a fingerprint of its weights."""

    name: str
    revision: str | None
    path: Path
    fingerprint: str

    @property
    def label(self) -> str:
        """The name as it may leave this machine: a hub id, `builtin`, or a local folder's last part."""
        is_local = self.name != BUILTIN and (self.name.startswith((".", "/", "~")) or Path(self.name).is_dir())
        return Path(self.name).resolve().name if is_local else self.name


@dataclass(frozen=True)
class Quantization:
    """How the base's linear layers are held in memory."""

    load_in_4bit: bool = True
    quant_type: str = "nf4"
    double_quant: bool = True


def quiet_stack(log_file: Path | None = None) -> None:
    """Send what the libraries have to say to a log file, away from the terminal; no usage reports.

    Must be called before they are imported. Only one GPU is shown to the process: TRL refuses several in one.
    """
    if "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TRL_DISABLE_TELEMETRY", "DO_NOT_TRACK", "BITSANDBYTES_NOWELCOME"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that wait by spinning starve each other as soon as another process wants a core: a step took
    # 15 s instead of 0.6 s beside one busy process. A short spin costs 10 % on an idle machine (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
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
    memory = psutil.virtual_memory().total
    return Device("cpu", f"CPU, {torch.get_num_threads()} threads", memory, "bfloat16" if fast_bf16 else "float32")


def is_downloaded(name: str) -> bool:
    """Whether a hub model's weights are already on this machine. Touches no network."""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("model.safetensors", "model.safetensors.index.json")
    )


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """Find a base model's folder: the built-in one, a local folder, or the hub's (downloaded where needed).

    Raises ModelError when it is nowhere, not reachable, gated, or holds no safetensors weights.
    """
    if name == BUILTIN:
        path = shipped_path("builtin")
    elif Path(name).is_dir():
        path = Path(name)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f'Base model "{name}": no such folder. Expected "builtin", a folder with config.json and safetensors, '
            'or a hub id such as "HuggingFaceTB/SmolLM2-135M"; --model-name-or-path says where it is.'
        )
    else:
        path = _download(name, revision)
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise ModelError(
            f'Base model "{name}": {path.name or path} holds no config.json with safetensors weights. Other weight '
            "formats can run code while loading and are not read."
        )
    _refuse_unsupported(name, json.loads((path / "config.json").read_text(encoding="utf-8")))
    revision = path.name if name != BUILTIN and path.parent.name == "snapshots" else revision
    return BaseModel(name, revision, path, fingerprint_weights(weights))


def fingerprint_weights(files: Sequence[Path]) -> str:
    """A short hash that tells base models apart, independent of folder and sharding.

    Covers every tensor's name, type and shape and its first and last 512 bytes: reading 16 GB in full would take
    a minute and tell no more about which model it is.
    """
    lines = []
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                digest = hashlib.sha256()
                for position in (start, max(start, end - 512)):
                    stream.seek(8 + length + position)
                    digest.update(stream.read(min(512, end - position)))
                lines.append(f"{name} {entry['dtype']} {entry['shape']} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


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


def load_base(base: BaseModel, device: Device, precision: Precision, quantization: Quantization) -> Any:
    """Load a base model for training or answering, its linear layers in 4 bits unless that is switched off."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, precision)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.path,
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
    model.config.use_cache = False
    return model


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
) -> Any:
    """Put a fresh LoRA adapter (arXiv 2106.09685) on a base model. Raises ModelError for unknown layer names."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = {name.split(".")[-1] for name, part in model.named_modules() if "Linear" in type(part).__name__}
        raise ModelError(
            f"lora_target_modules {list(target_modules)}: {error} This model has {', '.join(sorted(linear))}."
        ) from None


def keep_adapter_in_fp32(model: Any) -> None:
    """Cast everything that is trained to float32.

    TRL casts QLoRA adapters to bfloat16, where small steps round to nothing: at a learning rate of 2e-5 only 13 %
    of lora_A had moved after 10 steps, against 100 % in float32 (docs/log.md).
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


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
    missing = [
        name
        for name in ("adapter_model.safetensors", "adapter_config.json", ADAPTER_RECORD)
        if not (folder / name).is_file()
    ]
    if missing:
        raise ModelError(
            f"{folder}: no adapter made by qlora-tune ({', '.join(missing)} missing). Expected a run's adapter "
            "folder or an unpacked export."
        )
    record: dict[str, Any] = json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))
    return record


def load_adapter(model: Any, folder: Path, base: BaseModel) -> Any:
    """Put a trained adapter on its base. Raises ModelError for another base, or for missing or surplus tensors."""
    from peft import PeftModel
    from safetensors import safe_open

    record = read_adapter_record(folder)
    if record["base_fingerprint"] != base.fingerprint:
        refuse_other_base(folder, record, base)
    tuned = PeftModel.from_pretrained(model, folder, is_trainable=False)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    expected = {
        name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        for name, _ in tuned.named_parameters()
        if "lora_" in name
    }
    if stored != expected:
        raise ModelError(
            f"{folder}: the adapter file has {len(stored)} tensors, the model expects {len(expected)}, and "
            f"{len(stored ^ expected)} names differ. The file is incomplete or was changed."
        )
    return tuned


def refuse_other_base(folder: Path, record: dict[str, Any], base: BaseModel) -> NoReturn:
    """Raise ModelError naming both bases."""
    raise ModelError(
        f"{folder}: this adapter was trained on {record['base_model']} (weights {record['base_fingerprint'][:12]}), "
        f"but the base given is {base.name} (weights {base.fingerprint[:12]}). On another base it answers nonsense; "
        "give the base it was trained on."
    )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WEIGHT_PATTERNS))
    except GatedRepoError:
        raise ModelError(
            f'Base model "{name}" is gated: accept its licence on the hub, then run `hf auth login`.'
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f'Base model "{name}": the hub has no such repository. Check the id.') from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f'Base model "{name}" is not on this machine and the hub can\'t be reached ({reason}). Connect and try '
            "again, give the path of a local folder, or use --preset builtin, which works offline."
        ) from None


def _refuse_unsupported(name: str, config: dict[str, Any]) -> None:
    if config.get("auto_map"):
        raise ModelError(f'Base model "{name}" needs code of its own to load. Such code is never run here.')
    if config.get("quantization_config"):
        raise ModelError(
            f'Base model "{name}" is already quantized. Give the original 16-bit model; it is quantized on loading.'
        )
    # Fused experts are one 3-D tensor, which bitsandbytes leaves unquantized: memory would be several times more.
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if (config.get(key) or 0) > 1]
    if experts:
        raise ModelError(
            f'Base model "{name}" is a mixture of experts ({experts[0]}); only dense models are supported.'
        )


def _keep_4bit_weights_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when the model is first evaluated on an AVX512-BF16 CPU.

    The repacked weights stay in place, and later training steps get wrong gradients from them without an error:
    25 of 28 adapter gradients differed after one evaluation (docs/log.md). tests/test_model.py guards it.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
