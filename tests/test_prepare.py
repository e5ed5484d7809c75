"""What training gets of the data: split chats, folders, weights and tools, and what the report says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune.cli import main
from qlora_tune.prepare import count_tokens, leave_out_long, prepare_data


def write_chats(path: Path, *exchanges: int) -> Path:
    """One chat a line, of so many exchanges."""
    turns = [
        [{"role": r, "content": f"word {n} {r}"} for n in range(k) for r in ("user", "assistant")] for k in exchanges
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    return path


@pytest.mark.parametrize(("long_chats", "sequences", "learned"), [("cut", 2, 3), ("split", 4, 7)])
def test_a_long_chat_is_cut_or_split_at_turn_boundaries(
    builtin: Any, tmp_path: Path, long_chats: str, sequences: int, learned: int
) -> None:
    chat = builtin[2]
    path = write_chats(tmp_path / "chats.jsonl", 6, 1)
    heldout = write_chats(tmp_path / "heldout.jsonl", 1)
    heldout.write_text(heldout.read_text().replace("word", "other"))
    config = settings(data=str(path), heldout_data=str(heldout), max_length="64", long_chats=long_chats)
    data = prepare_data(config, chat)
    assert len(data.train) == sequences
    assert all(len(sequence.input_ids) <= 64 for sequence in data.train)
    assert sum(sequence.labels.count(chat.end_of_turn_id) for sequence in data.train) == learned
    (problem,) = [problem for problem in data.report.problems if problem.action == "changed"]
    assert problem.line == 1
    assert ("split into 3" if long_chats == "split" else "only its first 2 of 6 answers") in problem.reason


def test_a_folder_is_trained_on_file_by_file(builtin: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_chats(folder / "a.jsonl", 1, 2)
    (folder / "b.csv").write_text("question,answer\nWhat is 2?,Two.\n")
    (folder / "README.txt").write_text("About these files.")
    data = prepare_data(settings(data=str(folder), heldout_share="0"), builtin[2])
    assert [sequence.source for sequence in data.train] == ["a.jsonl:1", "a.jsonl:2", "b.csv:2"]


def test_weight_0_and_results_of_tools_are_context_and_calls_are_learned(builtin: Any, tmp_path: Path) -> None:
    tokenizer, chat = builtin[1], builtin[2]
    call = {"type": "function", "function": {"name": "find", "arguments": '{"what": "bread"}'}}
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "ignored", "weight": 0},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "the answer"},
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns, "tools": [{"name": "find"}]}))
    config = settings(data=str(tmp_path / "d.jsonl"), heldout_share="0", max_length="512")
    (sequence,) = prepare_data(config, chat).train
    learned = tokenizer.decode([label for label in sequence.labels if label != -100])
    assert "bread" in learned
    assert "the answer" in learned
    assert "ignored" not in learned
    assert "found" not in learned


def test_tokens_are_counted_as_they_are_trained_on(builtin: Any) -> None:
    chat = builtin[2]
    messages = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    assert count_tokens(chat, messages) == len(chat.tokenize_example(messages)[0].input_ids)  # type: ignore[arg-type]


def test_rows_of_held_out_tasks_are_counted_apart_and_all_rows_add_up(builtin: Any, tmp_path: Path) -> None:
    def rows(*found: tuple[str, str]) -> str:
        return "".join(json.dumps({"task": t, "prompt": p, "completion": "an answer"}) + "\n" for t, p in found)

    kept = [("a", f"first {n}") for n in range(6)]
    (tmp_path / "d.jsonl").write_text(rows(*kept, ("b", "second 1"), ("b", "First 2"), ("b", "long " * 100)))
    (tmp_path / "h.jsonl").write_text(rows(("a", "other 1"), ("b", "other 2"), ("b", "other 3")))
    files = {"data": str(tmp_path / "d.jsonl"), "heldout_data": str(tmp_path / "h.jsonl"), "max_length": "64"}
    data = prepare_data(settings(**files, holdout_tasks="b"), builtin[2])
    assert [sequence.source for sequence in data.train] == [f"d.jsonl:{n}" for n in range(1, 7)]
    assert [example.source for example in data.heldout_examples] == ["h.jsonl:1"]
    assert [example.source for example in data.unseen_examples] == ["d.jsonl:7", "h.jsonl:2", "h.jsonl:3"]
    copied, long = data.report.problems
    assert (copied.line, copied.reason) == (8, "held out, but the same prompt is trained on at d.jsonl:3")
    assert long.line == 9
    summary = data.summary()
    assert (summary["rows_in"], summary["rows_kept"], summary["rows_unseen"]) == (12, 10, 3)
    assert summary["rows_kept"] == len(data.train) + summary["rows_heldout"] + summary["rows_unseen"]


def test_a_held_out_file_of_held_out_tasks_alone_leaves_no_held_out_rows(builtin: Any, tmp_path: Path) -> None:
    for name, task in (("d", "a"), ("h", "b")):
        row = {"task": task, "prompt": f"of {task}", "completion": "x"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    files = {"data": str(tmp_path / "d.jsonl"), "heldout_data": str(tmp_path / "h.jsonl")}
    data = prepare_data(settings(**files, holdout_tasks="b"), builtin[2])
    assert (len(data.train), data.heldout_examples, len(data.unseen_examples)) == (1, [], 1)


@pytest.mark.parametrize("command", [["train"], ["preview"], ["select", "--rows", "9", "--output", "chosen.jsonl"]])
def test_more_rows_than_memory_holds_are_refused_before_they_are_read(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("rows.jsonl").open("wb") as file:
        file.truncate(1 << 42)  # takes no room on the disk
    name, *rest = command
    assert main([name, "rows.jsonl", *rest]) == 2
    said = capfd.readouterr().err.replace("\n", " ")
    assert "rows.jsonl: 4,398.0 GB of rows take about" in said
    assert "GB are free. Take a part of them" in said
    assert "part.jsonl" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_held_out_chat_is_scored_as_far_as_it_is_tokenized(builtin: Any, tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": f"{role} number {number}, in a few words"}
        for number in range(15)
        for role in ("user", "assistant")
    ]
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "Say a", "completion": "a"}) + "\n")
    other = tmp_path / "d.jsonl"
    other.write_text(json.dumps({"prompt": "Say b", "completion": "b"}) + "\n")
    config = settings(data=str(other), heldout_data=str(path), max_length="96")
    found = prepare_data(config, builtin[2])
    chat, short = found.heldout_examples
    (whole,) = [sequence for sequence in found.heldout if sequence.source == chat.source]
    assert 2 < len(chat.messages) < len(turns)
    assert chat.messages == tuple(turns[: len(chat.messages)])
    (again,) = builtin[2].tokenize_example(chat.messages)
    assert again.input_ids == whole.input_ids, "the answer that is asked for is the last that the loss counts"
    assert len(short.messages) == 2
    kept, problems = leave_out_long(builtin[2], [replace(chat, messages=tuple(turns))], 96)
    assert [example.messages for example in kept] == [chat.messages]
    assert len(problems) == 1
