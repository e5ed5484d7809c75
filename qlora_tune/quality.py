"""What may be wrong with one example's text, found row by row; nothing is changed here.

Third station of a row's journey. An error is a row that teaches nothing or the wrong thing; a warning is worth a
person's look, and many such rows are fine; a note is a fact.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_tune import text_signs as signs
from qlora_tune.shapes import Example
from qlora_tune.turns import strip_end_mark

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Defect:
    """One kind of defect: how grave it is, what it means, and whether `check --fix` mends or drops such rows."""

    severity: Severity
    meaning: str
    fix: Literal["", "mend", "drop"] = ""


# Every kind that a report can name, in the order of the report.
DEFECTS: dict[str, Defect] = {
    "unreadable row": Defect("error", "can't become a conversation; the reason stands with the line", "drop"),
    "answer repeats the prompt": Defect("error", "the answer is the instruction again", "drop"),
    "exact duplicate": Defect("error", "the same conversation as an earlier row", "drop"),
    "duplicate but for case or spacing": Defect("error", "an earlier row in other letters or spaces", "drop"),
    "near duplicate": Defect("error", "80 % or more of its word triples are an earlier row's", "drop"),
    "leak: same conversation": Defect("error", "a held-out row that is trained on", "drop"),
    "leak: same prompt": Defect(
        "error", "a held-out prompt that is trained on, with another answer or letters", "drop"
    ),
    "leak: near copy": Defect("error", "a held-out row that is trained on but for a few words", "drop"),
    "leak: same passage": Defect(
        "error", "a held-out passage or question that is trained on under other words", "drop"
    ),
    "placeholder answer": Defect("warning", "the answer says none, n/a, todo or the like"),
    "conflicting answers": Defect("warning", "an earlier row answers the same prompt differently"),
    "repetition loop": Defect("warning", "the same words over and over"),
    "badly decoded text": Defect("warning", "such as Ã© for é: UTF-8 once read as another encoding", "mend"),
    "replacement character": Defect("warning", "� stands where a character was lost"),
    "invisible characters": Defect("warning", "zero-width spaces or marks that turn the writing direction", "mend"),
    "control characters": Defect("warning", "characters that are no text, such as NUL or a bell", "mend"),
    "template marker": Defect("warning", "a chat template's marks typed into the text; they stay plain text"),
    "end-of-text mark behind the answer": Defect("warning", "the chat template adds its own", "mend"),
    "unfilled placeholder": Defect("warning", "such as {{name}}: never filled in"),
    "leftover HTML": Defect("warning", "tags or entities of a web page in plain text"),
    "model boilerplate": Defect("warning", "a model speaking of itself as a model"),
    "refusal": Defect("warning", "the answer declines to answer"),
    "second task in the answer": Defect("warning", "the next instruction of a list was left in"),
    "cut-off answer": Defect("warning", "seems to break off in the middle"),
    "answer copies the input": Defect("warning", "the answer is the input again, word for word"),
    "very long": Defect("warning", "32,000 characters or more"),
    "longer than max_length": Defect("warning", "left out, or cut after the last turn that fits"),
    "personal data": Defect("warning", "looks like an e-mail address, a phone, card or account number"),
    "no input": Defect("note", 'the input says "none" or the like: treated as no input', "mend"),
    "changed on reading": Defect("note", "kept, but not with all that stood in the row"),
    "carriage return": Defect("note", "lines end in CR LF", "mend"),
    "literal \\n": Defect("note", "line breaks are written as backslash and n"),
    "unusual shape": Defect("note", "read, but of another shape than most rows of the file"),
    "unused columns": Defect("note", "keys that few rows have and that are not read"),
    "blank line": Defect("note", "skipped"),
    "small task": Defect("note", "too few rows to hold one out at the usual share"),
    "uneven tasks": Defect("note", "one task has more than 20 times the rows of another"),
}
_LOOKED_AT = 50_000  # characters of a text without spaces that are searched for repetitions
VERY_LONG = 32_000  # characters


def find_defects(example: Example) -> Iterator[tuple[str, str]]:
    """Each defect that one example shows by itself: its kind, and what was seen."""
    answers = [turn["content"] for turn in example.messages if turn["role"] == "assistant"]
    whole = "\n".join(turn["content"] for turn in example.messages)
    answer = example.answer
    yield from _compare(example, answer)
    for kind, look in _LOOKS.items():
        if seen := look(whole):
            yield kind, seen
    turns = [turn["content"] for turn in example.messages]
    for kind, look in _TURN_LOOKS.items():
        if seen := next(filter(None, map(look, turns if len(turns) < 5 else [*turns, whole])), ""):
            yield kind, seen
    for kind, look in _ANSWER_LOOKS.items():
        if seen := next(filter(None, map(look, answers)), ""):
            yield kind, seen
    if ("<" in answer or "&" in answer) and (html := signs.HTML.search(answer)) and not _is_code(example):
        yield "leftover HTML", html.group()
    task = signs.NEXT_TURN.search(answer) if "\n" in answer and "```" not in answer else None
    if task and not signs.ASKS_FOR_TURNS.search(example.prompt):
        yield "second task in the answer", task.group()[:60].strip()
    if seen := _find_break(answer):
        yield "cut-off answer", seen


def last_words(text: str) -> str:
    """The last 40 characters of a text, in one line."""
    return " ".join(text[-40:].split())


def strip_invisible(text: str) -> str:
    """Take out characters that show nothing and mean nothing where they stand."""
    return _choose_invisible(text).sub("", text)


def mend_encoding(text: str) -> str:
    """Restore text whose UTF-8 was read as another encoding, where nothing of it was lost."""
    from ftfy import fix_encoding

    mended = fix_encoding(text)
    return signs.FOREIGN.sub(lambda run: _read_again(run.group(), 0.0) or run.group(), mended)


def _compare(example: Example, answer: str) -> Iterator[tuple[str, str]]:
    if example.messages[-1].get("tool_calls") or len(example.messages) < 2:
        return
    question = example.messages[-2]["content"]
    said, whole = _plain(answer), _plain(question)
    instruction, _, given = question.partition("\n\n")
    if len(said.split()) < 3 and len(said) < 12:
        return  # a greeting is answered by a greeting
    if _bare(said) in (_bare(whole), _bare(_plain(instruction))):
        yield "answer repeats the prompt", last_words(answer)
    elif given and said == _plain(given):
        yield "answer copies the input", last_words(answer)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    return text.casefold().rstrip(" .?!:;")


def _is_code(example: Example) -> bool:
    """Whether tags belong: the prompt is about code, or the answer shows some."""
    return bool(signs.ABOUT_CODE.search(example.prompt)) or "```" in example.answer


def _matched(pattern: re.Pattern[str], *signs: str) -> Callable[[str], str]:
    """Look for a pattern, only where one of the signs stands that it can't do without: that is much faster."""

    def look(text: str) -> str:
        found = pattern.search(text) if not signs or any(sign in text for sign in signs) else None
        return found.group()[:60] if found else ""

    return look


def _named(pattern: re.Pattern[str]) -> Callable[[str], str]:
    """Look for characters that can't be shown, and name them by code point."""

    def look(text: str) -> str:
        found = None if text.isascii() and text.isprintable() else Counter("".join(pattern.findall(text)))
        return ", ".join(f"{n} x U+{ord(c):04X}" for c, n in found.most_common(3)) if found else ""

    return look


def _find_mojibake(text: str) -> str:
    if text.isascii():
        return ""
    from ftfy import fix_encoding

    for line in text.splitlines():
        if not line.isascii() and (mended := fix_encoding(line)) != line:
            start = next((i for i, (a, b) in enumerate(zip(line, mended, strict=False)) if a != b), 0)
            return line[start : start + 20]
    runs: list[str] = signs.FOREIGN.findall(text)[:20]
    for run in runs:
        if _read_again(run[:40], 0.35):
            return run[:20]
    swapped = signs.SWAPPED_CASE.search(text)
    return swapped.group() if swapped else ""


def _read_again(run: str, lost: float) -> str:
    """What a run of characters says when its bytes are read as UTF-8; empty if more than a share of it is no UTF-8."""
    lost, wide = (lost, signs.WRONG_WIDE_ENCODINGS) if len(run) >= 6 else (0.0, ())
    for encoding in (*signs.WRONG_ENCODINGS, *wide):
        try:
            content = run.encode(encoding, "ignore" if lost else "strict")
        except UnicodeEncodeError:
            continue
        text = str(content, "utf-8", "replace")
        whole = len(content) > 2 and len(str(content, encoding, "ignore")) >= 0.8 * len(run)
        if whole and text.count("\ufffd") <= lost * len(text):
            return text
    return ""


def _choose_invisible(text: str) -> re.Pattern[str]:
    return signs.INVISIBLE if signs.RIGHT_TO_LEFT.search(text) else signs.INVISIBLE_LEFT_TO_RIGHT


def _find_invisible(text: str) -> str:
    return "" if text.isascii() else _named(_choose_invisible(text))(text)


def _find_loop(text: str) -> str:
    """Words or characters that come back at once and again, in all of a text, in its last 80 words or in one word."""
    units = signs.NUMBER_OF_ITEM.sub("", text).split()
    if len(units) < 24:
        return _find_repeats(list(text[:_LOOKED_AT]), 12, 0.4)
    longest = max(units, key=len)
    return (
        _find_repeats(units, 4, 0.4)
        or (_find_repeats(units[-80:], 4, 0.6) if len(units) > 80 else "")
        or (_find_repeats(list(longest[:_LOOKED_AT]), 12, 0.4) if len(longest) >= 60 else "")
    )


def _find_repeats(units: list[str], size: int, share: float) -> str:
    """A group of so many units that stands 6 times or more, where such groups make up that share of all."""
    if len(units) < (60 if size == 12 else 24) or len(set(units)) > 0.6 * len(units) + size:
        return ""
    groups = Counter(zip(*(units[i:] for i in range(size)), strict=False))
    group, count = groups.most_common(1)[0]
    if count < 6 or sum(n - 1 for n in groups.values() if n >= 6) < share * len(units):
        return ""
    joined = ("" if size == 12 else " ").join(group)
    spoken = any(c.isalpha() or c in "!?" for c in joined) or (len(set(joined)) > 2 and any(map(str.isalnum, joined)))
    return f"{count} x {joined[:40]}" if spoken else ""


def _find_personal(text: str) -> str:
    if "@" in text and signs.EMAIL.search(text):
        return "e-mail address"
    if any(sign in text for sign in ("AKIA", "sk-", "ghp_")) and signs.KEY.search(text):
        return "access key"
    if not signs.DIGITS.search(text):
        return ""
    if any(_is_phone(text, number) for number in signs.NUMBER.finditer(text)):
        return "phone number"
    if (card := signs.CARD.search(text)) and _passes_luhn(card.group()):
        return "card number"
    if signs.SOCIAL.search(text) or any(_passes_97(found) for found in signs.ACCOUNT.findall(text)):
        return "account number"
    return ""


def _is_phone(text: str, number: re.Match[str]) -> bool:
    start, end = number.span()
    if signs.PHONE.search(text, start, end + 1):
        return True
    return bool(signs.PHONE_AHEAD.search(text[max(0, start - 10) : start]))


def _passes_luhn(number: str) -> bool:
    """Whether the digits end in the check digit that card numbers have (ISO/IEC 7812)."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def _passes_97(number: str) -> bool:
    """Whether an account number has the check digits of an IBAN (ISO 13616)."""
    plain = number.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def ends_in_prose(answer: str) -> bool:
    """Whether an answer ends in the middle of a line of prose: on a letter or comma, and no list item or code."""
    text = answer.rstrip()
    if len(text) < 40 or "```" in text or (unicodedata.category(text[-1])[0] != "L" and text[-1] != ","):
        return False
    last = text.splitlines()[-1]
    return len(last.split()) >= 5 and not signs.LIST_ITEM.match(last)


def _find_break(answer: str) -> str:
    """Whether an answer ends on a word after which something must follow, or without the stop that it uses before."""
    text = answer.rstrip()
    if len(text) < 40 or (signs.STOPPED.search(text) and not signs.BARE_ITEM.search(text)):
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    behind_code = text.rpartition("```")[2].strip()
    if (
        text.count("```") % 2
        or signs.BARE_ITEM.search(text)
        or lines[-1].count("(") > lines[-1].count(")")
        or _breaks_habit(lines)
    ):
        return last_words(text)
    if text[-1] in "+=/^&([{" or not ends_in_prose(behind_code):
        return last_words(text) if text[-1] in "+=^&([{" else ""
    stops = len(re.findall(r"[.!?…][\"'”’)]*(?:\s|$)", text))
    long = len(lines[-1].split()) >= 8
    return last_words(text) if text[-1] == "," or signs.DANGLING.search(text) or (stops >= 1 and long) else ""


def _breaks_habit(lines: Sequence[str]) -> bool:
    """Whether all lines end in a stop but the last; a name below a letter or a saying stands for itself."""
    before, last = lines[:-1], lines[-1]
    if len(before) < 2 or not last[-1].isalpha() or last.startswith(("#", "—", "–", "|")) or "#" in last.split()[-1]:
        return False
    if before[-1].endswith((",", ":")) or (not signs.LIST_ITEM.match(last) and len(last.split()) < 5):
        return False
    return sum(bool(signs.STOPPED.search(line)) for line in before) >= 0.8 * len(before)


def _find_boilerplate(text: str) -> str:
    lower = text.casefold()
    if not any(
        sign in lower for sign in (" ai", "language model", "artificial int", "bot", "cutoff", "cut-off", "作为")
    ):
        return ""
    found = signs.BOILERPLATE.search(text)
    return found.group()[:60] if found else ""


def _find_marker(text: str) -> str:
    if not any(sign in text for sign in ("<", "[", "###", "USER:", "Human:")):
        return ""
    found = signs.MARKERS.search(strip_end_mark(text))
    return found.group()[:60] if found else ""


_LOOKS: dict[str, Callable[[str], str]] = {
    "badly decoded text": _find_mojibake,
    "replacement character": _named(re.compile("\ufffd")),
    "invisible characters": _find_invisible,
    "control characters": _named(signs.CONTROL),
    "unfilled placeholder": _matched(signs.UNFILLED, "{", "[", "<", "%(", "@@", "__", "$", "(insert"),
    "carriage return": _named(re.compile("\r")),
    "very long": lambda text: f"{len(text):,} characters" if len(text) >= VERY_LONG else "",
    "personal data": _find_personal,
    "template marker": _find_marker,
}
_TURN_LOOKS: dict[str, Callable[[str], str]] = {
    "repetition loop": _find_loop,
    "literal \\n": lambda text: "\\n" if signs.LITERAL.search(text) and "\n" not in text.strip() else "",
}
_ANSWER_LOOKS: dict[str, Callable[[str], str]] = {
    "placeholder answer": lambda text: text.strip()[:40] if signs.PLACEHOLDER_ANSWER.fullmatch(text) else "",
    "end-of-text mark behind the answer": lambda text: text[len(strip_end_mark(text)) :].strip(),
    "model boilerplate": _find_boilerplate,
    "refusal": lambda text: text.strip()[:60] if signs.REFUSAL.match(text) else "",
    "second task in the answer": _matched(signs.SECOND_TASK),
}
