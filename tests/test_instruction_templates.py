"""Instruction templates: literal substitution, even dealing, and every mistake in a file named at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from qlora_tune.data import duplicate_key
from qlora_tune.errors import ConfigError
from qlora_tune.instruction_templates import InstructionTemplate, expand_templates, load_templates
from qlora_tune.shapes import Example
from qlora_tune.turns import Message


def example(user: str, answer: str, task: str | None = "t", system: str = "", line: int = 1) -> Example:
    turns = [Message(role="system", content=system)] if system else []
    turns += [Message(role="user", content=user), Message(role="assistant", content=answer)]
    return Example(tuple(turns), task, f"a.jsonl:{line}")


def rows(number: int, task: str | None = "t") -> list[Example]:
    return [example(f"q{line}", f"a{line}", task, line=line) for line in range(number)]


def template(**fields: str) -> InstructionTemplate:
    return InstructionTemplate.model_validate({"task": "t", **fields})


def contents(made: Example) -> list[str]:
    return [turn["content"] for turn in made.messages]


def problems_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_templates(path)
    return str(raised.value)


def test_all_four_fields_are_filled_in() -> None:
    given = template(system="{system} For {task}.", user="Ask: {prompt}", assistant="So: {answer}")
    (made,) = expand_templates([example("q", "a", system="Be kind.")], [given], seed=1)
    assert contents(made) == ["Be kind. For t.", "Ask: q", "So: a"]
    assert [turn["role"] for turn in made.messages] == ["system", "user", "assistant"]
    assert (made.task, made.source, made.template) == ("t", "a.jsonl:1", 1)


@pytest.mark.parametrize(
    "text", ["{answer}", "{{x}}", "{", "}", "{0}", "{prompt.__class__}", "%s $answer \\1 {task!r}"]
)
def test_what_stands_in_a_row_is_never_read_as_a_template(text: str) -> None:
    (made,) = expand_templates(
        [example(text, text + "!")], [template(user="Q {{ {prompt} }}", assistant="A {answer}")], 1
    )
    assert contents(made) == [f"Q {{ {text} }}", f"A {text}!"]


def test_a_template_without_a_system_text_keeps_the_rows_own() -> None:
    (made,) = expand_templates([example("q", "a", system="Own.")], [template(user="Q: {prompt}")], 1)
    assert contents(made) == ["Own.", "Q: q", "a"]


def test_a_reversed_template_asks_for_the_prompt() -> None:
    given = template(user="Which question has the answer {answer}?", assistant="{prompt}")
    (made,) = expand_templates([example("q", "a")], [given], 1)
    assert contents(made) == ["Which question has the answer a?", "q"]
    assert given.is_reversed
    assert not template().is_reversed


def test_templates_are_dealt_out_evenly_and_by_the_seed() -> None:
    given = [template(user=f"{number}: {{prompt}}") for number in range(3)]
    first, again, other = (expand_templates(rows(32), given, seed) for seed in (1, 1, 2))
    assert sorted(Counter(row.template for row in first).values()) == [10, 11, 11]
    assert first == again
    assert [row.template for row in first] != [row.template for row in other]
    assert [row.source for row in first] == [row.source for row in rows(32)]
    assert [row.template for row in first[:6]] not in ([1, 2, 3, 1, 2, 3], [1, 1, 2, 2, 3, 3])


def test_a_row_gets_only_templates_of_its_task_and_of_every_task() -> None:
    given = [template(user="t {prompt}"), template(task="u", user="u {prompt}"), template(task="*", user="* {prompt}")]
    used = {
        task: {row.template for row in expand_templates(rows(40, task), given, 1)} for task in ("t", "u", "v", None)
    }
    assert used == {"t": {1, 3}, "u": {2, 3}, "v": {3}, None: {3}}


def test_several_copies_of_a_row_are_in_different_templates() -> None:
    given = [template(user=f"{number}: {{prompt}}") for number in range(3)]
    two = expand_templates(rows(9), given, 1, per_row=2)
    assert len(two) == 18
    assert all(len({row.template for row in two[at : at + 2]}) == 2 for at in range(0, 18, 2))
    assert set(Counter(row.template for row in two).values()) == {6}
    assert len(expand_templates(rows(9), given, 1, per_row=5)) == 27


def test_chats_of_several_turns_and_rows_with_tools_stay_as_they_are() -> None:
    long = Example((*rows(1)[0].messages, *rows(2)[1].messages), "t", "a.jsonl:1")
    tools = Example(rows(1)[0].messages, "t", "a.jsonl:2", tools=({"type": "function", "function": {"name": "f"}},))
    call = Message(role="assistant", content="Let me see.", tool_calls=[{"name": "f", "arguments": {}}])
    calls = Example((Message(role="user", content="q"), call), "t", "a.jsonl:3")
    made = expand_templates([long, tools, calls], [template(user="Q: {prompt}")], 1)
    assert [(row.messages, row.tools, row.template) for row in made] == [
        (given.messages, given.tools, None) for given in (long, tools, calls)
    ]


def test_a_template_is_left_to_rows_that_have_text_for_all_its_fields() -> None:
    given = [template(task="*", user="{task}: {prompt}"), template(task="*", user="{system} {prompt}")]
    made = expand_templates([example("q", "a", None), example("q", "a"), example("q", "a", None, "S")], given, 1)
    assert [row.template for row in made] == [None, 1, 2]


def test_a_wording_that_is_seen_is_avoided_where_there_is_a_choice() -> None:
    given = [template(user="Q: {prompt}"), template(user="Write: {answer}", assistant="{prompt}")]
    seen = {duplicate_key(example("Write: yes", "x"))}
    asked = [example(f"q{line}", "yes", line=line) for line in range(6)]
    assert {row.template for row in expand_templates(asked, given, 1)} == {1, 2}
    assert {row.template for row in expand_templates(asked, given, 1, 2, seen)} == {1}
    assert [row.template for row in expand_templates(asked, given[1:], 1, 1, seen)] == [1] * 6


def test_templates_read_alike_from_toml_and_json_lines(tmp_path: Path) -> None:
    tables = [
        {"task": "t", "user": "Ä {prompt}"},
        {"task": "*", "system": "S", "user": "{answer}", "assistant": "{prompt}"},
    ]
    toml, lines = tmp_path / "t.toml", tmp_path / "t.jsonl"
    text = "".join("[[template]]\n" + "".join(f'{k} = "{v}"\n' for k, v in table.items()) for table in tables)
    toml.write_text(text, encoding="utf-8")
    lines.write_text("".join(json.dumps(table) + "\n" for table in tables), encoding="utf-8")
    assert load_templates(toml) == load_templates(lines)
    assert [one.user for one in load_templates(toml)] == ["Ä {prompt}", "{answer}"]


def test_every_problem_of_a_template_file_is_named_with_the_templates_number(tmp_path: Path) -> None:
    text = """
        [[template]]
        task = "t"
        user = "{promt} and {input}"
        [[template]]
        user = "{prompt}"
        asistant = "{answer}"
        [[template]]
        task = "t"
        user = 'JSON: {"a": 1} {prompt}'
        [[template]]
        task = "t"
        user = "{ {prompt}"
        [[template]]
        task = "t"
        assistant = "{answer!r}"
    """
    found = problems_of(tmp_path / "t.toml", text)
    assert (
        "template 1: user = '{promt} and {input}': unknown field {promt}, {input}; known are {prompt}, {answer}"
        in found
    )
    assert "template 2: task is missing" in found
    assert 'template 2: asistant: no such key. Did you mean "assistant"?' in found
    assert 'unknown field {"a": 1}' in found
    assert "template 4: user = '{ {prompt}'" in found
    assert "unknown field {answer!r}" in found


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("Classify {prompt}: {answer}", "{answer}"),
        ("{prompt}", "{prompt}"),
        ("{prompt}", "Fine."),
        ("Say something.", "{answer}"),
    ],
)
def test_a_template_that_shows_its_answer_or_teaches_nothing_is_refused(
    tmp_path: Path, user: str, assistant: str
) -> None:
    line = json.dumps({"task": "t", "user": user, "assistant": assistant}) + "\n"
    assert "template 1" in problems_of(tmp_path / "t.jsonl", line)


def test_a_file_of_no_templates_says_what_was_expected(tmp_path: Path) -> None:
    assert "template is missing" in problems_of(tmp_path / "t.toml", "")
    assert "line 2: not valid JSON" in problems_of(tmp_path / "t.jsonl", '{"task": "t"}\n{"task"\n')
    assert ".toml" in problems_of(tmp_path / "t.yaml", "")
    with pytest.raises(ConfigError, match="no such file"):
        load_templates(tmp_path / "missing.jsonl")
