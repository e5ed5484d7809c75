"""The training of reward models: pairs through TRL's RewardTrainer (Bradley-Terry loss), held-out ones scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tune.config import BUILTIN, TrainConfig, resolve_config, validate_settings
from qlora_tune.hub_models import is_repository
from qlora_tune.lifecycle import save_adapter
from qlora_tune.outsiders import is_model
from qlora_tune.pair_scores import share
from qlora_tune.pair_setup import REFERENCE, Origin, PreferenceSetup, find_origin, pair_settings, settings_before
from qlora_tune.pair_stage import PairSteps, train_on_pairs
from qlora_tune.pair_trainer import build_reward_trainer
from qlora_tune.preferences import PreferencePair, TokenizedPair
from qlora_tune.reward_model import RewardModel, begin_reward_model, read_head
from qlora_tune.runs import Run, write_json
from qlora_tune.scores import Interval, bootstrap_mean

SCORES = "rewards.json"


@dataclass(frozen=True)
class PairReward:
    """The rewards of both answers of a held-out pair, and their lengths with the end of turn [tokens]."""

    source: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


@dataclass(frozen=True)
class RewardScores:
    """Held-out pairs: in how many the chosen answer has the higher reward, and the longer one is the chosen one.

    Reward models like length, so that what one has learned is what it knows beyond `longer`, where answers of one
    length count as half. All with intervals of 95 %.
    """

    pairs: list[PairReward]

    @property
    def accuracy(self) -> Interval:
        return share([pair.chosen > pair.rejected for pair in self.pairs])

    @property
    def longer(self) -> Interval:
        return bootstrap_mean([_won(pair.chosen_tokens, pair.rejected_tokens) for pair in self.pairs])

    @property
    def gain(self) -> Interval:
        """By how much the reward is right more often than length, on the same pairs."""
        return bootstrap_mean(
            [_won(pair.chosen, pair.rejected) - _won(pair.chosen_tokens, pair.rejected_tokens) for pair in self.pairs]
        )

    @property
    def margin(self) -> Interval:
        return bootstrap_mean([pair.chosen - pair.rejected for pair in self.pairs])


@dataclass(frozen=True)
class RewardResult:
    """The trained model, still loaded, how training ended, and the held-out pairs; None without any, or stopped."""

    model: Any
    status: str
    scores: RewardScores | None


def plan_reward(source: Path, data: Sequence[str], flags: Mapping[str, Any]) -> tuple[Origin | None, TrainConfig]:
    """Where to begin, and the settings: a run's or an adapter's, or those of a base (no origin, a fresh adapter).

    Raises RunError or ConfigError.
    """
    origin = None
    if str(source) == BUILTIN:
        before = resolve_config({"preset": BUILTIN}).config
    elif is_model(source) or is_repository(source):
        before = resolve_config({"model_name_or_path": str(source)}).config
    else:
        origin = find_origin(source, flags.get("runs_dir", "runs"))
        before = settings_before(origin)
    values = pair_settings(before, origin.run if origin else None, data) | {"reward_model": True}
    return origin, validate_settings(values | dict(flags), "reward")


def train_reward_model(
    config: TrainConfig,
    run: Run,
    setup: PreferenceSetup,
    origin: Origin | None,
    *,
    resume: bool = False,
    on_metrics: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_stop: Callable[[], None] = lambda: None,
) -> RewardResult:
    """Train a reward model on pairs and leave it in the run's folder, with the held-out pairs scored.

    `on_metrics` gets what train.train gives it, and margin and accuracy of the rewards. Raises RunError as train.train
    does.
    """
    trained, first = setup.trained, run.path / REFERENCE

    def finish(model: Any) -> RewardScores | None:
        save_adapter(model, run, trained.base, trained.tokenizer, trained.quantization, trained.precision)
        if not setup.heldout:
            return None
        head = read_head(run.adapter, model.device)
        rewards = RewardModel(model, "default", head, trained.chat, None)
        scores = score_pair_rewards(rewards, setup.heldout, config.per_device_eval_batch_size)
        figures = {name: getattr(scores, name) for name in ("accuracy", "longer", "gain", "margin")}
        pairs = [asdict(pair) for pair in scores.pairs]
        write_json(run.path / SCORES, {"rows": len(pairs), **figures, "pairs": pairs})
        return scores

    def load() -> Any:
        return begin_reward_model(trained, first if first.exists() else None, config)

    steps = PairSteps(load, build_reward_trainer, finish, fast=False)
    return RewardResult(*train_on_pairs(config, run, setup, origin, steps, resume, on_metrics, on_stop))


def score_pair_rewards(
    model: RewardModel, pairs: Sequence[tuple[PreferencePair, TokenizedPair]], batch_size: int
) -> RewardScores:
    """The rewards of both answers of each pair."""
    both = [(tokens.prompt_ids + tokens.chosen_ids, tokens.prompt_ids + tokens.rejected_ids) for _, tokens in pairs]
    rewards = model.score_tokens([sequence for pair in both for sequence in pair], batch_size)
    return RewardScores(
        [
            PairReward(
                pair.source,
                rewards[tuple(chosen)],
                rewards[tuple(rejected)],
                len(tokens.chosen_ids),
                len(tokens.rejected_ids),
            )
            for (pair, tokens), (chosen, rejected) in zip(pairs, both, strict=True)
        ]
    )


def _won(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)
