"""Measures against reference implementations, on 200 rows, and intervals against the truth."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from qlora_tune.scores import (
    INVALID,
    METRICS,
    bootstrap_mean,
    find_labels,
    find_ungrounded,
    is_exact_match,
    measure_answer,
    measure_chrf,
    measure_json_f1,
    measure_macro_f1,
    measure_repetition,
    measure_rouge_l,
    normalise_label,
    parse_json,
    split_words,
    write_value,
)


def draw_pairs() -> list[tuple[str, str]]:
    """200 answers with their references: rows of the sample, the answers damaged in ways that models are wrong."""
    draw = random.Random(7)
    rows = [json.loads(line) for line in (ROOT / "sample_heldout.jsonl").read_text().splitlines()]
    references = [row["messages"][-1]["content"] if "messages" in row else row["output"] for row in rows][:190]
    references += [
        "Grüße aus Köln, naïve café",
        "写一个 short 标题",
        "Привет, как дела?",
        "a_b c",
        "don't stop",
        "x",
    ] * 2
    pairs = []
    for number, reference in enumerate(references[:200]):
        words = reference.split()
        if number % 4 == 1:
            draw.shuffle(words)
        elif number % 4 == 2:
            words = [*words[: len(words) // 2], "Well,", "then"]
        elif number % 4 == 3:
            words = [*words, *words, "no."]
        pairs.append((" ".join(words), reference))
    return pairs


PAIRS = draw_pairs()


class _Words:
    """Our words for rouge-score, whose own are a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def test_rouge_l_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    assert len(PAIRS) == 200
    ours = [measure_rouge_l(split_words(answer), split_words(reference)) for answer, reference in PAIRS]
    same_words = RougeScorer(["rougeL"], tokenizer=_Words())
    assert ours == pytest.approx([same_words.score(reference, a)["rougeL"].fmeasure for a, reference in PAIRS])
    stock = RougeScorer(["rougeL"])
    plain = [(pair, ours) for pair, ours in zip(PAIRS, ours, strict=True) if "".join(pair).isascii()]
    plain = [(pair, ours) for pair, ours in plain if "_" not in "".join(pair)]
    assert len(plain) > 180
    assert [s for _, s in plain] == pytest.approx([stock.score(r, a)["rougeL"].fmeasure for (a, r), _ in plain])
    assert 0.3 < sum(ours) / 200 < 0.95


def test_chrf_equals_sacrebleu() -> None:
    from sacrebleu import sentence_chrf

    ours = [measure_chrf(answer, reference) for answer, reference in PAIRS]
    assert ours == pytest.approx([sentence_chrf(answer, [reference]).score / 100 for answer, reference in PAIRS])
    assert measure_chrf("", "x") == 0.0


def test_macro_f1_and_accuracy_equal_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(1)
    labels = ["negative", "neutral", "positive"]
    references = draw.choices(["Positive", "negative.", "neutral"], weights=[5, 3, 1], k=200)
    answers = [r if draw.random() < 0.6 else draw.choice(["positive", "NEGATIVE", "no idea", ""]) for r in references]
    given, wanted = ([normalise_label(text) for text in texts] for texts in (answers, references))
    assert find_labels(references) == labels
    expected = f1_score(wanted, given, labels=labels, average="macro", zero_division=0)
    assert measure_macro_f1(answers, references, labels) == pytest.approx(expected)
    assert sum(g == w for g, w in zip(given, wanted, strict=True)) / 200 == accuracy_score(wanted, given)
    assert 0.2 < expected < 0.9


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


@pytest.mark.parametrize(
    ("references", "labels"),
    [
        (["yes", "No", "yes.", "no", "YES", '"no"'], ["no", "yes"]),
        (["yes"] * 9, []),  # one label is no choice
        ([f"word {n}" for n in range(9)], []),
        (["yes", "no", "yes", "no", "no"], []),  # too few rows for two labels
        (["a" * 61] * 5 + ["b"] * 5, []),
        ([".", "yes"] * 5, []),
        ([], []),
    ],
)
def test_a_task_with_few_answers_is_a_choice_among_labels(references: list[str], labels: list[str]) -> None:
    assert find_labels(references) == labels


@pytest.mark.parametrize(
    ("answer", "prompt", "found"),
    [
        ("It costs 40 euros.", "What does it cost? 30 euros?", ["40"]),
        ("It costs 1,200 euros.", "It costs 1200 euros.", []),
        ("We met Anna in Paris. There it rained.", "Where did you meet Anna?", ["Paris"]),
        ("Yes. Bring water.\nThen go.", "What to do?", []),  # capitals at the beginning of sentences
        ("It was Anna's dog", "anna has a dog", ["Anna's"]),
        ("- Berlin\n- Rome", "Name cities", []),
        ("он видел Анну", "кто там?", ["Анну"]),
        ("I think so", "Do you?", []),
        ("", "", []),
    ],
)
def test_numbers_and_names_from_nowhere_are_found(answer: str, prompt: str, found: list[str]) -> None:
    assert find_ungrounded(answer, prompt) == found


def test_repetition_is_the_share_of_runs_that_came_before() -> None:
    assert measure_repetition(split_words("one two three")) == 0.0
    assert measure_repetition(split_words("a b c d e f g h")) == 0.0
    assert measure_repetition(split_words("go " * 13)) == pytest.approx(0.9)
    assert measure_repetition(split_words("a b c d a b c d")) == pytest.approx(0.2)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "NaN", "[Infinity]", "1 2", "```json\n{}\n```", "[" * 100_000])
def test_what_is_no_json_is_invalid(text: str) -> None:
    assert parse_json(text) is INVALID


@pytest.mark.parametrize(
    ("given", "expected", "f1"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1.0}', 1.0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": "1.0"}', '{"a": 1}', 0.0),
        ('{"a": [2, 1, 1]}', '{"a": [1, 2, 2]}', 2 / 3),
        ('{"a": {}}', '{"a": []}', 0.0),
        ('{"a": {"b": null}}', '{"a": {"b": null}}', 1.0),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0.0),
        ("{}", "{}", 1.0),
        ("no", '{"a": 1}', 0.0),
        ("3", '{"a": 3}', 0.0),
        ('{"a": "cafe\u0301"}', '{"a": "caf\u00e9"}', 1.0),
    ],
)
def test_json_is_compared_field_by_field(given: str, expected: str, f1: float) -> None:
    assert measure_json_f1(parse_json(given), parse_json(expected)) == pytest.approx(f1)


def test_an_answer_has_the_measures_that_mean_something() -> None:
    free = measure_answer("The sky is blue.", "The sky is grey.", "What colour?")
    assert set(free) == {"exact_match", "rouge_l", "chrf", "words", "repetition", "ungrounded"}
    assert free["rouge_l"] == pytest.approx(0.75)
    assert free["words"] == 4
    assert measure_answer('{"a": 1}', '{"a": 1}', "")["json_f1"] == 1.0
    assert measure_answer("oops", "[1]", "")["json_valid"] == 0.0
    assert {*free, "json_f1", "json_valid"} <= {metric.name for metric in METRICS}


@pytest.mark.parametrize("rows", [20, 60])
@pytest.mark.parametrize("kind", ["shares", "differences", "weighted"])
def test_intervals_cover_the_truth(kind: str, rows: int) -> None:
    draw = np.random.default_rng(3)
    hits, runs = 0, 300
    for number in range(runs):
        if kind == "shares":  # tuned minus base, each right or wrong
            values, truth = (draw.random(rows) < 0.7).astype(float) - (draw.random(rows) < 0.4), 0.3
            weights = None
        elif kind == "differences":
            values, truth, weights = draw.gamma(1.5, size=rows), 1.5, None
        else:  # a loss per token, of answers of different lengths
            weights = draw.integers(5, 40, size=rows).astype(float)
            values, truth = 1.0 + draw.normal(size=rows), 1.0
        found = bootstrap_mean(values.tolist(), None if weights is None else weights.tolist(), seed=number)
        hits += found.low <= truth <= found.high
    # 95 % are aimed at; two and a half standard errors of 300 runs are 3 %.
    assert 0.90 <= hits / runs <= 0.985, hits / runs


def test_an_interval_is_that_of_its_rows_and_seed() -> None:
    values: list[Any] = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values).mean == pytest.approx(0.6)
    assert bootstrap_mean([2.0]) == (2.0, 2.0, 2.0)
    assert bootstrap_mean([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert bootstrap_mean([1.0, 3.0], [3.0, 1.0]).mean == pytest.approx(1.5)
    assert bootstrap_mean([0.0, 1.0, 1.0])[1:] == (0.0, 1.0)  # no share lies beyond all of them


def test_values_are_written_with_the_figures_they_have() -> None:
    assert write_value("chrf", 0.12345) == "12.3 %"
    assert write_value("chrf", 0.5, signed=True) == "+50.0"
    assert write_value("loss", 1.23456) == "1.23"
    assert write_value("words", 1234.56) == "1234.6"
    assert write_value("loss", -0.5, signed=True) == "-0.5"
