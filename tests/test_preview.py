"""What is shown of a row is what is trained on, token for token; a row that isn't trained on says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, settings

from qlora_tune.chat_format import IGNORED
from qlora_tune.errors import DataError, ModelError
from qlora_tune.prepare import prepare
from qlora_tune.preview import RowView, check_as_trained, mark_tokens, view_row

FILE_ROWS: list[Any] = [
    {"instruction": "Say hi", "output": "hi"},
    {"messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Greet. <|im_end|>"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Part."},
        {"role": "assistant", "content": "Bye."},
    ]},
    {"prompt": "2+2", "completion": "4\n\nor four"},
    {"conversations": [{"from": "human", "value": "Ünï 字 😀"}, {"from": "gpt", "value": "ok"}]},
    {"messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "not this", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "this"},
    ]},
]  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def shown(view: RowView) -> list[list[tuple[str, bool]]]:
    return [[(token.text, token.learned) for token in tokens] for tokens in view.sequences]


def trained(file: Path, line: int, config: Any) -> list[list[tuple[str, bool]]]:
    """The sequences that a run with these settings gets from a line."""
    setup = prepare(config.model_copy(update={"data": [str(file)], "heldout_share": 0.0}))
    source = f"{file.name}:{line}"
    chosen = [s for s in setup.data.train if s.source == source or s.source.startswith(f"{source}#")]
    decode = setup.tokenizer.decode
    return [[(decode([i]), label != IGNORED) for i, label in zip(s.input_ids, s.labels, strict=True)] for s in chosen]


@pytest.mark.parametrize("line", range(1, len(FILE_ROWS) + 1))
@pytest.mark.parametrize("template", ["auto", "plain"])
def test_tokens_shown_are_those_that_are_trained_on(line: int, template: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", FILE_ROWS)
    config = settings(chat_template=template)
    view = view_row(file, line, config)
    assert view.source == f"rows.jsonl:{line}"
    assert shown(view) == trained(file, line, config) != []
    assert view.problems == []


def test_token_numbers_and_labels_are_those_of_the_sample_as_it_is_trained_on() -> None:
    setup = prepare(settings())
    chosen = setup.data.train[:: len(setup.data.train) // 15]
    for sequence in chosen:
        line = int(sequence.source.rpartition(":")[2])
        view = view_row(ROOT / "sample.jsonl", line, settings())
        assert view.sequences == [mark_tokens(setup.tokenizer, sequence.input_ids, sequence.labels)]
        assert sum(token.learned for token in view.sequences[0]) == sequence.learned


def test_the_texts_of_the_tokens_are_the_conversation_and_its_answer_is_learned(tmp_path: Path) -> None:
    (tokens,) = view_row(write(tmp_path / "r.jsonl", FILE_ROWS), 2, settings()).sequences
    learned = "".join(token.text for token in tokens if token.learned)
    assert learned.count("<|im_end|>") == 2
    assert "Hello." in learned
    assert "Bye." in learned
    assert "Greet" not in learned
    assert "Greet" in "".join(token.text for token in tokens)


def test_an_end_of_turn_typed_by_a_user_is_no_control_token(tmp_path: Path) -> None:
    (tokens,) = view_row(write(tmp_path / "r.jsonl", FILE_ROWS), 2, settings()).sequences
    ends = [token for token in tokens if token.control and token.text == "<|im_end|>"]
    assert len(ends) == 5  # one a turn, none for what was typed


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": ["b"]}, '"output"'),
        ({"a": 1}, "no known shape"),
        ('{"instruction": "a", "out', "JSON"),
        ({"messages": [{"role": "user", "content": "only a question"}]}, "assistant"),
        ({"instruction": "long " * 2000, "output": "x"}, "tokens long, max_length is 256"),
        ("[1, 2]", "list"),
        ({"instruction": "a", "output": ""}, "empty"),
    ],
)
def test_a_row_with_a_defect_says_why_and_has_no_tokens(row: Any, reason: str, tmp_path: Path) -> None:
    view = view_row(write(tmp_path / "r.jsonl", [FILE_ROWS[0], row]), 2, settings())
    assert view.source == "r.jsonl:2"
    assert view.sequences == []
    assert view.raw is not None
    assert len(view.problems) == 1
    assert re.search(reason, view.problems[0]), view.problems


def test_what_is_changed_of_a_row_is_said_beside_its_tokens(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "unanswered"}]}  # fmt: skip
    view = view_row(write(tmp_path / "r.jsonl", [row]), 1, settings())
    assert len(view.sequences) == 1
    assert view.problems
    assert "unanswered" in json.dumps(view.raw)


def test_the_next_row_below_a_line_is_shown_and_none_below_the_end(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [FILE_ROWS[0], "", "", FILE_ROWS[2]])
    assert [view_row(file, line, settings()).source for line in (-3, 0, 1, 2, 3, 4)] == [
        *["r.jsonl:1"] * 3,
        *["r.jsonl:4"] * 3,
    ]
    with pytest.raises(DataError, match=r"r\.jsonl: has no row at line 5 or below it"):
        view_row(file, 5, settings())


def test_columns_are_read_as_the_settings_name_them(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [{"frage": "Say hi", "antwort": "hi"}])
    mapped = settings(map=["instruction=frage", "output=antwort"])
    view = view_row(file, 1, mapped)
    assert shown(view) == shown(view_row(write(tmp_path / "s.jsonl", FILE_ROWS), 1, settings()))
    assert view.raw == {"frage": "Say hi", "antwort": "hi"}
    assert view_row(file, 1, settings()).sequences == []


def test_a_row_of_a_table_is_shown_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('instruction,output\nSay hi,hi\n"two\nlines",x\nlast,y\n')
    assert [view_row(file, line, settings()).source for line in (2, 3, 5)] == ["t.csv:2", "t.csv:3", "t.csv:5"]


def test_a_base_that_is_not_here_is_not_downloaded_to_show_a_row(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", FILE_ROWS)
    far = settings(model_name_or_path="someone/base")
    with pytest.raises(ModelError, match="not on this machine yet. Choose builtin"):
        view_row(file, 1, far)
    with pytest.raises(ModelError, match="not on this machine yet"):
        check_as_trained(far, [str(file)])


def test_the_report_measures_in_tokens_as_they_are_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", FILE_ROWS)
    seen: list[None] = []
    report = check_as_trained(settings(), [str(file)], lambda: seen.append(None))
    assert len(seen) == report.rows_in == len(FILE_ROWS)
    longest = max(len(tokens) for n in range(1, 6) for tokens in view_row(file, n, settings()).sequences)
    assert report.lengths is not None
    assert (report.lengths.unit, report.lengths.longest, report.lengths.limit) == ("tokens", longest, 256)


def long_chat(folder: Path) -> Path:
    turns = [
        {"role": role, "content": f"{role} number {number} about some things"}
        for number in range(12)
        for role in ("user", "assistant")
    ]
    return write(folder / "r.jsonl", [{"messages": turns}])


def test_a_long_chat_is_shown_as_far_as_it_is_trained_on(tmp_path: Path) -> None:
    file = long_chat(tmp_path)
    assert shown(view_row(file, 1, settings())) == trained(file, 1, settings())


def test_a_long_chat_says_that_it_is_cut(tmp_path: Path) -> None:
    assert view_row(long_chat(tmp_path), 1, settings()).problems


def test_a_long_chat_that_is_split_is_shown_split(tmp_path: Path) -> None:
    file, config = long_chat(tmp_path), settings(long_chats="split")
    assert shown(view_row(file, 1, config)) == trained(file, 1, config)
