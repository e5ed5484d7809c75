"""An experiment: one run on all tasks, one without each cluster, the same rows asked, and going on after a stop."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, settings

from qlora_tune.cli import main
from qlora_tune.comparison import read_comparison
from qlora_tune.errors import ConfigError, DataError, RunError
from qlora_tune.plan import plan_run
from qlora_tune.rotation import Rotation, open_rotation
from qlora_tune.runs import UNSEEN, Run, list_runs, new_run, read_json

TASKS = ("extract_field", "extract_json", "sentiment", "topic")
STEPS = 3


def write_rows(path: Path, tasks: tuple[str, ...] = TASKS, rows: int = 20) -> Path:
    """Some rows of the sample, the first of each task."""
    lines = [line for line in (ROOT / "sample.jsonl").read_text().splitlines() if json.loads(line)["task"] in tasks]
    kept = [[line for line in lines if json.loads(line)["task"] == task][:rows] for task in tasks]
    path.write_text("".join(f"{line}\n" for found in kept for line in found))
    return path


def command(folder: Path, *more: str) -> list[str]:
    return [
        *("train", str(folder / "rows.jsonl"), "--preset", "builtin", "--holdout-tasks", "auto"),
        *("--holdout-clusters", "2", "--heldout-share", "0.3", "--max-steps", str(STEPS), "--max-new-tokens", "8"),
        *("--runs-dir", str(folder / "runs"), "--run-name", "x", *more),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment's folder."""
    folder = tmp_path_factory.mktemp("experiment")
    write_rows(folder / "rows.jsonl")
    assert main(command(folder)) == 0
    return folder / "runs" / "x"


@pytest.fixture
def experiment(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(whole.parent.parent, tmp_path / "copy")
    return tmp_path / "copy" / "runs" / "x"


def go_on(experiment: Path, *more: str) -> int:
    # The copy's data are those that the experiment was begun with: they are known by their content.
    return main(command(experiment.parent.parent, *more))


def test_its_runs_are_ordinary_ones_each_without_one_cluster(whole: Path) -> None:
    runs = {run.name: run for run in list_runs(whole)}
    assert list(runs) == ["all", "cluster-1", "cluster-2"]
    held_out = {name: run.read_config().holdout_tasks for name, run in runs.items()}
    assert held_out == {"all": [], "cluster-1": ["extract_field", "extract_json"], "cluster-2": ["sentiment", "topic"]}
    for name, run in runs.items():
        assert run.read_state()["status"] == "finished"
        assert run.has_adapter
        scored = {score.task for score in read_comparison(run).by_task()}
        assert scored == set(TASKS) - set(held_out[name])
        summary = read_json(run.path / "data.json")
        assert summary["rows_in"] == 80
        assert summary["rows_kept"] == sum(
            summary[f"{key}"] for key in ("train_sequences", "rows_heldout", "rows_unseen")
        )
        assert {example.task for example in run.read_unseen()} == set(held_out[name])


def test_the_table_compares_each_task_on_the_same_rows(whole: Path) -> None:
    seen = read_comparison(Run(whole / "all"))
    table = (whole / "unseen.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()}
    for task in TASKS:
        name = "cluster-1" if task.startswith("extract") else "cluster-2"
        unseen = read_comparison(Run(whole / name), UNSEEN)
        asked = {answer.source for answer in unseen.answers if answer.task == task}
        (before,) = [score for score in seen.by_task() if score.task == task]
        (after,) = [score for score in unseen.by_task() if score.task == task]
        assert asked == {answer.source for answer in seen.answers if answer.task == task}
        assert len(asked) == 6
        shares = [after.base["exact_match"], after.tuned["exact_match"], before.tuned["exact_match"]]
        cells = lines[task]
        assert [cells[1], cells[2], cells[3], cells[5]] == ["6", *(f"{100 * share:.1f} %" for share in shares)]
        assert cells[7].split(" → ")[1:] == [f"{100 * s.tuned['chrf']:.1f}" for s in (after, before)]
        assert cells[8] == name
    assert lines["all"][1] == "24"
    assert "cluster-2: sentiment, topic" in table
    record = read_json(whole / "experiment.json")
    assert [gain["task"] for gain in record["tasks"]] == sorted(TASKS)
    assert record["seed"] == 42


def test_base_and_seen_stay_empty_for_a_task_without_held_out_rows(experiment: Path) -> None:
    scores = read_json(experiment / "all" / "scores.json")
    scores["answers"] = [answer for answer in scores["answers"] if answer["task"] != "topic"]
    (experiment / "all" / "scores.json").write_text(json.dumps(scores))
    rotation = read_rotation(experiment)
    unseen = Run(experiment / "cluster-2").read_unseen()
    chosen = rotation.choose_rows(unseen)
    assert {row.source for row in unseen if row.task == "topic"} <= {row.source for row in chosen}
    assert len([row for row in chosen if row.task == "sentiment"]) == 6
    gains, total = rotation.read_gains()
    assert [gain.task for gain in gains if gain.seen is None] == ["topic"]
    assert total is not None
    assert total.unseen.rows == 18


def test_rows_that_only_one_run_has_answered_are_no_part_of_the_table(experiment: Path) -> None:
    path = experiment / "cluster-2" / "scores-unseen.json"  # as `evaluate` on that run leaves it: other rows drawn
    scores = read_json(path)
    other = {**scores["answers"][0], "source": "rows.jsonl:999"}
    path.write_text(json.dumps({**scores, "answers": [*scores["answers"][1:], other]}))
    gains, total = read_rotation(experiment).read_gains()
    assert total is not None
    assert total.unseen.rows == 23
    assert all(gain.seen and gain.seen.rows == gain.unseen.rows for gain in gains)


def read_rotation(experiment: Path, **changes: Any) -> Rotation:
    usual = {"data": [str(experiment.parent.parent / "rows.jsonl")], "holdout_tasks": "auto", "holdout_clusters": "2"}
    usual |= {"heldout_share": "0.3", "max_steps": str(STEPS), "max_new_tokens": "8", "eval_steps": "0.5"}
    where = {"runs_dir": str(experiment.parent), "run_name": experiment.name}
    return open_rotation(settings(**{**usual, **where, **changes}))


def test_the_same_command_again_keeps_what_is_finished(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in experiment.glob("*/*.json*")}
    (experiment / "unseen.md").unlink()
    assert go_on(experiment) == 0
    out = capsys.readouterr().out
    assert out.count("finished and scored already") == 3
    assert "run 2 of 3: without extract_field, extract_json" in out
    assert {path: path.read_bytes() for path in experiment.glob("*/*.json*")} == before
    assert (experiment / "unseen.md").exists()


def test_a_run_that_was_trained_and_not_scored_is_only_scored(experiment: Path) -> None:
    run = Run(experiment / "cluster-2")
    (run.path / "scores-unseen.json").unlink()
    adapter = {path: path.read_bytes() for path in run.adapter.iterdir()}
    steps = run.read_metrics()
    assert go_on(experiment) == 0
    assert {path: path.read_bytes() for path in run.adapter.iterdir()} == adapter
    assert run.read_metrics() == steps
    assert read_comparison(run, UNSEEN).total().rows == 12


@pytest.mark.reliability
def test_an_interrupted_experiment_goes_on_to_the_same_losses(whole: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    second = tmp_path / "runs" / "x" / "cluster-1"
    arguments = [sys.executable, "-m", "qlora_tune", *command(tmp_path, "--eval-steps", "1")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    wait_for(lambda: Run(second).read_metrics() != [] or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "the experiment goes on with the same command and --run-name x" in said
    assert Run(second).read_state()["status"] == "stopped"
    assert not (tmp_path / "runs" / "x" / "unseen.md").exists()
    first = (second.parent / "all" / "metrics.jsonl").read_bytes()
    assert main(command(tmp_path, "--eval-steps", "1")) == 0
    assert (second.parent / "all" / "metrics.jsonl").read_bytes() == first
    steps = [entry for entry in Run(second).read_metrics() if "loss" in entry]
    alone = [entry for entry in Run(whole / "cluster-1").read_metrics() if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert [entry["loss"] for entry in steps] == pytest.approx([entry["loss"] for entry in alone], rel=1e-5)
    assert (tmp_path / "runs" / "x" / "unseen.md").exists()


def wait_for(condition: Any, limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_scoring_such_a_run_again_asks_held_out_and_unseen_rows(experiment: Path) -> None:
    run = Run(experiment / "cluster-2")
    for name in ("scores.json", "scores-unseen.json", "report.html"):
        (run.path / name).unlink()
    assert main(["evaluate", str(run.path)]) == 0
    assert {score.task for score in read_comparison(run).by_task()} == {"extract_field", "extract_json"}
    assert {score.task for score in read_comparison(run, UNSEEN).by_task()} == {"sentiment", "topic"}
    assert "Task types it never saw" in (run.path / "report.html").read_text()
    assert run.read_state()["score_tuned"] == read_comparison(run).total().tuned["exact_match"]


def test_rows_of_a_file_called_unseen_do_not_take_the_place_of_the_unseen_tasks(experiment: Path) -> None:
    run = Run(experiment / "cluster-2")
    before = (run.path / "scores-unseen.json").read_bytes()
    other = experiment.parent.parent / "unseen.jsonl"
    other.write_text(json.dumps({"prompt": "Say a word", "completion": "word", "task": "other"}))
    shutil.copy(run.path.parent.parent.parent / "rows.jsonl", experiment)
    config = run.path / "config.toml"
    original = run.read_config().data[0]
    config.write_text(config.read_text().replace(original, str(experiment / "rows.jsonl")))
    assert main(["evaluate", str(run.path), "--data", str(other)]) == 0
    assert (run.path / "scores-unseen.json").read_bytes() == before
    assert read_comparison(run, "other-unseen").total().rows == 1
    own, folder = (run.path / "scores.json").read_bytes(), other.parent / "folder of rows"
    folder.mkdir()
    shutil.move(other, folder)
    with contextlib.chdir(folder):
        assert main(["evaluate", str(run.path), "--data", "."]) == 0
    assert (run.path / "scores.json").read_bytes() == own
    assert read_comparison(run, "folder of rows").total().rows == 1


@pytest.mark.parametrize("name", ["seed", "lora_r"])
def test_other_settings_are_another_experiment(experiment: Path, name: str) -> None:
    with pytest.raises(RunError, match=f"its {name} \\(.*, now 7\\) have changed since it was begun.*--run-name"):
        read_rotation(experiment, **{name: "7"})


def test_other_rows_are_another_experiment(experiment: Path) -> None:
    write_rows(experiment.parent.parent / "rows.jsonl", rows=19)
    with pytest.raises(RunError, match="data"):
        read_rotation(experiment)


def test_an_experiment_without_a_run_yet_may_still_change(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    where = tmp_path / "runs" / "x"
    first = read_rotation(where)
    assert [list(planned.tasks) for planned in first.planned] == [
        [], ["extract_field", "extract_json"], ["sentiment", "topic"],
    ]  # fmt: skip
    assert len(read_rotation(where, holdout_clusters="3").planned) == 4


def test_what_can_not_be_an_experiment_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ("topic",))
    with pytest.raises(DataError, match="two tasks at least, and the rows name 1: topic"):
        read_rotation(tmp_path / "runs" / "x")
    write_rows(rows)
    with pytest.raises(ConfigError, match="score_rows is 0"):
        read_rotation(tmp_path / "runs" / "x", score_rows="0")
    new_run(settings(runs_dir=str(tmp_path / "runs"), run_name="x"))
    with pytest.raises(RunError, match="exists and is no experiment. Choose another --run-name"):
        read_rotation(tmp_path / "runs" / "x")


def test_the_list_of_runs_passes_an_experiment_by_and_lists_its_own(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_runs(whole.parent) == []
    assert main(["runs", "--runs-dir", str(whole.parent)]) == 0
    assert "No runs yet" in capsys.readouterr().out
    assert main(["runs", "--runs-dir", str(whole)]) == 0
    assert "cluster-2" in capsys.readouterr().out


def test_where_one_run_is_started_the_command_for_an_experiment_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_run({"preset": "builtin", "holdout_tasks": ["auto"], "runs_dir": str(tmp_path)})
    assert "python -m qlora_tune train FILE --holdout-tasks auto" in " ".join(plan.problems)
    assert main(["preview", "--preset", "builtin", "--holdout-tasks", "auto"]) == 2
    assert "name the tasks to hold out" in capsys.readouterr().err


def test_the_card_counts_the_rows_that_are_kept_out(tmp_path: Path) -> None:
    flags = {"preset": "builtin", "runs_dir": str(tmp_path)}
    with_all, without = (dict(plan_run(more).facts) for more in (flags, {**flags, "holdout_tasks": ["topic"]}))
    assert "kept out" not in with_all["split"]
    assert "of tasks kept out of training" in without["split"]
    assert with_all["steps"] != without["steps"]
