"""A run's folder: settings, state, metrics, log, checkpoints. The folder is the truth; every face reads it.

RUN/config.toml       every setting, as it was resolved
RUN/state.json        status, process, device, base, data fingerprint, versions, totals
RUN/metrics.jsonl     one line a training step and one an evaluation
RUN/log.txt           what the libraries had to say
RUN/data.json         rows in, kept, rejected, held out; tokens; the data files by name, rows and hash
RUN/heldout.jsonl     the held-out rows that base and tuned model answer
RUN/unseen.jsonl      the rows of tasks that were kept out of training, where there are any
    RUN/problems.jsonl    every rejected or changed row as it stood, with file, line and reason
RUN/checkpoints/      resumable states, each with a manifest of hashes
RUN/adapter/          the trained adapter
RUN/scores.json, RUN/comparison.md   base against tuned on the held-out rows; scores-unseen.json and so on likewise
RUN/report.html       all of it for people, on one page
RUN/votes.jsonl       which answers people found best (compare --vote)
RUN/pairs.jsonl, RUN/pairs-heldout.jsonl   of `prefer` and `reward`: the pairs that are trained on and scored on
RUN/reference/        of `prefer` and `reward`: the adapter that it began with
RUN/preferences.json  of `prefer`: the held-out pairs before and after
RUN/rewards.json      of `reward`: the rewards of the held-out pairs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tune.config import TrainConfig, describe_value, read_toml, validate_settings
from qlora_tune.disk import hash_file
from qlora_tune.errors import RunError
from qlora_tune.shapes import DataProblem, Example

MANIFEST = "manifest.json"
_STEP = re.compile(r"checkpoint-\d+")
UNDER_WAY = ("preparing", "running")
HELDOUT, UNSEEN = "heldout", "unseen"  # rows to score: of tasks that are trained on, and of others


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def has_adapter(self) -> bool:
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def can_answer(self) -> bool:
        """Whether the run has an adapter that writes answers."""
        return self.has_adapter and not is_reward_model(self.adapter)

    def require_adapter(self) -> None:
        """Raise RunError with the way on when the run has no adapter yet."""
        if not self.has_adapter:
            raise RunError(
                f"{self.path}: this run is {self.read_state()['status']} and has no adapter yet. "
                f"Go on with: {self.resume_command()}"
            )

    @property
    def stage(self) -> str:
        """The command that trains the run."""
        config = self.read_config()
        if config.reward_model:
            return "reward"
        return "prefer" if config.preference_data else "train"

    def resume_command(self) -> str:
        """What goes on with the run in a terminal."""
        return f"python -m qlora_tune {self.stage} --resume {self.path}"

    def require_unfinished(self) -> None:
        """Raise RunError when there is nothing to go on with."""
        status = self.read_state()["status"]
        if status in ("running", "finished"):
            again = status == "finished" and self.stage != "reward"
            hint = f" Score it again with: python -m qlora_tune evaluate {self.path}" if again else ""
            raise RunError(f"{self.path}: this run is {status}; there is nothing to go on with.{hint}")

    def read_config(self) -> TrainConfig:
        return validate_settings(read_toml(self.path / "config.toml"), str(self.path / "config.toml"))

    def read_state(self) -> dict[str, Any]:
        """The run's state; a run whose process is gone without a last word reads as interrupted."""
        state = self._load_state()
        if state["status"] in UNDER_WAY and not _is_alive(state):
            state["status"] = "interrupted"
        return state

    def is_alive(self) -> bool:
        """Whether the run's process lives: preparing, training or scoring."""
        return _is_alive(self._load_state())

    def _load_state(self) -> dict[str, Any]:
        """state.json as it is. Raises RunError where an entry that decides something is no such value."""
        state = read_json(self.path / "state.json")
        kinds = {"status": str, "pid": int | None, "started": int | float | None, "created": int | float}
        state.setdefault("status", None)  # the one that may not be missing
        damaged = [key for key, kind in kinds.items() if key in state and not isinstance(state[key], kind)]
        if damaged:
            raise RunError(f"{self.path / 'state.json'}: names no proper {damaged[0]}. The file is damaged.")
        return state

    def update_state(self, **changes: Any) -> None:
        """Change entries of state.json; readers see the old file or the new one, never half of it."""
        path = self.path / "state.json"
        state = read_json(path) if path.exists() else {}
        write_json(path, {**state, **changes, "updated": time.time()})

    def forget_process(self) -> None:
        """Note that no process trains or scores the run any more."""
        with contextlib.suppress(OSError):  # on a full disk: what is being told of it matters more
            self.update_state(pid=None)

    def add_metrics(self, entry: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        entries = _read_lines(self.path / "metrics.jsonl")
        return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]

    def rewind_metrics(self, step: int) -> None:
        """Forget what was measured after a step, before training goes on from it."""
        kept = [json.dumps(entry) for entry in self.read_metrics() if entry["step"] <= step]
        temporary = self.path / "metrics.jsonl.tmp"
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path / "metrics.jsonl")

    def write_heldout(self, examples: Iterable[Example], name: str = HELDOUT) -> None:
        """Keep the held-out rows themselves: scoring again must not depend on the data files of that day.

        Those of tasks that were kept out of training whole have the name UNSEEN.
        """
        lines = [_to_json_line(example) for example in examples]
        (self.path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def read_unseen(self) -> list[Example]:
        """The rows of tasks that were kept out of training; none where the run held none out."""
        return self.read_heldout(UNSEEN) if (self.path / f"{UNSEEN}.jsonl").exists() else []

    def read_heldout(self, name: str = HELDOUT) -> list[Example]:
        """The held-out rows that write_heldout kept."""
        path = self.path / f"{name}.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [
                Example(tuple(row["messages"]), row["task"], row["source"], tuple(row.get("tools", ()))) for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever an edit can leave
            raise RunError(f"{path}: can't be read ({error}).") from None

    def write_problems(self, problems: Iterable[DataProblem]) -> None:
        lines = [_to_json_line(problem) for problem in problems]
        (self.path / "problems.jsonl").write_text("".join(lines), encoding="utf-8")

    def read_problems(self) -> list[dict[str, Any]]:
        """The rejected and changed rows that write_problems kept; none where it kept none."""
        return [entry for entry in _read_lines(self.path / "problems.jsonl") if isinstance(entry, dict)]


def new_run(config: TrainConfig) -> Run:
    """Make a run's folder and keep its settings there. Raises RunError when the name is taken."""
    import tomli_w

    root = Path(config.runs_dir)
    base = Path(config.model_name_or_path).name
    name = config.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{base}"
    path = root / name
    number = 2
    while config.run_name is None and path.exists():
        path, number = root / f"{name}-{number}", number + 1
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise RunError(f"{path}: this run exists. Choose another --run-name, or go on with --resume {path}.") from None
    except OSError as error:
        raise RunError(f"{path}: the run's folder can't be made: {error.strerror}.") from None
    settings = {key: value for key, value in config.model_dump().items() if value is not None}
    # Absolute, so that the run can be resumed and opened from anywhere.
    for key in ("data", "heldout_data", "preference_data"):
        settings[key] = [str(Path(file).resolve()) for file in settings[key]]
    for key in ("contracts", "plain_text"):
        if settings.get(key, "auto") != "auto":
            settings[key] = str(Path(settings[key]).resolve())
    if Path(config.model_name_or_path).is_dir():
        settings["model_name_or_path"] = str(Path(config.model_name_or_path).resolve())
    run = Run(path)
    try:
        (path / "config.toml").write_bytes(tomli_w.dumps(settings).encode("utf-8", errors="surrogateescape"))
        run.update_state(
            status="preparing",
            pid=os.getpid(),
            started=time.time(),
            created=time.time(),
            preset=config.preset,
            base_model=settings["model_name_or_path"],
        )
    except OSError:  # on a full disk; a folder without a state would only keep its name from being used
        shutil.rmtree(path)
        raise
    return run


def open_run(name: str | Path, runs_dir: str | Path = "runs") -> Run:
    """Open a run by its folder or its name. Raises RunError naming the runs that exist."""
    for path in (Path(name), Path(runs_dir) / name):
        if (path / "state.json").is_file():
            return Run(path)
    known = [run.name for run in list_runs(runs_dir)]
    hint = f"Runs in {runs_dir}: {', '.join(known[-10:])}." if known else f"There are no runs in {runs_dir} yet."
    raise RunError(f"{name}: no such run. {hint}")


def latest_run(runs_dir: str | Path = "runs") -> Run:
    """The newest run that has an adapter to answer with. Raises RunError when there is none."""
    finished = [run for run in list_runs(runs_dir) if run.can_answer]
    if not finished:
        raise RunError(f"There is no run with an adapter in {runs_dir}. Train one first: qlora_tune train FILE")
    return finished[-1]


def list_runs(runs_dir: str | Path = "runs") -> list[Run]:
    """All runs in a folder whose state can be read, oldest first."""
    found = [Run(path.parent) for path in Path(runs_dir).glob("*/state.json")]
    created = {}
    for run in found:
        with contextlib.suppress(RunError):
            created[run] = run.read_state().get("created", 0)
    return sorted(created, key=lambda run: created[run])


def is_reward_model(adapter: Path) -> bool:
    """Whether an adapter's folder holds a reward model: it scores answers and writes none."""
    with contextlib.suppress(RunError):  # what can't be read is refused where it is loaded
        return bool(read_json(adapter / "adapter_config.json").get("task_type") == "SEQ_CLS")
    return False


def seal_checkpoint(folder: Path) -> None:
    """Declare a checkpoint complete: write its manifest of sizes and hashes last, after everything is on disk."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, entries)


def step_of(checkpoint: Path | None) -> int:
    """The step that a run goes on after; 0 without a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def keep_whole_checkpoints(run: Run) -> list[Path]:
    """Delete checkpoints whose manifest is missing or doesn't hold for every file, so that nothing resumes from them.

    Returns the whole ones, oldest first. Every file is read once.
    """
    whole = []
    folders = [folder for folder in run.checkpoints.glob("checkpoint-*") if _STEP.fullmatch(folder.name)]
    for folder in sorted(filter(Path.is_dir, folders), key=step_of):
        if _is_whole(folder):
            whole.append(folder)
        else:
            shutil.rmtree(folder)
    return whole


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """Hash the content of data files, in order: a resumed run must see what it saw before."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest()


def shaping_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape training, as JSON holds them. Files and base are known by their content instead."""
    elsewhere = {"runs_dir", "run_name", "score_rows", "max_new_tokens", "plain_text"}
    by_content = {"data", "heldout_data", "preference_data", "model_name_or_path"}
    return config.model_dump(mode="json", exclude=elsewhere | by_content)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, with both values. One that an earlier version didn't have had its default."""
    defaults = shaping_settings(TrainConfig())
    both = [(name, before.get(name, defaults[name]), value) for name, value in now.items()] if before else []
    return [
        f"{name} ({describe_value(was)}, now {describe_value(is_now)})" for name, was, is_now in both if was != is_now
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run. Raises RunError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: can't be read ({error}).") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds no JSON object. The file is damaged.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines, but for what is none: the last line of a killed process."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return entries


def _to_json_line(record: Example | DataProblem) -> str:
    # Rows from Parquet files may hold dates and the like, which JSON writes as text.
    return json.dumps(asdict(record), default=str) + "\n"


def _is_whole(folder: Path) -> bool:
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(entries) and all(_matches(folder / name, entry) for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whatever a damaged manifest can hold
        return False


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return bool(hash_file(path) == entry["sha256"])


def _is_alive(state: dict[str, Any]) -> bool:
    """Whether a run's process still lives; a later process with the same number doesn't count."""
    import psutil

    if not state.get("pid"):
        return False
    try:
        process = psutil.Process(state["pid"])
        return bool(
            process.create_time() <= (state.get("started") or 0) + 1 and process.status() != psutil.STATUS_ZOMBIE
        )
    except (psutil.Error, ValueError):  # a number that no process has
        return False
