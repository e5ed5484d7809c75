"""What a run was trained with, in a form that may leave this machine: recipe.toml, and rows for people.

Data files are known by name, rows and hash, the base by its name and fingerprint; no path and no row travels.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pydantic

from qlora_tune import __version__
from qlora_tune.config import TrainConfig, describe_value
from qlora_tune.data import DataReport
from qlora_tune.disk import hash_file
from qlora_tune.errors import ExportError, join_problems
from qlora_tune.prepare import heldout_files, training_files
from qlora_tune.runs import Run, read_json

RECIPE = "recipe.toml"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
# Settings that a reader asks for first; all others stand there where they differ from the default.
ASKED_FIRST = ("lora_r", "lora_alpha", "learning_rate", "num_train_epochs", "max_length", "seed", "load_in_4bit")
# Names and places of this machine, or settled by what the recipe says of base and data.
ELSEWHERE = {
    *("data", "heldout_data", "preference_data", "contracts", "plain_text", "runs_dir", "run_name"),
    *("preset", "model_name_or_path", "model_revision"),
}
_HEAD = "# What this adapter was trained with. To train it again: python -m qlora_tune reproduce FOLDER --data FILE\n"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class DataFile(_Strict):
    """A data file as it may be named elsewhere."""

    name: str
    use: Literal["training", "held-out"]
    rows: int
    sha256: str


class RecipeBase(_Strict):
    """The base model; `fingerprint` is that of base.fingerprint_weights."""

    name: str
    revision: str | None = None
    fingerprint: str


class Outcome(_Strict):
    """Where it was trained and what came out; loss in nats per answer token, exact match as a share."""

    device: str
    precision: str
    steps: int
    held_out_loss: float | None = None
    exact_match: float | None = None


class Recipe(_Strict):
    """Everything that is needed to train the same adapter again, but the data itself."""

    format: Literal[1] = 1
    base: RecipeBase
    settings: dict[str, Any]
    data_files: list[DataFile]
    versions: list[dict[str, str]]
    outcome: Outcome


def read_versions() -> dict[str, str]:
    """Versions of what decides the numbers of a training: Python, this package and the libraries below it."""
    found = {"python": platform.python_version(), "qlora-tune": __version__}
    return found | {name: version(name) for name in LIBRARIES}


def describe_files(config: TrainConfig, report: DataReport) -> list[dict[str, Any]]:
    """The data files of a run by name, use, rows and sha256, as data.json keeps them. Reads every file once."""
    files = [("training", file) for file in training_files(config)]
    files += [("held-out", file) for file in heldout_files(config)]
    return [
        {"name": Path(file).name, "use": use, "rows": report.rows_by_file[file], "sha256": hash_file(file)}
        for use, file in files
    ]


def make_recipe(run: Run, base: RecipeBase) -> Recipe | None:
    """The recipe of a trained run; None for one of an earlier version, which kept no hashes and no versions.

    None for preference training too, which begins with an adapter that no recipe holds.
    """
    config, state, data = run.read_config(), run.read_state(), read_json(run.path / "data.json")
    if "files" not in data or "versions" not in state or config.preference_data:
        return None
    settings = {key: value for key, value in config.model_dump().items() if key not in ELSEWHERE and value is not None}
    outcome = Outcome(
        device=state["device"],
        precision=state["precision"],
        steps=state["steps"],
        held_out_loss=state.get("eval_loss"),
        exact_match=state.get("score_tuned"),
    )
    return Recipe(
        base=base,
        settings=settings | {"dtype": state["precision"]},  # what `auto` was
        data_files=data["files"],
        versions=state["versions"],
        outcome=outcome,
    )


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write recipe.toml into a folder."""
    import tomli_w

    text = tomli_w.dumps(recipe.model_dump(exclude_none=True))
    (folder / RECIPE).write_text(_HEAD + text, encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.toml that others may have written. Raises ExportError naming everything that is wrong with it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ExportError(join_problems(f"{path.name}: no recipe that this version can follow:", found)) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name}: can't be read ({error}). Export the adapter again.") from None
    if strange := sorted(ELSEWHERE & recipe.settings.keys()):
        raise ExportError(f"{path.name}: sets {', '.join(strange)}, which no recipe may. Export the adapter again.")
    return recipe


def describe_method(config: TrainConfig) -> str:
    """How a model was tuned, in the words of papers."""
    method = "QLoRA" if config.load_in_4bit else "LoRA"
    if config.peft_type != "LORA":
        method = config.peft_type.lower().replace("_", " ")
    loss = "DPO" if config.loss_type == "sigmoid" else "IPO"
    return f"{method}, then trained on preference pairs ({loss})," if config.preference_data else method


def describe_heldout(data: Mapping[str, Any]) -> str:
    """What a run's data.json says of the rows, or pairs, that were kept out of training."""
    if "pairs_heldout" in data:
        return f"{data['pairs_heldout']:,} pairs held out; {data['rows_heldout']:,} held-out rows to score"
    return f"{data['rows_heldout']:,} rows held out"


def describe_recipe(run: Run) -> list[tuple[str, str]]:
    """Data by name and size, then the settings that matter: names of files, not where they lie."""
    config, state, data = run.read_config(), run.read_state(), read_json(run.path / "data.json")
    files = ", ".join(Path(file).name for file in config.preference_data or config.data) or "the built-in sample"
    what = "pairs" if "pairs_heldout" in data else "rows"
    rows = f"{data['rows_in']:,} {what} read, {data['rows_rejected']:,} rejected, {describe_heldout(data)}"
    if unseen := data.get("rows_unseen"):
        rows += f", {unseen:,} of tasks kept out of training"
    tokens = f"{data['train_tokens']:,} tokens, {data['learned_tokens']:,} learned"
    changed = [
        name
        for name, field in TrainConfig.model_fields.items()
        if getattr(config, name) != field.default and name not in {*ASKED_FIRST, *ELSEWHERE}
    ]
    settings = [(name, describe_value(getattr(config, name))) for name in (*ASKED_FIRST, *changed)]
    prints = [(f"{what} fingerprint", state[f"{what}_fingerprint"][:16]) for what in ("data", "base")]
    trained = f"{data['train_sequences']:,} sequences, {tokens}"
    preset = ("preset", Path(config.preset).name)  # which may be a file of the user's
    before = [("began with", f"the adapter of {Path(state['began_with']).name}")] if "began_with" in state else []
    return [*before, ("data", files), ("rows", rows), ("trained on", trained), preset, *settings, *prints]
