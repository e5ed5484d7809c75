"""The terminal face of reward models: one trained on pairs, and how often it is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tune import terminal
from qlora_tune.cli_prefer import PairFiles, Resume, train_pairs, with_progress
from qlora_tune.config import TrainConfig
from qlora_tune.flags import AnyRewardSettings, given_flags
from qlora_tune.runs import Run
from qlora_tune.terminal import console, say

if TYPE_CHECKING:
    from qlora_tune.pair_setup import Origin, PreferenceSetup
    from qlora_tune.reward import RewardScores


def reward(
    source: Path | None = None,
    *,
    data: PairFiles = (),
    resume: Resume = None,
    settings: AnyRewardSettings = None,
) -> None:
    """Train a model that scores answers on preference pairs, from SOURCE: a run, an adapter's folder, or a base."""
    from qlora_tune.reward import plan_reward

    train_pairs("reward", source, data, resume, given_flags(settings), plan_reward, _fit)


def _fit(config: TrainConfig, run: Run, setup: PreferenceSetup, origin: Origin | None, resume: bool) -> None:
    from qlora_tune.reward import train_reward_model

    result = with_progress(train_reward_model, run, resume, config, run, setup, origin)
    if result.scores:
        _show_pairs(result.scores)
    say(
        f"score answers with it:  python -m qlora_tune compare RUN base --reward {run.path}\n"
        f"choose answers by it:   python -m qlora_tune chat RUN --best-of 4 --reward {run.path}"
    )


def _show_pairs(scores: RewardScores) -> None:
    console.rule("held-out pairs", align="left")

    def share(name: str, sign: str = "") -> str:
        mean, low, high = getattr(scores, name)
        return f"{mean:{sign}.1%} ({low:{sign}.1%} to {high:{sign}.1%})"

    mean, low, high = scores.margin
    terminal.show_table(
        [f"{len(scores.pairs)} pairs", "share (95 %)"],
        [
            ["chosen answer has the higher reward", share("accuracy")],
            ["chosen answer is the longer one", share("longer")],
            ["right by the reward more often than by length", share("gain", "+")],
            ["margin of the rewards", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"],
        ],
    )
