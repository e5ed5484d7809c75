"""Votes on answers side by side: kept one line each, read back, counted.

A vote names its answerers and holds their answers, so that preferences can be trained from the file alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from qlora_tune.errors import DataError
from qlora_tune.json_stream import decode_line
from qlora_tune.row_files import append_rows, to_turn
from qlora_tune.scores import Interval
from qlora_tune.turns import Message, RowError, read_tools, read_turns, type_name

TIE, NONE = "tie", "none"  # winners that are no answerer
_FIELDS: dict[str, Any] = {
    "answers": dict,
    "winner": str,
    "source": str,
    "task": str | None,
    "blind": bool,
    "seed": int,
    "time": int | float,
    "fingerprints": dict,
    "base": str | None,
}


@dataclass(frozen=True)
class Vote:
    """One vote: the prompt, the answers by answerer, and the winner's name, "tie", or "none" (none is good).

    `fingerprints` tell the answerers apart, whatever they are called: sha256 of adapter_model.safetensors or of the
    file of answers (with #ANSWERER where one of several in it is meant), the base's own for "base". `base` is the
    fingerprint of the adapters' base; None where only files answered. `time` is Unix time [s].
    """

    prompt: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    task: str | None
    source: str
    answers: dict[str, str]
    winner: str
    blind: bool
    seed: int
    time: float
    fingerprints: dict[str, str]
    base: str | None

    @property
    def key(self) -> str:
        """What it was asked on: the prompt's key."""
        return key_prompt(self.prompt, self.tools)


@dataclass(frozen=True)
class Tally:
    """Votes by what they say; shares are of the decided ones, which name a winner."""

    wins: dict[str, int]
    ties: int
    none: int

    @property
    def decided(self) -> int:
        return sum(self.wins.values())

    def share(self, name: str) -> Interval:
        """An answerer's share of the decided votes, with its interval. There must be one at least."""
        return wilson_interval(self.wins[name], self.decided)


def key_prompt(prompt: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """What makes two prompts the same: every turn and every function that is offered, to the letter."""
    turns = [{name: value for name, value in turn.items() if name != "learn"} for turn in prompt]
    return json.dumps([turns, list(tools)], sort_keys=True, default=str)


def append_vote(path: Path, vote: Vote, *, once: bool = False) -> bool:
    """Put a vote behind those of a file, on the disk before this returns: a kill costs the line being written at most.

    What such a kill left of a line is taken out. With `once` the same answers take one vote: where they have one,
    the file stays as it is, and False is returned.
    """
    row = {**asdict(vote), "prompt": [to_turn(turn) for turn in vote.prompt]}

    def is_done() -> bool:
        return once and any(_same_answers(vote, other) for other in read_votes(path))

    return append_rows(path, [row], _is_vote, is_done)


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file, none where there is no file. A torn last line is passed over.

    Raises DataError with the line's number for any other line that is no vote.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    votes = []
    for number, line in enumerate(lines, start=1):
        try:
            votes += [_read_line(line)] if line.strip() else []
        except RowError as error:
            raise DataError(
                f"{path}:{number}: is no vote: {error}. Mend or delete the line, or name another file with --votes."
            ) from None
    return [*votes, _read_line(last)] if _is_vote(last) else votes


def same_answerers(votes: Sequence[Vote], fingerprints: Mapping[str, str]) -> list[Vote]:
    """The votes on these very answerers, by their fingerprints."""
    wanted = set(fingerprints.values())
    return [vote for vote in votes if set(vote.fingerprints.values()) == wanted]


def count_votes(votes: Sequence[Vote], fingerprints: Mapping[str, str]) -> Tally:
    """Count the votes on these answerers, under the names that they have now."""
    names = {fingerprint: name for name, fingerprint in fingerprints.items()}
    found = Counter(
        names[vote.fingerprints[vote.winner]] if vote.winner in vote.fingerprints else vote.winner
        for vote in same_answerers(votes, fingerprints)
    )
    return Tally({name: found[name] for name in fingerprints}, found[TIE], found[NONE])


def wilson_interval(wins: int, decided: int) -> Interval:
    """The share of wins, and the 95 % score interval of Wilson (1927), which holds for few votes and extreme shares."""
    z = NormalDist().inv_cdf(0.975)
    share, weight = wins / decided, z * z / decided
    middle = (share + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * (share * (1 - share) / decided + weight / (4 * decided)) ** 0.5
    return Interval(share, max(0.0, middle - reach), min(1.0, middle + reach))


def _same_answers(one: Vote, other: Vote) -> bool:
    return (one.key, one.answers, one.fingerprints) == (other.key, other.answers, other.fingerprints)


def _is_vote(line: bytes) -> bool:
    try:
        _read_line(line)
    except RowError:
        return False
    return True


def _read_line(line: bytes) -> Vote:
    """Read one line. Raises RowError saying what is wrong with it."""
    value, problem = decode_line(line)
    if problem:
        raise RowError(problem)
    if not isinstance(value, dict):
        raise RowError(f"is {type_name(value)}, expected an object")
    return to_vote(value)


def to_vote(fields: Mapping[str, Any]) -> Vote:
    """The vote that a row holds. Raises RowError saying what is wrong with it."""
    for name, kind in _FIELDS.items():
        if name not in fields:
            raise RowError(f'"{name}" is missing')
        if not isinstance(fields[name], kind):
            raise RowError(f'"{name}" is {type_name(fields[name])}')
    texts = [*fields["answers"].values(), *fields["fingerprints"].values()]
    if fields["answers"].keys() != fields["fingerprints"].keys() or not all(isinstance(text, str) for text in texts):
        raise RowError('"answers" and "fingerprints" must hold a text for each answerer')
    if fields["winner"] not in (*fields["answers"], TIE, NONE):
        raise RowError(f'the winner "{fields["winner"]}" is none of the answerers')
    prompt = tuple(read_turns(fields.get("prompt"), "prompt", []))
    return Vote(prompt=prompt, tools=read_tools(dict(fields)), **{name: fields[name] for name in _FIELDS})
