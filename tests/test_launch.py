"""Runs as processes of their own: one at a time on a device, stopped by asking, gone when discarded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import settings

from qlora_tune import launch
from qlora_tune.errors import RunError
from qlora_tune.launch import (
    OUTPUT_FILE,
    delete_run,
    discard_run,
    keep_upload,
    launch_resume,
    launch_run,
    lock_device,
    refuse_busy_device,
    remove_old_uploads,
    rename_run,
    request_stop,
    uploads_folder,
)
from qlora_tune.runs import Run, keep_whole_checkpoints, list_runs, new_run, step_of

WAIT_S = 120.0
FOREVER = "100000"  # steps


def wait_for(condition: Callable[[], Any], what: str, run: Run | None = None) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            output = (run.path / OUTPUT_FILE).read_text()[-2000:] if run else ""
            pytest.fail(f"no {what} after {WAIT_S:g} s: {output}")
        time.sleep(0.05)


def wait_for_end(run: Run) -> dict[str, Any]:
    wait_for(lambda: not run.is_alive(), "end", run)
    return run.read_state()


def wait_for_step(run: Run, step: int = 1) -> None:
    wait_for(lambda: not run.is_alive() or step in [m["step"] for m in run.read_metrics()], f"step {step}", run)
    assert run.is_alive(), (run.path / OUTPUT_FILE).read_text()[-2000:]


def write_rows(path: Path, count: int = 24) -> str:
    rows = [{"instruction": f"Say {n}", "output": f"I say {n}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def short(folder: Path, **changes: Any) -> Any:
    """Settings of a run on a few short rows."""
    usual = {"data": [write_rows(folder / "rows.jsonl")], "runs_dir": str(folder / "runs"), "score_rows": "0"}
    return settings(**{**usual, "per_device_train_batch_size": "2", "max_steps": "3", "heldout_share": "0", **changes})


def is_free() -> bool:
    try:
        refuse_busy_device("cpu")
    except RunError:
        return False
    return True


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Run]:
    """A launched run that trains until it is discarded."""
    run = launch_run(short(folder, max_steps=FOREVER, run_name="long one", eval_steps=FOREVER), "cpu")
    try:
        wait_for_step(run)
        yield run
    finally:
        if run.path.exists():
            discard_run(run)


def test_a_launched_run_trains_in_a_session_of_its_own(running: Run) -> None:
    state = running.read_state()
    assert state["status"] == "running"
    assert state["pid"] not in (os.getpid(), None)
    assert os.getsid(state["pid"]) == os.getpgid(state["pid"]) == state["pid"] != os.getsid(0)
    assert running in list_runs(running.path.parent)
    assert running.is_alive()
    assert "run " in (running.path / OUTPUT_FILE).read_text()


def test_a_second_launch_is_refused_with_the_holders_name_and_leaves_no_run(running: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Run .*/runs/long one is running on this machine's CPU.*[Ss]top it"):
        launch_run(short(tmp_path), "cpu")
    assert not (tmp_path / "runs").exists()


def test_a_resume_is_refused_while_another_run_holds_the_device(running: Run, tmp_path: Path) -> None:
    other = new_run(short(tmp_path))
    other.update_state(status="stopped", pid=None)
    with pytest.raises(RunError, match="long one is running"):
        launch_resume(other, "cpu")
    assert other.read_state()["status"] == "stopped"
    with pytest.raises(RunError, match="this run is running; there is nothing to go on with"):
        launch_resume(running, "cpu")


def train_command(folder: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "qlora_tune", "train", write_rows(folder / "rows.jsonl"), "--preset", "builtin"]
    return [*words, "--runs-dir", str(folder / "runs"), "--score-rows", "0", "--max-steps", FOREVER, *more]


def test_a_run_in_a_terminal_is_refused_beside_a_launched_one(running: Run, tmp_path: Path) -> None:
    done = subprocess.run(train_command(tmp_path), capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert f"{running.path} is running on this machine's CPU" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_another_device_is_free_meanwhile(running: Run) -> None:
    lock_device("cuda").release()


def test_a_running_run_can_be_neither_renamed_nor_deleted(running: Run) -> None:
    with pytest.raises(RunError, match="long one is running and can't be renamed. Stop it first"):
        rename_run(running, "other")
    with pytest.raises(RunError, match="long one is running and can't be deleted"):
        delete_run(running)
    assert running.path.is_dir()
    assert running.is_alive()


def test_discarding_kills_a_run_and_removes_its_folder(running: Run) -> None:
    """Last of those that need the running one: it is gone afterwards."""
    pid = running.read_state()["pid"]
    runs_dir = running.path.parent
    discard_run(running)
    assert list(runs_dir.iterdir()) == []
    with pytest.raises(RunError, match="no such run|state.json"):
        discard_run(running)
    wait_for(lambda: not psutil.pid_exists(pid), "end of the process")
    wait_for(is_free, "free device")


def test_a_launched_run_finishes_and_frees_the_device(tmp_path: Path) -> None:
    run = launch_run(short(tmp_path, run_name="mine"), "cpu")
    assert run.is_alive()
    assert run.read_state()["status"] == "preparing"
    assert not is_free()
    state = wait_for_end(run)
    assert (state["status"], state["steps"], state["pid"]) == ("finished", 3, None)
    assert run.has_adapter
    assert is_free()
    assert stat.S_ISREG((run.path / OUTPUT_FILE).stat().st_mode)
    with pytest.raises(RunError, match="this run is finished"):
        launch_resume(run, "cpu")


@pytest.mark.reliability  # test_train and the journey in the browser stop and resume a run too
def test_a_stopped_run_is_saved_whole_and_goes_on_to_its_end(tmp_path: Path) -> None:
    run = launch_run(short(tmp_path, max_steps="30", eval_steps="1000"), "cpu")
    wait_for_step(run, 2)
    request_stop(run)
    assert wait_for_end(run)["status"] == "stopped"
    (checkpoint,) = keep_whole_checkpoints(run)
    reached = step_of(checkpoint)
    assert 2 <= reached < 30
    assert not run.has_adapter
    assert is_free()
    launch_resume(run, "cpu")
    assert not is_free()
    state = wait_for_end(run)
    assert (state["status"], state["steps"]) == ("finished", 30)
    assert [entry["step"] for entry in run.read_metrics()] == list(range(1, 31))
    assert run.has_adapter


def test_a_killed_run_reads_as_interrupted_and_the_device_is_free(tmp_path: Path) -> None:
    run = launch_run(short(tmp_path, max_steps=FOREVER), "cpu")
    wait_for_step(run)
    os.kill(run.read_state()["pid"], signal.SIGKILL)
    assert wait_for_end(run)["status"] == "interrupted"
    wait_for(is_free, "free device", run)  # the last thread of a killed process may outlive its first by a moment
    assert Run(run.path) in list_runs(run.path.parent)


def test_a_run_stopped_before_its_first_step_can_be_resumed(tmp_path: Path) -> None:
    run = launch_run(short(tmp_path), "cpu")
    request_stop(run)
    assert wait_for_end(run)["status"] in ("interrupted", "stopped")
    wait_for(is_free, "free device", run)
    run.require_unfinished()
    request_stop(run)  # asking a process that is gone is no error


def test_a_run_is_discarded_while_it_prepares(tmp_path: Path) -> None:
    run = launch_run(short(tmp_path), "cpu")
    discard_run(run)
    assert list((tmp_path / "runs").iterdir()) == []
    wait_for(is_free, "free device")


def test_a_run_on_bad_data_ends_failed_with_the_reason(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    run = launch_run(short(tmp_path, data=[str(bad)]), "cpu")
    state = wait_for_end(run)
    assert state["status"] == "failed"
    assert "No usable row" in state["reason"]
    assert "bad.jsonl" in state["reason"]
    assert "No usable row" in (run.path / OUTPUT_FILE).read_text()
    assert is_free()


def ended(runs_dir: Path, name: str, *data: Path) -> Run:
    """A run without a process, trained on some files."""
    run = new_run(settings(runs_dir=str(runs_dir), run_name=name, data=[str(file) for file in data]))
    run.update_state(status="finished", pid=None)
    return run


def upload(tmp_path: Path, name: str, content: str = "x") -> Path:
    source = tmp_path / name
    source.write_text(content)
    return keep_upload(source, tmp_path / "runs")


def test_uploads_go_with_the_last_run_that_was_trained_on_them(tmp_path: Path) -> None:
    own, shared, foreign = upload(tmp_path, "own.jsonl"), upload(tmp_path, "shared.jsonl"), tmp_path / "mine.jsonl"
    foreign.write_text("not an upload")
    one = ended(tmp_path / "runs", "one", own, shared, foreign)
    two = ended(tmp_path / "runs", "two", shared)
    delete_run(one)
    assert (own.exists(), shared.exists(), foreign.exists()) == (False, True, True)
    assert list_runs(tmp_path / "runs") == [two]
    delete_run(two)
    assert list((tmp_path / "runs").iterdir()) == [shared.parent]
    assert list(shared.parent.iterdir()) == []
    assert foreign.exists()


def test_uploads_of_an_experiments_runs_count_as_used(tmp_path: Path) -> None:
    used = upload(tmp_path, "used.jsonl")
    ended(tmp_path / "runs" / "experiment", "all", used)
    os.utime(used, (0, time.time() - 90_000))
    remove_old_uploads(tmp_path / "runs")
    delete_run(ended(tmp_path / "runs", "one", used))
    assert used.exists()


def test_held_out_uploads_count_as_used(tmp_path: Path) -> None:
    held = upload(tmp_path, "held.jsonl")
    one = ended(tmp_path / "runs", "one", tmp_path / "own.jsonl", held)
    two = new_run(settings(runs_dir=str(tmp_path / "runs"), run_name="two", data=["x"], heldout_data=[str(held)]))
    two.update_state(pid=None)
    delete_run(one)
    assert held.exists()
    delete_run(two)
    assert not held.exists()


def test_a_damaged_run_can_be_deleted(tmp_path: Path) -> None:
    run = ended(tmp_path, "one")
    (run.path / "config.toml").write_text("lora_r = ")
    delete_run(run)
    assert list(tmp_path.iterdir()) == []


def test_a_renamed_run_keeps_everything(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished[0].path, tmp_path / "short")
    run = Run(tmp_path / "short")
    run.update_state(pid=None)
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    renamed = rename_run(run, "a better name")
    assert renamed.path == tmp_path / "a better name"
    assert {str(path.relative_to(renamed.path)) for path in renamed.path.rglob("*")} == files
    assert list_runs(tmp_path) == [renamed]
    assert renamed.has_adapter


@pytest.mark.parametrize("name", ["../x", ".x", "", "a/b", "/tmp/x", "..", ".", "a\\b", "a\0b", "-x", "a:b", "~/../x/"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    run = ended(tmp_path / "runs", "one")
    with pytest.raises(RunError, match="can't be a run's name"):
        rename_run(run, name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    one, two = ended(tmp_path, "one"), ended(tmp_path, "two")
    with pytest.raises(RunError, match="this run exists. Choose another name"):
        rename_run(one, "two")
    with pytest.raises(RunError, match="this run exists"):
        rename_run(one, "one")
    assert set(list_runs(tmp_path)) == {one, two}


def test_runs_that_began_with_a_renamed_one_know_its_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, later, other = (ended(tmp_path, name) for name in ("one", "later", "other"))
    later.update_state(began_with=str(one.path.resolve()))
    other.update_state(began_with=str(tmp_path / "elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "is_alive", lambda run: run.name == "later")
        with pytest.raises(RunError, match="one can't be renamed: later, which began with it, is running"):
            rename_run(one, "new")
    assert one.path.is_dir()
    rename_run(one, "new")
    assert later.read_state()["began_with"] == str((tmp_path / "new").resolve())
    assert other.read_state()["began_with"] == str(tmp_path / "elsewhere")


def test_a_run_can_not_take_the_name_of_the_folder_of_uploads(tmp_path: Path) -> None:
    run = ended(tmp_path, "one")
    with pytest.raises(RunError):
        rename_run(run, launch.UPLOADS)


def test_an_upload_is_private_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "runs" / "uploads").mkdir(parents=True, mode=0o755)
    before = os.umask(0)
    try:
        kept = upload(tmp_path, "d.jsonl", "secret")
    finally:
        os.umask(before)
    assert kept.read_text() == "secret"
    assert kept.parent == tmp_path / "runs" / "uploads"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


class Named(type(Path())):  # type: ignore[misc]
    """A path whose file calls itself what an attacker wants."""

    _called = ""

    @property
    def name(self) -> str:
        return self._called


@pytest.mark.parametrize(
    "name",
    ["../../x.jsonl", "..", ".", "", "/etc/passwd", "..\\..\\x.jsonl", ".bashrc", "...", "a\0b", "~root", "a/../../b",
     "\n", "con|:*?<>.csv", "ünï 字.jsonl"],
)  # fmt: skip
def test_an_upload_stays_in_its_folder_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    source = Named(tmp_path / "source")
    source.write_text("x")
    source._called = name
    kept = keep_upload(source, tmp_path / "runs")
    assert kept.resolve().parent == (tmp_path / "runs" / "uploads").resolve()
    assert kept.read_text() == "x"
    assert not kept.name.startswith(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "source"]
    assert list((tmp_path / "runs").iterdir()) == [kept.parent]


def test_an_upload_never_overwrites_another_and_keeps_its_ending(tmp_path: Path) -> None:
    kept = [upload(tmp_path, "d.jsonl", content) for content in ("one", "two", "three")]
    assert [path.read_text() for path in kept] == ["one", "two", "three"]
    assert len(set(kept)) == 3
    assert {path.suffix for path in kept} == {".jsonl"}


def test_old_uploads_that_no_run_needs_are_removed(tmp_path: Path) -> None:
    used, unused = (upload(tmp_path, f"{name}.jsonl") for name in ("used", "unused"))
    upload(tmp_path, "fresh.jsonl")
    adapter = uploads_folder(tmp_path / "runs") / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    ended(tmp_path / "runs", "one", used)
    for path in (used, unused, adapter):
        os.utime(path, (0, time.time() - 90_000))
    remove_old_uploads(tmp_path / "runs")
    assert sorted(path.name for path in used.parent.iterdir()) == ["fresh.jsonl", "used.jsonl"]
    remove_old_uploads(tmp_path / "nowhere")  # no folder, nothing to do


@pytest.mark.parametrize("damaged", ["config.toml", "state.json"])
def test_no_upload_is_removed_while_a_run_is_damaged_that_may_need_it(damaged: str, tmp_path: Path) -> None:
    old = upload(tmp_path, "old.jsonl")
    run = ended(tmp_path / "runs", "one", old)
    (run.path / damaged).write_text("{damaged")
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    old = moved / "uploads" / "old.jsonl"
    os.utime(old, (0, time.time() - 90_000))
    remove_old_uploads(moved)
    delete_run(ended(moved, "two", old))
    assert old.exists()


def test_a_lock_names_its_holder_and_is_free_when_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_NAME_WAIT_S", 0.1)
    run = ended(tmp_path, "one")
    lock = lock_device("cpu")
    with pytest.raises(RunError, match="Another run is running"):  # it has not yet said its name
        refuse_busy_device("cpu")
    lock.write_holder(run)
    with pytest.raises(RunError, match=f"Run {run.path} is running"):
        lock_device("cpu")
    lock.release()
    again = lock_device("cpu")
    with pytest.raises(RunError, match="Another run"):  # the old name is gone
        lock_device("cpu")
    again.release()


def test_the_file_of_a_lock_is_private_and_one_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lock_device("cpu").release()
    path = launch._lock_path("cpu")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    paths = set()
    for visible in ("0", "1", "1,0", "GPU-8932f937-d72c"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        paths.add(launch._lock_path("cuda"))
    assert len(paths) == 3
    assert {found.parent for found in paths} == {path.parent}


def test_a_run_whose_process_can_not_be_started_leaves_nothing_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(OSError, match="no-python"):
        launch_run(short(tmp_path), "cpu")
    assert is_free()
    assert not [run for run in list_runs(tmp_path / "runs") if run.is_alive()]
