"""Votes on a chat's answers: base against tuned model on one prompt, blind on request; and training on them.

A vote is the line that compare --vote writes, in the file of the adapter's run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tune import launch
from qlora_tune.adapter_record import read_adapter_record
from qlora_tune.answer_files import Answers, Question
from qlora_tune.disk import hash_file
from qlora_tune.errors import DataError
from qlora_tune.model import detect_device
from qlora_tune.pair_setup import Origin, find_origin
from qlora_tune.prefer import make_settings
from qlora_tune.preferences import read_pairs
from qlora_tune.runs import Run
from qlora_tune.side_by_side import BASE
from qlora_tune.turns import Message
from qlora_tune.votes import NONE, TIE, Vote, append_vote, key_prompt, read_votes


@dataclass(frozen=True)
class Ballot:
    """Two answers to one prompt before somebody votes on them. `vote` lacks its winner and time, at first the answers.

    `letters` are the answerers' names by side, A and B; where the vote is blind its seed draws them.
    """

    file: Path
    vote: Vote
    letters: dict[str, str]

    def arrange(self, pair: Sequence[Any]) -> list[Any]:
        """What belongs to both answerers, in the order of the sides; and back again."""
        return list(pair if list(self.letters.values()) == list(self.vote.answers) else reversed(pair))

    def fill(self, texts: Sequence[str]) -> Ballot:
        """The ballot with its answers, in the order in which the voices were named."""
        return replace(self, vote=replace(self.vote, answers=dict(zip(self.vote.answers, texts, strict=True))))

    def cast(self, choice: str) -> bool:
        """Keep a vote for side A or B, TIE or NONE; False where these answers have theirs already."""
        vote = replace(self.vote, winner=self.letters.get(choice, choice), time=time.time())
        return append_vote(self.file, vote, once=True)


def votes_file(run: Run) -> Path:
    """Where a run's votes are kept."""
    return run.path / "votes.jsonl"


def why_no_vote(run: Run | None, voices: Sequence[str], histories: Sequence[Sequence[Message]]) -> str:
    """Why nobody can vote on what these voices answer, in words; empty where one can."""
    if run is None:
        return "No votes here: they are kept in a run's folder, and this adapter came as a zip."
    if run.name in (BASE, TIE, NONE):
        return f'No votes here: "{run.name}" says something else in a vote. Rename the run.'
    if set(voices) != {"base", "tuned"}:
        return "Votes are on base against tuned: choose one for each side."
    if histories[0] != histories[1]:
        return "Votes are on answers to the same prompt, and the sides have said different things. Clear, then ask."
    return ""


def draw_ballot(run: Run, voices: Sequence[str], prompt: Sequence[Message], blind: bool) -> Ballot:
    """The ballot on what two voices, base and tuned, are about to answer; a blind one draws their sides.

    A prompt that is a held-out row's has its task and source. Raises ModelError where the run's adapter is none.
    """
    names = {"base": BASE, "tuned": run.name}
    prints = {
        "base": str(read_adapter_record(run.adapter)["base_fingerprint"]),
        "tuned": hash_file(run.adapter / "adapter_model.safetensors"),
    }
    rows = {key_prompt(row.messages[:-1], row.tools): row for row in run.read_heldout()}
    row, seed = rows.get(key_prompt(prompt)), random.randrange(1 << 31)
    vote = Vote(
        prompt=tuple(prompt),
        tools=(),
        task=row.task if row else None,
        source=row.source if row else "chat",
        answers={names[voice]: "" for voice in voices},
        winner=NONE,
        blind=blind,
        seed=seed,
        time=0,
        fingerprints={names[voice]: prints[voice] for voice in voices},
        base=prints["base"],
    )
    question = Question(vote.prompt, (), None, vote.task, vote.source)
    return Ballot(votes_file(run), vote, Answers(question, vote.answers).letter(seed if blind else None))


def count_votes(run: Run) -> tuple[int, int]:
    """How many votes a run has, and how many of them say which answer is better. Raises DataError."""
    votes = read_votes(votes_file(run))
    return len(votes), sum(vote.winner not in (TIE, NONE) for vote in votes)


def find_beginning(run: Run) -> tuple[Origin, list[str]]:
    """What to train on a run's votes begins with, and the preference files that come before them.

    Of a run that is trained on preferences already these are its own: all pairs are held against one reference.
    Raises RunError.
    """
    earlier = run.read_config().preference_data
    start = Path(run.read_state()["began_with"]) if earlier else run.path
    return find_origin(start, ""), earlier


def launch_on_votes(run: Run, flags: Mapping[str, Any]) -> Run:
    """Train on a copy of a run's votes, with those before them, in a process of its own (launch.launch_run).

    A copy, because a run that is stopped goes on with the votes that it began with, whatever is voted meanwhile.
    Raises DataError where no vote makes a pair, and as launch_run does.
    """
    origin, earlier = find_beginning(run)
    votes, decided = count_votes(run)
    if not decided:
        raise DataError(
            f"{run.name}: too few votes to train on. {votes} of {votes} name no better answer; one at least must. "
            "Vote on answers side by side, above."
        )
    read_pairs([votes_file(run)])
    kind = detect_device().kind
    launch.refuse_busy_device(kind)
    copy = launch.keep_upload(votes_file(run), flags["runs_dir"])
    return launch.launch_run(make_settings(origin, [*earlier, str(copy)], flags), kind, origin.place)
