"""Votes: kept at once and line by line, read back whatever was torn off, counted with their interval."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.errors import DataError
from qlora_tune.votes import NONE, TIE, Vote, append_vote, count_votes, key_prompt, read_votes, wilson_interval

PRINTS = {"a": "1" * 64, "base": "2" * 32}


def cast(winner: str, question: str = "q", **changes: Any) -> Vote:
    vote = Vote(
        prompt=({"role": "user", "content": question},),
        tools=(),
        task=None,
        source="d.jsonl:1",
        answers={"a": "yes", "base": "no"},
        winner=winner,
        blind=True,
        seed=42,
        time=1.5,
        fingerprints=PRINTS,
        base="2" * 32,
    )
    return replace(vote, **changes)


def test_a_vote_is_read_back_as_it_was(tmp_path: Path) -> None:
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1, None]}}]}
    result: Any = {"role": "tool", "content": "\x00é\u2028\n"}
    context: Any = {"role": "assistant", "content": "not learned", "learn": False}
    tool = {"type": "function", "function": {"name": "f"}}
    turns = (*cast("a").prompt, call, result, context, *cast("a").prompt)
    votes = [cast("a"), cast(TIE, prompt=turns, tools=(tool,), task="t|\n"), cast(NONE, base=None, blind=False)]
    for vote in votes:
        append_vote(tmp_path / "votes.jsonl", vote)
    assert read_votes(tmp_path / "votes.jsonl") == votes
    assert read_votes(tmp_path / "nowhere.jsonl") == []
    assert votes[1].key == key_prompt(turns, (tool,)) != votes[0].key
    learned: Any = {"role": "assistant", "content": "not learned"}
    assert key_prompt([context]) == key_prompt([learned])  # whether it is learned is no part of what is asked


def test_wherever_the_last_line_is_torn_the_votes_before_it_count_and_voting_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    append_vote(path, cast("a", "one"))
    first = path.stat().st_size
    append_vote(path, cast("base", "twö"))
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        kept = [cast("a", "one")] * (end >= first - 1) + [cast("base", "twö")] * (end == len(whole) - 1)
        assert read_votes(path) == kept
        append_vote(path, cast(TIE, "three"))
        assert read_votes(path) == [*kept, cast(TIE, "three")]


def test_a_killed_process_loses_no_vote_that_it_had_given(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_votes import cast; from qlora_tune.votes import append_vote\n"
        "for number in range(10**9):\n"
        "    append_vote(Path(sys.argv[1]), cast('a', f'{number} ' * 2000)); print(number, flush=True)"
    )
    path = tmp_path / "votes.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        assert process.stdout
        told = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        told += map(int, process.stdout)
    votes = read_votes(path)
    assert len(votes) >= len(told)
    assert [vote.key for vote in votes] == [cast("a", f"{n} " * 2000).key for n in range(len(votes))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("torn", "not valid JSON"),
        ([1], "is a list, expected an object"),
        ({"winner": "other"}, 'the winner "other" is none of the answerers'),
        ({"winner": None}, '"winner" is null'),
        ({"answers": {"a": "yes"}}, "a text for each answerer"),
        ({"answers": {"a": 1, "base": "no"}}, "a text for each answerer"),
        ({"prompt": []}, '"prompt" is empty'),
        ({"fingerprints": None}, '"fingerprints" is null'),
    ],
)
def test_a_line_that_is_no_vote_is_named_unless_it_is_the_torn_last_one(
    change: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "votes.jsonl"
    append_vote(path, cast("a"))
    good = path.read_text()
    line = '{"prompt": [' if change == "torn" else json.dumps(json.loads(good) | change if change != [1] else change)
    path.write_text(f"{good}\n{line}\n{good}")
    with pytest.raises(DataError, match=rf"votes.jsonl:3: is no vote: .*{message}"):
        read_votes(path)
    path.write_text(good + line)
    assert len(read_votes(path)) == 1


def test_votes_are_counted_by_who_answered_whatever_they_were_called() -> None:
    renamed = {"older": PRINTS["a"], "base": PRINTS["base"]}
    before = cast("older", answers={"older": "yes", "base": "no"}, fingerprints=renamed)
    others = [cast(winner, fingerprints=PRINTS | {"a": "3" * 64}) for winner in ("a", "base", TIE, NONE)]
    tally = count_votes([cast("a"), before, cast("base"), cast(TIE), cast(NONE), cast(NONE), *others], PRINTS)
    assert (tally.wins, tally.ties, tally.none, tally.decided) == ({"a": 2, "base": 1}, 1, 2, 3)
    assert tally.share("a") == wilson_interval(2, 3)


@pytest.mark.parametrize(("wins", "decided"), [(0, 1), (1, 1), (2, 3), (0, 20), (13, 20), (999, 1000)])
def test_the_interval_of_a_share_is_that_of_scipy(wins: int, decided: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(wins, decided).proportion_ci(method="wilson")
    found = wilson_interval(wins, decided)
    assert found == pytest.approx((wins / decided, expected.low, expected.high), abs=1e-12)


def test_votes_can_be_read_without_torch() -> None:
    code = "import sys, qlora_tune.votes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
