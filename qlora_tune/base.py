"""A base model's files: found on this machine or the hub, fingerprinted, and refused where they can't be tuned soundly.

Only safetensors are read, and code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from qlora_tune.config import BUILTIN, shipped_path
from qlora_tune.errors import ModelError

# The README names the licence, which an adapter's card takes over.
WEIGHT_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]


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

    def read_config(self) -> dict[str, Any]:
        """config.json; what a multimodal one says of its text model, as if it were said of the whole."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
        return config | (text if isinstance(text, dict) else {})

    def context_length(self) -> int | None:
        """max_position_embeddings (or GPT-2's n_positions) of its config [tokens]; None where it names none."""
        config = self.read_config()
        length = config.get("max_position_embeddings", config.get("n_positions"))
        return length if isinstance(length, int) and length > 0 else None


def is_downloaded(name: str) -> bool:
    """Whether a hub model's weights are already on this machine. Touches no network."""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("model.safetensors", "model.safetensors.index.json")
    )


def is_local(name: str) -> bool:
    """Whether a base can be found without a download: the built-in one, a folder, or a hub model kept here."""
    return not _is_hub_id(name) or is_downloaded(name)


def _is_hub_id(name: str) -> bool:
    is_folder = Path(name).is_dir() or name.startswith((".", "/", "~"))
    return name != BUILTIN and not is_folder and name.count("/") == 1


def download_bytes(name: str, revision: str | None = None) -> int:
    """How much find_base would fetch from the hub for a model. Raises ModelError when the hub can't be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=5).siblings or []
    except Exception as error:  # each transport has errors of its own, and all mean the same here
        raise ModelError(
            f'Base model "{name}" is not on this machine, and the hub can\'t be asked for it '
            f"({type(error).__name__}). Connect and try again, or choose one that is here: builtin works offline."
        ) from None
    return sum(file.size or 0 for file in files if any(fnmatch(file.rfilename, p) for p in WEIGHT_PATTERNS))


def fetch_config(name: str, revision: str | None = None) -> BaseModel:
    """A hub model of which only config.json is fetched: enough to estimate. Raises ModelError without a hub."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # as above
        raise ModelError(f'Base model "{name}": its config.json can\'t be fetched ({type(error).__name__}).') from None
    return BaseModel(name, revision, path.parent, "")


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """Find a base model's folder: the built-in one, a local folder, or the hub's (downloaded where needed).

    Raises ModelError when it is nowhere, not reachable, gated, or holds no safetensors weights.
    """
    if name == BUILTIN:
        path = shipped_path("builtin")
    elif Path(name).is_dir():
        path = Path(name).resolve()
        name = str(path)
    elif not _is_hub_id(name):
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
    try:
        _refuse_unsupported(name, json.loads((path / "config.json").read_text(encoding="utf-8")))
        fingerprint = fingerprint_weights(weights)
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(f'Base model "{name}" is damaged: {error}. Get its files again.') from None
    revision = path.name if name != BUILTIN and path.parent.name == "snapshots" else revision
    return BaseModel(name, revision, path, fingerprint)


def fingerprint_weights(files: Sequence[Path]) -> str:
    """A short hash that tells base models apart, independent of folder and sharding.

    Covers every tensor's name, type and shape and its first and last 512 bytes: reading 16 GB in full would take
    a minute and tell no more about which model it is.
    """
    lines = []
    for file in files:
        with file.open("rb") as stream:
            length, header = read_header(stream)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                if 8 + length + end > file.stat().st_size:
                    raise ValueError(f"{file.name} is cut off")
                digest = hashlib.sha256()
                for position in (start, max(start, end - 512)):
                    stream.seek(8 + length + position)
                    digest.update(stream.read(min(512, end - position)))
                lines.append(f"{name} {entry['dtype']} {entry['shape']} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def read_header(stream: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The header of a safetensors file, and its length [bytes]. Raises ValueError where the file is cut off."""
    length = int.from_bytes(stream.read(8), "little")
    content = stream.read(length) if length <= os.fstat(stream.fileno()).st_size else b""
    if len(content) < length:
        raise ValueError(f"{Path(stream.name).name} is cut off")
    return length, json.loads(content)


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
