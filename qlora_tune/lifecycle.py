"""The life of a training in its run's folder, whatever the stage: begun, recorded, stopped, resumed, ended, failed."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from qlora_tune import adapters, disk, processes, runs
from qlora_tune.adapter_record import write_adapter_record
from qlora_tune.base import BaseModel
from qlora_tune.config import TrainConfig
from qlora_tune.errors import MemoryLimitError, RunError, TuneError
from qlora_tune.model import Device, Precision, Quantization
from qlora_tune.recipe import read_versions
from qlora_tune.runs import Run

SLEPT_S = 10  # that much sleep counts: clocks that are set while a run trains are off by less
START = "start"  # folder of a run: while it trains, what its adapter's initialisation took out of the base
# What is kept of what a trainer logs; those with rewards come from preference training, the last from reward models.
MEASURED = (
    *("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy"),
    *("rewards/margins", "rewards/accuracies", "eval_rewards/margins", "eval_rewards/accuracies"),
    *("margin", "accuracy", "eval_margin", "eval_accuracy"),
)


def begin(
    run: Run,
    base: BaseModel,
    device: Device,
    precision: Precision,
    fingerprints: Mapping[str, Any],
    *,
    total_steps: int,
    resume: bool,
) -> None:
    """Record that a training runs in this process: where, on what, and from which data."""
    run.update_state(
        status="running",
        pid=os.getpid(),
        started=time.time(),
        reason=None,
        device=device.name,
        precision=precision,
        base_model=base.name,
        **fingerprints,
        versions=_versions_with(run.read_state().get("versions", []) if resume else []),
        total_steps=total_steps,
    )


@contextmanager
def failures_recorded(run: Run, config: TrainConfig, device: Device) -> Iterator[None]:
    """Leave in the run's state why training ended early.

    Raises MemoryLimitError when memory ran out, and RunError when the disk is full, where a half-written checkpoint is
    removed to make room for the state, when a checkpoint is a pickle of more than tensors, or when a GPU did not
    outlast a sleep of the computer.
    """
    awake_from = asleep_s()
    try:
        yield
    except KeyboardInterrupt:
        run.update_state(status="stopped")
        raise
    except BaseException as error:
        words = _in_words(error, run, asleep_s() - awake_from)
        with suppress(OSError):  # on a full disk; a process that is gone then says as much
            run.update_state(status="failed", reason=words or (str(error) or type(error).__name__)[:500])
        if words:
            raise RunError(words) from None
        if type(error).__name__ == "OutOfMemoryError":
            raise MemoryLimitError(out_of_memory(config, device)) from None
        raise


def _in_words(error: BaseException, run: Run, slept_s: float) -> str:
    """What libraries report in words of their own, or under none; empty for all other failures."""
    if isinstance(error, UnpicklingError):
        return (
            f"{run.path}: a file in its checkpoints holds more than numbers, so it was not opened. Whoever wrote it "
            "could have run code here: don't use this run's folder."
        )
    if isinstance(error, TuneError) or not isinstance(error, Exception):
        return ""
    on_gpu = "CUDA" in str(error) and type(error).__name__ != "OutOfMemoryError"
    if disk.is_full(error) or disk.takes_nothing(run.path):
        what, first = "the disk is full", "Free some space, then go"
    elif on_gpu and slept_s > SLEPT_S:
        what, first = f"the computer slept, and then the GPU failed ({str(error)[:200]})", "Go"
    else:
        return ""
    kept = runs.step_of(next(reversed(runs.keep_whole_checkpoints(run)), None))
    return (
        f"{run.path}: {what}, so training was stopped. It is saved up to step {kept}. {first} on with: "
        f"{run.resume_command()}"
    )


def asleep_s() -> float:
    """A clock that goes on only while the computer sleeps [s]; what it shows means nothing, differences do."""
    whole = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()
    return whole - time.monotonic()  # which stands still meanwhile


def _versions_with(earlier: list[dict[str, str]]) -> list[dict[str, str]]:
    """The versions that a run was trained with: those it began with, then each that it was resumed with."""
    now = read_versions()
    return earlier if earlier and earlier[-1] == now else [*earlier, now]


def out_of_memory(config: TrainConfig, device: Device) -> str:
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return (
        f"{device.name} ran out of memory ({device.memory_bytes / 1e9:.1f} GB) with micro-batches of "
        f"{config.per_device_train_batch_size} rows and up to {config.max_length} tokens. Try, in this order: "
        f"--per-device-train-batch-size 1 --gradient-accumulation-steps {effective} (the same training), "
        "--activation-checkpointing on, a smaller --max-length, a smaller preset (python -m qlora_tune presets)."
    )


def find_checkpoint(run: Run, fingerprints: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from. Raises RunError where going on would not be the same training."""
    run.require_unfinished()
    state = run.read_state()
    names = {
        "data_fingerprint": "data files",
        "base_fingerprint": "base model's weights",
        "preferences_fingerprint": "preference files or first adapter",
    }
    changed = [names[key] for key, value in fingerprints.items() if key in names and state.get(key, value) != value]
    changed += runs.changed_settings(state.get("settings", {}), fingerprints["settings"])
    if changed:
        raise RunError(
            f"{run.path}: its {' and '.join(changed)} have changed since it was started, so going on would mix two "
            "trainings. "
            f"Train anew with: python -m qlora_tune {run.stage} --config {run.path / 'config.toml'} --run-name NEW"
        )
    checkpoint = next(reversed(runs.keep_whole_checkpoints(run)), None)
    run.rewind_metrics(runs.step_of(checkpoint))
    return checkpoint


class Stop:
    """Whether a signal has asked to stop."""

    asked = False


@contextmanager
def stop_on_signal(on_stop: Callable[[], None]) -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM and SIGHUP into a wish to stop after the step; the third one raises KeyboardInterrupt.

    Not the second: people press Ctrl-C twice, and the checkpoint being written is what they want to keep. SIGHUP comes
    when the terminal is closed, and stays ignored under nohup.
    """
    stop = Stop()
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
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        old = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: whoever runs it decides about signals
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def recorder(
    run: Run, device: Device, on_metrics: Callable[[dict[str, Any]], None], stop: Stop, *, has_heldout: bool
) -> Any:
    """A Trainer callback that records every step, seals checkpoints, watches the loss and heeds a stop."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            _require_room(run, args, model)
            self.begin, self.first_step = time.perf_counter(), state.global_step
            self.asleep_s, self.slept_s = asleep_s(), 0.0
            if state.best_model_checkpoint:  # kept as a path, which is wrong once the run's folder was moved
                state.best_model_checkpoint = str(run.checkpoints / Path(state.best_model_checkpoint).name)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stop.asked = processes.any_of(stop.asked, args.device)  # all end after the same step
            before, self.asleep_s = self.asleep_s, asleep_s()
            self.slept_s = self.asleep_s - before
            # A battery that was empty once may be so again.
            control.should_save |= processes.any_of(self.slept_s > SLEPT_S, args.device)
            if stop.asked:
                control.should_save = control.should_training_stop = True
            elif state.global_step >= state.max_steps and has_heldout:
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
            processes.wait()  # each one keeps its random state there
            if processes.index() == 0:
                runs.seal_checkpoint(run.checkpoints / f"checkpoint-{state.global_step}")

        def _measure(self, state: Any, logs: dict[str, float]) -> dict[str, Any] | None:
            known = {name: float(logs[name]) for name in MEASURED if name in logs}
            if "loss" not in known and "eval_loss" not in known:
                return None
            elapsed = time.perf_counter() - self.begin
            done = state.global_step - self.first_step
            if "num_tokens" in logs and "loss" in known:
                known["tokens_per_s"] = logs["num_tokens"] / elapsed
            if self.slept_s > SLEPT_S:
                known["slept_s"], self.slept_s = round(self.slept_s), 0.0
            return {
                "step": state.global_step,
                "total_steps": state.max_steps,
                "epoch": round(state.epoch or 0.0, 4),
                **known,
                "memory_bytes": _memory_in_use(device),
                "elapsed_s": round(elapsed, 3),
                "left_s": round(elapsed / max(done, 1) * (state.max_steps - state.global_step), 1),
            }

    return Recorder()


def _require_room(run: Run, args: Any, model: Any) -> None:
    """Refuse to begin where the checkpoints that are kept, one being written and the adapter don't fit the disk."""
    weights = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = 0.5 if "8bit" in args.optim else 2  # of Adam, for each byte of weights
    needed = ((args.save_total_limit + 1) * (1 + moments) + 1) * weights
    there = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    disk.require_room(run.path, int(needed) - there, "checkpoints and the adapter")


def _memory_in_use(device: Device) -> int:
    """Peak bytes allocated on a GPU; resident bytes of the process on a CPU."""
    import psutil
    import torch

    if device.kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def leave_training(trainer: Any, model: Any) -> None:
    """Take training's autocast and attention off the model: scores must come from the computation of chat and exports.

    Raises RunError where a trained weight is no finite number.
    """
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.set_attn_implementation("sdpa")
    adapters.refuse_non_finite(model)


def save_adapter(
    model: Any, run: Run, base: BaseModel, tokenizer: Any, quantization: Quantization, precision: Precision
) -> None:
    """Leave the adapter, its tokenizer with chat template, and its base's fingerprint in the run's folder."""
    adapters.save_adapter_files(model, run.adapter, run.path / START)
    tokenizer.save_pretrained(run.adapter)
    write_adapter_record(run.adapter, base, quantization, precision)
