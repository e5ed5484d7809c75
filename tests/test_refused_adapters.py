"""An adapter that is not what was trained, or not on what it was trained on, is refused by name and never answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import changed_base

from qlora_tune.adapter_record import ADAPTER_RECORD, CONFIG, WEIGHTS
from qlora_tune.errors import ModelError
from qlora_tune.export import open_adapter

Change = Callable[[Path], Any]


@pytest.fixture
def adapter(finished: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0].adapter, tmp_path / "adapter"))


def weights(change: Callable[[dict[str, torch.Tensor]], Any], *, trusted: bool = False) -> Change:
    """Change the tensors; with a record that vouches for them, as whoever changes them on purpose would write."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if trusted:
            record(sha256={})(folder)

    return apply


def edited(name: str, **entries: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))


def record(**entries: Any) -> Change:
    return edited(ADAPTER_RECORD, **entries)


def flip(name: str) -> Change:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)

    return apply


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "Q_proj")] = tensors.pop(name)


def shrink(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][:4].clone()


def other_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    size = len(vocabulary)
    tokenizer["model"]["vocab"] = {token: (number + 1) % size for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def put(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[first(tensors)].view(-1)[3:4].fill_(value)


CHANGES: dict[str, tuple[Change, str]] = {
    "another base": (record(base_fingerprint="0" * 64), "was trained on builtin"),
    "a record without its base": (record(base_model="nowhere/base"), "nowhere/base"),
    "no record": (lambda folder: (folder / ADAPTER_RECORD).unlink(), f"{ADAPTER_RECORD} missing"),
    "a record of something else": (lambda folder: (folder / ADAPTER_RECORD).write_text("[]"), "is damaged"),
    "another vocabulary": (other_vocabulary, "tokenizer.json changed"),
    "another chat template": (flip("chat_template.jinja"), "chat_template.jinja changed"),
    "another rank": (edited(CONFIG, r=4), "adapter_config.json changed"),
    "another scale": (edited(CONFIG, lora_alpha=999), "adapter_config.json changed"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} missing"),
    "an empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS} changed"),
    "a flipped bit": (flip(WEIGHTS), f"{WEIGHTS} changed"),
    "no tensors": (weights(dict.clear, trusted=True), "incomplete or was changed"),
    "renamed tensors": (weights(rename, trusted=True), "incomplete or was changed"),
    "a missing tensor": (weights(lambda tensors: tensors.pop(first(tensors)), trusted=True), "incomplete or was"),
    "a tensor too many": (weights(lambda t: t.update(more=torch.ones(1)), trusted=True), "incomplete or was"),
    "a tensor of another rank": (weights(shrink, trusted=True), "the adapter is damaged"),
    "not a number": (weights(put(float("nan")), trusted=True), "not finite numbers"),
    "infinity": (weights(put(float("inf")), trusted=True), "not finite numbers"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_adapter_is_refused_by_name(name: str, adapter: Path) -> None:
    change, words = CHANGES[name]
    change(adapter)
    with pytest.raises(ModelError, match=words):
        open_adapter(adapter).load()


def test_a_base_with_one_other_tensor_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="but the base given is"):
        open_adapter(adapter, str(changed_base(tmp_path).path)).load()


def test_an_unchanged_adapter_and_one_from_before_there_were_hashes_are_taken(adapter: Path) -> None:
    open_adapter(adapter).load()
    content = json.loads((adapter / ADAPTER_RECORD).read_text())
    assert set(content["sha256"]) == {WEIGHTS, CONFIG, "tokenizer.json", "chat_template.jinja"}
    del content["sha256"]
    (adapter / ADAPTER_RECORD).write_text(json.dumps(content))
    open_adapter(adapter).load()
