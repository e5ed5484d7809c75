"""Preference pairs: read from every usual shape and from votes, each lost row named, split by prompt, written again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_votes import cast

from qlora_tune.errors import DataError
from qlora_tune.preferences import PreferencePair, read_pairs, split_pairs, write_pairs
from qlora_tune.votes import NONE, TIE, append_vote

ASK = {"role": "user", "content": "Which?"}
GOOD, BAD = {"role": "assistant", "content": "This."}, {"role": "assistant", "content": "That."}
SYSTEM = {"role": "system", "content": "Be short."}
EXPECTED = PreferencePair(({"role": "user", "content": "Which?"},), "This.", "That.", "rows.jsonl:1")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(number: int, question: str = "") -> PreferencePair:
    prompt: Any = ({"role": "user", "content": question or f"Question {number} of {number * 7919}?"},)
    return PreferencePair(prompt, f"right {number}", f"wrong {number}", f"rows.jsonl:{number}")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which?", "chosen": "This.", "rejected": "That."},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": "This.", "rejected": "That."},
        {"prompt": "Which?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Which?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"instruction": "Which?", "input": "", "chosen": "This.", "rejected": "That."},
        {"question": "Which?", "chosen": "This.", "rejected": "That."},
        {"question": "Which?", "response_j": "This.", "response_k": "That."},
        {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {
            "conversations": [{"from": "human", "value": "Which?"}],
            "chosen": {"from": "gpt", "value": "This."},
            "rejected": {"from": "gpt", "value": "That."},
        },
    ],
    ids=lambda row: ",".join(row),
)
def test_every_usual_shape_gives_the_same_pair(row: dict[str, Any], tmp_path: Path) -> None:
    pairs, report = read_pairs([write(tmp_path / "rows.jsonl", row)])
    assert pairs == [EXPECTED]
    assert (report.rows_in, report.kept, dict(report.shapes)) == (1, 1, {"preference": 1})


def test_a_system_prompt_and_earlier_turns_stay_in_the_prompt(tmp_path: Path) -> None:
    earlier = [SYSTEM, ASK, GOOD, {"role": "user", "content": "And now?"}]
    rows = [
        {"prompt": earlier, "chosen": [GOOD], "rejected": [BAD]},
        {"system": "Be short.", "question": "Which?", "chosen": "This.", "rejected": "That."},
    ]
    pairs, _ = read_pairs([write(tmp_path / "rows.jsonl", *rows)])
    assert [list(pair.prompt) for pair in pairs] == [earlier, [SYSTEM, ASK]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Which?", "chosen": "This.", "rejected": "This. "}, "both answers are the same"),
        ({"prompt": "Which?", "chosen": "This.", "rejected": " "}, "hold no two answers|is empty"),
        ({"prompt": "Which?", "chosen": "This."}, "hold no two answers"),
        ({"instruction": "Which?", "output": "This."}, "hold no two answers"),
        ({"chosen": "This.", "rejected": "That."}, 'has no prompt before "chosen"'),
        ({"prompt": "Which?", "chosen": 1, "rejected": 2}, '"chosen" is a number, expected text or turns'),
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "Why?"}, BAD]}, "answer different conversations"),
        ({"prompt": "Which?", "chosen": [GOOD, GOOD], "rejected": [BAD]}, "holds 2 turns"),
        ({"prompt": [ASK], "chosen": [{**GOOD, "image": "x.png"}], "rejected": [BAD]}, "not text"),
        (
            {"prompt": [ASK], "chosen": [{"role": "assistant", "tool_calls": [{"name": "f"}]}], "rejected": [BAD]},
            "calls functions",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_row_that_gives_no_pair_is_kept_aside_with_line_and_reason(row: Any, reason: str, tmp_path: Path) -> None:
    import re

    good = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}
    pairs, report = read_pairs([write(tmp_path / "rows.jsonl", good, row)])
    assert (len(pairs), report.rows_in, report.kept, report.rejected) == (1, 2, 1, 1)
    (problem,) = report.problems
    assert (problem.line, problem.original) == (2, row)
    assert re.search(reason, problem.reason)


def test_files_without_any_pair_are_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)No preference pair in .*rows\.jsonl\..*rows\.jsonl:1: .*no two answers"):
        read_pairs([write(tmp_path / "rows.jsonl", {"instruction": "Which?", "output": "This."})])


def test_a_vote_sets_its_winner_against_every_other_answer_and_a_tie_against_none(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    prints = {"a": "1" * 64, "b": "3" * 64, "base": "2" * 32}
    three = {"a": "yes", "b": "maybe", "base": "no"}
    append_vote(path, cast("b", answers=three, fingerprints=prints, task="t"))
    append_vote(path, cast(TIE))
    append_vote(path, cast(NONE))
    append_vote(path, cast("a", "same", answers={"a": "yes", "b": "yes", "base": "no"}, fingerprints=prints))
    append_vote(path, cast("a", "empty", answers={"a": "yes", "base": ""}))
    pairs, report = read_pairs([path])
    found = [(pair.chosen, pair.rejected, pair.source, pair.task) for pair in pairs]
    assert found == [
        ("maybe", "yes", "votes.jsonl:1#1", "t"),
        ("maybe", "no", "votes.jsonl:1#2", "t"),
        ("yes", "no", "votes.jsonl:4#2", None),
    ]
    assert (report.rows_in, report.kept, report.rejected, report.changed) == (5, 2, 3, 1)
    reasons = [f"{problem.line}: {problem.reason}" for problem in report.problems if problem.action == "rejected"]
    assert reasons == [
        "2: is a tie: no answer is better",
        "3: says that no answer is good: none is better",
        "5: the answer of base was left out: turn 2 (assistant) is empty",
    ]


def test_no_prompt_stands_on_both_sides_of_the_split() -> None:
    pairs = [pair(number, f"Say {number // 5} of {number // 5 * 7919}") for number in range(100)]
    train, heldout = split_pairs(pairs, 0.2, 1)
    assert len(train) + len(heldout) == 100
    assert 10 <= len(heldout) <= 30
    assert not {p.prompt[0]["content"] for p in train} & {p.prompt[0]["content"] for p in heldout}
    assert split_pairs(pairs, 0.2, 1) == (train, heldout)
    assert split_pairs(pairs, 0.0, 1) == (pairs, [])


def test_written_pairs_are_read_back_as_they_were(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    learned: Any = ({"role": "system", "content": "é\u2028"}, ASK, {**GOOD, "learn": False}, ASK)
    pairs = [pair(1), PreferencePair(learned, "a\nb", "</s> c", "rows.jsonl:2", "t", (tool,))]
    write_pairs(tmp_path / "rows.jsonl", pairs)
    assert read_pairs([tmp_path / "rows.jsonl"])[0] == pairs


def test_the_votes_of_a_run_are_written_as_pairs_by_a_command(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_tune.cli import main

    run = finished[0]
    assert main(["votes", str(tmp_path / "none"), "--output", str(tmp_path / "pairs.jsonl")]) == 2
    assert main(["votes", str(run.path), "--output", str(tmp_path / "pairs.jsonl")]) == 2
    assert "no votes yet" in " ".join(capsys.readouterr().err.split())
    votes = tmp_path / "votes.jsonl"
    append_vote(votes, cast("a"))
    append_vote(votes, cast(TIE))
    assert main(["votes", str(votes), "--output", str(tmp_path / "pairs.jsonl")]) == 0
    assert "1 pairs of 1 votes" in capsys.readouterr().out
    row = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert [row[name][0]["content"] for name in ("prompt", "chosen", "rejected")] == ["q", "yes", "no"]


def test_real_preference_files_are_read_and_every_row_is_accounted_for(shared_data: Path) -> None:
    pairs, report = read_pairs([shared_data / "preference" / "dpo_en_demo.json"])
    assert (report.rows_in, report.kept + report.rejected) == (300, 300)
    assert len(pairs) == report.kept > 290
    others, report = read_pairs([shared_data / "preference" / "stack_exchange_paired_tiny.json"])
    assert len(others) == report.kept == 25


def test_pairs_can_be_read_without_torch() -> None:
    code = "import sys, qlora_tune.preferences; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
