"""A disk that runs full: one clear message, what was whole stays whole, and all goes on once there is space again.

Each test fills a small disk of its own (tmpfs) at some moment down to some bytes; that needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from boundaries import FLAGS, at_each_write, check_goes_on, in_process, rows_in, train_here
from safetensors.torch import load_file

from qlora_tune.cli import main
from qlora_tune.runs import Run, keep_whole_checkpoints, open_run

LEFT = [0, 3_000, 60_000, 1_000_000]  # bytes: from nothing to a half-written checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small disk can't be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes of a disk."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65_536) == 65_536:
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left))


def command_in(said: Path, disk: Path, name: str, boundary: int, left: int, arguments: list[str]) -> None:
    """Run a command in this process, which fills the disk before one of its writes. What it says goes to a file."""
    at_each_write(name, lambda number: fill(disk, left) if number == boundary else None)
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.exit(main(arguments))


def train_command(folder: Path, run: Run) -> list[str]:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in FLAGS.items()]
    place = [f"--runs-dir={run.path.parent}", f"--run-name={run.name}"]
    return ["train", str(rows_in(folder)), "--preset=builtin", *place, *flags]


def check_message(said: str) -> None:
    """Exactly one error, which names the disk and what to do."""
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert "disk is full" in said.replace("\n", " ") or "MB left" in said.replace("\n", " ")  # foreseen
    assert "space" in said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    assert in_process(train_here, folder, "a") == 0
    return open_run("a", folder / "runs")


# Of about 80 writes of that run: its first files, its three checkpoints, its state and metrics, its adapter
SOME = [(22, 60_000), (44, 0)]
MORE = [(boundary, left) for boundary in (0, 3, 12, 18, 30, 38, 50, 56, 63, 70, 74, 77) for left in LEFT]


@pytest.mark.parametrize(
    ("boundary", "left"), [*SOME, *(pytest.param(*pair, marks=pytest.mark.reliability) for pair in MORE)]
)
def test_a_run_on_a_full_disk_says_so_and_goes_on_to_the_same_adapter(
    whole: Run, disk: Path, tmp_path: Path, boundary: int, left: int
) -> None:
    said, run = tmp_path / "said.txt", Run(disk / "runs" / "a")
    ended = in_process(command_in, said, disk, run.name, boundary, left, train_command(tmp_path, run))
    for weights in run.path.rglob("checkpoint-*/adapter_model.safetensors"):
        assert (weights.parent / "manifest.json").exists(), "a half-written checkpoint takes the room that is needed"
    if ended == 0:  # what was left was enough
        assert run.read_state()["status"] == "finished"
        return
    assert ended == 2
    check_message(said.read_text())
    before = keep_whole_checkpoints(run)
    (disk / "ballast").unlink()
    if not run.path.exists():
        return
    assert check_goes_on(whole, disk, run.name), (said.read_text(), before)


def test_training_does_not_begin_without_room_for_its_checkpoints(disk: Path, tmp_path: Path) -> None:
    fill(disk, 5_000_000)
    said, run = tmp_path / "said.txt", Run(disk / "runs" / "a")
    assert in_process(command_in, said, disk, run.name, -1, 0, train_command(tmp_path, run)) == 2
    text = said.read_text().replace("\n", " ")
    assert "checkpoints and the adapter take up to" in text
    assert "MB left" in text
    assert not run.read_metrics()


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("evaluate", 0),
        ("gguf", 40_000),
        *(
            pytest.param(what, left, marks=pytest.mark.reliability)
            for what in ("evaluate", "export", "merged", "gguf")
            for left in (*LEFT, 40_000)
            if (what, left) not in (("evaluate", 0), ("gguf", 40_000))
        ),
    ],
)
def test_scoring_and_exporting_on_a_full_disk_leave_nothing_half_written(
    finished: object, disk: Path, tmp_path: Path, what: str, left: int, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[0].path, disk / "runs" / "short")  # type: ignore[index]
    run = Run(disk / "runs" / "short")
    out = disk / "out"
    out.mkdir()
    command = {
        "evaluate": ["evaluate", str(run.path)],
        "export": ["export", str(run.path), "--output", str(out / "a.zip")],
        "merged": ["export", str(run.path), "--merged", "--output", str(out / "model")],
        "gguf": ["export", str(run.path), "--gguf", "--output", str(out / "a")],
    }[what]
    scores = {path.name: path.read_bytes() for path in run.path.glob("scores*.json")}
    fill(disk, left)
    ended = main(command)
    said = capfd.readouterr()
    if ended != 0:
        assert ended == 2
        check_message(said.out + said.err)
        assert list(out.iterdir()) == []
        assert {path.name: path.read_bytes() for path in run.path.glob("scores*.json")} == scores
        assert load_file(run.adapter / "adapter_model.safetensors")
    else:
        assert left, "nothing can be written to a full disk"
    (disk / "ballast").unlink()
    for leftover in out.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    assert main(command) == 0
    assert what == "evaluate" or list(out.iterdir())
