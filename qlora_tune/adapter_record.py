"""What stands beside an adapter: which base it belongs to, how that was held, and the hashes of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from qlora_tune.base import BaseModel
from qlora_tune.disk import hash_file
from qlora_tune.errors import ModelError
from qlora_tune.model import Precision, Quantization

ADAPTER_RECORD = "qlora_tune.json"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HASHED = (WEIGHTS, CONFIG, "tokenizer.json", "chat_template.jinja")
_OF_THE_BASE = ("base_model_name_or_path", "revision")  # an export writes them anew
_KEYS = {
    "base_model",
    "base_revision",
    "base_fingerprint",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "precision",
}


def write_adapter_record(folder: Path, base: BaseModel, quantization: Quantization, precision: Precision) -> None:
    """Keep beside a complete adapter what it belongs to: whatever else it meets makes another model of it."""
    record = {
        "base_model": base.name,
        "base_revision": base.revision,
        "base_fingerprint": base.fingerprint,
        "load_in_4bit": quantization.load_in_4bit,
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "precision": precision,
        "sha256": {name: _hash(folder / name) for name in _HASHED if (folder / name).is_file()},
    }
    (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_adapter_record(folder: Path) -> dict[str, Any]:
    """Read what write_adapter_record wrote. Raises ModelError when the folder holds no adapter of ours."""
    if missing := [name for name in (WEIGHTS, CONFIG, ADAPTER_RECORD) if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder}: no adapter made by qlora-tune ({', '.join(missing)} missing). Expected a run's adapter "
            "folder or an unpacked export."
        )
    try:
        record = json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not set(record) >= _KEYS or not isinstance(record.get("sha256", {}), dict):
        raise ModelError(f"{folder / ADAPTER_RECORD}: is damaged. Export the adapter again.")
    return record


def refuse_changed_files(folder: Path, record: dict[str, Any]) -> None:
    """Raise ModelError naming the files that are no longer what was trained: damaged, replaced or edited."""
    changed = [
        name
        for name, expected in record.get("sha256", {}).items()
        if not (folder / name).is_file() or _hash(folder / name) != expected
    ]
    if changed:
        raise ModelError(
            f"{folder}: {', '.join(changed)} changed since the adapter was made, so it is not the model that was "
            "trained. Take the files as they were, or export the adapter again."
        )


def refuse_other_base(folder: Path, record: dict[str, Any], base: BaseModel) -> NoReturn:
    """Raise ModelError naming both bases."""
    raise ModelError(
        f"{folder}: this adapter was trained on {record['base_model']} (weights {record['base_fingerprint'][:12]}), "
        f"but the base given is {base.name} (weights {base.fingerprint[:12]}). On another base it answers nonsense; "
        "give the base it was trained on."
    )


def _hash(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal; of PEFT's configuration without what names the base."""
    if path.name == CONFIG:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in content.items() if key not in _OF_THE_BASE}
        except (ValueError, AttributeError):
            return "unreadable"
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return hash_file(path)
