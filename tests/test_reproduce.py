"""An adapter trained again from its recipe: the same to the last bit, or told what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import settings
from safetensors.torch import load_file, save_file

from qlora_tune.cli import main
from qlora_tune.errors import ExportError, ModelError
from qlora_tune.export import export_adapter, open_adapter
from qlora_tune.prepare import prepare
from qlora_tune.reproduce import Reproduction, compare_weights, make_settings, open_origin
from qlora_tune.runs import Run, new_run, read_json, write_json
from qlora_tune.train import train


def write_rows(path: Path, count: int, start: int = 0) -> str:
    rows = [{"instruction": f"Say {n}", "output": f"I say {n}."} for n in range(start, start + count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, Path]:
    """A run on two files with held-out rows, its export, and the folder of its data."""
    folder = tmp_path_factory.mktemp("made")
    data = [write_rows(folder / "a.jsonl", 12), write_rows(folder / "b.jsonl", 12, 50)]
    config = settings(
        data=data, heldout_data=[write_rows(folder / "h.jsonl", 6, 200)], runs_dir=str(folder / "runs"),
        max_steps="3", score_rows="0", run_name="first", per_device_train_batch_size="4", lora_dropout="0.1",
    )  # fmt: skip
    run = new_run(config)
    train(config, run, prepare(config))
    export_adapter(open_adapter(run.adapter), run, folder / "first.zip")
    return run, folder / "first.zip", folder


def again(made: tuple[Run, Path, Path], adapter: Path, runs_dir: Path, *more: str) -> list[str]:
    folder = made[2]
    files = ["--data", str(folder / "b.jsonl"), "--data", str(folder / "a.jsonl")]  # in another order
    return [
        "reproduce",
        str(adapter),
        *files,
        "--heldout-data",
        str(folder / "h.jsonl"),
        "--runs-dir",
        str(runs_dir),
        *more,
    ]


def test_the_export_of_a_run_is_trained_again_to_the_last_bit(
    made: tuple[Run, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(again(made, made[1], tmp_path, "--run-name", "second")) == 0
    said = capsys.readouterr().out
    assert "held-out loss [nats]" in said
    assert "tensors are identical, to the last bit" in said
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (made[0].path, tmp_path / "second")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_training_that_ends_elsewhere_says_so_with_its_causes_and_exits_with_1(
    made: tuple[Run, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil
    import zipfile

    with zipfile.ZipFile(made[1]) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "first"
    recipe = (folder / "recipe.toml").read_text()
    versions = read_json(made[0].path / "state.json")["versions"][0]
    loss = read_json(made[0].path / "state.json")["eval_loss"]
    changed = recipe.replace(f'peft = "{versions["peft"]}"', 'peft = "0.1"').replace("seed = 42", "seed = 7")
    (folder / "recipe.toml").write_text(changed.replace(f"held_out_loss = {loss}", f"held_out_loss = {loss + 1}"))
    assert main(again(made, folder, tmp_path, "--run-name", "second")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "tensors differ" in said
    assert f"peft 0.1, now {versions['peft']}" in said
    assert f"{loss + 1:.6f}" in said
    shutil.rmtree(folder)


def test_a_run_is_its_own_recipe(made: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run, packed, _ = made
    recipe = open_origin(packed, str(run.path.parent), tmp_path).recipe
    for name in (run.path, run.adapter, Path("first")):
        origin = open_origin(name, str(run.path.parent), tmp_path)
        assert (origin.adapter, origin.recipe) == (run.adapter, recipe)


def test_other_data_is_refused_file_by_file(made: tuple[Run, Path, Path], tmp_path: Path) -> None:
    run, _, folder = made
    recipe = open_origin(run.path, "", tmp_path).recipe
    other = write_rows(tmp_path / "other.jsonl", 3)
    place = {"run_name": None, "runs_dir": str(tmp_path), "model_name_or_path": None}
    files = [str(folder / "a.jsonl"), other]
    with pytest.raises(ExportError) as caught:
        make_settings(recipe, files, [str(folder / "h.jsonl")], **place)
    message = str(caught.value)
    assert "b.jsonl (training, 12 rows, sha256 " in message
    assert "other.jsonl (training, sha256 " in message
    assert "a.jsonl" not in message
    assert "h.jsonl" not in message
    with pytest.raises(ExportError, match="None was given .--data FILE.*built-in sample"):
        make_settings(recipe, [], [], **place)
    copies = [str((tmp_path / f"copy-{name}").write_bytes((folder / name).read_bytes()) and tmp_path / f"copy-{name}")
              for name in ("a.jsonl", "b.jsonl", "h.jsonl")]  # fmt: skip
    config = make_settings(recipe, copies[:2], copies[2:], **place)
    assert [Path(file).name for file in config.data] == ["copy-a.jsonl", "copy-b.jsonl"]
    expected = run.read_config().model_dump(exclude={"data", "heldout_data", "preset", "runs_dir", "run_name", "dtype"})
    assert config.model_dump(include=set(expected)) == expected


def test_another_base_is_refused(made: tuple[Run, Path, Path], tmp_path: Path) -> None:
    from test_model import changed_base

    recipe = open_origin(made[0].path, "", tmp_path).recipe
    other = str(changed_base(tmp_path).path)
    with pytest.raises(ModelError, match="is another base"):
        make_settings(recipe, [], [], run_name=None, runs_dir="", model_name_or_path=other)


def test_the_sample_needs_no_files(tmp_path: Path) -> None:
    config = settings(runs_dir=str(tmp_path), max_steps="1", score_rows="0", run_name="sample")
    run = new_run(config)
    train(config, run, prepare(config))
    recipe = open_origin(run.path, "", tmp_path).recipe
    place = {"run_name": None, "runs_dir": str(tmp_path), "model_name_or_path": None}
    found = make_settings(recipe, [], [], **place)
    assert (found.data, found.heldout_data, found.max_steps) == ([], [], 1)
    state = read_json(run.path / "state.json")
    write_json(run.path / "state.json", {key: value for key, value in state.items() if key != "versions"})
    with pytest.raises(ExportError, match="an earlier version trained it"):
        open_origin(run.path, "", tmp_path)


def test_differences_are_relative_and_by_tensor(tmp_path: Path) -> None:
    one = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4), "d": torch.ones(4)}
    two = {"a": torch.ones(4), "b": torch.ones(4) * 1.1, "c": torch.ones(5), "e": torch.ones(4)}
    for name, tensors in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    found = compare_weights(tmp_path / "one", tmp_path / "two")
    infinite = float("inf")
    assert found == [("c", infinite), ("d", infinite), ("e", infinite), ("b", pytest.approx(0.1, rel=1e-4)), ("a", 0.0)]


@pytest.mark.parametrize(
    ("difference", "losses", "agrees"),
    [
        (0.0, (None, None), True),
        (0.1, (1.0, 1.0009), True),
        (0.1, (1.0, 1.002), False),
        (0.1, (None, 1.0), False),
        (0.1, (1.0, float("nan")), False),
    ],
)
def test_identical_weights_or_near_losses_agree(
    difference: float, losses: tuple[float | None, float | None], agrees: bool
) -> None:
    assert Reproduction([("a", difference)], losses, (None, None), []).agrees is agrees
