"""Files to examples: every shape, every reason, nothing lost, no copy across the split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.containers import read_rows
from qlora_tune.data import drop_seen, duplicate_key, find_data, label_files, load_examples, split_heldout
from qlora_tune.errors import DataError
from qlora_tune.shapes import DataProblem, Example, Row, detect_format, to_examples
from qlora_tune.turns import Message

GOOD = {"instruction": "Say hi", "output": "hi"}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def contents(fields: dict[str, Any]) -> list[tuple[str, str]]:
    (example,) = to_examples(Row(fields, "f.jsonl", 1)).examples
    return [(turn["role"], turn["content"]) for turn in example.messages]


@pytest.mark.parametrize(
    ("fields", "shape", "turns"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "alpaca", [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", [("user", "Add"), ("assistant", "3")]),
        ({"system": "S", **GOOD}, "alpaca", [("system", "S"), ("user", "Say hi"), ("assistant", "hi")]),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", [("user", "p"), ("assistant", "c")]),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "c"}],
            },
            "prompt-completion",
            [("user", "p"), ("assistant", "c")],
        ),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "messages",
            [("user", "u"), ("assistant", "a")],
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("system", "S"), ("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_each_shape_is_recognised_and_becomes_a_conversation(
    fields: dict[str, Any], shape: str, turns: list[tuple[str, str]]
) -> None:
    assert detect_format(fields) == shape
    assert contents(fields) == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "x", "output": ["a"]}, '"output" is a list, expected text'),
        ({"instruction": "x", "output": "  "}, "turn 2 (assistant) is empty"),
        ({"question": "x"}, "has a prompt but no answer to learn"),
        ({"topic": "x"}, 'its keys ("topic") are no known shape'),
        ({"messages": []}, '"messages" is empty, expected a list of turns'),
        ({"messages": [{"role": "user", "content": "u"}]}, "no assistant turn to learn from"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "turn 1 is the assistant's, expected the user's"),
        ({"messages": [{"role": "user", "content": 3}]}, 'turn 1: "content" is a number, expected text'),
        ({"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "a"}]}, 'the role "narrator"'),
        ({"conversations": [{"from": "tool", "value": "x"}, {"from": "gpt", "value": "a"}]}, "turn 1 is the tool's"),
        ('{"instruction": "x", "output": "a"', "not valid JSON"),
        ('{"instruction": "x", "instruction": "y", "output": "a"}', 'the key "instruction" stands twice'),
        ('{"instruction": "x", "output": NaN}', "NaN is not JSON"),
        ("[1, 2]", "is a list, expected an object"),
        ({"instruction": "x", "input": 0, "output": "a"}, '"input" is a number, expected text'),
        ('{"instruction": "a \\ud800 b", "output": "a"}', "half a character"),
        ('{"instruction": ' + "[" * 100_000, "nested too deep"),
    ],
)
def test_a_bad_row_is_rejected_with_file_line_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", GOOD, row, GOOD)
    examples, report = load_examples([path])
    assert [example.source for example in examples] == ["d.jsonl:1", "d.jsonl:3"]
    assert (report.rows_in, report.kept, report.rejected) == (3, 2, 1)
    assert str(report.problems[0]).startswith(f"{path}:2: ")
    assert reason in report.problems[0].reason
    assert report.problems[0].original is not None


def test_a_line_that_is_not_utf8_is_rejected_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "caf\xe9", "output": "x"}\n')
    _, report = load_examples([path])
    assert (report.rows_in, report.kept) == (2, 1)
    assert "not UTF-8" in report.problems[0].reason


def test_rows_of_an_array_keep_the_line_they_start_on(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD, {"x": 1}, GOOD], indent=1))
    examples, report = load_examples([path])
    lines = path.read_text().splitlines()
    assert lines[report.problems[0].line - 1].strip() == "{"
    assert '"x"' in lines[report.problems[0].line]
    assert [int(example.source.split(":")[1]) for example in examples] == [2, 9]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([GOOD, GOOD])[:-1], "the file is cut off"),
        ("[" + json.dumps(GOOD) + ",\n{bad,\n" + json.dumps(GOOD) + "]", "d.json:2: not valid JSON"),
        (json.dumps([GOOD], indent=1) + "\n" + json.dumps([GOOD]), "more text after the end of the JSON"),
        (json.dumps(GOOD, indent=1) + json.dumps(GOOD), "more text after the end of the JSON"),
    ],
)
def test_an_array_that_leaves_open_how_many_rows_were_lost_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        load_examples([path])


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("first", [json.dumps(GOOD), '["x"]', json.dumps([GOOD])])
def test_json_lines_are_told_by_their_content_and_a_bad_line_costs_only_itself(
    tmp_path: Path, name: str, first: str
) -> None:
    path = write_lines(tmp_path / name, first, *[GOOD] * 9, "{bad", *[GOOD] * 9)
    _, report = load_examples([path])
    assert report.rows_in == 20
    assert report.kept == 18 + (first == json.dumps(GOOD))


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(GOOD, indent=2) + "\n")
    assert load_examples([path])[1].kept == 1


@pytest.mark.parametrize("text", ["\ufeff" + json.dumps(GOOD) + "\r\n", "\n\n" + json.dumps(GOOD), json.dumps([GOOD])])
def test_a_byte_order_mark_empty_lines_and_an_array_named_jsonl_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    assert load_examples([path])[1].kept == 1


def test_a_last_turn_without_an_answer_is_left_out_and_counted_as_changed(tmp_path: Path) -> None:
    turns = [("user", "u"), ("assistant", "a"), ("user", "and?")]
    path = write_lines(tmp_path / "d.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    examples, report = load_examples([path])
    assert examples[0].messages[-1]["role"] == "assistant"
    assert (report.rows_in, report.kept, report.rejected, report.changed) == (1, 1, 0, 1)


@pytest.mark.parametrize(("name", "content"), [("empty.jsonl", ""), ("bad.jsonl", '{"a": 1}\n'), ("e.json", "[]")])
def test_a_file_without_a_usable_row_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match="No usable row"):
        load_examples([path])


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(tmp_path))


def make_examples(prompts: list[tuple[str, str]]) -> list[Example]:
    return [
        Example((Message(role="user", content=p), Message(role="assistant", content="a")), task, f"d.jsonl:{i}")
        for i, (p, task) in enumerate(prompts, start=1)
    ]


def test_no_duplicate_group_stands_on_both_sides_of_the_split() -> None:
    prompts = [(f"Question {n % 70}" + ("  " if n % 2 else ""), f"task {n % 3}") for n in range(300)]
    for seed in range(5):
        train, heldout = split_heldout(make_examples(prompts), 0.1, seed)
        assert not {duplicate_key(e) for e in train} & {duplicate_key(e) for e in heldout}
        assert len(train) + len(heldout) == 300
        assert 15 <= len(heldout) <= 45


def test_the_split_is_drawn_by_seed_and_by_task() -> None:
    examples = make_examples([(f"q{n}", f"task {n % 4}") for n in range(200)])
    assert split_heldout(examples, 0.1, 1) == split_heldout(examples, 0.1, 1)
    assert split_heldout(examples, 0.1, 1) != split_heldout(examples, 0.1, 2)
    _, heldout = split_heldout(examples, 0.1, 1)
    assert {task: sum(e.task == task for e in heldout) for task in {e.task for e in heldout}} == {
        f"task {n}": 5 for n in range(4)
    }


@pytest.mark.parametrize(
    ("tasks", "rows", "share", "expected"), [(100, 4, 0.12, 48), (100, 4, 0.13, 52), (10, 2, 0.25, 5), (20, 1, 0.5, 10)]
)
def test_the_share_holds_over_many_small_tasks(tasks: int, rows: int, share: float, expected: int) -> None:
    examples = make_examples([(f"q{n}", f"task {n % tasks}") for n in range(tasks * rows)])
    train, heldout = split_heldout(examples, share, 3)
    assert abs(len(heldout) - expected) <= 1
    assert len(train) + len(heldout) == tasks * rows


def test_something_is_always_left_to_train_on() -> None:
    train, heldout = split_heldout(make_examples([("a", "t"), ("b", "u")]), 0.5, 1)
    assert len(train) == len(heldout) == 1


def test_a_share_of_zero_holds_nothing_out_and_two_rows_hold_one_out() -> None:
    examples = make_examples([("a", "t"), ("b", "t")])
    assert split_heldout(examples, 0.0, 1)[1] == []
    assert len(split_heldout(examples, 0.1, 1)[1]) == 1


def test_held_out_rows_that_are_trained_on_are_left_out_and_named() -> None:
    train, heldout = make_examples([("Same  question", "t")]), make_examples([("same question", "t"), ("new", "t")])
    clean, leaks = drop_seen(train, heldout)
    assert [example.messages[0]["content"] for example in clean] == ["new"]
    assert "d.jsonl:1" in leaks[0].reason


def test_problems_of_one_reason_are_grouped_whatever_their_figures(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", GOOD, {"a": 1}, {"instruction": "x", "output": 1}, {"a": 2}, {"a": 3})
    _, report = load_examples([path])
    groups = report.group_problems()
    assert [(count, first.line) for count, first in groups] == [(3, 2), (1, 3)]


def test_files_of_the_same_name_are_told_apart_by_their_folders() -> None:
    assert label_files(["a/b/x.jsonl", "c/y.jsonl"]) == {"a/b/x.jsonl": "x.jsonl", "c/y.jsonl": "y.jsonl"}
    assert set(label_files(["a/b/x.jsonl", "c/b/x.jsonl", "x.jsonl"]).values()) == {
        "a/b/x.jsonl",
        "c/b/x.jsonl",
        "x.jsonl",
    }


@pytest.mark.parametrize(
    "name",
    ["alpaca/alpaca_en_demo.json", "sharegpt/dummy_conversation.json", "messages/toy_chat_fine_tuning.jsonl"],
)
def test_real_files_add_up(shared_data: Path, name: str) -> None:
    rows = list(read_rows(shared_data / name))
    examples, report = load_examples([shared_data / name])
    assert report.rows_in == len(rows) == report.kept + report.rejected
    assert report.kept == len(examples)
    assert not any(isinstance(row, DataProblem) for row in rows)


def test_a_name_that_is_no_utf_8_is_refused_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/donn\xe9es.jsonl")).write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match="no UTF-8 in its name"):
        find_data([folder])
