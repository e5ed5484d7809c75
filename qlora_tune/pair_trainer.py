"""TRL's DPOTrainer and RewardTrainer as used here: what they are told, and pairs as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from qlora_tune.config import TrainConfig
from qlora_tune.fast import FastModel
from qlora_tune.model import Device, Precision
from qlora_tune.preferences import TokenizedPair
from qlora_tune.prepare import count_steps
from qlora_tune.runs import Run
from qlora_tune.trainer import LeanTrainer, arguments_of, early_stopping

# Pulls rewards towards a mean of 0, so that those of different prompts can be compared: the loss of pairs knows their
# differences alone. The weight that TRL recommends (Eisenstein et al., arXiv 2312.09244).
CENTER = 0.01


def build_preference_trainer(
    model: Any,
    config: TrainConfig,
    run: Run,
    device: Device,
    precision: Precision,
    tokenizer: Any,
    train: Sequence[TokenizedPair],
    heldout: Sequence[TokenizedPair],
    *,
    plain: bool,
) -> Any:
    """A DPOTrainer over prepared pairs, which trains the model's adapter against a frozen copy of it.

    TRL keeps that copy beside the adapter, on the same base, under the name "ref". Not `plain`: the caller puts
    fast_log_probs in place.
    """
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(LeanTrainer, DPOTrainer):  # type: ignore[misc]
        """DPOTrainer that takes pairs as tokens, where TRL would render and cut them in its own way."""

        def log(self, logs: dict[str, float], *rest: Any) -> None:
            if not plain:  # fast_log_probs doesn't know it
                for metrics in self._metrics.values():
                    metrics.pop("mean_token_accuracy", None)
            super().log(logs, *rest)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    told = _pair_arguments(config, run, device, precision, len(train), bool(heldout), plain)
    with _unrounded(model):
        trainer = PairTrainer(
            model=model,
            args=DPOConfig(**told, beta=config.beta, loss_type=[config.loss_type]),
            train_dataset=_to_pair_dataset(train),
            eval_dataset=_to_pair_dataset(heldout) if heldout else None,
            processing_class=tokenizer,
            callbacks=early_stopping(config, run) if heldout else [],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fast_log_probs(model: Any, fast: FastModel) -> AbstractContextManager[Any]:
    """Let the fast path give a DPOTrainer the log-probabilities that it asks its model for."""
    return patch.object(model.get_base_model(), "forward", partial(_log_probs, fast))


def _log_probs(fast: FastModel, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
    """What TRL's own output head gives, but for the sum of each row's log-probabilities, in its first position.

    TRL sums them up itself. What only its logs would show is 0.
    """
    import torch
    from transformers.utils import ModelOutput

    rows = [
        {"input_ids": ids[:length].tolist(), "labels": wanted[:length].tolist()}
        for ids, wanted, length in zip(input_ids, labels, attention_mask.sum(1).tolist(), strict=True)
    ]
    with torch.autocast(input_ids.device.type, enabled=False):
        sums = fast.log_likelihoods(rows)
    unknown = torch.zeros_like(labels[:, 1:])
    log_probs = torch.nn.functional.pad(sums.unsqueeze(1), (0, unknown.shape[1] - 1))
    return ModelOutput(log_probs=log_probs, entropy=unknown, mean_logits=unknown, is_top1=unknown.bool())


def build_reward_trainer(
    model: Any,
    config: TrainConfig,
    run: Run,
    device: Device,
    precision: Precision,
    tokenizer: Any,
    train: Sequence[TokenizedPair],
    heldout: Sequence[TokenizedPair],
    *,
    plain: bool,
) -> Any:
    """A RewardTrainer over prepared pairs: Bradley-Terry loss on the rewards at the answers' last tokens."""
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class ScoreTrainer(LeanTrainer, RewardTrainer):  # type: ignore[misc]
        """RewardTrainer as it is, but for what no trainer here needs."""

    told = _pair_arguments(config, run, device, precision, len(train), bool(heldout), plain)
    ends = {pair.chosen_ids[-1] for pair in train}
    # The reward is read at the last token that is no padding, which may be the end of turn in a base's tokenizer.
    pad = next(token for token in (tokenizer.pad_token_id, *range(len(ends) + 1)) if token not in ends)
    with _unrounded(model):
        trainer = ScoreTrainer(
            model=model,
            args=RewardConfig(**told, center_rewards_coefficient=CENTER),
            data_collator=DataCollatorForPreference(pad, told["pad_to_multiple_of"]),
            train_dataset=_to_reward_dataset(train),
            eval_dataset=_to_reward_dataset(heldout) if heldout else None,
            processing_class=tokenizer,
            callbacks=early_stopping(config, run) if heldout else [],
        )
    model.config.get_text_config().pad_token_id = pad
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pair_arguments(
    config: TrainConfig, run: Run, device: Device, precision: Precision, pairs: int, has_heldout: bool, plain: bool
) -> dict[str, Any]:
    """What the trainers on pairs are told."""
    # A GPU's memory is what runs out, and no estimate is made for pairs the plain way.
    automatic = config.activation_checkpointing == "auto" and device.kind == "cuda"
    recompute = plain and (config.activation_checkpointing == "on" or automatic)
    told = arguments_of(config, run, device, precision, count_steps(config, pairs), has_heldout)
    return told | {"gradient_checkpointing": recompute}


@contextmanager
def _unrounded(model: Any) -> Iterator[None]:
    """Keep what is trained, and TRL's copy of it ("ref"), from being rounded to bfloat16 while a trainer is made.

    It would begin as another model than the one that was loaded, and small steps be lost.
    """
    exact = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if (before := name.replace(".ref.", ".default.")) in exact:
            weight.data = exact[before].float().clone()


def _to_pair_dataset(pairs: Sequence[TokenizedPair]) -> Any:
    from datasets import Dataset

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({column: [getattr(pair, column) for pair in pairs] for column in columns})


def _to_reward_dataset(pairs: Sequence[TokenizedPair]) -> Any:
    """Whole conversations, as RewardTrainer takes them."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "chosen_ids": [pair.prompt_ids + pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.prompt_ids + pair.rejected_ids for pair in pairs],
        }
    )
