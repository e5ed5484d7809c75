"""The model card and the recipe: everything that was done, nothing that must stay."""

from __future__ import annotations

import hashlib
import shutil
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, settings
from huggingface_hub import ModelCard

from qlora_tune.base import BaseModel, find_base
from qlora_tune.card import public_text, read_license, write_model_card
from qlora_tune.config import TrainConfig
from qlora_tune.errors import ExportError
from qlora_tune.parity import Parity
from qlora_tune.recipe import (
    ELSEWHERE,
    RecipeBase,
    describe_files,
    describe_recipe,
    make_recipe,
    read_recipe,
    write_recipe,
)
from qlora_tune.runs import Run, read_json, write_json

STOPS = [2, 5]
HUB = BaseModel("owner/base-1b", "abc123", Path("nowhere"), "f" * 32)
RECIPE_BASE = RecipeBase(name="owner/base-1b", revision="abc123", fingerprint="f" * 32)


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Run:
    shutil.copytree(finished[0].path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return Run(tmp_path / "copy")


def test_the_card_names_data_settings_versions_scores_and_agreement(run: Run) -> None:
    card = write_model_card(run, find_base("builtin"), STOPS, Parity(100, 99, 1e-5, 2e-5))
    heldout = Path(run.read_config().heldout_data[0])
    for file, rows, use in ((ROOT / "sample.jsonl", "2,096", "training"), (heldout, "134", "held-out")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"| {file.name} | {use} | {rows} | `{digest}` |" in card
    assert "The sample that is built into qlora-tune" in card
    for name, value in describe_recipe(run):
        assert f"| {name} | {value} |" in card
    assert "| max_steps | 24 |" in card
    assert "| lora_dropout |" not in card, "what is the default is left to recipe.toml"
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        assert f"{name} {version(name)}" in card
    assert "24 steps on CPU" in card
    assert f"Held-out loss {run.read_state()['eval_loss']:.4f}" in card
    assert "| all | 50 |" in card
    assert "99 of 100 greedy answers equal" in card
    assert "Apache-2.0" in card
    assert "on no hub" in card
    assert str(run.path) not in card


def test_the_front_matter_is_what_the_hub_reads(run: Run, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        '---\nlicense: other\nlicense_name: "open: really"\nlicense_link: https://example.org/l\n---\n# x\n'
    )
    found = ModelCard(write_model_card(run, replace(HUB, path=tmp_path), STOPS)).data.to_dict()
    assert found["license"] == "other"
    assert found["license_name"] == "open: really"
    assert found["base_model"] == "owner/base-1b"
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    local = ModelCard(write_model_card(run, find_base("builtin"), STOPS, form="quantized")).data.to_dict()
    assert local["license"] == "apache-2.0"
    assert local["library_name"] == "transformers"
    assert "base_model" not in local, "the hub takes its own ids only"


@pytest.mark.parametrize("text", [None, "# no front matter", "---\nlicense: [a, b]\n---\n", "---\n{: broken\n---\n"])
def test_a_licence_that_is_not_named_is_not_guessed(text: str | None, run: Run, tmp_path: Path) -> None:
    base = replace(HUB, path=tmp_path)
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_license(base) == {}
    card = write_model_card(run, base, STOPS)
    assert "its licence is not known here: look at [owner/base-1b](https://huggingface.co/owner/base-1b)" in card
    assert "license" not in ModelCard(card).data.to_dict()


def test_each_use_is_named_with_what_it_needs(run: Run) -> None:
    adapter = write_model_card(run, HUB, STOPS)
    assert 'from_pretrained("owner/base-1b", revision="abc123", dtype="auto")' in adapter
    assert 'PeftModel.from_pretrained(model, ".")' in adapter
    assert "vllm serve owner/base-1b --revision abc123 --enable-lora --max-lora-rank 32 \\" in adapter
    assert "--lora-modules tuned=FOLDER --chat-template FOLDER/chat_template.jinja" in adapter
    assert "[2, 5]" in adapter
    assert "export RUN --gguf" in adapter
    merged = write_model_card(run, HUB, STOPS, form="original")
    assert "vllm serve FOLDER" in merged
    assert "--enable-lora" not in merged
    assert "the original 16-bit base, which is close to what was trained, not equal" in merged


@pytest.mark.parametrize(
    ("rank", "dora", "expected"), [(17, False, 32), (1, False, 8), (600, False, None), (8, True, None)]
)
def test_vllm_is_named_only_for_adapters_that_it_takes(rank: int, dora: bool, expected: int | None, run: Run) -> None:
    text = (run.path / "config.toml").read_text()
    text = text.replace("lora_r = 32", f"lora_r = {rank}").replace(
        "use_dora = false", f"use_dora = {str(dora).lower()}"
    )
    (run.path / "config.toml").write_text(text)
    card = write_model_card(run, HUB, STOPS)
    assert (f"--max-lora-rank {expected} " in card) == (expected is not None)
    assert ("vLLM serves no" in card) == (expected is None)


def test_a_run_of_an_earlier_version_still_has_a_card(run: Run) -> None:
    data, state = read_json(run.path / "data.json"), read_json(run.path / "state.json")
    write_json(run.path / "data.json", {key: value for key, value in data.items() if key != "files"})
    write_json(run.path / "state.json", {key: value for key, value in state.items() if key != "versions"})
    card = write_model_card(run, HUB, STOPS)
    assert "kept no hashes of its data files" in card
    assert "recipe.toml" not in card
    assert make_recipe(run, RECIPE_BASE) is None


def test_what_is_public_holds_neither_the_runs_name_nor_that_of_a_local_base(run: Run) -> None:
    local = replace(HUB, name="/srv/annas-base")
    assert "annas-base" in write_model_card(run, local, STOPS)
    assert "annas-base" not in public_text(run, local, STOPS)
    assert run.name not in public_text(run, HUB, STOPS)
    assert "owner/base-1b" in public_text(run, HUB, STOPS)


def test_a_cell_can_not_break_its_table(run: Run) -> None:
    data = read_json(run.path / "data.json")
    data["files"][0]["name"] = "a|b\n# c.jsonl"
    write_json(run.path / "data.json", data)
    assert "| a\\|b # c.jsonl | training |" in write_model_card(run, HUB, STOPS)


def test_a_recipe_holds_every_setting_that_shapes_training_and_is_read_as_it_was_written(
    run: Run, tmp_path: Path
) -> None:
    recipe = make_recipe(run, RECIPE_BASE)
    assert recipe is not None
    write_recipe(recipe, tmp_path)
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    text = (tmp_path / "recipe.toml").read_text()
    assert str(run.path.parent) not in text
    absent = {name for name, value in run.read_config() if value is None}
    assert recipe.settings.keys() == TrainConfig.model_fields.keys() - ELSEWHERE - absent
    assert recipe.settings["dtype"] == run.read_state()["precision"] != "auto"
    assert tomllib.loads(text)["outcome"]["held_out_loss"] == run.read_state()["eval_loss"]
    assert [file.rows for file in recipe.data_files] == [2096, 134]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "format: "),
        ('use = "training"', 'use = "evil"', "data_files.0.use: "),
        ("[settings]", '[settings]\ndata = ["/etc/passwd"]', "sets data, which no recipe may"),
        ("[base]", "[base", "can't be read"),
        ("[outcome]", '[outcome]\nrun = "x"', "outcome.run: "),
    ],
)
def test_a_recipe_of_others_is_checked(old: str, new: str, message: str, run: Run, tmp_path: Path) -> None:
    recipe = make_recipe(run, RECIPE_BASE)
    assert recipe is not None
    write_recipe(recipe, tmp_path)
    text = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text.replace(old, new))
    with pytest.raises(ExportError, match=r"recipe.toml: ") as caught:
        read_recipe(tmp_path / "recipe.toml")
    assert message in str(caught.value)


def test_several_files_are_listed_each_with_its_rows(tmp_path: Path) -> None:
    from qlora_tune.prepare import prepare

    for name, count in (("a.jsonl", 5), ("b.jsonl", 7)):
        rows = [f'{{"prompt": "{name} says {n}", "completion": "it is {n}"}}' for n in range(count)]
        (tmp_path / name).write_text("\n".join([*rows, '{"odd": 1}', ""]))
    config = settings(data=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    files = describe_files(config, prepare(config).data.report)
    assert [(file["name"], file["rows"]) for file in files] == [("a.jsonl", 6), ("b.jsonl", 8)]
    assert files[0]["sha256"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_a_resumed_run_keeps_the_versions_it_began_with() -> None:
    from qlora_tune.lifecycle import _versions_with
    from qlora_tune.recipe import read_versions

    earlier = {**read_versions(), "torch": "1.0"}
    assert _versions_with([]) == [read_versions()]
    assert _versions_with([read_versions()]) == [read_versions()]
    assert _versions_with([earlier]) == [earlier, read_versions()]
