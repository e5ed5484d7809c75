"""Scores: what counts as equal, and base against tuned on the same rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.errors import RunError
from qlora_tune.evaluate import (
    Answered,
    Comparison,
    is_exact_match,
    pick_answers,
    read_comparison,
    score_table,
    to_markdown,
    write_comparison,
)
from qlora_tune.runs import Run


def answered(task: str, reference: str, base: str, tuned: str, prompt: str = "q") -> Answered:
    return Answered("d.jsonl:1", task, ({"role": "user", "content": prompt},), reference, base, tuned)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        (" Paris\n", "Paris", True),
        ("- a\n- b", "- a - b", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("PARIS", "Paris", False),
        ("Paris.", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_exact_match_ignores_composition_and_spacing_but_not_case(answer: str, reference: str, equal: bool) -> None:
    assert is_exact_match(answer, reference) is equal


def test_scores_are_counted_by_task_and_in_all() -> None:
    comparison = Comparison(
        [
            answered("b", "x", "x", "x"),
            answered("a", "x", "no", "x"),
            answered("a", "y", "no", "no"),
        ]
    )
    scores = [(score.task, score.rows, score.base, score.tuned) for score in comparison.by_task()]
    assert scores == [("a", 2, 0, 1), ("b", 1, 1, 1)]
    assert (comparison.total().rows, comparison.total().base, comparison.total().tuned) == (3, 1, 2)
    assert "| all | 3 | 33.3% | 66.7% |" in score_table([*comparison.by_task(), comparison.total()])


def test_markdown_holds_answers_as_text_that_can_not_act() -> None:
    hostile = "a|b\n<script>alert(1)</script> ![x](http://example.org/?q=secret)"
    text = to_markdown(Comparison([answered("t", "r", hostile, "t", prompt=hostile)]))
    row = next(line for line in text.splitlines() if line.startswith("| d.jsonl"))
    assert "<script>" not in row
    assert "![" not in row
    assert row.count(" | ") == 5


def test_a_run_keeps_all_answers_of_base_and_tuned(finished: Any) -> None:
    run, _, result = finished
    scores = json.loads((run.path / "scores.json").read_text())
    assert scores["rows"] == len(scores["answers"]) == 50
    assert sum(row["rows"] for row in scores["by_task"]) == 50
    sources = {example.source for example in result.setup.data.heldout_examples}
    assert {answer["source"] for answer in scores["answers"]} <= sources
    assert any(answer["base"] != answer["tuned"] for answer in scores["answers"])
    assert (run.path / "comparison.md").read_text().count("| sample_heldout.jsonl:") == 50


def test_the_disabled_adapter_is_the_base_to_the_last_bit(builtin: Any, finished: Any) -> None:
    import torch

    from qlora_tune.model import Quantization, load_base

    _, _, result = finished
    setup = result.setup
    plain = load_base(builtin[0], setup.device, setup.precision, Quantization()).eval()
    ids = torch.tensor([setup.data.heldout[0].input_ids])
    result.model.eval()
    with torch.inference_mode():
        with result.model.disable_adapter():
            disabled = result.model(ids).logits
        assert torch.equal(disabled, plain(ids).logits)
        assert not torch.equal(disabled, result.model(ids).logits)


def reached(*pairs: tuple[str, str], reference: str = "abcdefgh") -> Comparison:
    """Answers of base and tuned model to one reference, named by their place."""
    rows = [Answered(f"d.jsonl:{n}", "t", (), reference, base, tuned) for n, (base, tuned) in enumerate(pairs, 1)]
    return Comparison(rows)


def places(answers: list[Answered]) -> list[int]:
    return [int(answer.source.rpartition(":")[2]) for answer in answers]


def test_best_answers_are_the_nearest_and_worst_the_farthest() -> None:
    comparison = reached(("", "abcdxxxx"), ("", "zzzz"), ("", "abcdefgh"), ("", "abcdefgx"))
    assert places(pick_answers(comparison, "best", 4)) == [3, 4, 1, 2]
    assert places(pick_answers(comparison, "worst", 4)) == [2, 1, 4, 3]
    assert places(pick_answers(comparison, "best", 1)) == [3]
    assert len(pick_answers(comparison, "worst", 99)) == 4


def test_among_equal_answers_those_show_most_whose_base_tells_most() -> None:
    right = reached(("abcdefgh", "abcdefgh"), ("zz", "abcdefgh"), ("abcd", "abcdefgh"))
    assert places(pick_answers(right, "best", 3)) == [2, 3, 1]  # the base got it more wrong
    wrong = reached(("zz", "zz"), ("abcdefgh", "zz"), ("abcd", "zz"))
    assert places(pick_answers(wrong, "worst", 3)) == [2, 3, 1]  # the base had it right


def test_nearness_ignores_what_scoring_ignores() -> None:
    comparison = reached(("", "caf\u00e9  au\nlait"), ("", "cafe\u0301 au lai"), reference="cafe\u0301 au lait")
    assert places(pick_answers(comparison, "best", 1)) == [1]
    assert is_exact_match(pick_answers(comparison, "best", 1)[0].tuned, "cafe\u0301 au lait")


def test_random_answers_are_drawn_by_seed_without_repeats() -> None:
    comparison = reached(*[("", str(number)) for number in range(30)])
    drawn = pick_answers(comparison, "random", 10, seed=1)
    assert drawn == pick_answers(comparison, "random", 10, seed=1) != pick_answers(comparison, "random", 10, seed=2)
    assert len(set(places(drawn))) == 10
    assert sorted(places(pick_answers(comparison, "random", 99))) == list(range(1, 31))


@pytest.mark.parametrize("which", ["best", "worst", "random"])
def test_no_answers_and_empty_answers_can_be_picked_from(which: Any) -> None:
    assert pick_answers(Comparison([]), which, 5) == []
    assert len(pick_answers(reached(("", ""), reference=""), which, 5)) == 1


def kept_run(finished: Any, tmp_path: Path) -> Run:
    shutil.copytree(finished[0].path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def test_a_kept_comparison_is_read_back_as_it_was(finished: Any, tmp_path: Path) -> None:
    run = kept_run(finished, tmp_path)
    comparison = read_comparison(run)
    assert len(comparison.answers) == 50
    assert to_markdown(comparison) == (run.path / "comparison.md").read_text()
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1, None]}}]}
    odd = Comparison([Answered("d:1", "t|\u2028", ({"role": "user", "content": "\x00\u00e9\n"}, call), "r", "", "é")])
    write_comparison(run, odd, "other")
    assert read_comparison(run, "other") == odd
    assert read_comparison(run) == comparison


def test_a_run_without_scores_says_how_to_get_them(finished: Any, tmp_path: Path) -> None:
    run = kept_run(finished, tmp_path)
    (run.path / "scores.json").unlink()
    with pytest.raises(RunError, match=r"copy was not scored.*evaluate"):
        read_comparison(run)
    with pytest.raises(RunError, match="was not scored"):
        read_comparison(run, "unseen")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"answers": [{"sou', "can't be read"),
        ("[]", "holds no JSON object"),
        ('{"answers": [{"source": "d:1"}]}', "another form"),
        ('{"answers": [{"source": "d", "task": "t", "prompt": [], "reference": "", "base": "", "new": 1}]}', "another"),
        ('{"answers": [1]}', "another form"),
        ('{"answers": 7}', "another form"),
        ('{"answers": null}', "another form"),
    ],
)
def test_damaged_scores_are_a_problem_told_not_a_crash(
    content: str, message: str, finished: Any, tmp_path: Path
) -> None:
    run = kept_run(finished, tmp_path)
    (run.path / "scores.json").write_text(content)
    with pytest.raises(RunError, match=message):
        read_comparison(run)
