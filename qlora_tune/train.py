"""The SFT stage: prepared rows through TRL's SFTTrainer, on a 4-bit base with a LoRA adapter (QLoRA, arXiv 2305.14314).

TRL gets input_ids and labels ready-made; masking and truncation are decided before it (chat_format).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune import model as models
from qlora_tune import runs
from qlora_tune.chat_format import IGNORED, TokenizedExample
from qlora_tune.config import TrainConfig
from qlora_tune.errors import MemoryLimitError, RunError
from qlora_tune.model import Device, Quantization
from qlora_tune.prepare import (
    PAD_TO,
    SHORT_ROWS,
    Setup,
    checkpoints_activations,
    data_files,
    optimizer_of,
    quantization_of,
)
from qlora_tune.runs import Run


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
) -> TrainResult:
    """Train an adapter and leave it in the run's folder.

    `on_metrics` is called after every optimizer step and evaluation with what metrics.jsonl gets: step,
    total_steps, loss or eval_loss, learning_rate, grad_norm, tokens_per_s, memory_bytes, elapsed_s, left_s.
    SIGINT and SIGTERM save a checkpoint and end training; a third one ends it at once. Raises RunError when the
    loss is no longer finite, or when there is nothing sound to resume from. `on_stop` is called when a stop is asked.
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
        total_steps=setup.total_steps(config),
    )
    try:
        runs.write_json(run.path / "data.json", setup.data.summary())
        run.write_problems(setup.data.report.problems)
        run.write_heldout(setup.data.heldout_examples)
        model = models.load_base(setup.base, setup.device, setup.precision, quantization)
        model = _attach(model, config)
        status = _fit(model, config, run, setup, checkpoint, on_metrics, on_stop)
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


def _out_of_memory(config: TrainConfig, device: Device) -> str:
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return (
        f"{device.name} ran out of memory ({device.memory_bytes / 1e9:.1f} GB) with micro-batches of "
        f"{config.per_device_train_batch_size} rows and up to {config.max_length} tokens. Try, in this order: "
        f"--per-device-train-batch-size 1 --gradient-accumulation-steps {effective} (the same training), "
        "--activation-checkpointing on, a smaller --max-length, a smaller preset (python -m qlora_tune presets)."
    )


def to_sft_config(config: TrainConfig, run: Run, setup: Setup) -> Any:
    """Translate our settings to TRL's: the only place that knows both."""
    from trl import SFTConfig

    steps = setup.total_steps(config)
    every = int(config.eval_steps) if config.eval_steps >= 1 else max(1, math.ceil(steps * config.eval_steps))
    has_heldout = bool(setup.data.heldout)
    on_cuda = setup.device.kind == "cuda"
    return SFTConfig(
        output_dir=str(run.checkpoints),
        max_length=None,  # rows are already whole and short enough; the default would cut them again
        packing=False,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        # The held-out loss holds logits of the whole batch, as training does: no larger batch fits.
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=int(steps * config.warmup_ratio),  # rounded down: the first step of a warmup has rate 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=optimizer_of(config, setup.device),
        neftune_noise_alpha=config.neftune_noise_alpha,
        gradient_checkpointing=checkpoints_activations(config, setup.device),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=setup.precision == "bfloat16",
        fp16=setup.precision == "float16",
        use_cpu=not on_cuda,
        seed=config.seed,
        eval_strategy="steps" if has_heldout else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=config.load_best_model_at_end and has_heldout,
        metric_for_best_model="eval_loss" if has_heldout else None,
        greater_is_better=False if has_heldout else None,
        pad_to_multiple_of=None if on_cuda else PAD_TO,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show a loss that is not a number as 0.0
        dataloader_pin_memory=on_cuda,
        disable_tqdm=True,
        report_to="none",
    )


def _fit(
    model: Any,
    config: TrainConfig,
    run: Run,
    setup: Setup,
    checkpoint: Path | None,
    on_metrics: Callable[[dict[str, Any]], None],
    on_stop: Callable[[], None],
) -> str:
    """Run SFTTrainer to its end or to a stop signal. Returns finished or stopped."""
    trainer = _build_trainer(model, config, run, setup)
    models.keep_adapter_in_fp32(model)
    short = max(len(sequence.input_ids) for sequence in setup.data.train) <= SHORT_ROWS
    if setup.device.kind == "cpu" and short:
        model.set_attn_implementation("eager")
    started = time.process_time()
    with _stop_on_signal(on_stop) as stop, models.uncast_inputs(model, active=not config.use_dora):
        trainer.add_callback(_recorder(run, setup, on_metrics, stop))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Off with training's autocast: scores must come from the computation that chat and exports will do.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.set_attn_implementation("sdpa")
    _refuse_non_finite(model)
    state = trainer.state
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    kept = state.best_metric if trainer.args.load_best_model_at_end else next(reversed(losses), None)
    run.update_state(steps=state.global_step, eval_loss=kept, train_cpu_s=round(time.process_time() - started, 1))
    return "stopped" if stop.asked and state.global_step < state.max_steps else "finished"


def _build_trainer(model: Any, config: TrainConfig, run: Run, setup: Setup) -> Any:
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTTrainer

    class MaskedTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer whose held-out loss is the mean over learned tokens, not a mean of batch means."""

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Leave no card of empty headings in the checkpoints; export writes the real one."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            with models.only_learned(self.model, inputs) as fewer:
                return super().compute_loss(model, fewer, *rest, **named)

        def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
            self.model.eval()
            total = torch.zeros((), dtype=torch.float64)
            tokens = 0
            for batch in self.get_eval_dataloader():
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                with torch.no_grad(), self.compute_loss_context_manager():
                    total += self.compute_loss(self.model, self._prepare_inputs(batch)).double().cpu() * learned
                tokens += learned
            metrics = {f"{metric_key_prefix}_loss": float(total / max(tokens, 1))}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = to_sft_config(config, run, setup)
    callbacks = []
    if config.early_stopping_patience and setup.data.heldout:
        stopper = EarlyStoppingCallback(config.early_stopping_patience)
        losses = [entry["eval_loss"] for entry in run.read_metrics() if "eval_loss" in entry]
        # After a resume it would count from 0 again.
        stopper.early_stopping_patience_counter = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        callbacks.append(stopper)
    trainer = MaskedTrainer(
        model=model,
        args=args,
        train_dataset=_to_dataset(setup.data.train),
        eval_dataset=_to_dataset(setup.data.heldout) if setup.data.heldout else None,
        processing_class=setup.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _to_dataset(sequences: Sequence[TokenizedExample]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [sequence.input_ids for sequence in sequences],
            "labels": [sequence.labels for sequence in sequences],
        }
    )


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
