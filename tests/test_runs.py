"""A run's folder: states, metrics, and checkpoints that are whole or passed over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune.cli import main
from qlora_tune.errors import RunError
from qlora_tune.runs import (
    Run,
    fingerprint_files,
    keep_whole_checkpoints,
    latest_run,
    list_runs,
    new_run,
    open_run,
    seal_checkpoint,
    step_of,
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(settings(runs_dir=str(tmp_path), run_name="one"))


def checkpoint(run: Run, step: int, sealed: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (folder / "optimizer.pt").write_bytes(b"moments")
    if sealed:
        seal_checkpoint(folder)
    return folder


def test_whole_checkpoints_are_found_in_the_order_of_their_steps(run: Run) -> None:
    assert keep_whole_checkpoints(run) == []
    assert step_of(None) == 0
    older, newest = checkpoint(run, 9), checkpoint(run, 10)
    assert keep_whole_checkpoints(run) == [older, newest]
    assert step_of(newest) == 10


@pytest.mark.parametrize("damage", ["unsealed", "truncated", "changed", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_removed(run: Run, damage: str) -> None:
    good = checkpoint(run, 5)
    bad = checkpoint(run, 10, sealed=damage != "unsealed")
    file = bad / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "changed":
        file.write_bytes(b"w" + file.read_bytes()[1:-1] + b"!")
    elif damage == "missing":
        (bad / "optimizer.pt").unlink()
    elif damage == "manifest":
        (bad / "manifest.json").write_text('{"adapter')
    assert keep_whole_checkpoints(run) == [good]
    assert not bad.exists()


def test_a_run_whose_process_is_gone_reads_as_interrupted(run: Run) -> None:
    run.update_state(status="running", pid=2**22 + 1, started=time.time())
    assert run.read_state()["status"] == "interrupted"


def test_a_process_that_took_over_the_number_is_not_the_run(run: Run) -> None:
    run.update_state(status="running", pid=1, started=0.0)
    assert run.read_state()["status"] == "interrupted"


def test_metrics_after_the_checkpoint_are_forgotten_on_resume_and_a_torn_line_is_skipped(run: Run) -> None:
    for step in (1, 2, 3):
        run.add_metrics({"step": step, "loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in run.read_metrics()] == [1, 2, 3]
    run.rewind_metrics(2)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_name_that_is_taken_is_refused_and_times_never_collide(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="this run exists"):
        new_run(settings(runs_dir=str(tmp_path), run_name="one"))
    unnamed: Any = [new_run(settings(runs_dir=str(tmp_path))) for _ in range(3)]
    assert len({run.name for run in unnamed}) == 3


def test_runs_are_listed_in_order_and_an_unknown_one_names_those_that_exist(run: Run, tmp_path: Path) -> None:
    second = new_run(settings(runs_dir=str(tmp_path), run_name="two"))
    assert list_runs(tmp_path) == [run, second]
    assert open_run("two", tmp_path) == second
    with pytest.raises(RunError, match="one, two"):
        open_run("three", tmp_path)
    with pytest.raises(RunError, match="no run with an adapter"):
        latest_run(tmp_path)


def test_a_damaged_run_does_not_hide_the_others(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = new_run(settings(runs_dir=str(tmp_path), run_name="two"))
    third = new_run(settings(runs_dir=str(tmp_path), run_name="three"))
    (third.path / "state.json").write_text('{"status": "finished", "created": 1e12}')  # as an older version left it
    (run.path / "state.json").write_text("{}")
    assert list_runs(tmp_path) == [second, third]
    (run.path / "state.json").write_text("{")
    (third.path / "config.toml").write_text('lora_r = "x"')
    assert list_runs(tmp_path) == [second, third]
    assert main(["runs", "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "two" in out
    assert "three" in out


@pytest.mark.parametrize(
    ("file", "content", "read", "found"),
    [
        ("state.json", '{"status": "running", "pid": -5, "started": 1, "created": 1}', Run.is_alive, False),
        ("state.json", '{"a":' * 20_000, Run.read_state, None),
        ("heldout.jsonl", "[]\n", Run.read_heldout, None),
        ("problems.jsonl", '{"file": "a"}\n\n{"fi', Run.read_problems, [{"file": "a"}]),
        ("checkpoints/checkpoint-5", "a file", keep_whole_checkpoints, []),
        ("checkpoints/checkpoint-10.bak/x", "a copy", keep_whole_checkpoints, []),
    ],
)
def test_whatever_an_edit_leaves_in_a_run_is_passed_over_or_refused_in_words(
    run: Run, file: str, content: str, read: Callable[[Run], Any], found: Any
) -> None:
    path = run.path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    if found is None:
        with pytest.raises(RunError, match=path.name):
            read(run)
    else:
        assert read(run) == found
    assert path.read_text() == content
    list_runs(run.path.parent)


def test_a_run_keeps_its_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = new_run(settings(data=["x.jsonl"], runs_dir="runs", run_name="rel"))
    assert run.read_config().data == [str(tmp_path / "x.jsonl")]


def test_data_files_are_known_by_content_not_by_name_or_date(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x")
    b.write_text("x")
    assert fingerprint_files([a]) == fingerprint_files([b])
    b.write_text("y")
    assert fingerprint_files([a]) != fingerprint_files([b])
