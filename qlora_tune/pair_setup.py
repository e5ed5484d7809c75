"""What a training on pairs begins with: an adapter or a bare base, settings, and the pairs as tokens.

Shared by preference training (prefer.py) and reward models (reward.py). Loads no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune import data as rows
from qlora_tune import model as models
from qlora_tune import runs
from qlora_tune.adapter_record import read_adapter_record
from qlora_tune.base import find_base
from qlora_tune.config import TrainConfig, validate_settings
from qlora_tune.errors import DataError, RunError, join_problems
from qlora_tune.export import Trained, open_adapter
from qlora_tune.preferences import (
    STAGE,
    PreferencePair,
    TokenizedPair,
    read_pairs,
    split_pairs,
    tokenize_pairs,
)
from qlora_tune.prepare import (
    heldout_files,
    precision_of,
    quantization_of,
    refuse_longer_than_context,
    training_files,
)
from qlora_tune.runs import Run
from qlora_tune.shapes import Example

REFERENCE = "reference"  # folder of a run: the adapter that it began with


@dataclass(frozen=True)
class Origin:
    """The adapter to begin with, and the run that trained it; None where nobody knows."""

    adapter: Path
    run: Run | None

    @property
    def place(self) -> str:
        """What find_origin finds it by, from anywhere."""
        return str((self.run.path if self.run else self.adapter).resolve())


@dataclass(frozen=True)
class PreferenceSetup:
    """Everything decided before training: the adapter with its base, the pairs as tokens, and rows to score.

    `examples` are held-out rows of the instruction tuning, `unseen` those of its held-out tasks, both without prompts
    that are now trained on; `taken` counts the latter.
    """

    trained: Trained
    train: list[tuple[PreferencePair, TokenizedPair]]
    heldout: list[tuple[PreferencePair, TokenizedPair]]
    report: rows.DataReport
    examples: list[Example]
    unseen: list[Example]
    taken: int

    def summary(self) -> dict[str, Any]:
        """Totals for the run's record; each pair is two sequences."""
        tokens = [pair for _, pair in self.train]
        learned = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in tokens)
        return {
            "rows_in": self.report.rows_in,
            "rows_kept": self.report.kept,
            "rows_rejected": self.report.rejected,
            "rows_changed": self.report.changed,
            "rows_heldout": len(self.examples),
            "rows_unseen": len(self.unseen),
            "shapes": dict(self.report.shapes),
            "tasks": dict(self.report.tasks),
            "pairs_train": len(self.train),
            "pairs_heldout": len(self.heldout),
            "train_sequences": 2 * len(tokens),
            "train_tokens": learned + 2 * sum(len(pair.prompt_ids) for pair in tokens),
            "learned_tokens": learned,
            "longest_sequence": max(map(len, tokens)),
        }


def find_origin(name: Path, runs_dir: str) -> Origin:
    """Find the adapter to begin with: a run's, or an adapter's folder. Raises RunError.

    `runs_dir` is empty where the name is the place that a run has recorded.
    """
    if not runs_dir and not name.exists():
        raise RunError(f"{name}: what this run began with is not there any more. Put that folder back.")
    if (name / "adapter_config.json").is_file():
        name = name.resolve()
        if not (name.parent / "state.json").is_file():
            return Origin(_with_lora(name), None)
        name = name.parent
    run = runs.open_run(name, runs_dir)
    run.require_adapter()
    if run.read_config().preference_data:
        raise RunError(
            f"{run.path}: is trained on preferences already. Begin with the run before it, and name all pairs: they "
            "are then held against one reference."
        )
    return Origin(_with_lora(run.adapter), run)


def _with_lora(adapter: Path) -> Path:
    """The adapter's folder. Raises RunError where it holds virtual tokens."""
    kind = runs.read_json(adapter / "adapter_config.json")["peft_type"]
    if kind != "LORA":
        raise RunError(f"{adapter}: is of type {kind}; preferences are learned by LoRA adapters. Begin with one.")
    return adapter


def reopen_origin(run: Run) -> tuple[Origin | None, bool]:
    """What a run goes on from, and whether it has begun: then its own copy of the first adapter. Raises RunError.

    None for a reward model that began with a bare base.
    """
    state, first = run.read_state(), run.path / REFERENCE
    if "preferences_fingerprint" in state:
        return Origin(first, run) if first.exists() else None, True
    if "began_with" not in state and run.read_config().reward_model:
        return None, False
    return find_origin(Path(state.get("began_with", run.path)), ""), False


def settings_before(origin: Origin) -> TrainConfig:
    """The settings of the run to begin with, or those that its adapter itself knows."""
    return origin.run.read_config() if origin.run else _settings_of(origin.adapter)


def pair_settings(before: TrainConfig, run: Run | None, data: Sequence[str]) -> dict[str, Any]:
    """What settings become when pairs are trained on.

    A micro-batch has half as many pairs as it had rows, because a pair is two sequences.
    """
    rows_before = before.per_device_train_batch_size
    values = before.model_dump() | STAGE
    if run:  # by name: the sample, which an empty list stands for there, stands for nothing here
        values |= {"data": training_files(before), "heldout_data": heldout_files(before)}
    return values | {
        "per_device_train_batch_size": max(1, rows_before // 2),
        "gradient_accumulation_steps": before.gradient_accumulation_steps * (2 if rows_before > 1 else 1),
        "preference_data": list(data),
    }


def prepare_preferences(config: TrainConfig, origin: Origin | None) -> PreferenceSetup:
    """Open the adapter, or the bare base where there is no origin; read, split and tokenize the pairs.

    Loads no weights. Raises DataError when no pair is left.
    """
    moved = config.model_name_or_path
    trained = open_adapter(origin.adapter, moved if Path(moved).is_dir() else None) if origin else _open_base(config)
    began = origin.run if origin else None
    refuse_longer_than_context(config.max_length, trained.base)
    pairs, report = read_pairs(config.preference_data)
    fitting, problems = tokenize_pairs(trained.chat, pairs, config.max_length)
    report.problems += problems
    if not fitting:
        raise DataError(join_problems("No pair is left to train on.", [str(problem) for problem in report.problems]))
    _, held_out = split_pairs([pair for pair, _ in fitting], config.heldout_share, config.seed)
    sources = {pair.source for pair in held_out}
    train = [found for found in fitting if found[0].source not in sources]
    heldout = [found for found in fitting if found[0].source in sources]
    asked = [pair.to_example() for pair, _ in train]
    examples, leaks = rows.drop_seen(asked, began.read_heldout() if began else [])
    unseen, more_leaks = rows.drop_seen(asked, began.read_unseen() if began else [])
    return PreferenceSetup(trained, train, heldout, report, examples, unseen, len(leaks) + len(more_leaks))


def _open_base(config: TrainConfig) -> Trained:
    """A bare base as `train` would hold it; its own folder stands for the adapter's, which only gives the tokenizer."""
    base, device = find_base(config.model_name_or_path, config.model_revision), models.detect_device()
    tokenizer, chat = models.load_tokenizer(base.path, config.chat_template)
    return Trained(base.path, base, device, precision_of(config, device), quantization_of(config), tokenizer, chat)


def _settings_of(adapter: Path) -> TrainConfig:
    """The settings that an adapter itself knows; nothing says what it was trained on."""
    record = read_adapter_record(adapter)
    lora = runs.read_json(adapter / "adapter_config.json")
    context = find_base(record["base_model"], record["base_revision"]).context_length()
    values = {
        "preset": "none",
        "model_name_or_path": record["base_model"],
        "model_revision": record["base_revision"],
        "load_in_4bit": record["load_in_4bit"],
        "bnb_4bit_quant_type": record["bnb_4bit_quant_type"],
        "bnb_4bit_use_double_quant": record["bnb_4bit_use_double_quant"],
        "dtype": record["precision"],
        "lora_r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "use_rslora": lora["use_rslora"],
        "use_dora": lora["use_dora"],
    }
    longest = min(TrainConfig.model_fields["max_length"].default, context or sys.maxsize)
    return validate_settings({**values, "max_length": longest}, str(adapter))
