"""The turns of one conversation: every usual way to write them, read into one form and checked.

Handles OpenAI's messages (content parts, tools and tool calls, weights), ShareGPT's from and value, ChatML text, and
transcripts with roles as headings.
"""

from __future__ import annotations

import json
import re
from typing import Any, NotRequired, TypedDict

from qlora_tune.json_stream import decode_row

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\r?\n(.*?)(?:<\|im_end\|>|\Z)", re.S)
_HEADING = re.compile(r"(?<!#)###\s*(System|Human|User|Instruction|Input|Assistant|Response)\s*:\s*")
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos", "pixel_values")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ASKING = ("human", "user", "instruction", "input")
_ANSWERING = ("assistant", "response")
# How templates write the end of a turn or text.
_TRAILING_END = re.compile(
    r"(?:<\|(?:endoftext|im_end|eot_id|eot|eom_id|end_of_text|end_of_turn|end|return)\|>|</s>|<eos>|<end_of_turn>"
    r"|<turn\|>|<｜end▁of▁sentence｜>)\s*\Z"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """Why one row can't be used."""


class ToolCall(TypedDict):
    """A function that the assistant calls, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


class Message(TypedDict):
    """One turn: role is system, user, assistant, or tool (what a called function gave back)."""

    role: str
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    learn: NotRequired[bool]  # False: an assistant's turn that is context only


def type_name(value: Any) -> str:
    """What JSON calls a value's type, as one says what something is: "a list", "null"."""
    names = {list: "a list", dict: "an object", bool: "a true/false value", str: "text"}
    names |= dict.fromkeys((int, float), "a number")
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def strip_end_mark(text: str) -> str:
    """Take out a template's end-of-text mark behind a text; </s> after <s> is a struck-out passage."""
    marked = text.rstrip().endswith(("|>", "</s>", "<eos>", "_turn>", "｜>"))
    found = _TRAILING_END.search(text) if marked else None
    return text if not found or ("</s>" in found.group() and "<s>" in text) else text[: found.start()].rstrip()


def read_text(fields: dict[str, Any], key: str, what: str = "") -> str:
    """A field that must be text. Raises RowError with what it is instead."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise RowError(f'{what}"{key}" is {type_name(value)}, expected text')
    return value


def read_turns(value: Any, key: str, changes: list[str]) -> list[Message]:
    """Read a list of turns, by role and content or by from and value. Appends to `changes` what was not taken over."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, f'"{key}"')  # as in a CSV file, whose cells are text
    if not isinstance(value, list) or not value:
        raise RowError(f'"{key}" is {"empty" if value == [] else type_name(value)}, expected a list of turns')
    return [_read_turn(turn, f"turn {number}", changes) for number, turn in enumerate(value, start=1)]


def read_tools(fields: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that a row offers to the assistant, from "tools" or "functions": a list, or JSON text of one."""
    value = fields.get("tools") or fields.get("functions")
    if isinstance(value, str) and value.strip():
        value = _from_json(value, '"tools"')
    if not value or isinstance(value, str):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError('"tools" is no list of objects')
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def split_chatml(text: str) -> list[Message]:
    """Read ChatML text into turns. Raises RowError where text stands between or before the turns."""
    rest = _CHATML_TURN.sub("", text)
    if rest.strip():
        raise RowError(f"has text outside ChatML's turns: {rest.strip()[:40]!r}")
    turns = [Message(role=_role(m[1], "ChatML"), content=m[2].strip("\r\n")) for m in _CHATML_TURN.finditer(text)]
    for number, turn in enumerate(turns, start=1):
        if "<|im_start|>" in turn["content"]:
            raise RowError(f"turn {number} ({turn['role']}) has no <|im_end|>")
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # a text that ends in the prompt for the next answer
    return turns


def split_roles(text: str) -> list[Message]:
    """Read a transcript whose turns begin with headings such as `### Human:` or Alpaca's `### Instruction:`.

    Alpaca's fixed opening sentence before the first heading is left out, as is anything Alpaca put there; the
    `### Input:` part goes behind its instruction. Only the headings of the first exchange are some: an answer may
    have a heading of its own.
    """
    headings = list(_HEADING.finditer(text))
    names = [heading[1].lower() for heading in headings]
    used = {
        "system",
        *next(([name] for name in names if name in _ASKING), []),
        *next(([name] for name in names if name in _ANSWERING), []),
    }
    used |= {"input"} if "instruction" in used else set()
    headings = [heading for heading, name in zip(headings, names, strict=True) if name in used]
    turns: list[Message] = []
    for index, heading in enumerate(headings):
        end = headings[index + 1].start() if index + 1 < len(headings) else len(text)
        content = text[heading.end() : end].strip()
        name = heading[1].lower()
        if name == "input" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}" if content else turns[-1]["content"]
            continue
        role = {"instruction": "user", "input": "user", "response": "assistant"}.get(name) or ROLES[name]
        turns.append(Message(role=role, content=content))
    opening = text[: headings[0].start()].strip() if headings else ""
    if opening and not opening.startswith("Below is an instruction"):
        turns.insert(0, Message(role="system", content=opening))
    return turns


def check_turns(messages: list[Message]) -> None:
    """Hold the order that every chat template can render: maybe system, then user and assistant by turns.

    Between a call and the assistant's next turn stand the results of the tools. Raises RowError.
    """
    if not messages:
        raise RowError("has no assistant turn to learn from")
    previous = ""
    for number, turn in enumerate(messages, start=1):
        role = turn["role"]
        expected = _following(previous, bool(number > 1 and messages[number - 2].get("tool_calls")))
        if role == "system" and number > 1:
            raise RowError(f"turn {number} is a system turn; only the first turn may be one")
        if role not in expected:
            raise RowError(f"turn {number} is the {role}'s, expected the {expected[0]}'s")
        if _SURROGATE.search(turn["content"] + json.dumps(turn.get("tool_calls", []), ensure_ascii=False)):
            raise RowError(f"turn {number} ({role}) holds half a character (a lone surrogate), which is no text")
        if not turn["content"].strip() and not turn.get("tool_calls"):
            raise RowError(f"turn {number} ({role}) is empty")
        previous = role
    if not any(turn["role"] == "assistant" and turn.get("learn", True) for turn in messages):
        raise RowError("every answer has weight 0: nothing to learn from")


def has_surrogate(value: Any) -> bool:
    """Whether half a character stands in any text of a JSON value."""
    return bool(value) and bool(_SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str)))


def _following(previous: str, called: bool) -> tuple[str, ...]:
    if previous == "assistant":
        return ("tool",) if called else ("user",)
    if previous == "tool":
        return ("assistant", "tool")
    return {"": ("user", "system"), "system": ("user",), "user": ("assistant",)}[previous]


def _read_turn(turn: Any, what: str, changes: list[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{what} is {type_name(turn)}, expected an object")
    named, held = ("from", "value") if "from" in turn else ("role", "content")
    name = read_text(turn, named, f"{what}: ")
    role = _role(name, what)
    if media := next((key for key in NOT_TEXT if turn.get(key)), None):
        raise RowError(f'{what} holds "{media}", which is not text; only text can be trained on')
    changes += [f'{what}: "{key}" is not taken over' for key in _REASONING if turn.get(key)]
    message = Message(role=role, content="")
    calls = _read_calls(turn, what)
    if name == "function_call":
        calls = _calls_of(_from_json(read_text(turn, held, f"{what}: "), f"{what}: the call"), what)
    elif not (calls and turn.get(held) in (None, "")):
        message["content"] = _read_content(turn, held, what)
    if calls:
        if role != "assistant":
            raise RowError(f"{what} is the {role}'s and calls functions; only the assistant may")
        message["tool_calls"] = calls
    _read_weight(turn, message, what, changes)
    return message


def _role(name: str, what: str) -> str:
    role = ROLES.get(name.lower())
    if role is None:
        raise RowError(f'{what} has the role "{name[:40]}"; expected system, user, assistant or tool')
    return role


def _read_content(turn: dict[str, Any], key: str, what: str) -> str:
    """Text, or a list of parts that are all text."""
    value = turn.get(key)
    if not isinstance(value, list):
        return read_text(turn, key, f"{what}: ")
    pieces = []
    for part in value:
        if isinstance(part, str):
            pieces.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type_name(part).split()[-1]
        if kind not in ("text", "input_text", "output_text"):
            raise RowError(f'{what} holds a part of type "{kind}", which is not text; only text can be trained on')
        pieces.append(read_text(part, "value" if "value" in part and "text" not in part else "text", f"{what}: "))
    return "".join(pieces)


def _read_calls(turn: dict[str, Any], what: str) -> list[ToolCall]:
    value = turn.get("tool_calls") or turn.get("function_call")
    return _calls_of(value, what) if value else []


def _calls_of(value: Any, what: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what}: a call has no function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _from_json(arguments or "{}", f"{what}: the arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise RowError(
                f"{what}: the arguments of {function['name']} are {type_name(arguments)}, expected an object"
            )
        # Parquet brings dates and the like; a template writes JSON.
        arguments = json.loads(json.dumps(arguments, default=str))
        calls.append(ToolCall(name=function["name"], arguments=arguments))
    return calls


def _from_json(text: str, what: str) -> Any:
    try:
        return decode_row(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
        raise RowError(f"{what} is no valid JSON: {reason}") from None


def _read_weight(turn: dict[str, Any], message: Message, what: str, changes: list[str]) -> None:
    """OpenAI's `weight`, or `loss_weight`, or axolotl's `train`: 0 keeps an assistant's turn as context only."""
    name = next((name for name in ("weight", "loss_weight", "train") if turn.get(name) is not None), None)
    if name is None:
        return
    if turn[name] not in (0, 1):
        raise RowError(f'{what}: "{name}" is {json.dumps(turn[name], default=str)[:40]}, expected 0 or 1')
    if message["role"] != "assistant":
        if turn[name]:
            changes.append(f'{what}: "{name}" 1 on the {message["role"]}\'s turn is not used; only answers are learned')
    elif not turn[name]:
        message["learn"] = False
