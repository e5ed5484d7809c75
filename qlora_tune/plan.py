"""What a run would do and take, and why it can't start where it can't: the card beside Start. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_tune import model as models
from qlora_tune.adapters import describe_adapter, refuse_untrainable
from qlora_tune.base import download_bytes, fetch_config, is_local
from qlora_tune.config import (
    BUILTIN,
    ResolvedConfig,
    TrainConfig,
    describe_value,
    load_preset,
    pick_preset,
    resolve_config,
)
from qlora_tune.errors import TuneError
from qlora_tune.flags import command_line
from qlora_tune.launch import refuse_busy_device
from qlora_tune.memory import Fit, MemoryEstimate, choose_fit, free_bytes, unknown_targets
from qlora_tune.model import Device
from qlora_tune.pace import estimate_seconds
from qlora_tune.prepare import (
    Setup,
    data_files,
    heldout_files,
    precision_of,
    prepare,
    refuse_other_device,
    refuse_rotation,
)
from qlora_tune.runs import fingerprint_files, list_runs

LOST_SHARE = 0.05  # of the rows: beyond it the card says so aloud


@dataclass(frozen=True)
class Plan:
    """A run before it is started. Ready when `problems` is empty; facts are in words, in the order to be shown."""

    command: str
    config: TrainConfig | None = None
    device: Device | None = None
    preset: str = ""
    changes: dict[str, str] = field(default_factory=dict)  # what the preset sets, as values in words
    facts: list[tuple[str, str]] = field(default_factory=list)
    memory: MemoryEstimate | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def memory_share(self) -> float:
        """Estimated peak memory against the device's."""
        return self.memory.peak_bytes / self.device.memory_bytes if self.memory and self.device else 0.0


def plan_run(flags: Mapping[str, Any]) -> Plan:
    """Say what a run with these settings would do, over those of its preset. Never raises a TuneError: it is told."""
    command = command_line(flags)
    try:
        resolved = resolve_config(flags, pick_auto=pick_here)
    except TuneError as error:
        return Plan(command, problems=str(error).splitlines())
    config, device = resolved.config, models.detect_device()
    changes = {} if config.preset == "none" else load_preset(config.preset).settings
    facts = [("preset", f"{config.preset}: {resolved.preset_reason}"), ("base model", _base_words(config))]
    told: dict[str, Any] = {
        "config": config,
        "device": device,
        "preset": config.preset,
        "changes": {name: describe_value(value) for name, value in changes.items()},
    }
    problems: list[str] = []
    warnings: list[str] = []
    memory = None
    try:
        refuse_untrainable(config)
        refuse_rotation(config)
        refuse_other_device(config.preset, device)
        if is_local(config.model_name_or_path):
            setup = _prepare(config.model_dump_json(include=_PREPARED), fingerprint_files(data_files(config)))
            lengths, learned = setup.data.lengths(), setup.data.learned_share()
            fit, memory = choose_fit(setup.base, config, device, setup.precision, lengths, free_bytes(device), learned)
            facts += [*_setup_facts(setup, resolved), ("fit", _fit_words(config, fit))]
            warnings += _warn(setup, config)
            if unknown := unknown_targets(setup.base, config.lora_target_modules):
                problems.append(f"lora_target_modules: {', '.join(unknown)} is no linear layer of this model.")
            if memory.peak_bytes > device.memory_bytes:
                problems.append(
                    "It would need more memory than there is. Try a smaller batch size with more gradient "
                    "accumulation, a smaller max_length, activation_checkpointing on, or a smaller preset."
                )
        else:
            size = download_bytes(config.model_name_or_path, config.model_revision)
            facts.append(("download", f"{size / 1e9:.1f} GB, when the run starts; rows are counted after it"))
            base = fetch_config(config.model_name_or_path, config.model_revision)
            effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
            lengths = [config.max_length] * effective
            fit, memory = choose_fit(base, config, device, precision_of(config, device), lengths, free_bytes(device))
            facts.append(("fit", f"{_fit_words(config, fit)}, if rows are as long as max_length"))
        if config.run_name and (Path(config.runs_dir) / config.run_name).exists():
            problems.append(f"run_name: {config.run_name} exists. Choose another, or resume that run.")
        refuse_busy_device(device.kind)
    except TuneError as error:
        problems += str(error).splitlines()
    except OSError as error:
        problems.append(f"{error.filename or 'this machine'}: {error.strerror or error}")
    return Plan(command, facts=facts, memory=memory, problems=problems, warnings=warnings, **told)


def pick_here() -> tuple[str, str]:
    """The preset for this machine, and the reason."""
    from qlora_tune.base import is_downloaded

    device = models.detect_device()
    return pick_preset(device.kind, device.memory_bytes / 1e9, is_downloaded)


# What decides the rows and their tokens; the card follows all other settings without reading them again.
_PREPARED = {
    *("preset", "model_name_or_path", "model_revision", "dtype", "chat_template", "data", "heldout_data"),
    *("map", "encoding", "heldout_share", "holdout_tasks", "max_length", "long_chats", "seed"),
    *("peft_type", "num_virtual_tokens"),
}


@lru_cache(maxsize=4)
def _prepare(settings: str, data_fingerprint: str) -> Setup:
    """The rows as tokens, kept while neither settings nor the content of the files change."""
    return prepare(TrainConfig.model_validate_json(settings))


def _base_words(config: TrainConfig) -> str:
    held = f"in 4-bit {config.bnb_4bit_quant_type}" if config.load_in_4bit else "unquantized"
    return f"{config.model_name_or_path}, {held}, {describe_adapter(config)}"


def _fit_words(config: TrainConfig, fit: Fit) -> str:
    if config.fast:
        return fit.describe()
    recomputed = ", activations recomputed" if fit.checkpointing else ""
    return f"micro-batches of {config.per_device_train_batch_size} rows, the plain way{recomputed}"


def _duration(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.0f} days" if days > 2 else str(timedelta(seconds=round(seconds)))


def _warn(setup: Setup, config: TrainConfig) -> list[str]:
    """What a run would do as it was asked, and yet is hardly what anybody wants."""
    report, warnings = setup.data.report, []
    too_long = sum("max_length" in problem.reason and problem.action == "rejected" for problem in report.problems)
    if report.rejected > LOST_SHARE * report.rows_in:
        warnings.append(
            f"{report.rejected:,} of {report.rows_in:,} rows are left out, {too_long:,} of them longer than max_length "
            f"{config.max_length}. Preset cpu-small takes rows of 512 tokens, those for a GPU 1,024 and more."
        )
    if setup.base.name == BUILTIN and (config.data or config.heldout_data):
        warnings.append(
            "The built-in base is a demonstration that knows a small world: on your own rows it shows how everything "
            "works, and learns little. Preset cpu-small is the smallest real base (a download of 270 MB)."
        )
    return warnings


def _setup_facts(setup: Setup, resolved: ResolvedConfig) -> list[tuple[str, str]]:
    config, summary = resolved.config, setup.data.summary()
    steps = setup.total_steps(config)
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    seconds = estimate_seconds(
        setup.base, config, setup.device, setup.precision, summary, steps, list_runs(config.runs_dir)
    )
    lost = summary["rows_in"] - summary["rows_kept"]
    apart = f" (all of {', '.join(Path(file).name for file in heldout_files(config))})" if heldout_files(config) else ""
    unseen = f", {summary['rows_unseen']:,} of tasks kept out of training" if summary["rows_unseen"] else ""
    return [
        ("data", ", ".join(Path(file).name for file in data_files(config))),
        ("rows", f"{summary['rows_in']:,} read, {lost:,} rejected, {summary['rows_changed']:,} changed"),
        ("split", f"{summary['train_sequences']:,} to train on, {summary['rows_heldout']:,} held out{apart}{unseen}"),
        (
            "tokens",
            f"{summary['train_tokens']:,}, of which {summary['learned_tokens']:,} are learned; "
            f"longest row {summary['longest_sequence']:,}",
        ),
        ("steps", f"{steps:,} of {batch} × {accumulation} = {batch * accumulation} rows (effective batch)"),
        ("time", f"about {_duration(seconds)} of training on {setup.device.name}"),
        ("download", "none: the base is on this machine"),
    ]
