"""What has no run here and is scored all the same: somebody's adapter, a merged model, any base in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune import model as models
from qlora_tune.base import find_base
from qlora_tune.chat_format import ChatFormat
from qlora_tune.config import TrainConfig
from qlora_tune.data import DataReport, find_data
from qlora_tune.disk import hash_file
from qlora_tune.errors import DataError, ModelError, join_problems
from qlora_tune.export import open_adapter
from qlora_tune.model import Quantization
from qlora_tune.prepare import leave_out_long, load_others
from qlora_tune.recipe import RECIPE, read_recipe
from qlora_tune.shapes import Example


@dataclass(frozen=True)
class Outsider:
    """A model to score, an adapter's or a plain one. `trained_on` are sha256 of its training files, None if unknown."""

    model: Any
    chat: ChatFormat
    base: str
    context: int
    trained_on: frozenset[str] | None


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, not an adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def open_outsider(adapter: Path, model_name_or_path: str | None, load_in_4bit: bool) -> Outsider:
    """Load an adapter's folder on its base, held as in training, or a whole model's folder, in 4 bits if asked.

    Raises ModelError where it is neither, or its base is another one.
    """
    if is_model(adapter):
        base, device = find_base(str(adapter), None), models.detect_device()
        chat = models.load_tokenizer(base.path)[1]
        model = models.load_base(base, device, device.precision, Quantization(load_in_4bit))
        return Outsider(model, chat, base.name, base.context_length() or 1 << 30, None)
    if load_in_4bit:
        raise ModelError("--load-in-4bit is for whole models; an adapter's base is held as it was in training.")
    trained = open_adapter(adapter, model_name_or_path)
    recipe = read_recipe(adapter / RECIPE) if (adapter / RECIPE).is_file() else None
    seen = frozenset(file.sha256 for file in recipe.data_files if file.use == "training") if recipe else None
    return Outsider(trained.load(), trained.chat, trained.base.name, trained.context_length(), seen)


def find_rows(outsider: Outsider, files: Sequence[str]) -> tuple[list[Example], DataReport]:
    """The rows of files to score it on, as far as they fit its context, and what became of the others.

    Raises DataError for a file that it was trained on by its recipe, and where no row is left.
    """
    names = find_data(files)
    seen = [name for name in names if hash_file(name) in (outsider.trained_on or ())]
    if seen:
        raise DataError(f"{', '.join(seen)}: it was trained on this file, so scores on it prove nothing. Name others.")
    examples, report = load_others(TrainConfig(), names)
    kept, problems = leave_out_long(outsider.chat, examples, outsider.context)
    report.problems += problems
    if not kept:
        raise DataError(join_problems("No row of these files is left to score.", [str(p) for p in report.problems]))
    return kept, report
