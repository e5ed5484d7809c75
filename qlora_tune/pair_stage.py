"""The life of a training on pairs in its run's folder, whatever its loss: recorded, resumed, stopped, finished."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from qlora_tune import data as rows
from qlora_tune import runs
from qlora_tune.config import TrainConfig
from qlora_tune.disk import hash_file
from qlora_tune.export import Trained
from qlora_tune.fast import FastModel, fast_path
from qlora_tune.lifecycle import (
    begin,
    failures_recorded,
    find_checkpoint,
    leave_training,
    recorder,
    stop_on_signal,
)
from qlora_tune.memory import Fit, estimate_memory, free_bytes, peak_bytes, possible_fits
from qlora_tune.pair_setup import REFERENCE, Origin, PreferenceSetup
from qlora_tune.pair_trainer import fast_log_probs
from qlora_tune.preferences import (
    TokenizedPair,
    keep_pairs,
)
from qlora_tune.prepare import (
    SHORT_ROWS,
    count_steps,
)
from qlora_tune.runs import Run
from qlora_tune.trainer import uncast_inputs

_Scores = TypeVar("_Scores")


@dataclass(frozen=True)
class PairSteps(Generic[_Scores]):
    """What is a stage's own: how its model is loaded, its trainer made, and what was trained saved and scored."""

    load: Callable[[], Any]
    build: Callable[..., Any]
    finish: Callable[[Any], _Scores | None]
    fast: bool  # whether the fast path gives what its loss is made of


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
        "settings": runs.shaping_settings(config),
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


def _write_record(config: TrainConfig, run: Run, setup: PreferenceSetup, origin: Origin | None) -> None:
    """Keep what the run is trained and scored on, and the files that it and the run before it were made of."""
    began = origin.run if origin else None
    earlier = runs.read_json(began.path / "data.json").get("files", []) if began else []
    files = [
        {
            "name": Path(file).name,
            "use": "preferences",
            "rows": setup.report.rows_by_file[file],
            "sha256": hash_file(file),
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
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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
