"""Ollama's Modelfile for an adapter: the chat template in Ollama's own template language, and the stop words.

Ollama renders Go templates, not Jinja. What a chat template puts around each turn is found by rendering a conversation;
whether those pieces render others too is checked on what was written, with the held-out prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ExportError
from qlora_tune.generate import stop_words
from qlora_tune.shapes import Example
from qlora_tune.tool_text import uses_tools
from qlora_tune.turns import Message

_SLOTS = ("Zq9 system", "Zq9 user", "Zq9 answer", "Zq9 again")


@dataclass(frozen=True)
class TurnPieces:
    """The text around turns. A conversation that waits for an answer is: the system turn, or `no_system` where there is
    none, then the turns, then `opening`."""

    before_system: str
    after_system: str
    no_system: str
    before_user: str
    before_assistant: str
    after_assistant: str
    opening: str

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the model is given to answer; what Ollama's template makes of the same messages."""
        turns = list(messages)
        text = self.no_system
        if turns[0]["role"] == "system":
            text = self.before_system + turns.pop(0)["content"] + self.after_system
        for turn in turns:
            if turn["role"] == "user":
                text += self.before_user + turn["content"]
            else:
                text += self.before_assistant + turn["content"] + self.after_assistant
        return text + self.opening


def find_pieces(chat: ChatFormat) -> TurnPieces:
    """What a chat template puts around turns, without the token that begins a text, which Ollama puts there itself.

    The user's turn has nothing behind it: whatever stands there counts to the answer's, which always follows.
    """
    system, user, answer, again = _SLOTS
    asked = [Message(role="user", content=user), Message(role="assistant", content=answer)]
    asked.append(Message(role="user", content=again))
    between = re.split("|".join(_SLOTS), render_prompt(chat, [Message(role="system", content=system), *asked]))
    plain = re.split("|".join(_SLOTS), render_prompt(chat, asked))
    if (len(between), len(plain)) != (5, 4) or between[2:] != plain[1:]:
        raise ExportError("The chat template moves or repeats turns, which Ollama's templates can't follow.")
    # Everything that ends alike before a user's turn stands there whatever comes first.
    ends = (plain[0][start:] for start in range(len(plain[0]) + 1))
    before_user = next(end for end in ends if between[1].endswith(end) and between[3].endswith(end))
    cut = -len(before_user) or None
    return TurnPieces(
        before_system=between[0],
        after_system=between[1][:cut],
        no_system=plain[0][:cut],
        before_user=before_user,
        before_assistant=between[2],
        after_assistant=between[3][:cut],
        opening=between[4],
    )


def render_prompt(chat: ChatFormat, messages: Sequence[Message]) -> str:
    """A conversation that waits for an answer, as the chat template renders it, without the token that begins it."""
    text: str = chat.tokenizer.apply_chat_template(
        chat.fold_system(messages), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text.removeprefix(chat.tokenizer.bos_token or "")


def write_modelfile(pieces: TurnPieces, stops: Sequence[str], adapter: str, base: str, context: int | None) -> str:
    """A Modelfile. Raises ExportError where a text can't be quoted in one."""
    template = _to_go(pieces)
    unquotable = [text for text in (template, *stops) if '"""' in text]
    unquotable += [text for text in stops if '"' in text or "\n" in text]
    if unquotable:
        raise ExportError(f"A Modelfile can't hold {unquotable[0]!r}.")
    lines = [
        f"# The base is {base}: as GGUF from wherever you got it, or made by llama.cpp's convert_hf_to_gguf.py.",
        "FROM ./base.gguf",
        f"ADAPTER ./{adapter}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{text}"' for text in stops),
        "# Greedy, as it was scored.",
        "PARAMETER temperature 0",
        *([f"PARAMETER num_ctx {context}"] if context else []),
    ]
    return "\n".join(lines) + "\n"


def read_modelfile(text: str) -> tuple[TurnPieces, list[str]]:
    """The pieces and stop words of a Modelfile that write_modelfile made. Raises ExportError for another one."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    match = _GO_PATTERN.fullmatch(template[1]) if template else None
    if not match:
        raise ExportError("The Modelfile's template is not the one that was written. It was not kept.")
    pieces = TurnPieces(**{name: piece.replace(_BRACES, "{{") for name, piece in match.groupdict().items()})
    return pieces, re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)


def refuse_other_modelfile(text: str, chat: ChatFormat, rows: Sequence[Example]) -> None:
    """Raise ExportError where a Modelfile doesn't render prompts as the chat template does, or end answers so.

    Rows with functions are passed over: the Modelfile's template has none. White space at the ends of turns, which some
    templates drop, is left out of account.
    """
    pieces, stops = read_modelfile(text)
    missing = [word for word in stop_words(chat) if word not in stops]
    if missing:
        raise ExportError(f"The Modelfile does not end answers at {missing[0]!r}. It was not kept.")
    for row in rows:
        if uses_tools(row.messages, row.tools):
            continue
        turns = [Message(role=turn["role"], content=turn["content"].strip()) for turn in row.messages[:-1]]
        if pieces.render(turns) != render_prompt(chat, turns):
            raise ExportError(
                f"The Modelfile's template renders the prompt of {row.source} otherwise than the chat template. It was "
                "not kept."
            )


_BRACES = '{{ "{{" }}'
# Each @name@ is a piece of TurnPieces. Ollama gives the system text apart, beside all messages; an answer that stands
# last is one to go on with.
_GO = (
    "{{ if .System }}@before_system@{{ .System }}@after_system@{{ else }}@no_system@{{ end }}"
    "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq .Role "user" }}@before_user@{{ .Content }}'
    '{{ else if eq .Role "assistant" }}@before_assistant@{{ .Content }}'
    "{{ if not $last }}@after_assistant@{{ end }}{{ end }}"
    '{{ if and (ne .Role "assistant") $last }}@opening@{{ end }}{{ end }}'
)
_GO_PATTERN = re.compile(re.sub(r"@(\w+)@", r"(?P<\1>.*?)", re.escape(_GO)), re.DOTALL)


def _to_go(pieces: TurnPieces) -> str:
    return re.sub(r"@(\w+)@", lambda match: str(getattr(pieces, match[1])).replace("{{", _BRACES), _GO)
