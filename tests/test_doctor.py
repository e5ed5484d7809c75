"""The doctor says what is wrong with a machine, and finds nothing wrong with one that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest

from qlora_tune import cli, doctor
from qlora_tune.doctor import Finding, examine


def found(runs_dir: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(runs_dir)}


def test_a_machine_that_trains_is_found_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--runs-dir", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    for words in ("Python", "bitsandbytes", "4-bit product", "GiB free", "MB/s", "the built-in one is whole"):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_a_4_bit_product_that_is_off_by_a_tenth_means_that_training_can_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward: Any = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: 1.1 * forward(layer, x))
    assert cli.main(["doctor", "--runs-dir", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "Training can't work on this machine" in told.err
    assert "4-bit product: off by" in told.err
    assert "install another version" in told.out


def test_a_gradient_that_never_comes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Any = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: forward(layer, x.detach()) + 0 * x)
    assert found(tmp_path)["4-bit product"].fatal


def test_a_library_outside_its_range_is_named_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr("qlora_tune.doctor.metadata.version", lambda name: "0.1" if name == "peft" else real(name))
    finding = found(tmp_path)["peft"]
    assert finding.fatal
    assert finding.advice.startswith('pip install "peft')
    assert "0.1, needs" in finding.found


def test_a_folder_that_can_not_be_written_to_is_found() -> None:
    findings = list(examine("/proc/self/runs"))
    assert any(finding.what == "disk" and finding.fatal for finding in findings)
    assert {"base model", "cache", "network"} <= {finding.what for finding in findings}  # the rest was still tried


def test_without_a_network_training_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    finding = found(tmp_path)["network"]
    assert "doesn't answer (ConnectError)" in finding.found
    assert "built-in base" in finding.advice
    assert not finding.fatal


def test_a_damaged_built_in_base_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builtin").mkdir()
    monkeypatch.setattr("qlora_tune.base.shipped_path", lambda name: tmp_path / name)
    assert found(tmp_path)["base model"].fatal
