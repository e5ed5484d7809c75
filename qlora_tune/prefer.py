"""The preference stage: pairs through TRL's DPOTrainer, from an adapter that was instruction-tuned (arXiv 2305.18290).

The reference is the base with that adapter, frozen beside the one that is trained: the base is loaded once. What reward
models (reward.py) need as well is here too: where to begin, settings, pairs, and the life of the run.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from qlora_tune import adapters, runs
from qlora_tune import data as rows
from qlora_tune import model as models
from qlora_tune.base import find_base
from qlora_tune.config import TrainConfig, validate_settings
from qlora_tune.errors import DataError, RunError, join_problems
from qlora_tune.export import Trained, open_adapter
from qlora_tune.fast import FastModel, fast_path
from qlora_tune.lifecycle import (
    begin,
    failures_recorded,
    find_checkpoint,
    leave_training,
    recorder,
    run_trainer,
    save_adapter,
    stop_on_signal,
)
from qlora_tune.memory import Fit, estimate_memory, free_bytes, peak_bytes, possible_fits
from qlora_tune.pair_scores import PairScores, score_pairs, write_scores
from qlora_tune.preferences import (
    RATE_SHARE,
    STAGE,
    PreferencePair,
    TokenizedPair,
    keep_pairs,
    read_pairs,
    split_pairs,
    tokenize_pairs,
)
from qlora_tune.prepare import (
    SHORT_ROWS,
    count_steps,
    heldout_files,
    precision_of,
    quantization_of,
    refuse_longer_than_context,
    training_files,
)
from qlora_tune.runs import Run
from qlora_tune.shapes import Example
from qlora_tune.trainer import build_preference_trainer, fast_log_probs, uncast_inputs

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


_Scores = TypeVar("_Scores")


@dataclass(frozen=True)
class PairSteps(Generic[_Scores]):
    """What is a stage's own: how its model is loaded, its trainer made, and what was trained saved and scored."""

    load: Callable[[], Any]
    build: Callable[..., Any]
    finish: Callable[[Any], _Scores | None]
    fast: bool  # whether the fast path gives what its loss is made of


@dataclass(frozen=True)
class PreferResult:
    """The tuned model, still loaded, how training ended, and the held-out pairs; None without any, or stopped."""

    model: Any
    status: str
    scores: PairScores | None


def find_origin(name: Path, runs_dir: str) -> Origin:
    """Find the adapter to begin with: a run's, or an adapter's folder. Raises RunError."""
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


def make_settings(origin: Origin, data: Sequence[str], flags: Mapping[str, Any]) -> TrainConfig:
    """The settings of a preference training: those of the adapter's run, what this stage changes, then flags.

    Raises ConfigError.
    """
    before = settings_before(origin)
    rate = {"learning_rate": before.learning_rate * RATE_SHARE}
    return validate_settings(pair_settings(before, origin.run, data) | rate | dict(flags), "prefer")


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


def prefer(
    config: TrainConfig,
    run: Run,
    setup: PreferenceSetup,
    origin: Origin,
    *,
    resume: bool = False,
    on_metrics: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_stop: Callable[[], None] = lambda: None,
) -> PreferResult:
    """Train an adapter on pairs and leave it in the run's folder, with the held-out pairs scored before and after.

    `on_metrics` gets what train.train gives it, and the margins and accuracies of the implicit rewards. A run that is
    resumed goes on from its own copy of the first adapter. Raises RunError as train.train does.
    """
    trained, first = setup.trained, run.path / REFERENCE

    def load() -> Any:
        model = trained.load(first)
        model.set_adapter("default")  # loaded frozen, as for answering
        return model

    def finish(model: Any) -> PairScores | None:
        scores = None
        if setup.heldout:
            scores = score_pairs(model, setup.heldout, config.beta, config.per_device_eval_batch_size)
            write_scores(run, scores)
        model.delete_adapter("ref")
        save_adapter(model, run, trained.base, trained.tokenizer, trained.quantization, trained.precision)
        return scores

    steps = PairSteps(load, build_preference_trainer, finish, fast=True)
    return PreferResult(*train_on_pairs(config, run, setup, origin, steps, resume, on_metrics, on_stop))


def train_on_pairs(
    config: TrainConfig,
    run: Run,
    setup: PreferenceSetup,
    origin: Origin | None,
    steps: PairSteps[_Scores],
    resume: bool,
    on_metrics: Callable[[dict[str, Any]], None],
    on_stop: Callable[[], None],
) -> tuple[Any, str, _Scores | None]:
    """Live through a training on pairs in the run's folder: the model, how it ended, and what finishing it gave.

    A run that is resumed goes on from its own copy of the first adapter. Raises RunError as train.train does.
    """
    trained = setup.trained
    first = run.path / REFERENCE
    if not resume:
        if origin:
            shutil.copytree(origin.adapter, first, dirs_exist_ok=True)  # a killed process may have left a part of it
        _write_record(config, run, setup, origin)
    files = [*rows.find_data(config.preference_data), *map(str, first.glob("adapter_model.safetensors"))]
    began = (origin.run if origin else None) or run
    fingerprints = {
        "data_fingerprint": began.read_state().get("data_fingerprint", runs.fingerprint_files([])),
        "settings_fingerprint": runs.fingerprint_settings(config),
        "base_fingerprint": trained.base.fingerprint,
        "preferences_fingerprint": runs.fingerprint_files(files),
    }
    checkpoint = find_checkpoint(run, fingerprints) if resume else None
    total = count_steps(config, len(setup.train))
    begin(run, trained.base, trained.device, trained.precision, fingerprints, total_steps=total, resume=resume)
    with failures_recorded(run, config, trained.device):
        model = steps.load()
        status = _train_adapter(model, config, run, setup, steps, checkpoint, on_metrics, on_stop)
        scores = steps.finish(model) if status == "finished" else None
    run.update_state(status=status)
    return model, status, scores


def _open_base(config: TrainConfig) -> Trained:
    """A bare base as `train` would hold it; its own folder stands for the adapter's, which only gives the tokenizer."""
    base, device = find_base(config.model_name_or_path, config.model_revision), models.detect_device()
    tokenizer, chat = models.load_tokenizer(base.path, config.chat_template)
    return Trained(base.path, base, device, precision_of(config, device), quantization_of(config), tokenizer, chat)


def _settings_of(adapter: Path) -> TrainConfig:
    """The settings that an adapter itself knows; nothing says what it was trained on."""
    record = adapters.read_adapter_record(adapter)
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


def _write_record(config: TrainConfig, run: Run, setup: PreferenceSetup, origin: Origin | None) -> None:
    """Keep what the run is trained and scored on, and the files that it and the run before it were made of."""
    began = origin.run if origin else None
    earlier = runs.read_json(began.path / "data.json").get("files", []) if began else []
    files = [
        {
            "name": Path(file).name,
            "use": "preferences",
            "rows": setup.report.rows_by_file[file],
            "sha256": runs.hash_file(file),
        }
        for file in rows.find_data(config.preference_data)
    ]
    runs.write_json(run.path / "data.json", setup.summary() | {"files": [*earlier, *files]})
    keep_pairs(run.path, [pair for pair, _ in setup.train], [pair for pair, _ in setup.heldout])
    run.write_problems(setup.report.problems)
    if origin:
        run.update_state(began_with=origin.place)
    run.write_heldout(setup.examples)
    if setup.unseen:
        run.write_heldout(setup.unseen, runs.UNSEEN)


def _train_adapter(
    model: Any,
    config: TrainConfig,
    run: Run,
    setup: PreferenceSetup,
    steps: PairSteps[Any],
    checkpoint: Path | None,
    on_metrics: Callable[[dict[str, Any]], None],
    on_stop: Callable[[], None],
) -> str:
    """Run a trainer to its end or to a stop signal. Returns finished or stopped."""
    started = time.process_time()
    trained = setup.trained
    train, heldout = ([tokens for _, tokens in pairs] for pairs in (setup.train, setup.heldout))
    with ExitStack() as stack:
        fast = _settle(stack, model, config, trained, [*train, *heldout]) if steps.fast and config.fast else None
        trainer = steps.build(
            model, config, run, trained.device, trained.precision, trained.tokenizer, train, heldout, plain=fast is None
        )
        if fast is not None:
            stack.enter_context(fast_log_probs(model, fast))
        else:
            if trained.device.kind == "cpu" and max(map(len, [*train, *heldout])) <= SHORT_ROWS:
                model.set_attn_implementation("eager")
            stack.enter_context(uncast_inputs(model, active=not config.use_dora))
        run.update_state(path="fast" if fast else "plain")
        stop = stack.enter_context(stop_on_signal(on_stop))
        trainer.add_callback(recorder(run, trained.device, on_metrics, stop, has_heldout=bool(heldout)))
        run_trainer(trainer, checkpoint)
    leave_training(trainer, model)
    state = trainer.state
    run.update_state(
        steps=state.global_step,
        train_cpu_s=round(time.process_time() - started, 1),
        peak_bytes=peak_bytes(trained.device),
    )
    return "stopped" if stop.asked and state.global_step < state.max_steps else "finished"


def _settle(
    stack: ExitStack, model: Any, config: TrainConfig, trained: Trained, pairs: Sequence[TokenizedPair]
) -> FastModel | None:
    """Put the fast path in place, where it gives the stock loss, in such memory as instruction tuning would take.

    A micro-batch of pairs stays whole, as the loss compares its rows.
    """
    answers = [(pair, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    lengths = [len(pair.prompt_ids) + len(ids) for pair, ids in answers]
    learned = sum(len(ids) for _, ids in answers) / sum(lengths)
    rows_at_once = {"per_device_train_batch_size": 2 * config.per_device_train_batch_size}
    as_rows = config.model_copy(update=rows_at_once | {"gradient_accumulation_steps": 1})
    free = free_bytes(trained.device)

    def fits(fit: Fit) -> bool:
        memory = estimate_memory(trained.base, as_rows, trained.device, trained.precision, lengths, learned, fit)
        return memory.peak_bytes <= free

    possible = possible_fits(as_rows, trained.device, max(lengths))
    whole = [fit for fit in possible if fit.max_tokens == possible[0].max_tokens]
    fit = next(filter(fits, whole), whole[-1])
    path = fast_path(
        model,
        longest=max(lengths),
        keep_weights=fit.keep_weights,
        checkpointing=fit.checkpointing,
        offload=fit.offload,
    )
    return stack.enter_context(path)
