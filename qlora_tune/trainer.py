"""TRL's SFTTrainer as used here: what it is told, and the loss that it computes.

Station between the run's life (train.py) and the fast path. With pair_trainer the only module that knows TRL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from qlora_tune import adapters, processes
from qlora_tune.chat_format import IGNORED, TokenizedExample
from qlora_tune.config import TrainConfig
from qlora_tune.fast import FastModel, count_learned, split_batch
from qlora_tune.model import Device, Precision
from qlora_tune.prepare import PAD_TO, Setup, optimizer_of
from qlora_tune.runs import Run


class LeanTrainer:
    """What TRL's trainers have in common here; stands before theirs among the bases."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leave no card of empty headings in the checkpoints; export writes the real one."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing asks for it, and counting goes over all parameters at every step."""
        return 0

    def _save_checkpoint(self: Any, *arguments: Any, **named: Any) -> None:
        """Save no weights that are not finite: the loss tells of them a step later, when the checkpoint is kept."""
        adapters.refuse_non_finite(self.model, self.optimizer)
        super()._save_checkpoint(*arguments, **named)  # type: ignore[misc]

    def _run_epoch(self: Any, *arguments: Any, **named: Any) -> None:
        """Train nothing where nothing is left: Trainer would take a step more where the epoch isn't over.

        A kill before the adapter was saved leaves such a checkpoint.
        """
        from transformers import EarlyStoppingCallback

        stoppers = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stoppers)
        if self.state.global_step < self.state.max_steps and not stopped:
            super()._run_epoch(*arguments, **named)  # type: ignore[misc]


def to_sft_config(
    config: TrainConfig, run: Run, setup: Setup, *, flat: bool = False, checkpointing: bool = False
) -> Any:
    """Translate our settings to TRL's: the only place that knows both.

    `flat` lets the data loader yield the whole effective batch, which the fast path splits by tokens.
    """
    from trl import SFTConfig

    told = arguments_of(config, run, setup.device, setup.precision, setup.total_steps(config), bool(setup.data.heldout))
    if flat:
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        told |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
        told |= {"gradient_accumulation_steps": 1, "dataloader_pin_memory": False}
    else:
        rows = config.per_device_train_batch_size * processes.count()  # dealt to the processes
        told |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
        told["gradient_accumulation_steps"] = processes.deal_micro_batches(config.gradient_accumulation_steps)
    return SFTConfig(
        **told,
        packing=False,
        neftune_noise_alpha=None if flat else config.neftune_noise_alpha,
        gradient_checkpointing=checkpointing and not flat,  # the fast path brings its own
    )


def arguments_of(
    config: TrainConfig, run: Run, device: Device, precision: Precision, steps: int, has_heldout: bool
) -> dict[str, Any]:
    """What all of TRL's trainers are told."""
    every = int(config.eval_steps) if config.eval_steps >= 1 else max(1, math.ceil(steps * config.eval_steps))
    on_cuda = device.kind == "cuda"
    return {
        "output_dir": str(run.checkpoints),
        "max_length": None,  # rows are already whole and short enough; the default would cut them again
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        # The held-out loss holds logits of the whole batch, as training does: no larger batch fits.
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": int(steps * config.warmup_ratio),  # rounded down: the first step of a warmup has rate 0
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": optimizer_of(config, device),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "use_cpu": not on_cuda,
        "seed": config.seed,
        "eval_strategy": "steps" if has_heldout else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": config.load_best_model_at_end and has_heldout,
        "metric_for_best_model": "eval_loss" if has_heldout else None,
        "greater_is_better": False if has_heldout else None,
        "pad_to_multiple_of": None if on_cuda else PAD_TO,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show a loss that is not a number as 0.0
        "dataloader_pin_memory": on_cuda,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def build_trainer(
    model: Any,
    config: TrainConfig,
    run: Run,
    setup: Setup,
    *,
    fast: FastModel | None = None,
    max_tokens: int = 0,
    checkpointing: bool = False,
) -> Any:
    """An SFTTrainer over the prepared rows: through the fast path in micro-batches of max_tokens, or the plain way."""
    import torch
    from transformers import PrinterCallback
    from trl import SFTTrainer

    class MaskedTrainer(LeanTrainer, SFTTrainer):  # type: ignore[misc]
        """SFTTrainer whose held-out loss is the mean over learned tokens, not a mean of batch means."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            if fast is None:
                return super().training_step(model, inputs, *rest, **named)
            model.train()
            total = torch.zeros((), device=self.args.device)
            for batch in inputs["micro_batches"]:
                loss = fast.loss_sum(batch) / max(1, inputs["learned"])
                self.accelerator.backward(loss)
                total += loss.detach()
                del loss  # what recomputing began with would stay beside the next micro-batch's
            processes.sum_gradients(model)
            self._total_train_tokens += inputs["tokens"]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return processes.sum_up(total)

        def _get_dataloader(self, *args: Any, **named: Any) -> Any:
            """Whole batches in every process, dealt in collating: accelerate would repeat rows to fill the last one."""
            loader = super()._get_dataloader(*args, **named)
            if processes.count() > 1:
                # As Transformers itself makes accelerate's sharding pass batches on.
                sharding = loader.batch_sampler
                sharding.num_processes, sharding.process_index, sharding.even_batches = 1, 0, False
            return loader

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            with adapters.only_learned(self.model, inputs) as fewer:
                return super().compute_loss(model, fewer, *rest, **named)

        def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
            self.model.eval()
            sums = [self._loss_sum(inputs) for inputs in self.get_eval_dataloader()]
            total, tokens = (sum(column) for column in zip(*sums, strict=True))
            both = torch.tensor([total, tokens], dtype=torch.float64, device=self.args.device)
            total, tokens = processes.sum_up(both).tolist()
            metrics = {f"{metric_key_prefix}_loss": float(total / max(tokens, 1))}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _loss_sum(self, inputs: dict[str, Any]) -> tuple[Any, int]:
            """Sum of the losses of a batch's learned tokens, and how many they are."""
            with torch.no_grad():
                if fast is not None:
                    batches = inputs["micro_batches"]
                    losses = [fast.loss_sum(batch).double().cpu() for batch in batches]
                    return sum(losses), sum(len(batch.targets) for batch in batches)
                learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, self._prepare_inputs(inputs))
            return loss.double().cpu() * learned if learned else 0.0, learned

    trainer = MaskedTrainer(
        model=model,
        args=to_sft_config(config, run, setup, flat=fast is not None, checkpointing=checkpointing),
        data_collator=partial(_collate, max_tokens, setup.device.kind == "cpu") if fast else None,
        train_dataset=_to_dataset(setup.data.train),
        eval_dataset=_to_dataset(setup.data.heldout) if setup.data.heldout else None,
        processing_class=setup.tokenizer,
        callbacks=early_stopping(config, run) if setup.data.heldout else [],
    )
    trainer.remove_callback(PrinterCallback)
    if fast is None:
        trainer.data_collator = partial(_collate_padded, trainer.data_collator)
    adapters.keep_adapter_in_fp32(model)
    return trainer


def early_stopping(config: TrainConfig, run: Run) -> list[Any]:
    """A callback that ends training where the held-out loss no longer falls, if that is wanted."""
    from transformers import EarlyStoppingCallback

    if not config.early_stopping_patience:
        return []
    stopper = EarlyStoppingCallback(config.early_stopping_patience)
    losses = [entry["eval_loss"] for entry in run.read_metrics() if "eval_loss" in entry]
    # After a resume it would count from 0 again.
    stopper.early_stopping_patience_counter = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    return [stopper]


def uncast_inputs(model: Any, *, active: bool) -> AbstractContextManager[None]:
    """Keep PEFT from casting inputs to the adapter's float32, where autocast casts them back to the very same values.

    A twelfth of a step on a CPU. Not for DoRA, which computes with those inputs outside of autocast's operations.
    """
    from peft.helpers import disable_input_dtype_casting

    casting: AbstractContextManager[None] = disable_input_dtype_casting(model, active=active)
    return casting


def _collate(max_tokens: int, on_cpu: bool, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """An effective batch: this process's rows as micro-batches, with the tokens and the learned tokens of all rows.

    Rows are dealt by length, so that each process has about as many tokens to go through.
    """
    dealt = sorted(rows, key=lambda row: -len(row["input_ids"]))[processes.index() :: processes.count()]
    return {
        "micro_batches": split_batch(dealt, max_tokens, on_cpu),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "learned": sum(map(count_learned, rows)),
    }


def _collate_padded(collate: Any, rows: Sequence[dict[str, list[int]]]) -> Any:
    """This process's rows of a batch, padded; where there is none for it, one from which nothing is learned."""
    nothing = {"input_ids": rows[0]["input_ids"], "labels": [IGNORED] * len(rows[0]["labels"])}
    return collate(rows[processes.index() :: processes.count()] or [nothing])


def _to_dataset(sequences: Sequence[TokenizedExample]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [sequence.input_ids for sequence in sequences],
            "labels": [sequence.labels for sequence in sequences],
        }
    )
