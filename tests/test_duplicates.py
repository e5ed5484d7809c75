"""Copies of every degree are found, rows that only share a template are not; leaks across a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data import write_lines

from qlora_tune.check import check_files
from qlora_tune.duplicates import DuplicateFinder, LeakFinder, exact_key, jaccard, loose_key, shingles
from qlora_tune.shapes import Example
from qlora_tune.turns import Message

STORY = (
    "The river rises in the northern hills and runs through four old towns before it meets the sea, and along its "
    "banks the millers, the weavers and the fishers have worked for more than seven hundred years without a break."
)
OTHER = (
    "Copper conducts heat and current well, so cables, pans and roofs are made of it; it turns green in wet air, and "
    "that thin layer protects what lies below for a very long time."
)
CHINESE = "这条河发源于北方的山地，流经四座古老的城镇，最后汇入大海，沿岸的磨坊主、织工和渔民已经在这里工作了七百多年。"
THAI = "แม่น้ำสายนี้มีต้นกำเนิดจากภูเขาทางเหนือและไหลผ่านเมืองเก่าแก่สี่เมืองก่อนจะไหลลงสู่ทะเลใหญ่ทางทิศใต้ของประเทศ"
LONG_TASK = f"Read what stands below with care. {OTHER} {STORY} Then say in one line what the following is about."


def make_example(prompt: str, answer: str, **last: Any) -> Example:
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=answer, **last))
    return Example(turns, None, "f.jsonl:1")


def find(*pairs: tuple[str, str]) -> Any:
    finder = DuplicateFinder(near=True)
    for prompt, answer in pairs:
        finder.add(make_example(prompt, answer))
    return finder.find()


def test_exact_copies_name_the_first_row() -> None:
    copies = find(("a", "b"), ("c", "d"), ("a", "b"), ("a", "b"))
    assert copies.exact == {2: 0, 3: 0}
    assert not copies.loose
    assert not copies.near
    assert not copies.conflicting


@pytest.mark.parametrize("other", ["TELL ME  A STORY!", "tell me a story", "Tell\nme a story…", "Ｔell me a story"])
def test_copies_in_other_letters_spaces_or_punctuation_are_loose_ones(other: str) -> None:
    copies = find(("Tell me a story.", STORY), (other, STORY.upper()))
    assert copies.loose == {1: 0}
    assert not copies.exact


def test_answers_of_symbols_alone_are_told_apart() -> None:
    copies = find(("Which sign?", "+"), ("Which sign?", "-"))
    assert not copies.loose
    assert copies.conflicting == {1: 0}


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (STORY, STORY.replace("northern", "southern")),
        (CHINESE, CHINESE.replace("大海", "海洋")),
        (THAI, THAI.replace("สี่", "ห้า")),
    ],
)
def test_a_copy_with_a_changed_word_is_a_near_one_in_any_script(text: str, changed: str) -> None:
    copies = find(("Tell me of the river.", text), ("Copper?", OTHER), ("Tell me of the river.", changed))
    assert list(copies.near) == [2]
    assert copies.near[2][0] == 0
    assert 0.8 <= copies.near[2][1] < 1


def test_similarity_is_the_share_of_word_triples() -> None:
    assert shingles("One two, three FOUR") == {"one two three", "two three four"}
    assert shingles("我们今天去公园散步") == {"我们今天去", "们今天去公", "今天去公园", "天去公园散", "去公园散步"}
    assert shingles("one") == {"one"}
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5


def test_short_different_inputs_under_one_long_instruction_are_no_copies() -> None:
    pairs = [(f"{LONG_TASK}\n\n{word}", f"It is about {word}.") for word in ("rain", "bread", "stone", "glass")]
    copies = find(*pairs)
    assert not copies.near
    assert not copies.loose


def test_rows_that_differ_in_the_answer_alone_conflict() -> None:
    copies = find(("Is it warm?", "Yes, very warm."), ("is it WARM?", "No, it freezes."))
    assert copies.conflicting == {1: 0}


def test_calls_of_different_functions_are_no_copies() -> None:
    calls = [[{"type": "function", "function": {"name": name, "arguments": {}}}] for name in ("rain", "wind")]
    one, other = (make_example("Look.", "", tool_calls=call) for call in calls)
    assert exact_key(one) != exact_key(other)
    assert loose_key(one) != loose_key(other)


def test_copies_of_copies_form_one_group() -> None:
    near = STORY.replace("northern", "southern")
    copies = find(("Q", STORY), ("X", OTHER), ("q", STORY), ("Q", near), ("Q", near), ("X", OTHER))
    assert [rows for rows, _ in copies.groups()] == [[0, 2, 3, 4], [1, 5]]


@pytest.mark.parametrize(("limit", "found"), [(1000, 0), (100_000, 1), (None, 1)])
def test_near_copies_are_given_up_where_they_take_too_much_memory(limit: int | None, found: int) -> None:
    finder = DuplicateFinder(near=True, limit=limit)
    for text in (STORY, STORY.replace("northern", "southern"), OTHER):
        finder.add(make_example("Q", text))
    assert finder.gave_up is not bool(found)
    assert len(finder.find().near) == found


def test_of_a_group_the_row_with_the_fewest_defects_is_kept(tmp_path: Path) -> None:
    flawed = {"instruction": "Tell me of the river.", "output": STORY[:40] + "\u200b" + STORY[40:]}
    clean = {"instruction": "Tell me of the river.", "output": STORY}
    report = check_files([write_lines(tmp_path / "d.jsonl", flawed, clean, clean)])
    assert sorted(line for _, line in report.dropped) == [1, 3]
    assert any("of line 2" in reason for reason in report.dropped[str(tmp_path / "d.jsonl"), 1])


def leaks(heldout: list[tuple[str, str]], train: list[tuple[str, str]]) -> list[tuple[int, int, str]]:
    finder = LeakFinder([make_example(*pair) for pair in heldout])
    for pair in train:
        finder.add(make_example(*pair))
    return [(leak.heldout, leak.train, leak.kind) for leak in finder.find()]


FILLER = [(f"What is number {n} of the {word}?", f"It is the {word}.") for n, word in enumerate(OTHER.split())]


@pytest.mark.parametrize(
    ("trained", "kind"),
    [
        ((f"Sum it up.\n\n{STORY}", "A river."), "same conversation"),
        ((f"Sum it up.\n\n{STORY}", "Something else."), "same prompt"),
        ((f"SUM IT UP\n\n{STORY.upper()}", "A river."), "same prompt"),
        ((f"Sum it up.\n\n{STORY.replace('northern', 'southern')}", "A river."), "near copy"),
        ((f"Sum it up.\n\n{STORY.replace('northern', 'southern')}", "Mills and towns."), "same passage"),
        ((f"Translate into French.\n\n{STORY}", "Une rivière."), "same passage"),
        ((f"{STORY}\n\nWho works there?", "Millers."), "same passage"),
        ((f"Who works there?\n\n{STORY}", "Millers."), "same passage"),
        ((f"Please be so kind and do this: Sum it up.\n\n{STORY}", "A river."), "near copy"),
    ],
)
def test_a_leak_is_found_and_named_by_its_kind(trained: tuple[str, str], kind: str) -> None:
    heldout = [("Name a metal.", "Copper."), (f"Sum it up.\n\n{STORY}", "A river.")]
    assert leaks(heldout, [*FILLER, trained, *FILLER]) == [(1, len(FILLER), kind)]


def test_a_template_that_many_rows_share_is_no_leak() -> None:
    words = OTHER.split()
    train = [(f"{LONG_TASK}\n\n{word} {n}", f"{word}.") for n, word in enumerate(words)]
    assert not leaks([(f"{LONG_TASK}\n\nmountain goats", "Goats."), (f"{LONG_TASK}\n\nsnow", "Snow.")], train)


def test_one_sentence_that_many_rows_share_is_no_leak() -> None:
    train = [(f"{STORY} Say it with the word {word} {n}.", f"{word}.") for n, word in enumerate(OTHER.split())]
    assert not leaks([("Name a metal.", "Iron."), (f"{STORY} Say it with the word goats.", "Goats.")], train)


def test_the_same_short_input_under_a_reworded_long_instruction_is_a_leak() -> None:
    trained = (f"{LONG_TASK} Thank you.\n\nsnow", "White.")
    assert leaks([(f"{LONG_TASK}\n\nsnow", "Cold.")], [*FILLER, trained]) == [(0, len(FILLER), "same passage")]


def test_rows_of_other_passages_are_no_leaks() -> None:
    assert not leaks([(f"Sum it up.\n\n{STORY}", "A river.")], [(f"Sum it up.\n\n{OTHER}", "Copper."), *FILLER])
