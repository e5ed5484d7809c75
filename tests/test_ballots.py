"""Votes on a chat's answers: the same lines as compare --vote writes, one for a pair of answers, and trained on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.answer_files import Answers, Question
from qlora_tune.ballots import count_votes, draw_ballot, launch_on_votes, votes_file, why_no_vote
from qlora_tune.base import find_base
from qlora_tune.card import write_model_card
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.launch import OUTPUT_FILE, delete_run, discard_run, launch_resume, request_stop
from qlora_tune.preferences import read_kept_pairs, read_pairs
from qlora_tune.runs import Run
from qlora_tune.side_by_side import open_panel
from qlora_tune.votes import NONE, TIE, read_votes

VOICES = ("base", "tuned")
FLAGS: dict[str, Any] = {"heldout_share": 0, "score_rows": 0}


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Run:
    """A copy of the finished run."""
    copy = Run(Path(shutil.copytree(finished[0].path, tmp_path / "short")))
    copy.update_state(pid=None)
    return copy


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def cast(run: Run, number: int, choice: str = "A") -> None:
    assert draw_ballot(run, VOICES, user(f"Say {number}."), blind=False).fill([f"{number}.", "no"]).cast(choice)


def test_a_vote_in_a_chat_is_the_line_that_compare_writes(run: Run, tmp_path: Path) -> None:
    row = run.read_heldout()[3]
    ballot = draw_ballot(run, ("tuned", "base"), row.messages[:-1], blind=True).fill(["yes", "no"])
    assert ballot.cast("B")
    (vote,) = read_votes(votes_file(run))
    panel = open_panel([str(run.path), "base"], str(tmp_path), None, tmp_path)
    assert (vote.fingerprints, vote.base) == (panel.fingerprints, panel.base)
    assert vote.answers == {"short": "yes", "base": "no"}
    assert (vote.task, vote.source, vote.prompt) == (row.task, row.source, row.messages[:-1])
    question = Question(vote.prompt, (), None, None, "")
    assert vote.winner == Answers(question, vote.answers).letter(vote.seed)["B"], "the seed says who was who"
    assert time.time() - 60 < vote.time <= time.time()


def test_a_blind_vote_draws_the_sides_and_an_open_one_does_not(run: Run) -> None:
    open_ones = [draw_ballot(run, VOICES, user("Hi"), blind=False) for _ in range(20)]
    assert {tuple(ballot.letters.values()) for ballot in open_ones} == {("base", "short")}
    blind_ones = [draw_ballot(run, VOICES, user("Hi"), blind=True) for _ in range(40)]
    drawn = {tuple(ballot.letters.values()): ballot for ballot in blind_ones}
    assert drawn.keys() == {("base", "short"), ("short", "base")}
    for names, ballot in drawn.items():
        assert ballot.arrange(["base", "short"]) == list(names)
        assert ballot.arrange(ballot.arrange([1, 2])) == [1, 2]


def test_the_same_answers_take_one_vote(run: Run) -> None:
    ballot = draw_ballot(run, VOICES, user("Hi"), blind=True).fill(["a", "b"])
    assert ballot.cast(TIE)
    assert not ballot.cast("A")
    assert not draw_ballot(run, VOICES, user("Hi"), blind=False).fill(["a", "b"]).cast("A")
    assert draw_ballot(run, VOICES, user("Hi"), blind=False).fill(["a", "c"]).cast("A")
    assert draw_ballot(run, VOICES, user("Ho"), blind=False).fill(["a", "b"]).cast(NONE)
    assert count_votes(run) == (3, 1)


def test_where_nobody_can_vote_it_is_said_why(run: Run) -> None:
    same: list[Any] = [user("a"), user("a")]
    assert why_no_vote(run, VOICES, same) == ""
    assert "came as a zip" in why_no_vote(None, VOICES, same)
    assert "base against tuned" in why_no_vote(run, ("base", "off"), same)
    assert "base against tuned" in why_no_vote(run, ("tuned", "tuned"), same)
    assert "Clear, then ask" in why_no_vote(run, VOICES, [user("a"), user("b")])
    assert "Rename the run" in why_no_vote(replace(run, path=run.path.with_name("tie")), VOICES, same)


def test_too_few_votes_start_nothing_and_say_so(run: Run, tmp_path: Path) -> None:
    flags = {**FLAGS, "runs_dir": str(tmp_path)}
    with pytest.raises(DataError, match="too few votes.* 0 of 0"):
        launch_on_votes(run, flags)
    cast(run, 1, TIE)
    with pytest.raises(DataError, match="too few votes to train on. 1 of 1 name no better answer"):
        launch_on_votes(run, flags)
    cast(run, 2)
    with pytest.raises(ConfigError, match="beta"):
        launch_on_votes(run, {**flags, "beta": 0})
    assert [path.name for path in tmp_path.glob("*/state.json")] == ["state.json"]


def wait_for(condition: Callable[[], Any], run: Run) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, (run.path / OUTPUT_FILE).read_text()[-2000:]
        time.sleep(0.1)


def test_training_on_votes_runs_by_itself_goes_on_after_a_stop_and_is_voted_on_again(run: Run, tmp_path: Path) -> None:
    for number in range(6):
        cast(run, number)
    flags = {**FLAGS, "runs_dir": str(tmp_path), "num_train_epochs": 2}
    liked = launch_on_votes(run, {**flags, "run_name": "liked"})
    try:
        request_stop(liked)  # before it has begun
        wait_for(lambda: not liked.is_alive(), liked)
        assert liked.read_state()["status"] == "interrupted"
        cast(run, 6)  # it goes on with the votes that it began with
        launch_resume(liked, "cpu")
        wait_for(lambda: not liked.is_alive(), liked)
        assert liked.read_state()["status"] == "finished", (liked.path / OUTPUT_FILE).read_text()[-2000:]
    finally:
        if liked.is_alive():
            discard_run(liked)
    assert (len(read_kept_pairs(liked.path)[0]), liked.stage) == (6, "prefer")
    assert "began with | the adapter of short |" in write_model_card(liked, find_base("builtin"), [2])
    cast(liked, 7)
    again = launch_on_votes(liked, {**flags, "run_name": "again"})
    try:
        assert again.read_state()["began_with"] == str(run.path), "pairs are held against one reference"
        pairs, _ = read_pairs(again.read_config().preference_data)
        assert [pair.chosen for pair in pairs] == [*(f"{number}." for number in range(6)), "7."]
    finally:
        discard_run(again)
    copies = [Path(file) for file in liked.read_config().preference_data]
    assert [copy.exists() for copy in copies] == [True]
    delete_run(liked)
    assert [copy.exists() for copy in copies] == [False], "the copy of the votes goes with its run"
    assert count_votes(run) == (7, 7)
