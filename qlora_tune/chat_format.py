"""Conversations to tokens, and which of them are learned: one encoding for training, scoring and chat.

A conversation is rendered turn by turn with the tokenizer's own chat template, and each assistant turn is found as
the difference between two renderings. So any template works, no generation markers are needed, and the prompt at
inference is, token for token, what stood before the answer in training. Control tokens typed inside a message stay
plain text. Functions and calls go through the template where it renders them, else as text (see tool_text).
Response mask: QLoRA (arXiv 2305.14314, section B) trains on the response only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from jinja2 import TemplateError as JinjaError

from qlora_tune.errors import TemplateError
from qlora_tune.shapes import DataProblem, Example, reject_example
from qlora_tune.tool_text import Tools, find_missing, spell_tools, to_template_turn, uses_tools
from qlora_tune.turns import Message, ToolCall

IGNORED = -100  # the label that torch's cross entropy skips

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# For a base without ChatML's tokens: roles in plain text, and the base's own end-of-text token ends each turn.
# New tokens would need trained embeddings, which costs more memory than the whole adapter.
PLAIN_ROLES = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Unicode noncharacters, meant for a program's inner use; the first that a conversation doesn't contain breaks its
# control tokens apart until they are tokenized.
_BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_PROBE = "Zq9 probe"
_R = TypeVar("_R")
_Tokens = tuple[list[int], list[int]]  # ids and labels
_BATCH = 64  # rows tokenized at once: more are hardly faster, and hold more memory


@dataclass(frozen=True)
class TokenizedExample:
    """One training sequence. labels[i] is input_ids[i] where the token is learned, else -100."""

    input_ids: list[int]
    labels: list[int]
    source: str = ""

    @property
    def learned(self) -> int:
        """Number of learned tokens."""
        return len(self.labels) - self.labels.count(IGNORED)


class _Segment(NamedTuple):
    """Consecutive rendered text, learned or not, in pieces that are tokenized apart."""

    pieces: tuple[str, ...]
    learned: bool


def ensure_chat_template(tokenizer: Any, wanted: Literal["auto", "chatml", "plain"] = "auto") -> str:
    """Give a tokenizer a chat template without resizing embeddings. Returns which: own, chatml or plain.

    "auto" keeps the tokenizer's own, else takes ChatML where its tokens exist, else plain roles. Raises
    TemplateError where the one that is wanted has no token to end a turn with.
    """
    if tokenizer.chat_template and wanted == "auto":
        return "own"
    vocabulary = tokenizer.get_added_vocab()
    has_chatml = "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary
    if wanted == "chatml" and not has_chatml:
        raise TemplateError("chat_template chatml: the tokenizer has no <|im_start|> and <|im_end|>. Use plain.")
    if has_chatml and wanted != "plain":
        tokenizer.chat_template = CHATML
        return "chatml"
    if not tokenizer.eos_token:
        raise TemplateError(
            "The tokenizer has no end-of-text token and no chat template of its own, so no turn could end. "
            "Choose a base model whose tokenizer has an eos_token."
        )
    tokenizer.chat_template = PLAIN_ROLES
    return "plain"


class ChatFormat:
    """How one tokenizer's chat template is rendered, tokenized and masked. Build it with `probe`."""

    def __init__(self, tokenizer: Any, end_of_turn: str, folds_system: bool) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn = end_of_turn
        self.end_of_turn_id: int = tokenizer.convert_tokens_to_ids(end_of_turn)
        self.folds_system = folds_system
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        special = [text for text, token in added.items() if token.special or text == end_of_turn]
        self._special = _any_of(special)
        # Tokens such as <think> are ordinary format inside an answer, but not inside what a user typed.
        self._added = _any_of(text for text in added if not text.isspace())
        self._special_ids = {tokenizer.convert_tokens_to_ids(text) for text in special}
        self._guard, self._guard_length = _pick_guard(tokenizer, added)
        self.renders_tools = self._probe_tools()

    @classmethod
    def probe(cls, tokenizer: Any) -> ChatFormat:
        """Inspect a tokenizer's chat template: its end of turn, and whether it renders a system turn.

        Raises TemplateError when it has no template, fails on a plain conversation, or ends no assistant turn with
        a control token (a model trained on it would never stop).
        """
        if not tokenizer.chat_template:
            raise TemplateError("The tokenizer has no chat template; see ensure_chat_template.")
        user, answer = Message(role="user", content="Hello"), Message(role="assistant", content=_PROBE)
        try:
            prompt, full = _render(tokenizer, [user, answer])
        except (JinjaError, ValueError, TypeError) as error:
            raise TemplateError(f"The chat template fails on a plain conversation: {error}") from None
        if not full.startswith(prompt) or _PROBE not in full[len(prompt) :]:
            raise TemplateError(
                "The chat template renders a prompt that is not the beginning of the finished conversation, so the "
                "answer can't be located. Use a template whose generation prompt opens the assistant turn."
            )
        tail = full[full.index(_PROBE) + len(_PROBE) :]
        controls = _any_of(str(token) for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
        found = controls.search(tail)
        if not found:
            raise TemplateError(
                f"The chat template ends an assistant turn with {tail!r}, which holds no control token: the model "
                "would never learn to stop. Add the tokenizer's eos_token after the assistant's content."
            )
        return cls(tokenizer, found.group(), _folds_system(tokenizer, user))

    def tokenize_example(
        self, messages: Sequence[Message], max_length: int | None = None, source: str = "", tools: Tools = ()
    ) -> list[TokenizedExample]:
        """Render one conversation and mark which tokens are learned.

        Every assistant turn is learned through its end-of-turn token, calls of functions too, but not one whose
        "learn" is False; nothing else is. Returns one sequence, or one per assistant turn where the template rewrites
        the history (thinking templates drop earlier thoughts, so what was learned in an earlier turn is not what a
        later turn sees). A conversation longer than max_length [tokens] is cut after the last learned turn that fits.
        Raises TemplateError when an assistant turn can't be located, or when not even the first one fits.
        """
        rendered = self._sequences(messages, tools)
        return self._label(rendered, self._encode_pieces(rendered), max_length, source)

    def tokenize_batch(self, examples: Sequence[Example], max_length: int) -> Iterator[list[TokenizedExample] | str]:
        """Tokenize conversations at once: for each, what tokenize_example returns, or why it can't be tokenized."""
        rendered = [_attempt(self._sequences, example.messages, example.tools) for example in examples]
        known = self._encode_pieces(segments for found in rendered if not isinstance(found, str) for segments in found)
        for example, found in zip(examples, rendered, strict=True):
            yield found if isinstance(found, str) else _attempt(self._label, found, known, max_length, example.source)

    def _label(
        self, rendered: list[list[_Segment]], known: Mapping[str, list[int]], max_length: int | None, source: str
    ) -> list[TokenizedExample]:
        sequences = [self._encode_sequence(segments, known) for segments in rendered]
        if not sequences:
            raise TemplateError("has no assistant turn to learn from")
        fitting = [_cut(ids, labels, self.end_of_turn_id, max_length) for ids, labels in sequences]
        kept = [TokenizedExample(ids, labels, source) for ids, labels in fitting if ids]
        if not kept:
            raise TemplateError(f"is {min(len(ids) for ids, _ in sequences)} tokens long, max_length is {max_length}")
        return kept

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Encode a conversation that waits for an answer: exactly the tokens that precede it in training."""
        segments = self._sequences([*messages, Message(role="assistant", content=_PROBE)], tools)[-1]
        return self._encode_sequence(segments[:-1])[0]

    def encode_answer(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Encode the last learned answer of a conversation, its end of turn included."""
        segments = self._sequences(messages, tools)[-1]
        while not segments[-1].learned:
            segments = segments[:-1]
        return self._encode_sequence(segments)[0][len(self._encode_sequence(segments[:-1])[0]) :]

    def _probe_tools(self) -> bool:
        """Whether the template itself renders functions, calls and results as what they are, control tokens in them."""
        typed = f"{_PROBE} {self.end_of_turn}"
        parameters = {"type": "object", "properties": {"zq9_key": {"type": "string", "description": typed}}}
        function = {"name": "zq9_function", "description": typed, "parameters": parameters}
        call = ToolCall(name="zq9_function", arguments={"zq9_key": typed})
        messages = [
            Message(role="user", content="Hello"),
            Message(role="assistant", content="", tool_calls=[call]),
            Message(role="tool", content=f"result {typed}"),
            Message(role="assistant", content=_PROBE),
        ]
        safe, tools, mark = self._sanitise(messages, [{"type": "function", "function": function}])
        return not isinstance(_attempt(self._cut_at_answers, safe, mark, tools), str)

    def _sequences(self, messages: Sequence[Message], tools: Tools) -> list[list[_Segment]]:
        """Render a conversation, cut in segments; tools as text where the template can't hold them."""
        try:
            safe, safe_tools, mark = self._sanitise(messages, tools)
            if not uses_tools(safe, safe_tools):
                return self._cut_at_answers(safe, mark)
            if self.renders_tools:
                # Some templates render one call but not two at once, or no words beside a call.
                with suppress(TemplateError):
                    return self._cut_at_answers(safe, mark, safe_tools)
            return self._cut_at_answers(spell_tools(safe, safe_tools), mark)
        except RecursionError:
            raise TemplateError("its tools or arguments are nested too deep") from None

    def _cut_at_answers(self, messages: Sequence[Message], mark: str, tools: Tools = ()) -> list[list[_Segment]]:
        """Cut the rendered conversation where answers begin and end; a new sequence where history is rewritten."""
        turns = self.fold_system(messages)
        sequences: list[list[_Segment]] = []
        rendered: str | None = None
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt, answer = self._locate_answer(turns[: index + 1], tools)
            if rendered is None or not prompt.startswith(rendered):
                sequences.append([])
                rendered = ""
            opening = prompt[len(rendered) :]
            sequences[-1] += [
                _Segment(tuple(opening.split(mark)), False),
                _Segment(tuple(answer.split(mark)), turn.get("learn", True)),
            ]
            rendered = prompt + answer
        return [sequence for sequence in sequences if any(segment.learned for segment in sequence)]

    def _locate_answer(self, turns: Sequence[Message], tools: Tools) -> tuple[str, str]:
        """Render the last turn's prompt, and the turn itself through its end-of-turn token."""
        try:
            prompt, full = _render(self.tokenizer, turns, tools)
        except (JinjaError, ValueError, TypeError) as error:
            raise TemplateError(f"the chat template refuses it: {error}") from None
        answer = full.removeprefix(prompt)
        end = answer.find(self.end_of_turn)
        if answer == full or end < 0 or answer[:end].isspace() or not end:
            raise TemplateError(f"the answer in turn {len(turns)} can't be located in what the template renders")
        answer = answer[: end + len(self.end_of_turn)]
        if uses_tools(turns, tools):
            missing = find_missing(prompt, turns[:-1], tools) or find_missing(answer, turns[-1:], ())
            if missing is not None:
                raise TemplateError(f"the chat template leaves out {missing[:40]!r}")
        return prompt, answer

    def _encode_sequence(self, segments: Sequence[_Segment], known: Mapping[str, list[int]] = {}) -> _Tokens:
        """Join the tokens and labels of a sequence, whose pieces may be `known` from _encode_pieces."""
        ids: list[int] = []
        labels: list[int] = []
        for segment in segments:
            piece_ids: list[int] = []
            for piece in filter(None, segment.pieces):
                first = not ids and not piece_ids  # a piece may encode to nothing
                text = piece if first else self._guard + piece
                encoded = known[text] if text in known else self._encode_pieces([[_Segment((text,), False)]])[text]
                piece_ids += encoded if first else encoded[self._guard_length :]
            expected = sum(len(self._special.findall(piece)) for piece in segment.pieces)
            if sum(map(self._special_ids.__contains__, piece_ids)) != expected:
                raise TemplateError("a control token arises from its content; remove it from the row")
            ids += piece_ids
            labels += piece_ids if segment.learned else [IGNORED] * len(piece_ids)
        return ids, labels

    def _encode_pieces(self, sequences: Iterable[Sequence[_Segment]]) -> dict[str, list[int]]:
        """Encode all pieces of some sequences apart, those behind another with the guard: the tokens by text."""
        from transformers import PreTrainedTokenizerFast as Fast

        pieces = (enumerate(piece for part in segments for piece in part.pieces if piece) for segments in sequences)
        texts = list(dict.fromkeys((self._guard if n else "") + piece for some in pieces for n, piece in some))
        kind = type(self.tokenizer)
        if kind.__call__ is not Fast.__call__ or kind._encode_plus is not Fast._encode_plus:
            return {text: self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
        self.tokenizer("", add_special_tokens=False)  # undoes padding and the like, which a backend remembers
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {text: found.ids for text, found in zip(texts, encoded, strict=True)}

    def fold_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the system turn in front of the first user turn where the template has no place for it."""
        if not self.folds_system or messages[0]["role"] != "system":
            return list(messages)
        system, user, *rest = messages
        return [Message(role="user", content=f"{system['content']}\n\n{user['content']}"), *rest]

    def _sanitise(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Message], Tools, str]:
        """Break control tokens apart wherever somebody typed them; returns the mark that does it as well."""
        everything = "".join(turn["content"] for turn in messages)
        if uses_tools(messages, tools):
            everything = json.dumps([list(messages), list(tools)], ensure_ascii=False, default=str)
        mark = next((mark for mark in _BREAKS if mark not in everything), None)
        if mark is None:
            raise TemplateError("holds all 32 Unicode noncharacters U+FDD0 to U+FDEF; remove them")
        safe = []
        for turn in messages:
            clean = turn.copy()
            own = self._special if turn["role"] == "assistant" else self._added
            clean["content"] = _break_tokens(turn["content"], own, mark)
            if calls := turn.get("tool_calls"):
                names = (_break_tokens(call["name"], self._added, mark) for call in calls)
                arguments = (_break_strings(call["arguments"], self._added, mark) for call in calls)
                clean["tool_calls"] = [ToolCall(name=n, arguments=a) for n, a in zip(names, arguments, strict=True)]
            safe.append(clean)
        return safe, _break_strings(tools, self._added, mark), mark


def tokenize_examples(
    chat: ChatFormat, examples: Sequence[Example], max_length: int
) -> tuple[list[TokenizedExample], list[DataProblem]]:
    """Tokenize examples; those that don't fit the template or max_length [tokens] become problems."""
    tokenized: list[TokenizedExample] = []
    problems: list[DataProblem] = []
    batches = (examples[start : start + _BATCH] for start in range(0, len(examples), _BATCH))
    found = (pair for batch in batches for pair in zip(batch, chat.tokenize_batch(batch, max_length), strict=True))
    for example, sequences in found:
        if isinstance(sequences, str):
            problems.append(reject_example(example, sequences))
            continue
        answers = sum(turn["role"] == "assistant" and turn.get("learn", True) for turn in example.messages)
        learned = sum(sequence.labels.count(chat.end_of_turn_id) for sequence in sequences)
        if learned < answers:
            reason = f"longer than max_length {max_length}: only its first {learned} of {answers} answers are learned"
            problems.append(reject_example(example, reason, "changed"))
        tokenized += sequences
    return tokenized, problems


def _render(tokenizer: Any, turns: Sequence[Message], tools: Tools = ()) -> tuple[str, str]:
    """What the template makes of the last turn's prompt, and of all turns."""
    # enable_thinking=False makes thinking templates put the empty thought into the prompt, where plain
    # instruction data leaves it; other templates ignore the variable.
    given = {"tools": list(tools) or None, "tokenize": False, "enable_thinking": False}
    shown = [to_template_turn(turn) for turn in turns]
    prompt: str = tokenizer.apply_chat_template(shown[:-1], add_generation_prompt=True, **given)
    return prompt, tokenizer.apply_chat_template(shown, **given)


def _attempt(work: Callable[..., _R], *given: Any) -> _R | str:
    """What a call returns, or why it raises TemplateError."""
    try:
        return work(*given)
    except TemplateError as error:
        return str(error)


def _folds_system(tokenizer: Any, user: Message) -> bool:
    """Whether a system turn must go into the user's: the template refuses, drops or later moves it."""
    system, answer = Message(role="system", content=_PROBE), Message(role="assistant", content="Hi")
    try:
        prompt, full = _render(tokenizer, [system, user, answer])
    except (JinjaError, ValueError, TypeError):
        return True
    return _PROBE not in prompt or not full.startswith(prompt)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; one that never matches when there are none."""
    ordered = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _pick_guard(tokenizer: Any, added: dict[str, Any]) -> tuple[str, int]:
    """Text behind which a word is encoded as in the midst of a line, and its length [tokens]; often empty.

    SentencePiece tokenizers put a space before the first word of whatever they are given. Behind a control token they
    don't, if it swallows no white space behind it; old ones put a space there too, but not behind a newline.
    """
    controls = [text for text, token in added.items() if token.special and not token.rstrip and not token.normalized]
    for guard in ["", *controls[:1], "\n"]:
        alone, followed = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (guard, guard + "a"))
        rest = tokenizer.convert_ids_to_tokens(followed[len(alone) :])
        if followed[: len(alone)] == alone and rest == ["a"]:
            return guard, len(alone)
    return "", 0


def _break_tokens(content: str, tokens: re.Pattern[str], mark: str) -> str:
    """Put a mark behind the first character of every control token, overlapping ones too."""
    return re.sub(f"(?s)(?={tokens.pattern}).", rf"\g<0>{mark}", content) if tokens.search(content) else content


def _break_strings(value: Any, tokens: re.Pattern[str], mark: str) -> Any:
    """Break the control tokens in every text of a JSON value, keys too."""
    if isinstance(value, str):
        return _break_tokens(value, tokens, mark)
    if isinstance(value, dict):
        return {_break_strings(key, tokens, mark): _break_strings(held, tokens, mark) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_break_strings(held, tokens, mark) for held in value]
    return value


def _cut(ids: list[int], labels: list[int], end_of_turn_id: int, max_length: int | None) -> _Tokens:
    """Cut a sequence after the last learned end of turn within max_length [tokens]; empty when there is none."""
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    ends = [i for i in range(max_length) if labels[i] == end_of_turn_id]
    return (ids[: ends[-1] + 1], labels[: ends[-1] + 1]) if ends else ([], [])
