"""Does tuning help on task types that were never trained on? Clusters of similar tasks are held out in turn.

FLAN's question (arXiv 2109.01652): one run on all tasks, then one without each cluster. An experiment is a folder that
holds these runs as ordinary ones:

EXPERIMENT/experiment.json   clusters, fingerprints of what went in, scores by task
EXPERIMENT/all/              the run on all tasks
EXPERIMENT/cluster-1/ ...    the runs that each hold one cluster out
EXPERIMENT/unseen.md         the table: each task by the base, unseen and seen
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_tune.base import find_base
from qlora_tune.clusters import cluster_tasks
from qlora_tune.comparison import (
    HEADLINE,
    Answered,
    Comparison,
    TaskScore,
    read_comparison,
    table_cell,
    write_change,
    write_from_to,
    write_values,
)
from qlora_tune.config import TrainConfig
from qlora_tune.data import label_files
from qlora_tune.errors import ConfigError, RunError
from qlora_tune.prepare import data_files, load_files, training_files
from qlora_tune.runs import UNSEEN, Run, changed_settings, fingerprint_files, read_json, shaping_settings, write_json
from qlora_tune.scores import write_value
from qlora_tune.shapes import Example

ALL = "all"
RECORD = "experiment.json"
HEADS = ("task", "rows", "base", "unseen", "change (95 %)", "seen", "change (95 %)", "chrF", "held out in")
_WORDS = (
    "Exact match of greedy answers. Base: the model before tuning. Unseen: tuned on the tasks of all other clusters.\n"
    "Seen: tuned on all tasks, and asked the same rows; empty where a task has no held-out rows. Changes are over\n"
    "the base, row by row, with the interval in which they lie with 95 % confidence (paired bootstrap over rows): it\n"
    "says nothing of another training. chrF is base → unseen → seen. The last line is of all rows that have both."
)


@dataclass(frozen=True)
class Planned:
    """One run of an experiment: the tasks that it holds out, none for the run on all, and its settings."""

    tasks: tuple[str, ...]
    config: TrainConfig

    @property
    def run(self) -> Run:
        return Run(Path(self.config.runs_dir) / str(self.config.run_name))

    def is_made(self) -> bool:
        return (self.run.path / "state.json").is_file()

    def is_trained(self) -> bool:
        return self.is_made() and self.run.has_adapter and self.run.read_state()["status"] == "finished"

    def is_scored(self) -> bool:
        """Whether the scores that the table is made of are there."""
        return (self.run.path / (f"scores-{UNSEEN}.json" if self.tasks else "scores.json")).is_file()


@dataclass(frozen=True)
class TaskGain:
    """What tuning gave one task, on the same rows: by the run that held its cluster out, and by the run on all."""

    task: str
    cluster: str
    unseen: TaskScore
    seen: TaskScore | None


@dataclass(frozen=True)
class Rotation:
    """An experiment's folder and its runs, in the order in which they are trained."""

    path: Path
    planned: tuple[Planned, ...]

    def choose_rows(self, unseen: Sequence[Example]) -> list[Example]:
        """Of a run's unseen rows those to score: what the run on all tasks has answered without training on it.

        Of tasks that it has answered nothing of, all.
        """
        answers = _read(self.planned[0].run, "").answers
        sources, tasks = {answer.source for answer in answers}, {answer.task for answer in answers}
        return [row for row in unseen if row.source in sources or row.task not in tasks]

    def read_gains(self) -> tuple[list[TaskGain], TaskGain | None]:
        """What each task gained, by the scores of the runs so far; and all rows that have both scores, if any."""
        seen = _read(self.planned[0].run, "")
        answers: list[Answered] = []
        cluster_of: dict[str, str] = {}
        for planned in self.planned[1:]:
            answers += _read(planned.run, UNSEEN).answers
            cluster_of |= dict.fromkeys(planned.tasks, planned.run.name)
        both = {answer.source for answer in answers} & {answer.source for answer in seen.answers}
        seen = Comparison([answer for answer in seen.answers if answer.source in both], seen.contracts)
        with_both = {answer.task for answer in seen.answers}
        answers = [answer for answer in answers if answer.source in both or answer.task not in with_both]
        seen_scores = {score.task: score for score in seen.by_task()}
        gains = [
            TaskGain(score.task, cluster_of[score.task], score, seen_scores.get(score.task))
            for score in Comparison(answers, seen.contracts).by_task()
        ]
        if not both:
            return gains, None
        same = Comparison([answer for answer in answers if answer.source in both], seen.contracts)
        return gains, TaskGain("all", "", same.total(), seen.total())

    def write_table(self) -> Path:
        """Write unseen.md, and the scores by task into experiment.json. Returns the former."""
        gains, total = self.read_gains()
        config, record = self.planned[0].config, read_json(self.path / RECORD)
        write_json(self.path / RECORD, {**record, "tasks": [asdict(gain) for gain in gains]})
        lines = [f"| {' | '.join(map(table_cell, row))} |" for row in table_rows(gains, total)]
        lines.insert(1, f"| --- |{' ---: |' * (len(HEADS) - 2)} --- |")
        clusters = [f"- {planned.run.name}: {', '.join(planned.tasks)}" for planned in self.planned[1:]]
        day = datetime.fromtimestamp(record["created"], UTC).date().isoformat()
        about = f"Begun {day}, seed {config.seed}, base {Path(config.model_name_or_path).name}."
        parts = ["# Task types never seen", about, _WORDS, "\n".join(clusters), "\n".join(lines)]
        path = self.path / "unseen.md"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return path


def table_rows(gains: Sequence[TaskGain], total: TaskGain | None) -> list[tuple[str, ...]]:
    """The cells of the table, its heads in the first line and all rows that have both scores in the last."""
    rows: list[tuple[str, ...]] = [HEADS]
    for gain in [*gains, *([total] if total else [])]:
        seen = gain.seen
        after = write_value(HEADLINE, seen.tuned[HEADLINE]) if seen else ""
        change = write_change(seen, HEADLINE) if seen else ""
        chrf = write_from_to(gain.unseen, "chrf") + (
            f" → {write_from_to(seen, 'chrf').split(' → ')[1]}" if seen else ""
        )
        values = write_values(gain.unseen, HEADLINE)
        rows.append((gain.task, str(gain.unseen.rows), *values, after, change, chrf, gain.cluster))
    return rows


def open_rotation(config: TrainConfig) -> Rotation:
    """Make an experiment's folder, or open the one of this name to go on with what is unfinished.

    Raises ConfigError where nothing would be scored, DataError where the rows have too few tasks, and RunError where
    the name is taken, or the data, settings or base of an experiment that has begun are others now.
    """
    if not config.score_rows:
        raise ConfigError("holdout_tasks auto compares scores, and score_rows is 0. Leave --score-rows out.")
    came_in: dict[str, Any] = {
        "data_fingerprint": fingerprint_files(data_files(config)),
        "settings": shaping_settings(config),
        "base_fingerprint": find_base(config.model_name_or_path, config.model_revision).fingerprint,
    }
    path = Path(config.runs_dir) / (config.run_name or time.strftime("%Y%m%d-%H%M%S-unseen"))
    if path.exists() and not (path / RECORD).is_file():
        raise RunError(f"{path}: exists and is no experiment. Choose another --run-name.")
    if any(path.glob("*/state.json")):
        record = read_json(path / RECORD)
        hashes = ("data_fingerprint", "base_fingerprint")
        changed = [key.partition("_")[0] for key in hashes if record.get(key) != came_in[key]]
        changed += changed_settings(record.get("settings", {}), came_in["settings"])
        if changed:
            raise RunError(
                f"{path}: its {' and '.join(changed)} have changed since it was begun, so its runs could not be "
                "compared. Begin a new experiment under another --run-name."
            )
        return _plan(path, config, record["clusters"])
    files = training_files(config)
    clusters = cluster_tasks(load_files(config, files, label_files(data_files(config)))[0], config.holdout_clusters)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / RECORD, {"created": time.time(), "seed": config.seed, "clusters": clusters, **came_in})
    return _plan(path, config, clusters)


def _plan(path: Path, config: TrainConfig, clusters: Sequence[Sequence[str]]) -> Rotation:
    held_out = [(ALL, ()), *((f"cluster-{number}", tuple(tasks)) for number, tasks in enumerate(clusters, 1))]
    return Rotation(
        path,
        tuple(
            Planned(
                tasks,
                config.model_copy(update={"holdout_tasks": list(tasks), "runs_dir": str(path), "run_name": name}),
            )
            for name, tasks in held_out
        ),
    )


def _read(run: Run, name: str) -> Comparison:
    """A run's comparison; an empty one where its rows were not scored."""
    path = run.path / f"scores{f'-{name}' if name else ''}.json"
    return read_comparison(run, name) if path.exists() else Comparison([])
