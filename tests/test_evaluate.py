"""Scores: what counts as equal, and base against tuned on the same rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_tune.evaluate import Answered, Comparison, is_exact_match, score_table, to_markdown


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
