"""Functions, calls and results as text, for chat templates that have no place for them.

Stands beside chat_format, which asks here before it renders a conversation with tools: `spell_tools` writes them the
way Hermes and Qwen do, as JSON between tags in ordinary turns; `find_missing` tells whether a template that claims
to render them really did.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from qlora_tune.turns import Message

Tools = Sequence[Mapping[str, Any]]  # JSON schemas: {"type": "function", "function": {"name": …, …}}


def uses_tools(messages: Sequence[Message], tools: Tools) -> bool:
    """Whether a conversation offers functions, calls one, or holds what one gave back."""
    return bool(tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages)


def spell_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """Write tools into the system turn, calls into the assistant's text and results into user turns."""
    turns = list(messages)
    spelled: list[Message] = []
    if tools:
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        spelled.append(Message(role="system", content="\n\n".join(filter(None, [system, _list_tools(tools)]))))
    for are_results, group in groupby(turns, key=lambda turn: turn["role"] == "tool"):
        if are_results:
            results = "\n".join(f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in group)
            spelled.append(Message(role="user", content=results))
        else:
            spelled += [_spell_calls(turn) for turn in group]
    return spelled


def to_template_turn(turn: Message) -> dict[str, Any]:
    """A turn in the form that Transformers' chat templates read."""
    calls = [{"type": "function", "function": dict(call)} for call in turn.get("tool_calls", [])]
    shown: dict[str, Any] = {"role": turn["role"], "content": turn["content"]}
    return {**shown, "tool_calls": calls} if calls else shown


def find_missing(rendered: str, messages: Sequence[Message], tools: Tools) -> str | None:
    """The first function, call or result that a template left out of what it rendered; None when all is there.

    White space doesn't count, and text may stand there as JSON spells it. What the assistant says beside a call is
    looked for in the last turn only: templates drop earlier thoughts.
    """
    seen = _squeeze(rendered)
    calls = [call for turn in messages for call in turn.get("tool_calls", [])]
    texts = [text for tool in tools for text in _heads(tool)]
    texts += [turn["content"] for turn in messages if turn["role"] == "tool"]
    texts += [turn["content"] for turn in messages[-1:] if turn.get("tool_calls")]
    texts += [text for call in calls for text in _strings(call["arguments"])]
    for name, times in Counter(call["name"] for call in calls).items():
        if seen.count(_squeeze(name)) < times:
            return name
    return next((text for text in texts if _squeeze(text) not in seen and _squeeze(_as_json(text)) not in seen), None)


def _list_tools(tools: Tools) -> str:
    schemas = "\n".join(_to_json(tool) for tool in tools)
    return (
        "You may call the functions below to answer, each described by one line of JSON.\n"
        f"<tools>\n{schemas}\n</tools>\n"
        "To call one, answer with its name and its arguments, one block for each call:\n"
        '<tool_call>\n{"name": FUNCTION, "arguments": {NAME: VALUE}}\n</tool_call>'
    )


def _spell_calls(turn: Message) -> Message:
    spelled = turn.copy()
    calls = [f"<tool_call>\n{_to_json(call)}\n</tool_call>" for call in spelled.pop("tool_calls", [])]
    if calls:
        spelled["content"] = "\n".join(filter(str.strip, [turn["content"], *calls]))
    return spelled


def _to_json(value: Any) -> str:
    # Rows from Parquet files may hold dates and the like, which JSON writes as text.
    return json.dumps(value, ensure_ascii=False, default=str)


def _as_json(text: str) -> str:
    return json.dumps(text.strip(), ensure_ascii=False)[1:-1]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _heads(tool: Mapping[str, Any]) -> list[str]:
    """A function's name and description; the whole of it where it has no name."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return [_to_json(tool)]
    return [text for text in (function["name"], function.get("description")) if isinstance(text, str)]


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from (*_strings(key), *_strings(held))
    elif isinstance(value, Sequence):
        for held in value:
            yield from _strings(held)
