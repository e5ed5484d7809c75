"""Clusters of tasks: what is alike comes together, in groups of like size, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from conftest import ROOT

from qlora_tune.clusters import cluster_tasks, compare_tasks, describe_answers
from qlora_tune.data import load_examples
from qlora_tune.errors import DataError
from qlora_tune.shapes import Example

SAMPLE = load_examples([ROOT / "sample.jsonl"])[0]


def ask(task: str | None, question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), task, "x.jsonl:1")


def find(clusters: Sequence[Sequence[str]], task: str) -> Sequence[str]:
    return next(cluster for cluster in clusters if task in cluster)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_tasks_of_one_form_come_into_one_cluster(count: int) -> None:
    clusters = cluster_tasks(SAMPLE, count)
    for one, other in [("extract_field", "extract_json"), ("topic", "sentiment"), ("bullets", "sort_words")]:
        assert find(clusters, one) == find(clusters, other), one


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_each_task_stands_in_one_cluster_and_none_is_twice_an_even_share(count: int) -> None:
    clusters = cluster_tasks(SAMPLE, count)
    assert len(clusters) == count
    assert sorted(task for cluster in clusters for task in cluster) == sorted({str(row.task) for row in SAMPLE})
    assert max(map(len, clusters)) < 2 * 21 / count


def test_the_order_of_the_rows_does_not_matter() -> None:
    shuffled = random.Random(1).sample(SAMPLE, len(SAMPLE))
    assert cluster_tasks(shuffled, 4) == cluster_tasks(SAMPLE, 4)


def test_an_instruction_counts_for_more_than_what_it_is_about() -> None:
    things = [f"thing{number}" for number in range(30)]
    rows = [ask("sort", f"Sort these words: {thing}, b", f"b, {thing}") for thing in things]
    rows += [ask("order", f"Sort these words in order: {thing}2, c", f"c, {thing}2") for thing in things]
    rows += [ask("shout", f"Give this back in capitals: {thing}, b", f"B, {thing}".upper()) for thing in things]
    similarity = compare_tasks(rows, ["sort", "order", "shout"])  # things are shared by sort and shout alone
    assert similarity[0, 1] > similarity[0, 2] + 0.15


def test_the_form_of_the_answers_parts_tasks_that_are_asked_in_the_same_words() -> None:
    questions = [f"What is the city? Person {number} lives in town {number}." for number in range(20)]
    rows = [ask("plain", question, "Paris") for question in questions]
    rows += [ask("bare", question, "Rome") for question in questions]
    rows += [ask("json", question, '{"city": "Paris", "country": "France"}') for question in questions]
    assert cluster_tasks(rows, 2) == [["bare", "plain"], ["json"]]


def test_of_a_chat_the_last_question_says_what_the_task_is() -> None:
    def chat(task: str, first: str, last: str) -> Example:
        contents = [("user", first), ("assistant", "b"), ("user", last), ("assistant", "a")]
        return Example(tuple({"role": who, "content": text} for who, text in contents), task, "x.jsonl:1")  # type: ignore[misc]

    rows = [chat("one", "Count the birds", "Sort the words"), chat("two", "Name a colour", "Sort the words")]
    rows += [chat("three", "Count the birds", "Where is Peru?")]
    assert cluster_tasks(rows, 2) == [["one", "two"], ["three"]]


def test_more_clusters_than_tasks_are_as_many_as_there_are_tasks() -> None:
    rows = [ask(task, f"{task} this", "yes") for task in ("b", "a", "c")]
    assert cluster_tasks(rows, 5) == [["a"], ["b"], ["c"]]


def test_rows_without_a_task_make_no_cluster_and_one_task_is_too_few() -> None:
    rows = [ask("a", "this", "yes"), ask(None, "that", "no")]
    with pytest.raises(DataError, match="two tasks at least, and the rows name 1: a. Name each row's task"):
        cluster_tasks(rows, 2)
    assert cluster_tasks([*rows, ask("b", "these", "no")], 2) == [["a"], ["b"]]


def test_the_form_of_answers_is_their_share_of_each_kind() -> None:
    json_share, dashes, lines, commas, one_word, numbers, sentences, labels, length = describe_answers(
        ['{"a": 1, "b": 2}', "- one\n- two", "7", "It is so."]
    )
    assert (json_share, dashes, lines, commas, one_word, numbers, sentences) == (0.25,) * 7
    assert labels == 0
    assert 0 < length < 0.5
    assert describe_answers(["yes", "no"] * 3)[7] == 1
