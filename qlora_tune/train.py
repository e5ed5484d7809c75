"""The SFT stage: prepared rows through TRL's SFTTrainer, on a 4-bit base with a LoRA adapter (QLoRA, arXiv 2305.14314).

TRL gets input_ids and labels ready-made; masking and truncation are decided before it (chat_format).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tune import adapters, processes, runs
from qlora_tune import model as models
from qlora_tune.config import TrainConfig
from qlora_tune.errors import MemoryLimitError
from qlora_tune.fast import FastModel, fast_path, split_batch
from qlora_tune.launch import lock_device
from qlora_tune.lifecycle import (
    START,
    begin,
    failures_recorded,
    find_checkpoint,
    leave_training,
    out_of_memory,
    recorder,
    save_adapter,
    stop_on_signal,
)
from qlora_tune.memory import Fit, MemoryEstimate, choose_fit, free_bytes, peak_bytes, possible_fits
from qlora_tune.prepare import SHORT_ROWS, Setup, data_files, prepare, quantization_of
from qlora_tune.recipe import describe_files
from qlora_tune.runs import Run
from qlora_tune.trainer import build_trainer, uncast_inputs


@dataclass(frozen=True)
class TrainResult:
    """The tuned model, still loaded, and how training ended: finished or stopped."""

    model: Any
    setup: Setup
    status: str


def train(
    config: TrainConfig,
    run: Run,
    setup: Setup,
    *,
    resume: bool = False,
    on_metrics: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_stop: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Train an adapter and leave it in the run's folder.

    `on_metrics` is called after every optimizer step and evaluation with what metrics.jsonl gets: step,
    total_steps, loss or eval_loss, learning_rate, grad_norm, tokens_per_s, memory_bytes, elapsed_s, left_s.
    SIGINT and SIGTERM save a checkpoint and end training; a third one ends it at once. Raises RunError when the
    loss is no longer finite, or when there is nothing sound to resume from. `on_stop` is called when a stop is asked,
    `on_note` with a line on how the run uses memory.
    """
    fingerprints = {
        "data_fingerprint": runs.fingerprint_files(data_files(config)),
        "settings": runs.shaping_settings(config),
        "base_fingerprint": setup.base.fingerprint,
    }
    checkpoint = find_checkpoint(run, fingerprints) if resume else None
    steps = setup.total_steps(config)
    begin(run, setup.base, setup.device, setup.precision, fingerprints, total_steps=steps, resume=resume)
    with failures_recorded(run, config, setup.device):
        files = {"files": describe_files(config, setup.data.report)}
        runs.write_json(run.path / "data.json", setup.data.summary() | files)
        run.write_problems(setup.data.report.problems)
        run.write_heldout(setup.data.heldout_examples)
        if setup.data.unseen_examples:
            run.write_heldout(setup.data.unseen_examples, runs.UNSEEN)
        processes.share((run.path, checkpoint, setup.device.kind))
        model = _load(config, setup, run)
        status = _train_adapter(model, config, run, setup, checkpoint, on_metrics, on_stop, on_note)
        if status == "finished":
            quantization = quantization_of(config)
            save_adapter(model, run, setup.base, setup.tokenizer, quantization, setup.precision)
            if config.init_lora_weights in adapters.REPLACING:  # without its adapter the model must be the base again
                del model
                models.free_memory()
                model = models.load_base(setup.base, setup.device, setup.precision, quantization)
                model = adapters.load_adapter(model, run.adapter, setup.base)
    run.update_state(status=status)
    return TrainResult(model, setup, status)


class _WatchedRun(Run):
    """A run in a process beside the main one, which alone writes."""

    def update_state(self, **changes: Any) -> None:
        """Leave the state to the main process."""

    def add_metrics(self, entry: dict[str, Any]) -> None:
        """Leave the metrics to the main process."""


def train_along() -> None:
    """The life of a process beside the main one: wait for its run, and train the same steps on rows of its own."""
    told = processes.share(None)
    if told is None:
        return
    path, checkpoint, kind = told
    run = _WatchedRun(path)
    config = run.read_config()
    setup = prepare(config)
    with ExitStack() as stack:
        if kind == "cuda":  # a GPU of its own
            stack.enter_context(lock_device(kind)).write_holder(run)
        model = _load(config, setup, run)
        _train_adapter(model, config, run, setup, checkpoint, lambda entry: None, lambda: None, lambda text: None)


def _train_adapter(
    model: Any,
    config: TrainConfig,
    run: Run,
    setup: Setup,
    checkpoint: Path | None,
    on_metrics: Callable[[dict[str, Any]], None],
    on_stop: Callable[[], None],
    on_note: Callable[[str], None],
) -> str:
    """Run SFTTrainer to its end or to a stop signal. Returns finished or stopped."""
    started = time.process_time()
    with ExitStack() as stack:
        fit, fast = _settle(stack, model, config, run, setup, on_note)
        trainer = build_trainer(
            model, config, run, setup, fast=fast, max_tokens=fit.max_tokens, checkpointing=fit.checkpointing
        )
        if fast is None:
            if setup.device.kind == "cpu" and _longest(setup) <= SHORT_ROWS:
                model.set_attn_implementation("eager")
            stack.enter_context(uncast_inputs(model, active=not config.use_dora))
        stop = stack.enter_context(stop_on_signal(on_stop))
        trainer.add_callback(recorder(run, setup.device, on_metrics, stop, has_heldout=bool(setup.data.heldout)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    leave_training(trainer, model)
    processes.part()
    state = trainer.state
    losses = [entry["eval_loss"] for entry in run.read_metrics() if "eval_loss" in entry]
    kept = state.best_metric if trainer.args.load_best_model_at_end else next(reversed(losses), None)
    run.update_state(
        steps=state.global_step,
        eval_loss=kept,
        train_cpu_s=round(time.process_time() - started, 1),
        peak_bytes=peak_bytes(setup.device),
    )
    return "stopped" if stop.asked and state.global_step < state.max_steps else "finished"


def _longest(setup: Setup) -> int:
    return max(len(sequence.input_ids) for sequence in setup.data.train + setup.data.heldout)


def _settle(
    stack: ExitStack, model: Any, config: TrainConfig, run: Run, setup: Setup, on_note: Callable[[str], None]
) -> tuple[Fit, FastModel | None]:
    """Settle how the run uses memory, and put the fast path in place where it is wanted and gives the stock loss.

    Begins with the fastest fit whose estimate is within the free memory. The longest rows are then tried for real,
    and where memory runs out after all, the next smaller fit. A resumed run keeps its fit, and so its results.
    """
    lengths, learned = setup.data.lengths(), setup.data.learned_share()
    free = free_bytes(setup.device)

    def choose(config: TrainConfig) -> tuple[Fit, MemoryEstimate]:
        return choose_fit(setup.base, config, setup.device, setup.precision, lengths, free, learned)

    first, memory = choose(config)
    if earlier := run.read_state().get("fit"):
        first = Fit(**earlier)
    fits = possible_fits(config, setup.device, max(lengths))
    for fit in fits[fits.index(first) :] if config.fast and first in fits else [first]:
        with ExitStack() as attempt:
            noise = config.neftune_noise_alpha
            path = fast_path(
                model,
                longest=_longest(setup),
                keep_weights=fit.keep_weights,
                checkpointing=fit.checkpointing,
                offload=fit.offload,
                neftune_noise_alpha=noise,
            )
            fast = attempt.enter_context(path) if config.fast else None
            if config.fast and fast is None:
                on_note("the fast path doesn't know this base's layers: it is trained the plain way")
                fit, memory = choose(config.model_copy(update={"fast": False}))
            models.free_memory()
            if fast is None or _fits(model, config, setup, fit, fast):
                stack.enter_context(attempt.pop_all())
                run.update_state(fit=asdict(fit), path="fast" if fast else "plain", estimated_parts=memory.parts)
                words = f"{fit.describe()}; " if fast else ""
                on_note(f"{words}memory at most about {memory.peak_bytes / 1e9:.1f} GB")
                return fit, fast
        on_note(f"out of memory with {fit.describe()}: going on with less, with the same effective batch")
        models.free_memory()
    raise MemoryLimitError(out_of_memory(config, setup.device))


def _fits(model: Any, config: TrainConfig, setup: Setup, fit: Fit, fast: FastModel) -> bool:
    """Whether the largest micro-batch's forward and backward pass fit into memory. Leaves no gradient behind."""
    import torch

    rows = sorted(setup.data.train, key=lambda sequence: -len(sequence.input_ids))
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    whole = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows[:effective]]
    largest = split_batch(whole, fit.max_tokens, setup.device.kind == "cpu")[0]
    try:
        with torch.random.fork_rng([0] if setup.device.kind == "cuda" else []):
            model.train()
            fast.loss_sum(largest).backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def _load(config: TrainConfig, setup: Setup, run: Run) -> Any:
    """The base with a fresh adapter on it."""
    model = models.load_base(setup.base, setup.device, setup.precision, quantization_of(config))
    return adapters.attach(model, config, setup.base, run.path / START)
