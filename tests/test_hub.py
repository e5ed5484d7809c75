"""Datasets of the hub, as far as it goes without a network: names, the kept copy, refusals in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_tune.data import find_data, load_examples
from qlora_tune.errors import DataError
from qlora_tune.hub import fetch_dataset, is_dataset_id

ROWS = [{"instruction": f"Say {n}", "output": f"00{n}"} for n in range(10)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a cache of its own; a folder owner/name in it stands for a dataset of that name."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def publish(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "name", ["owner/name", "o-1/n.a_m-e", "owner/name:test", "o/n:train[:10%]", "o/n:train+test", "o/n@main:test"]
)
def test_owner_and_name_are_a_dataset(name: str) -> None:
    assert is_dataset_id(name)


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "./a/b", "../a", "/a/b", "a/", "/b", "a/b:", "a b/c", "a/b:c d", "~/data", "", "a\\b"]
)
def test_paths_are_no_dataset(name: str) -> None:
    assert not is_dataset_id(name)


def test_without_a_network_the_refusal_names_the_dataset_and_what_to_do(here: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_data(["nobody/nothing-like-this"])
    message = str(caught.value)
    assert message.startswith("nobody/nothing-like-this: no such file or folder here, and no dataset of the hub")
    assert "HF_HUB_OFFLINE" in message
    assert "\n" not in message
    assert not list(here.rglob("*.parquet"))


@pytest.mark.parametrize(
    "name", ["data/train.jsonl", "data/train.json", "data/t.csv", "data/t.tsv.gz", "data/t.parquet"]
)
def test_a_misspelt_path_of_a_data_file_is_a_missing_file_and_not_asked_of_the_hub(here: Path, name: str) -> None:
    (path,) = find_data([name])
    with pytest.raises(DataError, match=f"{name}: no such file"):
        load_examples([path])


def test_a_local_folder_goes_before_a_dataset_of_that_name(here: Path) -> None:
    publish(here / "owner" / "name")
    assert find_data(["owner/name"]) == [str(here / "owner" / "name" / f) for f in ("test.jsonl", "train.jsonl")]


def test_a_dataset_is_kept_as_a_file_and_used_again_when_its_source_is_gone(here: Path) -> None:
    publish(here / "owner" / "name")
    kept = fetch_dataset("owner/name")
    assert kept.is_relative_to(here / "cache")
    shutil.rmtree(here / "owner")
    assert find_data(["owner/name"]) == [str(kept)]
    examples, report = load_examples([kept])
    assert [example.answer for example in examples] == [row["output"] for row in ROWS]
    assert report.rows_in == 10
    assert [file.name for file in kept.parent.iterdir()] == [kept.name], "nothing unfinished is left behind"


def test_each_split_has_its_own_copy(here: Path) -> None:
    publish(here / "owner" / "name")
    splits = {"test": 3, "train": 10, "train[:20%]": 2, "train[-20:]": 10, "train[20:]": 0, "train+test": 13}
    kept = {split: fetch_dataset(f"owner/name:{split}") for split in splits if splits[split]}
    assert len(set(kept.values())) == len(kept)
    assert kept["train"] == fetch_dataset("owner/name")
    assert {split: load_examples([path])[1].rows_in for split, path in kept.items()} == {
        split: rows for split, rows in splits.items() if rows
    }


def test_a_split_that_is_not_there_is_refused_and_leaves_no_copy(here: Path) -> None:
    publish(here / "owner" / "name")
    with pytest.raises(DataError, match="owner/name:gone: .*gone"):
        fetch_dataset("owner/name:gone")
    assert not list((here / "cache").rglob("*.parquet"))


def test_a_configuration_is_named_behind_an_at_sign(here: Path) -> None:
    publish(here / "owner" / "name")
    configs = "configs:\n- {config_name: all, data_files: train.jsonl}\n- {config_name: few, data_files: test.jsonl}\n"
    (here / "owner" / "name" / "README.md").write_text(f"---\n{configs}---\n")
    assert len(load_examples([fetch_dataset("owner/name@few")])[0]) == 3
    assert len(load_examples([fetch_dataset("owner/name@all")])[0]) == 10
    with pytest.raises(DataError, match="Config name is missing"):
        fetch_dataset("owner/name")
