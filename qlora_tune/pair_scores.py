"""What preference training changed: held-out pairs before and after, and the answers to the instructions of before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_tune.chat_format import IGNORED
from qlora_tune.comparison import Answered, read_comparison
from qlora_tune.likelihood import PackedSequence, pack_sequence, score_sequences
from qlora_tune.preferences import PreferencePair, TokenizedPair
from qlora_tune.runs import Run, write_json
from qlora_tune.scores import Interval, bootstrap_mean, is_exact_match
from qlora_tune.votes import key_prompt, wilson_interval

SCORES = "preferences.json"


@dataclass(frozen=True)
class PairScore:
    """Log-likelihoods [nats] of both answers of a held-out pair, end of turn included, before training and after."""

    source: str
    chosen_before: float
    rejected_before: float
    chosen_after: float
    rejected_after: float

    @property
    def gain(self) -> float:
        """How much more likely the chosen answer has become than the rejected one [nats]."""
        return (self.chosen_after - self.chosen_before) - (self.rejected_after - self.rejected_before)


@dataclass(frozen=True)
class PairScores:
    """Held-out pairs. An answer's implicit reward is beta times the gain of its log-likelihood over the reference.

    `accuracy` is the share of pairs whose chosen answer has the higher reward, and `margin` the mean difference of
    both rewards; before training every reward is 0. `likelier_before` and `likelier_after` are the shares of pairs
    whose chosen answer is the likelier one, which favours short answers. All with intervals of 95 %.
    """

    beta: float
    pairs: list[PairScore]

    @property
    def accuracy(self) -> Interval:
        return share([pair.gain > 0 for pair in self.pairs])

    @property
    def margin(self) -> Interval:
        return bootstrap_mean([self.beta * pair.gain for pair in self.pairs])

    @property
    def likelier_before(self) -> Interval:
        return share([pair.chosen_before > pair.rejected_before for pair in self.pairs])

    @property
    def likelier_after(self) -> Interval:
        return share([pair.chosen_after > pair.rejected_after for pair in self.pairs])


def score_pairs(
    model: Any, pairs: Sequence[tuple[PreferencePair, TokenizedPair]], beta: float, batch_size: int
) -> PairScores:
    """Score both answers of each pair by the reference (adapter "ref") and by what was trained ("default")."""

    def pack(prompt: list[int], answer: list[int]) -> PackedSequence:
        return pack_sequence([*prompt, *answer], [IGNORED] * len(prompt) + answer)

    packed = [(pack(p.prompt_ids, p.chosen_ids), pack(p.prompt_ids, p.rejected_ids)) for _, p in pairs]
    each = list(dict.fromkeys(sequence for both in packed for sequence in both))
    nll = {}
    try:
        for name in ("ref", "default"):
            model.set_adapter(name)
            nll[name] = score_sequences(model, each, batch_size)
    finally:
        model.set_adapter("default")
    return PairScores(
        beta,
        [
            PairScore(
                pair.source,
                -nll["ref"][chosen],
                -nll["ref"][rejected],
                -nll["default"][chosen],
                -nll["default"][rejected],
            )
            for (pair, _), (chosen, rejected) in zip(pairs, packed, strict=True)
        ],
    )


def write_scores(run: Run, scores: PairScores) -> None:
    """Keep the scores of held-out pairs in preferences.json."""
    figures = {name: getattr(scores, name) for name in ("accuracy", "margin", "likelier_before", "likelier_after")}
    pairs = [asdict(pair) for pair in scores.pairs]
    write_json(run.path / SCORES, {"beta": scores.beta, "rows": len(pairs), **figures, "pairs": pairs})


def measure_damage(origin: Run, run: Run) -> tuple[Interval, int] | None:
    """The change of exact match on rows that both runs have scored, and how many those are; None without any.

    Preference training minus instruction tuning, row by row.
    """
    if not all((each.path / "scores.json").exists() for each in (origin, run)):
        return None
    before, after = ({_key(a): _is_right(a) for a in read_comparison(each).answers} for each in (origin, run))
    changes = [float(right) - float(before[key]) for key, right in after.items() if key in before]
    return (bootstrap_mean(changes), len(changes)) if changes else None


def _key(answer: Answered) -> tuple[str, str]:
    return key_prompt(answer.prompt), answer.reference


def _is_right(answer: Answered) -> bool:
    return is_exact_match(answer.tuned, answer.reference)


def share(found: Sequence[bool]) -> Interval:
    """The share of what holds, with its interval of 95 %."""
    return wilson_interval(sum(found), len(found))
