"""Every shape of row: its turns, tools and weights as they stand; what can't be learned is kept out with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_tune.data import DataReport, convert_rows, parse_columns
from qlora_tune.errors import ConfigError
from qlora_tune.shape_readers import Shape, ShapeError
from qlora_tune.shapes import Conversion, Row, detect_format, map_columns, to_examples
from qlora_tune.turns import RowError

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}
PAIR = [("user", "u"), ("assistant", "a")]
GOOD = {"instruction": "u", "output": "a"}
RENDERED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response.\n\n### Instruction:\nu\n\n### Input:\ni\n\n### Response:\na"
)


def convert(fields: dict[str, Any]) -> Conversion:
    return to_examples(Row(fields, "folder/f.jsonl", 7))


def turns(fields: dict[str, Any]) -> list[tuple[str, str]]:
    (example,) = convert(fields).examples
    return [(turn["role"], turn["content"]) for turn in example.messages]


def reason(fields: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        convert(fields)
    return str(caught.value)


def transcript(*texts: str, between: str = "\n") -> dict[str, Any]:
    return {"text": between.join(texts)}


def chatml(*turns: tuple[str, str], end: str = "\n") -> dict[str, Any]:
    return {"text": end.join(f"<|im_start|>{role}{end}{text}<|im_end|>" for role, text in turns)}


SHAPES: list[tuple[Shape, dict[str, Any], list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": "u", "input": None, "output": "a", "system": None}, PAIR),
    ("alpaca", {"instruction": "u", "context": "c", "input": "i", "output": "a"}, [("user", "u\n\nc\n\ni"), PAIR[1]]),
    (
        "alpaca",
        {**GOOD, "history": [["q", "r"]], "system": "S"},
        [("system", "S"), ("user", "q"), ("assistant", "r"), *PAIR],
    ),
    ("alpaca", {**GOOD, "history": []}, PAIR),
    (
        "alpaca",
        {**GOOD, "messages": None, "conversations": None, "chosen": None, "rejected": None, "label": None},
        PAIR,
    ),
    ("dolly", {"instruction": "u", "context": "c", "response": "a", "category": "qa"}, [("user", "u\n\nc"), PAIR[1]]),
    ("dolly", {"instruction": "u", "input": "i", "context": "", "response": "a"}, [("user", "u\n\ni"), PAIR[1]]),
    ("self-instruct", {"instruction": "u", "instances": [{"input": "", "output": "a"}]}, PAIR),
    ("prompt-completion", {"prompt": "u", "completion": "a", "system": "S"}, [("system", "S"), *PAIR]),
    ("prompt-completion", {"prompt": "u", "context": "c", "response": "a"}, [("user", "u\n\nc"), PAIR[1]]),
    ("prompt-completion", {"prompt": [U, A, U], "completion": [A]}, PAIR * 2),
    ("question-answer", {"question": "u", "answer": "a"}, PAIR),
    ("question-answer", {"question": "u", "context": "c", "response": "a"}, [("user", "u\n\nc"), PAIR[1]]),
    ("messages", {"messages": [U, A, U, A], "system": "S"}, [("system", "S"), *PAIR, *PAIR]),
    ("messages", {"messages": [{"role": "developer", "content": "D"}, U, A], "system": "S"}, [("system", "D"), *PAIR]),
    ("messages", {"conversations": [U, A]}, PAIR),
    ("messages", {"conversation": [{**U, "role": "User"}, A], "messages": None}, PAIR),
    ("messages", {"messages": json.dumps([U, A])}, PAIR),
    ("sharegpt", {"conversations": [HUMAN, GPT], "id": 1}, PAIR),
    ("sharegpt", {"conversation": [HUMAN, {"from": "ChatGPT", "value": "a"}], "instruction": None}, PAIR),
    ("sharegpt", {"conversations": json.dumps([HUMAN, GPT])}, PAIR),
    ("chatml", chatml(("system", "S"), *PAIR), [("system", "S"), *PAIR]),
    ("chatml", chatml(*PAIR, end="\r\n"), PAIR),
    ("chatml", {"text": chatml(*PAIR)["text"] + "\n<|im_start|>assistant\n"}, PAIR),
    ("transcript", transcript("### Human: u", "### Assistant: a"), PAIR),
    ("transcript", transcript("### Human: u.", "### Assistant: a", between=""), [("user", "u."), PAIR[1]]),
    ("transcript", transcript("### System: S", "### User: u", "### Assistant: a"), [("system", "S"), *PAIR]),
    ("transcript", transcript("A chat.", "### Human: u", "### Assistant: a"), [("system", "A chat."), *PAIR]),
    (
        "transcript",
        transcript("### Human: u", "### Assistant: a\n### Input: b"),
        [PAIR[0], ("assistant", "a\n### Input: b")],
    ),
    (
        "transcript",
        transcript("### Human: u", "### Assistant: a\n#### Human: b"),
        [PAIR[0], ("assistant", "a\n#### Human: b")],
    ),
    ("transcript", {"text": RENDERED}, [("user", "u\n\ni"), PAIR[1]]),
    ("transcript", {"text": RENDERED.replace("\ni\n", "\n\n")}, PAIR),
]


@pytest.mark.parametrize(("shape", "fields", "expected"), SHAPES)
def test_each_spelling_of_a_shape_gives_the_same_turns(
    shape: Shape, fields: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    conversion = convert(fields)
    assert detect_format(fields) == conversion.shape == shape
    assert turns(fields) == expected
    assert conversion.examples[0].source == "f.jsonl:7"


KEPT_OUT: list[tuple[Shape, dict[str, Any], str]] = [
    ("preference", {"prompt": "u", "chosen": "a", "rejected": "b"}, "is a preference pair"),
    ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "is a preference pair"),
    ("preference", {"question": "u", "response_j": "a", "response_k": "b"}, "is a preference pair"),
    ("preference", {"input": {}, "preferred_output": [A], "non_preferred_output": [A]}, "is a preference pair"),
    ("kto", {"prompt": "u", "completion": "a", "label": False}, "is a judged answer"),
    ("kto", {"prompt": "u", "completion": "a", "label": "False"}, "is a judged answer"),
    ("kto", {"messages": [U, A], "kto_tag": True}, "is a judged answer"),
    ("kto", {"instruction": "u", "output": "a", "kto_tag": True}, "is a judged answer"),
    ("plain text", {"text": "Once upon a time", "label": "Positive"}, "plain text without an answer"),
    ("prompt only", {"prompt": "u"}, "has a prompt but no answer to learn"),
    ("prompt only", {"instruction": "u", "text": "t"}, "has a prompt but no answer to learn"),
    ("prompt only", {"question_id": 1, "turns": ["u", "v"]}, "has a prompt but no answer to learn"),
]


@pytest.mark.parametrize(("shape", "fields", "words"), KEPT_OUT)
def test_rows_without_an_answer_to_learn_are_kept_out_with_the_right_word(
    shape: Shape, fields: dict[str, Any], words: str
) -> None:
    assert detect_format(fields) == shape
    with pytest.raises(ShapeError, match=words) as caught:
        convert(fields)
    assert caught.value.shape == shape


def test_every_shape_has_its_case_here() -> None:
    assert {shape for shape, *_ in [*SHAPES, *KEPT_OUT]} == set(get_args(Shape))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "its keys (none) are no known shape"),
        ({"id": 1, "data": {"text": "t"}, "annotations": []}, '("id", "data", "annotations") are no known shape'),
        ({str(n): n for n in range(10)}, '"7" and 2 more) are no known shape; expected alpaca'),
        ({**GOOD, "output": None}, '"output" is null, expected text'),
        ({"messages": None}, '"messages" is null, expected a list of turns'),
        ({"messages": "[{'role': 'user'}]"}, '"messages" is no valid JSON'),
        ({"messages": "hello"}, '"messages" is text, expected a list of turns'),
        ({**GOOD, "history": [["q"]]}, '"history" is no list of [question, answer]'),
        ({**GOOD, "history": ["q"]}, '"history" is no list of [question, answer]'),
        ({**GOOD, "history": [["q", ""]]}, "turn 2 (assistant) is empty"),
        ({"instruction": "u", "instances": []}, '"instances" is empty, expected a list'),
        ({"instruction": "u", "instances": "x"}, '"instances" is text, expected a list'),
        ({"instruction": "u", "instances": [{"output": 1}]}, '"output" is a number, expected text'),
        (
            {"instruction": "u", "instances": [5, {"output": ""}]},
            "instance 1: is a number, expected an object; instance 2",
        ),
        ({**GOOD, "image": "cat.png"}, 'holds "image", which is not text'),
        ({"conversations": [HUMAN, GPT], "images": ["a.png"]}, 'holds "images", which is not text'),
        ({"messages": [{**U, "images": ["a.png"]}, A]}, 'turn 1 holds "images", which is not text'),
        ({"messages": [U, {**A, "audio": {"id": "x"}}]}, 'turn 2 holds "audio", which is not text'),
        ({"messages": [{**U, "content": [{"type": "image_url", "image_url": {}}]}, A]}, 'a part of type "image_url"'),
        ({"messages": [{**U, "content": [{"type": "text", "text": None}]}, A]}, 'turn 1: "text" is null'),
        ({"messages": [{**U, "content": [3]}, A]}, 'a part of type "number"'),
        ({"messages": [U, "a"]}, "turn 2 is text, expected an object"),
        ({"messages": [U, U, A]}, "turn 2 is the user's, expected the assistant's"),
        ({"messages": [U, A, {"role": "system", "content": "S"}, U, A]}, "turn 3 is a system turn; only the first"),
        ({"messages": [U, {**A, "weight": 0}]}, "every answer has weight 0"),
        ({"messages": [U, {**A, "weight": 0.5}]}, 'turn 2: "weight" is 0.5, expected 0 or 1'),
        ({"messages": [U, {**A, "weight": "1"}]}, 'turn 2: "weight" is "1", expected 0 or 1'),
        ({"text": "before <|im_start|>user\nu<|im_end|>"}, "has text outside ChatML's turns: 'before'"),
        ({"text": "<|im_start|>narrator\nu<|im_end|>"}, 'ChatML has the role "narrator"'),
        (
            {"text": "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na\n<|im_start|>user\nv"},
            "turn 2 (assistant) has no",
        ),
        ({"text": "### Assistant: a"}, "turn 1 is the assistant's"),
    ],
)
def test_a_row_that_cannot_be_used_says_what_is_wrong_with_it(fields: dict[str, Any], words: str) -> None:
    assert words in reason(fields)


def test_null_columns_of_a_table_with_several_shapes_are_no_sign_of_a_shape() -> None:
    columns = {"messages": None, "prompt": None, "completion": None, "images": None, "weight": None}
    assert turns({**columns, "prompt": "u", "completion": "a"}) == PAIR
    assert turns({**columns, "messages": [{**U, "weight": None, "tool_calls": None, "name": None}, A]}) == PAIR


@pytest.mark.parametrize(
    "spelling",
    [
        "<noinput>",
        "No input",
        "noInput.",
        "N/A",
        "n/a",
        "None",
        "NULL",
        "nil",
        "(no input needed)",
        "No inputs required",
    ],
)
@pytest.mark.parametrize("extra", ["input", "context"])
def test_spellings_of_no_input_are_taken_as_none_and_counted_as_changed(extra: str, spelling: str) -> None:
    assert turns({**GOOD, extra: spelling}) == PAIR
    assert convert({**GOOD, extra: spelling}).changes == (f'"{extra}" says {spelling!r}: treated as no {extra}',)


@pytest.mark.parametrize("text", ["None of these", "no", "Nilpotent", "There is no input", "0", "-"])
def test_text_that_only_resembles_them_stays(text: str) -> None:
    assert turns({**GOOD, "input": text})[0] == ("user", f"u\n\n{text}")
    assert convert({**GOOD, "input": text}).changes == ()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"input": "x", "output": " "}, "turn 2 (assistant) is empty"),
        ({"input": "x", "output": None}, '"output" is null, expected text'),
        ({"input": "x"}, '"output" is null, expected text'),
        ({"input": 5, "output": "y"}, '"input" is a number, expected text'),
        ("y", "is text, expected an object"),
    ],
)
def test_one_bad_instance_costs_only_itself(bad: Any, why: str) -> None:
    instances = [{"input": "x", "output": "y"}, bad, {"input": "", "output": "z"}]
    conversion = convert({"instruction": "u", "instances": instances})
    assert [(example.source, example.answer) for example in conversion.examples] == [
        ("f.jsonl:7#1", "y"),
        ("f.jsonl:7#3", "z"),
    ]
    assert conversion.changes == (f"left out: instance 2: {why}",)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a "}, {"type": "output_text", "text": "b"}],
        [{"type": "text", "value": "a "}, "b"],
        [{"text": "a b"}],
    ],
)
def test_content_parts_are_joined_as_they_stand(content: list[Any]) -> None:
    assert turns({"messages": [U, {**A, "content": content}]}) == [("user", "u"), ("assistant", "a b")]


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
CALL = {"name": "f", "arguments": {"x": 1, "y": "é"}}
TEXT_CALL = {"name": "f", "arguments": json.dumps(CALL["arguments"])}
RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": TEXT_CALL}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "parameters": CALL["arguments"]}}]},
        {"role": "assistant", "content": None, "function_call": TEXT_CALL, "tool_calls": None},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([TEXT_CALL])},
    ],
)
@pytest.mark.parametrize(
    "result", [RESULT, {"role": "function", "name": "f", "content": "r"}, {"from": "observation", "value": "r"}]
)
@pytest.mark.parametrize("tools", [[FUNCTION], [{"type": "function", "function": FUNCTION}], json.dumps([FUNCTION])])
def test_calls_results_and_tools_are_one_form_whatever_their_spelling(calling: Any, result: Any, tools: Any) -> None:
    (example,) = convert({"messages": [U, calling, result, A], "tools": tools}).examples
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert example.messages[2]["content"] == "r"
    assert example.tools == ({"type": "function", "function": FUNCTION},)


def test_a_call_may_be_the_answer_and_older_rows_name_their_tools_functions() -> None:
    (example,) = convert({"messages": [U, {**A, "tool_calls": [CALL]}], "functions": [FUNCTION]}).examples
    assert example.answer == f"a\nf({CALL['arguments']})"
    assert example.tools[0]["function"] == FUNCTION


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([U, {**A, "tool_calls": [{"function": {}}]}], "turn 2: a call has no function name"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}], "turn 2: the arguments of f is no valid JSON"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "the arguments of f are a list, expected an"),
        ([{**U, "tool_calls": [CALL]}, A], "turn 1 is the user's and calls functions; only the assistant may"),
        ([U, {**A, "tool_calls": [CALL]}, U, A], "turn 3 is the user's, expected the tool's"),
        ([U, A, RESULT, A], "turn 3 is the tool's, expected the user's"),
        ([HUMAN, {"from": "function_call", "value": "f(1)"}], "turn 2: the call is no valid JSON"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}], "turn 2 (assistant) holds half a"),
    ],
)
def test_a_broken_call_is_refused_with_its_turn(messages: list[Any], words: str) -> None:
    assert words in reason({"messages": messages})


@pytest.mark.parametrize("tools", ["{", "5", [5], {"name": "f"}])
def test_tools_that_are_no_list_of_functions_are_refused(tools: Any) -> None:
    assert '"tools" is no' in reason({"messages": [U, A], "tools": tools})


@pytest.mark.parametrize(("name", "no", "yes"), [("weight", 0, 1), ("loss_weight", 0.0, 1.0), ("train", False, True)])
def test_an_answer_of_weight_0_is_context_only(name: str, no: Any, yes: Any) -> None:
    conversion = convert({"messages": [{**U, name: no}, {**A, name: no}, {**U, name: yes}, {**A, name: yes}]})
    assert [turn.get("learn", True) for turn in conversion.examples[0].messages] == [True, False, True, True]
    assert conversion.changes == (f'turn 3: "{name}" 1 on the user\'s turn is not used; only answers are learned',)


def test_reasoning_beside_the_content_is_reported_as_left_out() -> None:
    conversion = convert({"messages": [U, {**A, "reasoning_content": "hm"}, U, {**A, "reasoning_content": ""}]})
    assert conversion.changes == ('turn 2: "reasoning_content" is not taken over',)


def test_the_task_is_taken_from_task_or_category() -> None:
    named = [{"task": "t", "category": "c"}, {"task": " ", "category": "c"}, {"task": 5}]
    assert [convert({**GOOD, **fields}).examples[0].task for fields in named] == ["t", "c", None]


def test_mapped_columns_are_read_as_the_fields_they_are_said_to_be(tmp_path: Path) -> None:
    columns = parse_columns(["instruction=Frage", "output=a=b", "task=Art"])
    assert columns == {"instruction": "Frage", "output": "a=b", "task": "Art"}
    path = tmp_path / "d.csv"
    path.write_text("Frage,a=b,Art,instruction\nu,a,t,other\n")
    ((row, conversion),) = convert_rows(path, DataReport(), columns=columns)
    assert [(turn["role"], turn["content"]) for turn in conversion.examples[0].messages] == PAIR
    assert conversion.examples[0].task == "t"
    assert row.fields["instruction"] == "other", "a report shows the row as it stands in the file"


def test_a_mapped_column_that_is_missing_is_named_unless_the_row_needs_no_map(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(row) for row in [GOOD, {"q": "u"}, {"text": "t"}, {"q": "u", "r": "a"}, {"q": "u", "r": ""}]
        )
    )
    report = DataReport()
    kept = list(convert_rows(path, report, columns={"instruction": "q", "output": "r"}))
    assert [row.line for row, _ in kept] == [1, 4]
    assert [str(problem) for problem in report.problems] == [
        f'{path}:2: has no column "r", which --map names; its columns: "q"',
        f'{path}:3: has no column "q", which --map names; its columns: "text"',
        f"{path}:5: turn 2 (assistant) is empty",
    ]
    assert report.problems[2].original == {"q": "u", "r": ""}
    assert (report.rows_in, report.kept, report.rejected) == (5, 2, 3)


def test_two_columns_can_change_places() -> None:
    swapped = map_columns(
        {"output": "u", "instruction": "a", "id": 1}, {"instruction": "output", "output": "instruction"}
    )
    assert swapped == {"instruction": "u", "output": "a", "id": 1}
    assert map_columns({"q": "u", "id": 1}, {"prompt": "q"}) == {"prompt": "u", "id": 1}


def test_every_bad_pair_of_a_map_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_columns(["output=a", "output=b", "colour=c", "instruction", "prompt=", "=d"])
    lines = str(caught.value).splitlines()[1:]
    assert [line.split("; ")[0] for line in lines] == [
        '  - "instruction": expected FIELD=COLUMN',
        '  - "prompt=": expected FIELD=COLUMN',
        '  - "=d": expected FIELD=COLUMN',
        '  - "colour" is no field',
        '  - "output" is mapped twice',
    ]


@pytest.mark.parametrize(
    ("name", "shape", "kept", "rows"),
    [
        ("alpaca/dolly_12.json", "dolly", 12, 12),
        ("self_instruct/seed_tasks.jsonl", "self-instruct", 175, 175),
        ("sharegpt/glaive_toolcall_en_demo.json", "sharegpt", 300, 300),
        ("messages/v1_sft_demo.jsonl", "messages", 500, 500),
        ("preference/dpo_en_demo.json", "preference", 0, 300),
        ("preference/kto_en_demo.json", "kto", 0, 300),
        ("preference/stack_exchange_paired_tiny.json", "preference", 0, 25),
        ("raw/nih_abstracts_10.jsonl", "plain text", 0, 10),
        ("raw/structured_demo.parquet", "plain text", 0, 6),
        ("eval/ifeval_input_data.jsonl", "prompt only", 0, 541),
    ],
)
def test_real_files_have_the_shape_that_their_makers_gave_them(
    shared_data: Path, name: str, shape: Shape, kept: int, rows: int
) -> None:
    report = DataReport()
    assert len(list(convert_rows(shared_data / name, report))) == kept
    assert report.shapes == {shape: rows}
