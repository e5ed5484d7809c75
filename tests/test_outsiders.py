"""Adapters and models without a run here: scored on rows that are named, as they are scored with their run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_part
from test_export import run, trained  # noqa: F401 - fixtures

from qlora_tune.cli import main
from qlora_tune.comparison import Comparison, read_comparison, score_table
from qlora_tune.config import shipped_path
from qlora_tune.errors import DataError, ModelError
from qlora_tune.export import export_adapter, merge_adapter
from qlora_tune.outsiders import find_rows, open_outsider
from qlora_tune.runs import Run

HELDOUT = "sample_heldout.jsonl"


@pytest.fixture(scope="module")
def shared_zip(trained: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    target = tmp_path_factory.mktemp("shared") / "mine.zip"
    export_adapter(trained, run, target)
    return target


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty held-out rows in a file of their own."""
    return Path(write_part(tmp_path_factory.mktemp("rows") / "some.jsonl", HELDOUT, slice(20)))


def test_a_zip_scores_as_the_run_that_it_came_from(
    shared_zip: Path,
    rows: Path,
    run: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(shared_zip), "--data", str(rows)]) == 0
    assert "not known what it was trained on" not in capsys.readouterr().out  # its recipe says
    found = read_comparison(Run(tmp_path / "mine-scores"))
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    config = (copy / "config.toml").read_text()  # batches of one size, which round alike
    assert "per_device_eval_batch_size = 32\n" in config
    (copy / "config.toml").write_text(config.replace("eval_batch_size = 32", "eval_batch_size = 16"))
    assert main(["evaluate", str(copy), "--data", str(rows)]) == 0
    expected = read_comparison(Run(copy), "some")
    assert [(a.base, a.tuned, a.tuned_nll) for a in found.answers] == [
        (a.base, a.tuned, a.tuned_nll) for a in expected.answers
    ]
    assert len(found.answers) == 20
    assert found.forgetting is not None


def test_a_whole_model_is_scored_alone(
    trained: Any,  # noqa: F811
    run: Any,  # noqa: F811
    rows: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    merge_adapter(trained, run, tmp_path / "merged", dtype="float32")
    arguments = ["evaluate", str(tmp_path / "merged"), "--data", str(rows), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "not known what it was trained on" in capsys.readouterr().out
    found: Comparison = read_comparison(Run(tmp_path / "out"))
    assert all(answer.base is None for answer in found.answers)
    total = found.total()
    assert total.base == total.change == {}
    right = sum(answer.tuned == answer.reference for answer in found.answers)
    assert total.tuned["exact_match"] == right / 20
    assert 0 < total.tuned["loss"] < 5
    line = score_table([total]).splitlines()[-1]
    assert line.startswith(f"| all | 20 |  | {100 * right / 20:.1f} % |  |")
    assert main(arguments) == 0  # its own scores may be written anew
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert kept["forgetting"] is None


def test_what_it_was_trained_on_is_refused_by_the_recipe(shared_zip: Path, tmp_path: Path) -> None:
    from qlora_tune.chat import unpack_adapter

    outsider = open_outsider(unpack_adapter(shared_zip, tmp_path), None, False)
    with pytest.raises(DataError, match="trained on this file, so scores on it prove nothing"):
        find_rows(outsider, [str(shipped_path("sample.jsonl"))])
    examples, _ = find_rows(outsider, [str(shipped_path(HELDOUT))])
    assert len(examples) == 400


def test_what_can_t_be_scored_is_refused_in_words(shared_zip: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes").mkdir()
    cases = {
        "comes with no held-out rows": ["evaluate", str(shared_zip)],
        "no such run": ["evaluate", str(tmp_path / "notes"), "--data", str(rows)],
        "is there already and holds no scores": [
            "evaluate", str(shared_zip), "--data", str(rows), "--output", str(tmp_path / "notes")
        ],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert main(arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ModelError, match="for whole models"):
        open_outsider(tmp_path / "notes", None, True)


def test_scores_of_a_model_never_take_the_place_of_a_runs(
    shared_zip: Path,
    rows: Path,
    run: Any,  # noqa: F811
    capsys: Any,
) -> None:
    kept = {path.name: path.read_bytes() for path in run.path.glob("*.json")}
    assert "scores.json" in kept
    assert main(["evaluate", str(shared_zip), "--data", str(rows), "--output", str(run.path)]) == 2
    assert "is a run, which keeps its own scores" in capsys.readouterr().err.replace("\n", " ")
    assert {path.name: path.read_bytes() for path in run.path.glob("*.json")} == kept


def test_a_run_that_was_not_scored_is_scored_when_asked_on_files_of_any_number(
    run: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "copy")))
    config = copy.path / "config.toml"
    config.write_text(re.sub(r"score_rows = \d+", "score_rows = 0", config.read_text()))
    files = [write_part(tmp_path / f"customer-support-part-{n:03}.jsonl", HELDOUT, slice(n, n + 1)) for n in range(12)]
    assert main(["evaluate", str(copy.path), *(word for file in files for word in ("--data", file))]) == 0
    (scores,) = copy.path.glob("scores-customer*.json")
    assert len(scores.name) < 130
    assert len(json.loads(scores.read_text())["answers"]) == 12
