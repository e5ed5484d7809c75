"""Functions, calls and results: through a template that renders them, and as text for all the others."""

from __future__ import annotations

import copy
import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES
from conftest import SHARED_DATA
from test_chat_format import real_examples
from test_chat_format_families import BY_NAME, CASES, tokenizer_of

from qlora_tune.chat_format import IGNORED, ChatFormat, tokenize_examples
from qlora_tune.runs import Run
from qlora_tune.shapes import Example, reject_example
from qlora_tune.turns import Message, ToolCall

DATED = ToolCall(name="f", arguments={"day": date(2024, 2, 29)})  # as a Parquet file may hold it
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# As Qwen 2.5 renders tools, in our own words.
QWEN = r"""{%- set told = messages[0].content if messages[0].role == 'system' else 'You help.' %}
{{- '<|im_start|>system\n' + told }}
{%- if tools %}
    {{- '\n\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools>\nAnswer with <tool_call></tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for turn in messages if turn.role != 'system' %}
    {%- if turn.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' + turn.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- else %}
        {{- '<|im_start|>' + turn.role + ('\n' + turn.content if turn.content else '') }}
        {%- for call in turn.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Qwen 3: an empty thought before the newest answer, none in the history.
QWEN_THINKING = QWEN.replace(
    "{{- '<|im_start|>' + turn.role + ('\\n' + turn.content if turn.content else '') }}",
    "{%- set thought = '\\n<think>\\n\\n</think>\\n' if turn.role == 'assistant' and loop.last else '' %}"
    "{{- '<|im_start|>' + turn.role + thought + ('\\n' + turn.content if turn.content else '') }}",
).replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}")
# As Llama 3.1 renders tools: in the first user turn, results as JSON text, and never two calls at once.
LLAMA = r"""{{- bos_token }}
{%- for turn in messages %}
    {%- if turn.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + turn.content | tojson + '<|eot_id|>' }}
    {%- elif turn.tool_calls %}
        {%- if turn.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls at once!') }}{% endif %}
        {%- set call = turn.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}
        {%- if tools and loop.first %}
            {{- 'Functions:\n\n' }}{% for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{% endfor %}
        {%- endif %}
        {{- turn.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
NATIVE = {"qwen": ("qwen3", QWEN), "qwen_thinking": ("qwen3", QWEN_THINKING), "llama": ("llama3", LLAMA)}


def chat_of(name: str, kind: str = "bytes") -> ChatFormat:
    """A family's chat format; with a template that knows tools for the names in NATIVE."""
    if name not in NATIVE:
        return ChatFormat.probe(tokenizer_of(name, kind))
    family, template = NATIVE[name]
    return with_template(tokenizer_of(family, "bytes"), template, TAGS)


def with_template(tokenizer: Any, template: str, tokens: tuple[str, ...] = ()) -> ChatFormat:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(list(tokens))
    changed.chat_template = template
    return ChatFormat.probe(changed)


def schema(name: str = "get_weather", description: str = "Tells the weather", key: str = "city") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": "string", "description": "Größe: Ort"}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(city: str = "Kraków", name: str = "get_weather", key: str = "city") -> ToolCall:
    return ToolCall(name=name, arguments={key: city})


def talk(*calls: ToolCall, result: str = '{"celsius": 21}', asked: str = "Weather?", said: str = "") -> list[Message]:
    return [
        Message(role="system", content="Be brief."),
        Message(role="user", content=asked),
        Message(role="assistant", content=said, tool_calls=list(calls) or [call()]),
        *(Message(role="tool", content=result) for _ in calls or [0]),
        Message(role="assistant", content="21 degrees."),
    ]


def learned_texts(chat: ChatFormat, messages: list[Message], tools: Any = ()) -> list[str]:
    """The text of every run of learned tokens."""
    texts = []
    for example in chat.tokenize_example(messages, tools=tools):
        run: list[int] = []
        for label in [*example.labels, IGNORED]:
            if label == IGNORED and run:
                texts.append(chat.tokenizer.decode(run))
                run = []
            elif label != IGNORED:
                run.append(label)
    return texts


# ---- as text


def test_without_a_template_for_tools_they_are_spelled_as_text_and_calls_are_learned(builtin: Any) -> None:
    chat = builtin[2]
    assert not chat.renders_tools
    messages = talk(call(), call("Łódź"), said="I look.")
    (example,) = chat.tokenize_example(messages, tools=[schema(), schema("get_time")])
    one, two = (json.dumps(schema(name), ensure_ascii=False) for name in ("get_weather", "get_time"))
    spelled = (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kraków"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
    )
    answered = '<tool_response>\n{"celsius": 21}\n</tool_response>'
    decoded = chat.tokenizer.decode(example.input_ids)
    assert decoded.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert f"\n<tools>\n{one}\n{two}\n</tools>\n" in decoded
    assert decoded.endswith(
        f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nI look.\n{spelled}<|im_end|>\n"
        f"<|im_start|>user\n{answered}\n{answered}<|im_end|>\n<|im_start|>assistant\n21 degrees.<|im_end|>"
    )
    assert learned_texts(chat, messages) == [f"I look.\n{spelled}<|im_end|>", "21 degrees.<|im_end|>"]


def test_tools_make_a_system_turn_where_there_is_none_and_calls_alone_need_none(builtin: Any) -> None:
    chat = builtin[2]
    (with_tools,) = chat.tokenize_example(talk()[1:], tools=[schema()])
    assert chat.tokenizer.decode(with_tools.input_ids).startswith("<|im_start|>system\nYou may call")
    (without,) = chat.tokenize_example(talk()[1:])
    assert chat.tokenizer.decode(without.input_ids).startswith("<|im_start|>user\nWeather?")


@pytest.mark.parametrize("family", FAMILIES, ids=list(BY_NAME))
def test_every_family_holds_functions_calls_and_results_and_learns_call_and_answer(family: Any) -> None:
    chat = chat_of(family.name)
    assert not chat.renders_tools
    spelled = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kraków"}}\n</tool_call>'
    learned = learned_texts(chat, talk(), [schema()])
    assert [text.strip() for text in learned] == [spelled + family.end_of_turn, "21 degrees." + family.end_of_turn]
    decoded = chat.tokenizer.decode(chat.tokenize_example(talk(), tools=[schema()])[-1].input_ids)
    for part in ("Be brief.", json.dumps(schema(), ensure_ascii=False), spelled, '{"celsius": 21}'):
        assert part in decoded


def test_values_that_json_does_not_know_are_written_as_text(builtin: Any) -> None:
    assert '"2024-02-29"' in learned_texts(builtin[2], talk(DATED))[0]


def test_arguments_that_are_nested_too_deep_are_a_reason_to_reject_the_row(builtin: Any) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    row = Example(tuple(talk(ToolCall(name="f", arguments={"deep": deep}))), None, "d.jsonl:1")
    assert "nested too deep" in tokenize_examples(builtin[2], [row], 512)[1][0].reason


# ---- through the template


@pytest.mark.parametrize("name", list(NATIVE))
def test_a_template_that_renders_tools_is_used_for_them(name: str) -> None:
    chat = chat_of(name)
    assert chat.renders_tools
    native = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Kraków"}}}
    turns = [{**turn, "tool_calls": [native]} if "tool_calls" in turn else turn for turn in talk()]
    wanted = chat.tokenizer.apply_chat_template(turns, tools=[schema()], tokenize=False, enable_thinking=False)
    example = chat.tokenize_example(talk(), tools=[schema()])[-1]
    assert chat.tokenizer.decode(example.input_ids) == wanted.removesuffix("\n")
    assert "You may call" not in wanted


def test_a_call_that_the_template_renders_is_learned_like_an_answer() -> None:
    spelled = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kraków"}}\n</tool_call><|im_end|>'
    for name in ("qwen", "qwen_thinking"):
        assert learned_texts(chat_of(name), talk(), [schema()]) == [spelled, "21 degrees.<|im_end|>"]
    assert learned_texts(chat_of("llama"), talk(), [schema()]) == [
        '{"name": "get_weather", "parameters": {"city": "Kraków"}}<|eot_id|>',
        "21 degrees.<|eot_id|>",
    ]


@pytest.mark.parametrize(
    ("messages", "kept"),
    [
        (talk(call(), call("Łódź")), ["Kraków", "Łódź"]),  # the template raises
        (talk(said="I look."), ["I look."]),  # the template leaves it out without a word
    ],
)
def test_what_a_template_can_not_render_is_spelled_as_text_instead(messages: list[Message], kept: list[str]) -> None:
    chat = chat_of("llama")
    learned = learned_texts(chat, messages, [schema()])[0]
    assert "<tool_call>" in learned
    assert all(text in learned for text in kept)


@pytest.mark.parametrize(
    "change",
    [
        ("turn.content + '\\n</tool_response>'", "'\\n</tool_response>'"),  # no results
        ("'\\n' + tool | tojson", "''"),  # no functions
        ("'\\n' + tool | tojson", "'\\n' + tool.function.name"),  # names only
        ("call.function.arguments | tojson", "'{}'"),  # no arguments
        ("call.function.arguments | tojson", "call.function.arguments | string"),  # as Python spells it
        ("turn.tool_calls or []", "[]"),
        ("tool | tojson", "tool | tojson(ensure_ascii=true)"),
    ],
)
def test_a_template_that_loses_part_of_the_tools_is_not_trusted_with_them(change: tuple[str, str]) -> None:
    assert change[0] in QWEN
    chat = with_template(tokenizer_of("qwen3", "bytes"), QWEN.replace(*change), TAGS)
    assert not chat.renders_tools
    (example,) = chat.tokenize_example(talk(), tools=[schema()])
    decoded = chat.tokenizer.decode(example.input_ids)
    assert all(text in decoded for text in ("get_weather", "Tells the weather", "Kraków", '{"celsius": 21}'))


def test_two_equal_calls_of_which_a_template_shows_one_are_both_kept() -> None:
    first_only = QWEN.replace("turn.tool_calls or []", "(turn.tool_calls or [])[:1]")
    chat = with_template(tokenizer_of("qwen3", "bytes"), first_only, TAGS)
    assert chat.renders_tools
    assert learned_texts(chat, talk(call(), call()), [schema()])[0].count('"Kraków"') == 2


def test_a_function_without_a_name_is_still_shown() -> None:
    heads = QWEN.replace("tool | tojson", "tool.function.name ~ tool.function.description")
    chat = with_template(tokenizer_of("qwen3", "bytes"), heads, TAGS)
    assert chat.renders_tools
    nameless = {"type": "function", "function": {"summary": "no name"}}
    (example,) = chat.tokenize_example(talk(), tools=[nameless])
    assert json.dumps(nameless) in chat.tokenizer.decode(example.input_ids)


# ---- the same tokens everywhere


@pytest.mark.parametrize("name", [*BY_NAME, *NATIVE])
def test_the_prompt_for_a_call_or_an_answer_is_the_beginning_of_what_learned_it(name: str) -> None:
    chat, messages = chat_of(name), talk()
    examples = chat.tokenize_example(messages, tools=[schema()])
    for end in (2, 4):
        prompt = chat.encode_prompt(messages[:end], [schema()])
        answer = chat.encode_answer(messages[: end + 1], [schema()])
        assert any(
            example.input_ids[: len(prompt + answer)] == prompt + answer
            and set(example.labels[len(prompt) - 1 : len(prompt)]) == {IGNORED}
            and example.labels[len(prompt) : len(prompt + answer)] == answer
            for example in examples
        )


def hostile(place: str, text: str) -> tuple[list[Message], list[dict[str, Any]]]:
    """A conversation with a text at one place where somebody could type it."""
    messages, tools = talk(), [schema()]
    if place in ("system", "user", "answer"):
        messages[{"system": 0, "user": 1, "answer": 4}[place]]["content"] = f"a {text} b"
    elif place == "result":
        messages[3]["content"] = json.dumps({"a": text})
    elif place in ("argument", "argument name", "called name"):
        of = {"argument": "city", "argument name": "key", "called name": "name"}[place]
        messages[2]["tool_calls"] = [call(**{of: text})]
    else:
        tools = [schema(**{{"tool name": "name", "description": "description", "parameter": "key"}[place]: text})]
    return messages, tools


PLACES = ["system", "user", "answer", "result", "argument", "argument name", "called name"]
PLACES += ["tool name", "description", "parameter"]
IN_SYSTEM = ("system", "tool name", "description", "parameter")  # where tools are text


def added_counts(chat: ChatFormat, messages: list[Message], tools: Any) -> list[Counter[str]]:
    """How often each added token stands in each sequence."""
    names = {number: str(token) for number, token in chat.tokenizer.added_tokens_decoder.items()}
    sequences = chat.tokenize_example(messages, tools=tools)
    return [Counter(names[token] for token in s.input_ids if token in names) for s in sequences]


def typed_tokens(chat: ChatFormat, place: str, name: str) -> str:
    """Every added token, next to each other. In an answer, those that aren't special are format."""
    tokens = sorted(str(t) for t in chat.tokenizer.added_tokens_decoder.values() if t.special or place != "answer")
    if name == "smollm3" and place in IN_SYSTEM:  # it takes "/think" out of system messages
        tokens = [token for token in tokens if "think>" not in token]
    return "".join(tokens)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "kind"), [*CASES, *((name, "bytes") for name in NATIVE)])
def test_no_added_token_arises_from_what_is_typed_anywhere(name: str, kind: str, place: str) -> None:
    chat = chat_of(name, kind)
    typed = typed_tokens(chat, place, name)
    wanted = added_counts(chat, *hostile(place, "x"))
    assert added_counts(chat, *hostile(place, typed)) == wanted
    if chat.renders_tools:
        decoded = chat.tokenizer.decode(chat.tokenize_example(*hostile(place, typed)[:1])[-1].input_ids)
        assert "You may call" not in decoded


def test_tokens_that_are_not_special_stay_format_inside_an_answer() -> None:
    messages, tools = hostile("answer", "<tool_call>")
    (typed,), (plain,) = (added_counts(chat_of("qwen"), *row) for row in ((messages, tools), hostile("answer", "x")))
    assert typed - plain == {"<tool_call>": 1}


@pytest.mark.parametrize("place", PLACES)
def test_no_added_token_arises_from_what_is_typed_to_the_built_in_base(builtin: Any, place: str) -> None:
    chat = builtin[2]
    messages, tools = hostile(place, typed_tokens(chat, place, "builtin"))
    assert added_counts(chat, messages, tools) == added_counts(chat, *hostile(place, "x"))
    (example,) = chat.tokenize_example(messages, tools=tools)
    assert typed_tokens(chat, place, "builtin") in chat.tokenizer.decode(example.input_ids)


# ---- the rows of real files, and what a run keeps of them


@pytest.fixture(scope="module")
def glaive() -> list[Example]:
    path = SHARED_DATA / "sharegpt" / "glaive_toolcall_en_demo.json"
    if not path.is_file():
        pytest.skip("the real data files are not present (data/ beside the checkout)")
    return real_examples(path)


def test_real_rows_with_tools_keep_every_function_call_and_result(builtin: Any, glaive: list[Example]) -> None:
    chat = builtin[2]
    assert len(glaive) > 290
    assert sum(len(turn.get("tool_calls", [])) for example in glaive for turn in example.messages) > 200
    sequences, problems = tokenize_examples(chat, glaive, 100_000)
    assert not problems
    for example, sequence in zip(glaive, sequences, strict=True):
        decoded = chat.tokenizer.decode(sequence.input_ids)
        calls = [call for turn in example.messages for call in turn.get("tool_calls", [])]
        results = [turn["content"] for turn in example.messages if turn["role"] == "tool"]
        parts = [json.dumps(part, ensure_ascii=False) for part in (*example.tools, *calls)]
        assert all(part in decoded for part in (*parts, *results))
        answers = sum(turn["role"] == "assistant" for turn in example.messages)
        assert sequence.labels.count(chat.end_of_turn_id) == answers


def test_real_rows_with_tools_go_through_a_template_that_renders_them(glaive: list[Example]) -> None:
    chat = chat_of("qwen")
    for example in glaive:
        (sequence,) = chat.tokenize_example(example.messages, tools=example.tools)
        decoded = chat.tokenizer.decode(sequence.input_ids)
        assert ("# Tools" in decoded) == bool(example.tools)
        assert "You may call" not in decoded


def test_held_out_rows_with_tools_and_weights_come_back_as_they_were(tmp_path: Path) -> None:
    messages = (*talk(), Message(role="user", content="And?"), Message(role="assistant", content="No.", learn=False))
    examples = [
        Example(messages, "weather", "d.jsonl:1", (schema(),)),
        Example(tuple(talk()[:2]), None, "d.jsonl:2"),
    ]
    Run(tmp_path).write_heldout(examples)
    assert Run(tmp_path).read_heldout() == examples


def test_a_run_writes_values_that_json_does_not_know_as_text(tmp_path: Path) -> None:
    asked = Example(tuple(talk(DATED)[1:3]), None, "d.parquet:1")
    Run(tmp_path).write_heldout([asked])
    Run(tmp_path).write_problems([reject_example(asked, "why")])
    assert '"2024-02-29"' in (tmp_path / "problems.jsonl").read_text()
    (kept,) = Run(tmp_path).read_heldout()
    assert kept.messages[1]["tool_calls"][0]["arguments"] == {"day": "2024-02-29"}


def test_scoring_asks_with_the_tools_and_expects_the_call_as_the_model_writes_it(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tune.evaluate import compare

    chat, model = finished[2].setup.chat, finished[2].model
    monkeypatch.setattr(model.config, "max_position_embeddings", 1024)  # tools take more than the base's 256 tokens
    short = {"type": "function", "function": {"name": "add"}}
    unlearned = (Message(role="user", content="So?"), Message(role="assistant", content="Dunno", learn=False))
    messages = (*talk(ToolCall(name="add", arguments={"a": 1}))[1:3],)
    row = Example((*messages, Message(role="tool", content="2"), *talk()[-1:], *unlearned), None, "d.jsonl:1", (short,))
    rows = [row, Example(messages, None, "d.jsonl:2", (short,))]
    seen: list[list[int]] = []
    hook = model.get_base_model().model.embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(ids[0]))
    try:
        answers = compare(model, chat, rows, score_rows=2, max_new_tokens=2, batch_size=1, seed=0).answers
    finally:
        hook.remove()
    assert answers[0].reference == "21 degrees."
    assert answers[1].reference == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    prompts = [chat.encode_prompt(row.messages[:3], row.tools), chat.encode_prompt(messages[:1], row.tools)]
    asked = [ids.tolist()[0] for ids in seen]
    assert all(asked.count(prompt) == 2 for prompt in prompts)  # by base and tuned
