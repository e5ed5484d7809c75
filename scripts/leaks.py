"""The proof that held-out rows are new: no prompt or text of theirs stands in the pairs or in the corpus.

Compared as words in lower case, so that neither case nor punctuation nor line breaks hide a copy.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import questions

SCORED_FILES = ("sample_heldout.jsonl", "sample_rephrased.jsonl", "sample_unseen.jsonl")
SHORTEST_TEXT = 3  # [words] "Yes" or "red, blue" prove nothing
# Phrasings that hold their passage themselves, such as "Past tense, please: {text}".
_WITH_TEXT = [
    re.compile(re.sub(r"\\\{\w+\\\}", ".+?", re.escape(phrase).replace(r"\{text\}", "(?P<text>.+)")))
    for phrases in vars(questions).values()
    if isinstance(phrases, questions.Phrases)
    for phrase in (*phrases.trained, *phrases.new)
    if "{text}" in phrase
]
_NOT_WORDS = re.compile(r"(?:[\W_]|\band\b)+")  # "a, b and c" is the list "a, b, c"
# Their last question means nothing alone: "What is my name?" stands in pairs too, after other names.
NEED_CONTEXT = ("memory", "system_format")


@dataclass(frozen=True)
class Leak:
    """A text of a held-out row that stands somewhere else too."""

    row: str
    text: str


def as_words(text: str) -> str:
    """Lower-case words but "and", with single spaces, one at each end, so that only whole words match."""
    return f" {_NOT_WORDS.sub(' ', text.lower()).strip()} "


def conversation(row: dict[str, Any]) -> list[str]:
    """All turns of a row, the answer last."""
    if "messages" in row:
        return [turn["content"] for turn in row["messages"]]
    return ["\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]]


def texts_of(row: dict[str, Any]) -> list[str]:
    """What of a held-out row must stand nowhere else: its prompt, its last question, and the passage of that.

    The passage is the row's input, or stands in the instruction where its phrasing says {text}.
    """
    *earlier, question, _ = conversation(row)
    instruction, _, passage = question.partition("\n\n")
    texts = {as_words(" ".join([*earlier, question])), as_words(passage)}
    if row["task"] not in NEED_CONTEXT:
        texts.add(as_words(question))
    texts |= {as_words(found["text"]) for phrase in _WITH_TEXT if (found := phrase.fullmatch(instruction))}
    return sorted(text for text in texts if len(text.split()) >= SHORTEST_TEXT)


def fingerprint(*texts: str) -> str:
    return hashlib.sha256("\n".join(as_words(text) for text in texts).encode()).hexdigest()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_scored(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of the three scored files, by file and line."""
    return {
        f"{name}:{line}": row for name in SCORED_FILES for line, row in enumerate(read_rows(folder / name), start=1)
    }


def find_in_pairs(scored: dict[str, dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> list[Leak]:
    """Prompts and prompt-answer pairs by hash, of every turn of the pairs; passages as text."""
    known = set()
    for row in pairs:
        turns = conversation(row)
        known |= {fingerprint(*turns[:end]) for end in range(1, len(turns) + 1)}
        known |= {fingerprint(*turns[start : start + 2]) for start in range(len(turns) - 1)}
    leaks = []
    for name, row in scored.items():
        *prompt, answer = conversation(row)
        if fingerprint(*prompt) in known or fingerprint(*prompt, answer) in known:
            leaks.append(Leak(name, prompt[-1]))
    return leaks + find_in_text(scored, [" ".join(conversation(row)) for row in pairs])


def find_in_text(scored: dict[str, dict[str, Any]], documents: Iterable[str]) -> list[Leak]:
    """Prompts and passages that stand in any of the documents; looked up by their first words, as there are many."""
    by_start: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for name, row in scored.items():
        for text in texts_of(row):
            words = text.split()
            by_start.setdefault(tuple(words[:SHORTEST_TEXT]), []).append((name, words))
    leaks = []
    for document in documents:
        words = as_words(document).split()
        for at, start in enumerate(zip(*(words[skip:] for skip in range(SHORTEST_TEXT)), strict=False)):
            for name, wanted in by_start.get(start, ()):
                if words[at : at + len(wanted)] == wanted:
                    leaks.append(Leak(name, " ".join(wanted)))
    return leaks
