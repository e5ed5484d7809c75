"""A checkpoint with any file damaged is never resumed from: the one before it is, or training begins again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.lifecycle import find_checkpoint
from qlora_tune.runs import MANIFEST, Run, keep_whole_checkpoints, step_of

Damage = Callable[[Path, Path], Any]  # a file, and the same file of the other checkpoint


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "truncate": truncate,
    "flip": flip,
    "empty": lambda path, _: path.write_bytes(b""),
    "delete": lambda path, _: path.unlink(),
    "swap": lambda path, other: shutil.copyfile(other, path),
}


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Run:
    """The short run as it was before its end, with two whole checkpoints."""
    shutil.copytree(finished[0].path, tmp_path / "short")
    run = Run(tmp_path / "short")
    run.update_state(status="stopped", pid=None)
    return run


def steps(run: Run) -> list[int]:
    return [step_of(path) for path in keep_whole_checkpoints(run)]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_with_any_file_damaged_is_passed_over(copy: Run, kind: str, tmp_path: Path) -> None:
    older, newer = sorted(copy.checkpoints.iterdir(), key=step_of)
    kept = tmp_path / "kept"
    shutil.copytree(newer, kept)
    names = sorted(path.relative_to(newer) for path in newer.rglob("*") if path.is_file())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", MANIFEST} <= {str(name) for name in names}
    for name in names:
        before = (kept / name).read_bytes()
        DAMAGES[kind](newer / name, older / name)
        same = (newer / name).exists() and (newer / name).read_bytes() == before
        assert same == (kind == "swap" and (older / name).read_bytes() == before), name
        assert steps(copy) == [step_of(older), *([step_of(newer)] if same else [])], name
        shutil.copytree(kept, newer, dirs_exist_ok=True)
        assert len(steps(copy)) == 2


def test_a_manifest_with_any_bit_flipped_is_refused_or_says_the_same(copy: Run) -> None:
    older, newer = sorted(copy.checkpoints.iterdir(), key=step_of)
    shutil.rmtree(older)
    path = newer / MANIFEST
    manifest, whole = json.loads(path.read_text()), path.read_bytes()
    kept = newer.with_name("kept")
    shutil.copytree(newer, kept)
    accepted = 0
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        if steps(copy):
            accepted += 1
            assert json.loads(damaged) == manifest, at
        else:
            shutil.copytree(kept, newer)
    assert accepted < len(whole) / 14


def test_without_a_whole_checkpoint_training_begins_again(copy: Run) -> None:
    for folder in copy.checkpoints.iterdir():
        truncate(folder / "optimizer.pt", folder)
    assert find_checkpoint(copy, {"settings": {}}) is None
    assert copy.read_metrics() == []
    assert list(copy.checkpoints.iterdir()) == []
