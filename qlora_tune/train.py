"""The SFT stage: prepared rows through TRL's SFTTrainer, on a 4-bit base with a LoRA adapter (QLoRA, arXiv 2305.14314).

TRL gets input_ids and labels ready-made; masking and truncation are decided before it (chat_format).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tune import model as models
from qlora_tune import runs
from qlora_tune.config import TrainConfig
from qlora_tune.errors import MemoryLimitError, RunError
from qlora_tune.fast import FastModel, fast_path, split_batch
from qlora_tune.memory import Fit, MemoryEstimate, choose_fit, free_bytes, peak_bytes, possible_fits
from qlora_tune.model import Device, Quantization
from qlora_tune.prepare import SHORT_ROWS, Setup, data_files, quantization_of
from qlora_tune.recipe import describe_files, read_versions
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
        "settings_fingerprint": runs.fingerprint_settings(config),
        "base_fingerprint": setup.base.fingerprint,
    }
    checkpoint = _find_checkpoint(run, fingerprints) if resume else None
    quantization = quantization_of(config)
    run.update_state(
        status="running",
        pid=os.getpid(),
        started=time.time(),
        reason=None,
        device=setup.device.name,
        precision=setup.precision,
        base_model=setup.base.name,
        **fingerprints,
        versions=_versions_with(run.read_state().get("versions", []) if resume else []),
        total_steps=setup.total_steps(config),
    )
    try:
        files = {"files": describe_files(config, setup.data.report)}
        runs.write_json(run.path / "data.json", setup.data.summary() | files)
        run.write_problems(setup.data.report.problems)
        run.write_heldout(setup.data.heldout_examples)
        if setup.data.unseen_examples:
            run.write_heldout(setup.data.unseen_examples, runs.UNSEEN)
        model = models.load_base(setup.base, setup.device, setup.precision, quantization)
        model = _attach(model, config)
        status = _train_adapter(model, config, run, setup, checkpoint, on_metrics, on_stop, on_note)
        if status == "finished":
            _save_adapter(model, run, setup, quantization)
    except KeyboardInterrupt:
        run.update_state(status="stopped")
        raise
    except BaseException as error:
        run.update_state(status="failed", reason=(str(error) or type(error).__name__)[:500])
        if type(error).__name__ == "OutOfMemoryError":
            raise MemoryLimitError(_out_of_memory(config, setup.device)) from None
        raise
    run.update_state(status=status)
    return TrainResult(model, setup, status)


def _versions_with(earlier: list[dict[str, str]]) -> list[dict[str, str]]:
    """The versions that a run was trained with: those it began with, then each that it was resumed with."""
    now = read_versions()
    return earlier if earlier and earlier[-1] == now else [*earlier, now]


def _out_of_memory(config: TrainConfig, device: Device) -> str:
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return (
        f"{device.name} ran out of memory ({device.memory_bytes / 1e9:.1f} GB) with micro-batches of "
        f"{config.per_device_train_batch_size} rows and up to {config.max_length} tokens. Try, in this order: "
        f"--per-device-train-batch-size 1 --gradient-accumulation-steps {effective} (the same training), "
        "--activation-checkpointing on, a smaller --max-length, a smaller preset (python -m qlora_tune presets)."
    )


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
        stop = stack.enter_context(_stop_on_signal(on_stop))
        trainer.add_callback(_recorder(run, setup, on_metrics, stop))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Off with training's autocast: scores must come from the computation that chat and exports will do.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.set_attn_implementation("sdpa")
    _refuse_non_finite(model)
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
    raise MemoryLimitError(_out_of_memory(config, setup.device))


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


class _Stop:
    asked = False


@contextmanager
def _stop_on_signal(on_stop: Callable[[], None]) -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a wish to stop after the step; the third one raises KeyboardInterrupt.

    Not the second: people press Ctrl-C twice, and the checkpoint being written is what they want to keep.
    """
    stop = _Stop()
    asked = 0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        stop.asked = True
        if asked == 1:
            on_stop()
        if asked > 2:
            raise KeyboardInterrupt

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it decides about signals
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _recorder(run: Run, setup: Setup, on_metrics: Callable[[dict[str, Any]], None], stop: _Stop) -> Any:
    """A Trainer callback that records every step, seals checkpoints, watches the loss and heeds a stop."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin, self.first_step = time.perf_counter(), state.global_step
            if state.best_model_checkpoint:  # kept as a path, which is wrong once the run's folder was moved
                state.best_model_checkpoint = str(run.checkpoints / Path(state.best_model_checkpoint).name)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.asked:
                control.should_save = control.should_training_stop = True
            elif state.global_step >= state.max_steps and setup.data.heldout:
                control.should_evaluate = True  # else the last weights could never be the best ones

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            entry = self._measure(state, logs)
            if entry is None:
                return
            run.add_metrics(entry)
            on_metrics(entry)
            broken = [name for name in ("loss", "eval_loss") if not math.isfinite(entry.get(name, 0.0))]
            if not args.fp16 and not math.isfinite(entry.get("grad_norm", 0.0)):
                broken.append("gradient")
            if broken:
                raise RunError(
                    f"The {broken[0]} is not a finite number at step {state.global_step}, so training was stopped "
                    "before anything was saved from it. Lower --learning-rate, or use --dtype float32."
                )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            runs.seal_checkpoint(run.checkpoints / f"checkpoint-{state.global_step}")

        def _measure(self, state: Any, logs: dict[str, float]) -> dict[str, Any] | None:
            names = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")
            known = {name: float(logs[name]) for name in names if name in logs}
            if "loss" not in known and "eval_loss" not in known:
                return None
            elapsed = time.perf_counter() - self.begin
            done = state.global_step - self.first_step
            if "num_tokens" in logs and "loss" in known:
                known["tokens_per_s"] = logs["num_tokens"] / elapsed
            return {
                "step": state.global_step,
                "total_steps": state.max_steps,
                "epoch": round(state.epoch or 0.0, 4),
                **known,
                "memory_bytes": _memory_in_use(setup.device),
                "elapsed_s": round(elapsed, 3),
                "left_s": round(elapsed / max(done, 1) * (state.max_steps - state.global_step), 1),
            }

    return Recorder()


def _memory_in_use(device: Device) -> int:
    """Peak bytes allocated on a GPU; resident bytes of the process on a CPU."""
    import psutil
    import torch

    if device.kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _attach(model: Any, config: TrainConfig) -> Any:
    return models.attach_adapter(
        model,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        seed=config.seed,
    )


def _find_checkpoint(run: Run, fingerprints: dict[str, str]) -> Path | None:
    """The checkpoint to go on from. Raises RunError where going on would not be the same training."""
    run.require_unfinished()
    state = run.read_state()
    names = {
        "data_fingerprint": "data files",
        "settings_fingerprint": "settings",
        "base_fingerprint": "base model's weights",
    }
    changed = [names[key] for key, value in fingerprints.items() if state.get(key, value) != value]
    if changed:
        raise RunError(
            f"{run.path}: its {' and '.join(changed)} have changed since it was started, so going on would mix two "
            "trainings. Start a new run instead."
        )
    checkpoint = next(reversed(runs.keep_whole_checkpoints(run)), None)
    run.rewind_metrics(runs.step_of(checkpoint))
    return checkpoint


def _refuse_non_finite(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise RunError(f"{name} holds values that are not finite numbers; no adapter was saved.")


def _save_adapter(model: Any, run: Run, setup: Setup, quantization: Quantization) -> None:
    """Leave the adapter, its tokenizer with chat template, and its base's fingerprint in the run's folder."""
    model.save_pretrained(run.adapter, safe_serialization=True)
    (run.adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form; export writes the real card
    setup.tokenizer.save_pretrained(run.adapter)
    models.write_adapter_record(run.adapter, setup.base, quantization, setup.precision)
