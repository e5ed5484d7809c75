"""A run as a process of its own: one at a time on a device, independent of whoever started it, stopped by asking.

The page and the command line both come through here, so that neither can start a second run beside the other's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from qlora_tune.config import UPLOADS, TrainConfig
from qlora_tune.errors import ConfigError, RunError
from qlora_tune.model import Device
from qlora_tune.runs import Run, list_runs, new_run

LOCK_VARIABLE = "QLORA_TUNE_LOCK"  # in a launched process: the number of the locked file that it was handed
OUTPUT_FILE = "output.txt"  # in a run's folder: what its process printed
_NAME_WAIT_S = 5.0  # a lock's holder writes its name right after it got the lock
_KILL_WAIT_S = 10.0


@dataclass(frozen=True)
class DeviceLock:
    """A lock on a device. The operating system drops it when the last process that holds the file is gone."""

    file: int

    def write_holder(self, run: Run) -> None:
        """Say which run holds the device, for those that are refused."""
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, str(run.path.resolve()).encode(errors="surrogateescape"), 0)

    def release(self) -> None:
        os.close(self.file)

    def __enter__(self) -> DeviceLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_device(kind: str) -> DeviceLock:
    """Take the lock on a device, or the one that this process was handed at its start.

    Raises RunError with the name of the run that holds it.
    """
    inherited = os.environ.pop(LOCK_VARIABLE, None)
    if inherited is not None:
        os.set_inheritable(int(inherited), False)
        return DeviceLock(int(inherited))
    file = os.open(_lock_path(kind), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if holder := _wait_for_lock(file):
        os.close(file)
        raise RunError(
            f"{holder} is running on this machine's {kind.upper()}, which takes one run at a time. Wait for it, or "
            "stop it: Ctrl-C where it runs, or Stop on the page."
        )
    os.ftruncate(file, 0)
    return DeviceLock(file)


def refuse_busy_device(kind: str) -> None:
    """Raise RunError early where a run holds the device already, before rows are read for another one."""
    if LOCK_VARIABLE not in os.environ:
        lock_device(kind).release()


def refuse_busy_gpu(device: Device) -> None:
    """Raise RunError where a run holds the GPU, whose memory would not do for a second model. A CPU's holds both."""
    if device.kind == "cuda":
        refuse_busy_device("cuda")


def launch_run(config: TrainConfig, kind: str, began_with: str = "") -> Run:
    """Make a run and train it in a process of its own session, which outlives this one.

    `began_with` says where the adapter lies that preference training begins with. The lock is taken here and handed
    to that process, so nobody can come between. Raises RunError when the device is taken; then no run is made.
    """
    with lock_device(kind) as lock:
        run = new_run(config)
        if began_with:
            run.update_state(began_with=began_with)
        how = (
            ["prefer", "--resume", str(run.path)]
            if began_with
            else ["train", "--config", str(run.path / "config.toml")]
        )
        try:
            _spawn(run, lock, how)
        except OSError:
            shutil.rmtree(run.path)
            raise
    return run


def launch_resume(run: Run, kind: str) -> None:
    """Go on with a stopped run in a process of its own. Raises RunError as launch_run does."""
    run.require_unfinished()
    with lock_device(kind) as lock:
        before = run.read_state()
        run.update_state(status="preparing", reason=None)
        try:
            _spawn(run, lock, [run.stage, "--resume", str(run.path)])
        except OSError:
            run.update_state(status=before["status"], reason=before.get("reason"))
            raise


def request_stop(run: Run) -> None:
    """Ask a run's process to save a checkpoint after its step and end; it can be resumed from there."""
    if run.is_alive():
        os.kill(run.read_state()["pid"], signal.SIGTERM)


def discard_run(run: Run) -> None:
    """Kill a run's process at once and delete the run's folder. Raises RunError where it does not run.

    Uploaded files stay: whoever discards a run for a wrong setting starts another on the same data.
    """
    if not run.is_alive():
        raise RunError(f"{run.name} is not running any more. Nothing was deleted; that is done on the tab Runs.")
    pid = run.read_state()["pid"]
    if os.getpgid(pid) == pid != os.getpgrp():
        os.killpg(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + _KILL_WAIT_S
    while run.is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    _delete_folder(run)


def delete_run(run: Run) -> None:
    """Delete a run's folder, and uploaded files that no other run was trained on. Raises RunError while it runs."""
    runs_dir = run.path.parent
    folder = (runs_dir / UPLOADS).resolve()
    own = {path for path in map(Path.resolve, _read_data_paths(run) or []) if path.parent == folder}
    _delete_folder(run)
    for path in _without_used(own, runs_dir):
        path.unlink(missing_ok=True)


def _delete_folder(run: Run) -> None:
    _refuse_alive(run, "deleted")
    doomed = Path(tempfile.mkdtemp(prefix=".deleted-", dir=run.path.parent))
    run.path.rename(doomed / run.name)  # whole or not at all: a list of runs never meets half of one
    shutil.rmtree(doomed, ignore_errors=True)


def rename_run(run: Run, name: str) -> Run:
    """Give a run's folder another name, also where runs beside it say what they began with.

    Raises RunError while it runs, or where the name is taken or no name.
    """
    _refuse_alive(run, "renamed")
    try:
        TrainConfig(run_name=name or "")
    except ValueError:
        raise RunError(f"{name!r} can't be a run's name: it should be a plain folder name.") from None
    target = run.path.with_name(name)
    if target.exists():
        raise RunError(f"{target}: this run exists. Choose another name.")
    before = str(run.path.resolve())
    later = [other for other in list_runs(target.parent) if other.read_state().get("began_with") == before]
    for other in later:
        if other.is_alive():
            raise RunError(
                f"{run.name} can't be renamed: {other.name}, which began with it, is running. Stop it first."
            )
    run.path.rename(target)
    for other in later:
        other.update_state(began_with=str(target.resolve()))
    return Run(target)


def keep_upload(source: Path, runs_dir: str | Path) -> Path:
    """Copy an uploaded file to a private folder beside the runs, under a name of its own; it goes with its run."""
    folder = uploads_folder(runs_dir)
    stem = "".join(letter if letter.isalnum() or letter in "-_ ." else "_" for letter in source.name).lstrip(".")
    target, number = folder / (stem or "upload"), 2
    while target.exists():
        target, number = folder / f"{number}-{stem or 'upload'}", number + 1
    shutil.copyfile(source, target)
    target.chmod(0o600)
    return target


def uploads_folder(runs_dir: str | Path) -> Path:
    """The private folder of uploaded files, made where it is missing."""
    folder = Path(runs_dir) / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def remove_old_uploads(runs_dir: str | Path, older_than_s: float = 86_400) -> None:
    """Delete uploads that no run was trained on and that are older than a day."""
    folder = Path(runs_dir) / UPLOADS
    for path in _without_used(set(folder.iterdir()) if folder.is_dir() else set(), runs_dir):
        if time.time() - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _spawn(run: Run, lock: DeviceLock, arguments: list[str]) -> None:
    lock.write_holder(run)
    with (run.path / OUTPUT_FILE).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_tune", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.file,),
            env={**os.environ, LOCK_VARIABLE: str(lock.file), "COLUMNS": "100"},
        )
    run.update_state(pid=process.pid, started=time.time())
    Thread(target=process.wait, daemon=True).start()  # else it stayed a zombie while this process lives


def _read_data_paths(run: Run) -> list[Path] | None:
    """The files that a run was trained on; None where its settings can't be read."""
    try:
        config = run.read_config()
    except (ConfigError, RunError):
        return None
    return [Path(file) for file in (*config.data, *config.heldout_data, *config.preference_data)]


def _without_used(uploads: set[Path], runs_dir: str | Path) -> set[Path]:
    """Those uploads that no run was trained on. None where that can't be told of a run: it may be the only copy.

    Known by name: runs name the folder of runs as it was called then.
    """
    used: set[str] = set()
    # Runs, though their state may be damaged; those of an experiment lie one folder deeper.
    found = [config for where in ("*", "*/*") for config in Path(runs_dir).glob(f"{where}/config.toml")]
    for config in found:
        paths = _read_data_paths(Run(config.parent)) if UPLOADS not in config.relative_to(runs_dir).parts else []
        if paths is None:
            return set()
        used |= {path.name for path in paths if path.parent.name == UPLOADS}
    return {path for path in uploads if path.name not in used}


def _refuse_alive(run: Run, what: str) -> None:
    if run.is_alive():
        raise RunError(f"{run.name} is running and can't be {what}. Stop it first.")


def _lock_path(kind: str) -> Path:
    """One file a device and user. Not beside the runs: two folders of runs share one device."""
    root = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(root if root and Path(root).is_dir() else tempfile.gettempdir()) / f"qlora_tune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RunError(f"{folder}: belongs to another user, so this machine's lock can't be kept there. Remove it.")
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if kind == "cuda" else ""
    return folder / f"{kind}{''.join(filter(str.isalnum, number))}.lock"


def _wait_for_lock(file: int) -> str:
    """Take the lock; says who holds it where another does.

    Waited for is one that has yet to say its name, and one whose run has ended: a killed process lets go some 30 ms
    after its end.
    """
    end = time.monotonic() + _NAME_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            name = os.pread(file, 4096, 0).decode(errors="surrogateescape")
            if (name and _runs(Run(Path(name)))) or time.monotonic() > end:
                return f"Run {name}" if name else "Another run"
        time.sleep(0.02)


def _runs(run: Run) -> bool:
    try:
        return run.is_alive()
    except RunError:  # its folder is deleted
        return False
