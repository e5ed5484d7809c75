"""The preference stage: pairs through TRL's DPOTrainer, from an adapter that was instruction-tuned (arXiv 2305.18290).

The reference is the base with that adapter, frozen beside the one that is trained: the base is loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_tune.config import TrainConfig, validate_settings
from qlora_tune.lifecycle import (
    save_adapter,
)
from qlora_tune.pair_scores import PairScores, score_pairs, write_scores
from qlora_tune.pair_setup import REFERENCE, Origin, PreferenceSetup, pair_settings, settings_before
from qlora_tune.pair_stage import PairSteps, train_on_pairs
from qlora_tune.pair_trainer import build_preference_trainer
from qlora_tune.preferences import (
    RATE_SHARE,
)
from qlora_tune.runs import Run


@dataclass(frozen=True)
class PreferResult:
    """The tuned model, still loaded, how training ended, and the held-out pairs; None without any, or stopped."""

    model: Any
    status: str
    scores: PairScores | None


def make_settings(origin: Origin, data: Sequence[str], flags: Mapping[str, Any]) -> TrainConfig:
    """The settings of a preference training: those of the adapter's run, what this stage changes, then flags.

    Raises ConfigError.
    """
    before = settings_before(origin)
    rate = {"learning_rate": before.learning_rate * RATE_SHARE}
    return validate_settings(pair_settings(before, origin.run, data) | rate | dict(flags), "prefer")


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
