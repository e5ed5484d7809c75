"""A wheel carries what a checkout has: presets, sample, built-in base; and the README's commands are real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from qlora_tune.cli import app


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 10e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_an_unpacked_wheel_finds_its_presets_sample_and_base_away_from_the_checkout(
    unpacked_wheel: Path, tmp_path: Path
) -> None:
    code = (
        "import qlora_tune; from qlora_tune.config import list_presets; from qlora_tune.base import find_base;"
        "from qlora_tune.data import load_examples; from qlora_tune.config import shipped_path;"
        "print(qlora_tune.__file__, len(list_presets()), find_base('builtin').path,"
        "*(load_examples([shipped_path(f'{name}.jsonl')])[1].kept for name in"
        " ('sample', 'sample_heldout', 'sample_rephrased', 'sample_unseen')))"
    )
    # -I keeps the editable install and the current folder away; only the wheel is left to import from.
    code = f"import sys; sys.path.insert(0, {str(unpacked_wheel)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    module, presets, base, *kept = done.stdout.split()
    assert module.startswith(str(unpacked_wheel))
    assert base.startswith(str(unpacked_wheel))
    assert int(presets) == len(list((ROOT / "presets").glob("*.toml")))
    files = ("sample", "sample_heldout", "sample_rephrased", "sample_unseen")
    assert [int(count) for count in kept] == [len((ROOT / f"{f}.jsonl").read_text().splitlines()) for f in files]


def test_the_package_data_fits_in_10_mb(unpacked_wheel: Path) -> None:
    package = unpacked_wheel / "qlora_tune"
    data = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in data) <= 10_000_000


@pytest.fixture(scope="module")
def helps() -> str:
    """What the page and every command but the simplest say of their flags."""
    names = ("train", "prefer", "votes", "check", "mix", "select", "pairs", "preview", "export", "chat", "config")
    names += ("compare", "reproduce", "evaluate", "reward")
    return "".join(
        subprocess.run(
            [sys.executable, *command, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            timeout=60,
        ).stdout
        for command in (["app.py"], *(["-m", "qlora_tune", name] for name in names))
    )


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/scores.md"])
def test_every_command_and_flag_that_a_page_names_exists(page: str, helps: str) -> None:
    text = (ROOT / page).read_text()
    commands = set(re.findall(r"python -m qlora_tune ([a-z]+)", text))
    assert commands <= set(app), commands - set(app)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help"}:
        assert flag in helps, flag


def test_the_recipes_in_the_page_on_data_can_be_used(tmp_path: Path) -> None:
    from qlora_tune import documents, mixture

    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    names = ("recipe.toml", "templates.toml", "pairs.toml")
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block)
    rows = [{"prompt": f"review {n}", "completion": "so good", "task": "irony"} for n in range(5)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notes = "".join(f"said {number} times,note {number},plan\n" for number in range(20))
    (tmp_path / "notes.csv").write_text("dialogue,section_text,section_header\n" + notes)
    mixed = mixture.mix_examples(mixture.load_recipe(tmp_path / "recipe.toml"))
    assert {example.task for example in mixed.train} == {"plan"}
    assert {example.task for example in mixed.unseen} == {"irony"}
    assert [task.name for task in documents.load_recipe(tmp_path / "pairs.toml").task] == ["title"]


def test_the_readme_shows_the_size_and_base_of_every_preset() -> None:
    from qlora_tune.config import list_presets

    text = (ROOT / "README.md").read_text()
    for preset in list_presets():
        base = preset.settings["model_name_or_path"].split("/")[-1].replace("builtin", "built in")
        length = preset.settings.get("max_length", 1024)
        assert re.search(rf"\| {preset.name} \| {base}.*\| {length} \|", text), preset.name


def test_the_table_of_settings_is_the_declaration() -> None:
    from qlora_tune.terminal import settings_markdown

    assert (ROOT / "docs" / "settings.md").read_text() == settings_markdown()


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_no_file_names_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    for name in tracked:
        content = (ROOT / name).read_bytes()
        assert str(ROOT).encode() not in content, name
