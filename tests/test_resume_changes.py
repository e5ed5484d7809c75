"""A run goes on with what it was begun with: each change of settings, data or base is named, and nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import settings

from qlora_tune.cli import main
from qlora_tune.config import read_toml
from qlora_tune.runs import Run, changed_settings, new_run, shaping_settings

EDITS: dict[str, Any] = {
    "learning_rate": 0.01,
    "num_train_epochs": 9.0,
    "max_steps": 5,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "lora_r": 4,
    "lora_alpha": 99,
    "lora_dropout": 0.25,
    "max_length": 200,
    "seed": 7,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.5,
    "bnb_4bit_quant_type": "fp4",
    "use_rslora": True,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was stopped, with what it began with."""
    from qlora_tune.lifecycle import begin
    from qlora_tune.prepare import data_files, prepare
    from qlora_tune.runs import fingerprint_files

    folder = tmp_path_factory.mktemp("resume")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}", "output": f"I say {n}."}) for n in range(20)))
    config = settings(data=[str(rows)], runs_dir=str(folder), run_name="a", max_steps="2", score_rows="0")
    setup, run = prepare(config), new_run(config)
    came_in = {
        "data_fingerprint": fingerprint_files(data_files(config)),
        "settings": shaping_settings(config),
        "base_fingerprint": setup.base.fingerprint,
    }
    begin(run, setup.base, setup.device, setup.precision, came_in, total_steps=2, resume=False)
    run.update_state(status="stopped", pid=None)
    return run


def resume(run: Run, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    """What a resume that must be refused says."""
    before = (run.path / "state.json").read_bytes()
    assert main(["train", "--resume", str(run.path), *more]) == 2
    kept, was = (json.loads(text) for text in ((run.path / "state.json").read_bytes(), before))
    assert kept["settings"] == was["settings"]
    assert not run.read_metrics()
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.replace("\n", " ")


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_setting_is_named_with_both_values(
    stopped: Run, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stopped.path / "config.toml"
    before = path.read_text()
    path.write_text(tomli_w.dumps(read_toml(path) | {name: EDITS[name]}))
    try:
        said = resume(stopped, capfd)
    finally:
        path.write_text(before)
    assert f"its {name} (" in said
    assert " now " in said
    assert "have changed since it was started" in said
    assert f"train --config {path} --run-name NEW" in said


@pytest.mark.parametrize("name", EDITS)
def test_a_flag_beside_resume_is_refused_by_name(stopped: Run, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = resume(stopped, capfd, f"--{name.replace('_', '-')}", str(EDITS[name]))
    assert name in said
    assert "can't be changed" in said


def test_edited_data_and_another_base_are_named(
    stopped: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Path(read_toml(stopped.path / "config.toml")["data"][0])
    before = rows.read_text()
    rows.write_text(before.replace("I say 7.", "I say 8."))
    assert "its data files have changed" in resume(stopped, capfd)
    rows.write_text(before)
    stopped.update_state(base_fingerprint="of another base")
    assert "its base model's weights have changed" in resume(stopped, capfd)


def test_a_setting_that_is_new_in_this_version_had_its_default() -> None:
    config = settings(data=["x"])
    now = shaping_settings(config)
    older = {name: value for name, value in now.items() if name != "use_dora"}
    assert changed_settings(older, now) == []
    changed = changed_settings(older, shaping_settings(config.model_copy(update={"use_dora": True})))
    assert changed == ["use_dora (false, now true)"]
