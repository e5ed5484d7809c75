"""Tasks kept out of training: their rows leave both sides, and so do chats that would teach them on the way."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from qlora_tune.data import load_examples
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.shapes import Example
from qlora_tune.unseen import part_tasks

TRAIN, HELDOUT = (load_examples([ROOT / f"{name}.jsonl"])[0] for name in ("sample", "sample_heldout"))
LISTS = ["bullets", "list_items", "sort_words"]


def questions(example: Example) -> list[str]:
    return [turn["content"] for turn in example.messages if turn["role"] == "user"]


def test_rows_of_held_out_tasks_leave_training_and_held_out_rows_and_none_is_lost() -> None:
    parted = part_tasks(TRAIN, HELDOUT, LISTS)
    assert not {row.task for row in (*parted.train, *parted.heldout)} & set(LISTS)
    assert {row.task for row in parted.unseen} == set(LISTS)
    assert {row.source.split(":")[0] for row in parted.unseen} == {"sample.jsonl", "sample_heldout.jsonl"}
    rows = len(parted.train) + len(parted.heldout) + len(parted.unseen) + len(parted.problems)
    assert rows == len(TRAIN) + len(HELDOUT)


def test_a_chat_that_asks_for_a_held_out_task_on_the_way_is_left_out_with_its_reason() -> None:
    parted = part_tasks(TRAIN, HELDOUT, LISTS)
    asks = re.compile(r"^(Sort (these|from|the)|Put the words in alphabetical|Format as bullets|Put every item)")
    before = [row for row in TRAIN if row.task not in LISTS and any(map(asks.match, questions(row)[:-1]))]
    after = [row for row in parted.train if any(map(asks.match, questions(row)[:-1]))]
    assert len(before) > 5
    assert after == []
    assert all("an earlier question of this chat asks for a task" in problem.reason for problem in parted.problems)
    chats = [row for row in TRAIN if row.task not in LISTS and len(questions(row)) > 1]
    assert len(parted.problems) < len(chats) / 10  # chats about other things stay


def test_without_held_out_tasks_everything_stays_as_it_is() -> None:
    parted = part_tasks(TRAIN, HELDOUT, [])
    assert (parted.train, parted.heldout, parted.unseen, parted.problems) == (TRAIN, HELDOUT, [], [])


def test_a_task_that_no_row_has_is_named_with_the_nearest_and_all_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        part_tasks(TRAIN, HELDOUT, ["bulets", "topic", "irony"])
    message = str(caught.value)
    assert 'no row is of the task "bulets". Did you mean "bullets"?' in message
    assert 'no row is of the task "irony".' in message
    assert '"topic"' not in message
    assert "the rows' tasks: animal, bullets, capitals" in message


def test_holding_out_every_task_is_refused() -> None:
    with pytest.raises(DataError, match="none is left to train on. Hold out fewer"):
        part_tasks(TRAIN, HELDOUT, sorted({str(row.task) for row in TRAIN}))
