"""Training an adapter again from its recipe, on the very same data and base; then what came out beside what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_tune.adapter_record import read_adapter_record
from qlora_tune.base import find_base
from qlora_tune.chat import find_adapter
from qlora_tune.config import TrainConfig, validate_settings
from qlora_tune.disk import hash_file
from qlora_tune.errors import ExportError, ModelError, join_problems
from qlora_tune.prepare import heldout_files, training_files
from qlora_tune.recipe import RECIPE, Recipe, RecipeBase, make_recipe, read_recipe
from qlora_tune.runs import Run

SAME_LOSS = 1e-3  # [nats] held-out losses that are no further apart count as the same


@dataclass(frozen=True)
class Origin:
    """An adapter that is to be trained again, with its recipe."""

    adapter: Path
    recipe: Recipe


@dataclass(frozen=True)
class Reproduction:
    """What was trained before and again: relative differences by tensor, the largest first; None is not known.

    A difference is the norm of what changed over the norm of what was; infinite for a tensor of one side only.
    """

    tensors: list[tuple[str, float]]
    losses: tuple[float | None, float | None]
    exact_matches: tuple[float | None, float | None]
    causes: list[str]

    @property
    def identical(self) -> bool:
        """Whether every weight is the same to the last bit."""
        return not any(difference for _, difference in self.tensors)

    @property
    def agrees(self) -> bool:
        """Whether the weights are identical or the held-out losses within SAME_LOSS."""
        before, after = self.losses
        near = before is not None and after is not None and abs(before - after) <= SAME_LOSS
        return self.identical or near


def open_origin(name: Path, runs_dir: str, scratch: Path) -> Origin:
    """Find an adapter and its recipe: a zip, an adapter's folder with recipe.toml, or a run.

    Raises ExportError for one that has no recipe, RunError and ModelError for what is no adapter.
    """
    adapter, run = find_adapter(name, runs_dir, scratch)
    record = read_adapter_record(adapter)
    if run is None:
        if not (adapter / RECIPE).is_file():
            raise ExportError(f"{name}: holds no {RECIPE}. Ask for an export of this version, or give the run itself.")
        return Origin(adapter, read_recipe(adapter / RECIPE))
    base = RecipeBase(
        name=record["base_model"], revision=record["base_revision"], fingerprint=record["base_fingerprint"]
    )
    if run.stage != "train":
        raise ExportError(f"{run.path}: was trained on preferences, and only instruction tuning is trained again.")
    recipe = make_recipe(run, base)
    if recipe is None:
        raise ExportError(f"{run.path}: an earlier version trained it, which kept no hashes of its data files.")
    return Origin(run.adapter, recipe)


def make_settings(
    recipe: Recipe,
    data: Sequence[str],
    heldout_data: Sequence[str],
    *,
    run_name: str | None,
    runs_dir: str,
    model_name_or_path: str | None,
) -> TrainConfig:
    """The settings of the recipe, on files that must be those it names. No files stand for the built-in sample.

    Raises ExportError naming every file that is missing or surplus, ModelError for another base.
    """
    revision = None if model_name_or_path else recipe.base.revision
    base = find_base(model_name_or_path or recipe.base.name, revision)
    if base.fingerprint != recipe.base.fingerprint:
        raise ModelError(
            f"The adapter was trained on {recipe.base.name} (fingerprint {recipe.base.fingerprint}), and {base.label} "
            f"is another base ({base.fingerprint}). --model-name-or-path says where the right one is."
        )
    given = TrainConfig(data=list(data), heldout_data=list(heldout_data))
    training, held_out = training_files(given), heldout_files(given)
    found, problems = {}, []
    for use, files in (("training", training), ("held-out", held_out)):
        found[use], more = _match_files(recipe, use, files)  # type: ignore[arg-type]
        problems += more
    if problems:
        hint = "" if data else " None was given (--data FILE), which stands for the built-in sample."
        raise ExportError(join_problems(f"These are not the data that the adapter was trained on.{hint}", problems))
    settings = recipe.settings | {
        "preset": "none",
        "model_name_or_path": model_name_or_path or recipe.base.name,
        "data": found["training"] if data else [],
        "heldout_data": found["held-out"] if heldout_data else [],
        "runs_dir": runs_dir,
    }
    named = {"model_revision": revision, "run_name": run_name}
    return validate_settings(settings | {key: value for key, value in named.items() if value}, RECIPE)


def compare_runs(origin: Origin, run: Run) -> Reproduction:
    """Compare an adapter with the run that trained it again."""
    before, state = origin.recipe.outcome, run.read_state()
    return Reproduction(
        compare_weights(origin.adapter, run.adapter),
        (before.held_out_loss, state.get("eval_loss")),
        (before.exact_match, state.get("score_tuned")),
        _find_causes(origin.recipe, state),
    )


def compare_weights(before: Path, after: Path) -> list[tuple[str, float]]:
    """Relative differences of two adapters by tensor, the largest first."""
    import torch
    from safetensors.torch import load_file

    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, after))
    differences = {}
    for name in old.keys() | new.keys():
        if name not in old or name not in new or old[name].shape != new[name].shape:
            differences[name] = float("inf")
        elif torch.equal(old[name], new[name]):
            differences[name] = 0.0
        else:
            norm = torch.linalg.vector_norm(old[name].double())
            differences[name] = float(torch.linalg.vector_norm(new[name].double() - old[name].double()) / norm)
    return sorted(differences.items(), key=lambda found: (-found[1], found[0]))


def _match_files(
    recipe: Recipe, use: Literal["training", "held-out"], files: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The given files in the recipe's order, and what is wrong with them; names may differ, content may not."""
    given = {file: hash_file(file) for file in files}
    wanted = [file for file in recipe.data_files if file.use == use]
    hashes = [file.sha256 for file in wanted]
    by_hash = {digest: file for file, digest in given.items()}
    problems = [
        f"{file.name} ({use}, {file.rows:,} rows, sha256 {file.sha256[:16]}…) is missing"
        for file in wanted
        if file.sha256 not in by_hash
    ]
    problems += [
        f"{Path(file).name} ({use}, sha256 {digest[:16]}…) is none of the recipe's"
        for file, digest in given.items()
        if digest not in hashes
    ]
    return [by_hash[digest] for digest in hashes if digest in by_hash], problems


def _find_causes(recipe: Recipe, state: dict[str, Any]) -> list[str]:
    """What was not the same and can change the last bits, or more."""
    now, causes = state["versions"][-1], []
    for versions in recipe.versions:
        causes += [f"{name} {versions.get(name)}, now {now[name]}" for name in now if versions.get(name) != now[name]]
    if len(recipe.versions) > 1:
        causes.append("it was stopped and resumed with other versions")
    for key in ("device", "precision", "steps"):
        before = getattr(recipe.outcome, key)
        if before != state[key]:
            causes.append(f"{key} {before}, now {state[key]}")
    return causes
