"""Scores: what counts as equal, and base against tuned on the same rows."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from qlora_tune.comparison import (
    Answered,
    Comparison,
    pick_answers,
    read_comparison,
    score_table,
    to_markdown,
    write_comparison,
)
from qlora_tune.contracts import make_contracts
from qlora_tune.errors import RunError
from qlora_tune.evaluate import compare
from qlora_tune.runs import Run
from qlora_tune.scores import is_exact_match


def answered(task: str, reference: str, base: str, tuned: str, prompt: str = "q") -> Answered:
    return Answered("d.jsonl:1", task, ({"role": "user", "content": prompt},), reference, base, tuned)


def test_scores_are_counted_by_task_and_in_all() -> None:
    comparison = Comparison(
        [
            answered("b", "x", "x", "x"),
            answered("a", "x", "no", "x"),
            answered("a", "y", "no", "no"),
        ]
    )
    total = comparison.total()
    found = [(s.task, s.rows, s.base["exact_match"], s.tuned["exact_match"]) for s in comparison.by_task()]
    assert found == [("a", 2, 0.0, 0.5), ("b", 1, 1.0, 1.0)]
    assert (total.rows, total.base["exact_match"], total.tuned["exact_match"]) == pytest.approx((3, 1 / 3, 2 / 3))
    assert total.change["exact_match"] == pytest.approx((1 / 3, 0.0, 1.0))
    assert "| all | 3 | 33.3 % | 66.7 % | +33.3 (+0.0 to +100.0) |" in score_table([*comparison.by_task(), total])


def test_the_loss_is_a_mean_over_tokens_and_rows_without_one_are_left_out() -> None:
    row = answered("t", "x", "no", "x")
    rows = [
        dataclasses.replace(row, tokens=30, base_nll=60.0, tuned_nll=15.0, base_ended=False, tuned_ended=True),
        dataclasses.replace(row, tokens=10, base_nll=60.0, tuned_nll=5.0, base_ended=True, tuned_ended=True),
        row,  # longer than the base's context
    ]
    score = Comparison(rows).total()
    assert (score.base["loss"], score.tuned["loss"]) == pytest.approx((3.0, 0.5))
    assert score.change["loss"].mean == pytest.approx(-2.5)
    assert score.tuned["perplexity"] == pytest.approx(math.e**0.5)
    assert "perplexity" not in score.change
    assert (score.base["ended"], score.tuned["ended"]) == (0.5, 1.0)


def test_a_task_with_few_answers_is_scored_by_label() -> None:
    rows = [answered("t", label, "maybe", "YES.") for label in ("yes", "yes", "no", "yes", "no", "no")]
    score = Comparison([*rows, answered("u", "free text", "", "")]).by_task()[0]
    assert (score.base["label_accuracy"], score.tuned["label_accuracy"]) == (0.0, 0.5)
    assert score.tuned["macro_f1"] == pytest.approx((2 * 3 / 9 + 0) / 2)
    total = Comparison(rows).total()
    assert "macro_f1" not in total.tuned  # labels of different tasks have no common mean
    assert total.tuned["label_accuracy"] == 0.5


def test_contracts_are_kept_with_the_scores(finished: Any, tmp_path: Path) -> None:
    contracts = make_contracts([{"task": "a", "max_words": 2}], "here")
    rows = [answered("a", "x", "one two three", "one"), answered("b", "x", "one two three", "one")]
    comparison = Comparison(rows, contracts)
    first, second = comparison.by_task()
    assert (first.base["contract"], first.tuned["contract"]) == (0.0, 1.0)
    assert "contract" not in second.tuned
    run = kept_run(finished, tmp_path)
    write_comparison(run, comparison, "contracts")
    assert read_comparison(run, "contracts") == comparison
    text = (run.path / "comparison-contracts.md").read_text()
    assert "| a | 1 | 0.0 % | 0.0 % | +0.0 (all rows alike) | 0.0 → 100.0 |" in text
    assert "| contract kept | 0.0 % | 100.0 % |" in text


def test_a_row_beyond_the_context_is_answered_but_has_no_loss(finished: Any) -> None:
    _, _, result = finished
    examples = result.setup.data.heldout_examples[:3]
    model = result.model
    options: dict[str, Any] = {"score_rows": 3, "max_new_tokens": 8, "batch_size": 2, "seed": 0}
    whole = compare(model, result.setup.chat, examples, **options)
    assert all(answer.base_nll and answer.tuned_nll for answer in whole.answers)
    lengths = sorted(len(result.setup.chat.tokenize_example(example.messages)[-1].input_ids) for example in examples)
    with patch.object(model.config, "max_position_embeddings", lengths[1]):
        cut = compare(model, result.setup.chat, examples, **options)
    assert sum(answer.base_nll is None for answer in cut.answers) == 1


def test_the_loss_of_an_answer_is_that_of_its_tokens(finished: Any) -> None:
    import torch

    _, _, result = finished
    example = next(each for each in result.setup.data.heldout_examples if len(each.messages) == 2)
    options: dict[str, Any] = {"score_rows": 1, "max_new_tokens": 4, "batch_size": 1, "seed": 0}
    found = compare(result.model, result.setup.chat, [example], **options).answers[0]
    sequence = result.setup.chat.tokenize_example(example.messages)[0]
    ids, labels = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
    with torch.inference_mode():
        logits = result.model(ids).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
    assert found.tokens == sequence.learned
    assert found.tuned_nll == pytest.approx(float(expected), rel=1e-2)


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
    assert scores["all"]["rows"] == len(scores["answers"]) == 50
    assert scores["all"]["change"]["loss"][0] < 0
    assert all(answer["tuned_nll"] > 0 and answer["tokens"] > 1 for answer in scores["answers"])
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
