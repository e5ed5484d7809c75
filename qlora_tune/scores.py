"""Measures of answers: of one answer against its reference, of a task's answers together, and their intervals.

Texts go in, numbers come out; no model and no file. Each measure equals a reference implementation, or says where it
departs from it (tests/test_scores.py).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal, NamedTuple

RESAMPLES = 2000
DRAWN_AT_ONCE = 1_000_000  # rows, over several samples
SHORT_LABEL = 60  # [characters]
MOST_LABELS, ROWS_PER_LABEL = 20, 3  # a task is a choice among labels up to so many, met so often on average
REPEATED_WORDS = 4
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+")  # Han and kana: each a word
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_OPENS = set('.!?:;\n"“(•*-')  # a word behind one of these may be capitalised for its place
_CAPITALISED = re.compile(r"[^\W\d_][\w'’]*")


@dataclass(frozen=True)
class Metric:
    """One measure: what it is called, which way is better, and how its numbers are written."""

    name: str
    label: str
    better: Literal["more", "less", "neither"]
    unit: Literal["share", "number"]
    meaning: str


METRICS = (
    Metric("exact_match", "exact match", "more", "share", "the answer is the reference, but for spacing"),
    Metric("contract", "contract kept", "more", "share", "the answer keeps its task's contract"),
    Metric("label_accuracy", "right label", "more", "share", "the right one of a task's few answers, but for case"),
    Metric("macro_f1", "macro F1", "more", "share", "F1 of each label, their plain mean"),
    Metric("json_valid", "valid JSON", "more", "share", "the answer is JSON where the reference is"),
    Metric("json_f1", "JSON fields F1", "more", "share", "fields of the reference that the answer has, and no others"),
    Metric("rouge_l", "ROUGE-L", "more", "share", "F1 of the longest common subsequence of words"),
    Metric("chrf", "chrF", "more", "share", "F2 of character n-grams of 1 to 6 characters"),
    Metric("loss", "loss", "less", "number", "mean negative log-likelihood of the reference [nats a token]"),
    Metric("perplexity", "perplexity", "less", "number", "e to the loss"),
    Metric("ended", "ended by itself", "more", "share", "the answer came to its end of turn before the limit"),
    Metric("words", "words", "neither", "number", "length of the answer"),
    Metric("repetition", "repeated words", "less", "share", "runs of 4 words that the answer held before"),
    Metric("ungrounded", "unfounded", "less", "share", "answers with a number or name that the prompt doesn't hold"),
)
METRIC = {metric.name: metric for metric in METRICS}


class Interval(NamedTuple):
    """A mean with the bounds between which 95 % of resampled means lie."""

    mean: float
    low: float
    high: float


def normalise(text: str) -> str:
    """Text as exact match compares it: composed characters, single spaces. Case counts."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalise_label(text: str) -> str:
    """Text as labels are compared: without case, and without quotes or a full stop around it."""
    return normalise(text).casefold().strip(" .!\"'“”`*")


def is_exact_match(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, but for Unicode composition and white space. Case counts."""
    return normalise(answer) == normalise(reference)


def split_words(text: str) -> list[str]:
    """The words of a text, without case or punctuation."""
    return _WORD.findall(text.casefold())


def measure_rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of two texts' words: 0 to 1.

    As rouge-score has it (Lin 2004), with words of all scripts: its own tokenizer knows a to z and digits.
    """
    from rapidfuzz.distance import LCSseq

    total = len(first) + len(second)
    return 2 * LCSseq.similarity(first, second) / total if total else 0.0


def measure_chrf(answer: str, reference: str) -> float:
    """ChrF of one answer by sacrebleu: 0 to 1 (Popović 2015)."""
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


def measure_answer(answer: str, reference: str, prompt: str) -> dict[str, float]:
    """The measures that one answer has by itself: those that METRICS names, where they mean something."""
    words = split_words(answer)
    found = {
        "exact_match": float(is_exact_match(answer, reference)),
        "rouge_l": measure_rouge_l(words, split_words(reference)),
        "chrf": measure_chrf(answer, reference),
        "words": float(len(words)),
        "repetition": measure_repetition(words),
        "ungrounded": float(bool(find_ungrounded(answer, prompt))),
    }
    expected = parse_json(reference)
    if isinstance(expected, (dict, list)):
        given = parse_json(answer)
        found["json_valid"] = float(given is not INVALID)
        found["json_f1"] = measure_json_f1(given, expected)
    return found


def measure_repetition(words: Sequence[str]) -> float:
    """Share of the runs of REPEATED_WORDS words that stand in the text for a second time or more: 0 to 1."""
    runs = [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def find_ungrounded(answer: str, prompt: str) -> list[str]:
    """Numbers and names of an answer that its prompt doesn't hold: a hint at what was made up, no proof.

    A name is a capitalised word inside a sentence; scripts without capitals show numbers only.
    """
    known = set(split_words(prompt))
    numbers = {_plain_number(number) for number in _NUMBER.findall(prompt)}
    found = [number for number in _NUMBER.findall(answer) if _plain_number(number) not in numbers]
    for match in _CAPITALISED.finditer(answer):
        word = match.group()
        before = answer[max(0, match.start() - 20) : match.start()].rstrip(" \t")
        if (
            before
            and before[-1] not in _OPENS
            and word[0].isupper()
            and len(word) > 1
            and not set(split_words(word)) <= known
        ):
            found.append(word)
    return found


class _Invalid:
    """What parse_json returns for text that is no JSON."""


INVALID = _Invalid()


def parse_json(text: str) -> Any:
    """The value that a text is in JSON, or INVALID. NaN and Infinity are none, nor are two values or a code fence."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return INVALID


def measure_json_f1(given: Any, expected: Any) -> float:
    """F1 of fields: a field is a path with the value at its end; the order of a list's items doesn't count."""
    try:
        first, second = (Counter(_flatten(value)) for value in (given, expected))
    except RecursionError:
        return 0.0
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def find_labels(references: Sequence[str]) -> list[str]:
    """The labels that a task chooses among, in order, or none where its answers are free text."""
    labels = Counter(map(normalise_label, references))
    few = 2 <= len(labels) <= min(MOST_LABELS, len(references) // ROWS_PER_LABEL)
    return sorted(labels) if few and all(label and len(label) <= SHORT_LABEL for label in labels) else []


def measure_macro_f1(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> float:
    """Mean F1 of the labels, each counting the same; an answer that is none of them is wrong for its reference's."""
    given, expected = ([normalise_label(text) for text in texts] for texts in (answers, references))
    right = Counter(label for label, wanted in zip(given, expected, strict=True) if label == wanted)
    said, wanted = Counter(given), Counter(expected)
    f1 = [2 * right[label] / total if (total := said[label] + wanted[label]) else 0.0 for label in labels]
    return sum(f1) / max(len(f1), 1)


def bootstrap_mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """The weighted mean of rows' values, and the interval in which it lies with 95 % confidence.

    Rows are drawn anew RESAMPLES times; given differences between two answers to the same rows, the interval is the
    paired one (Efron and Tibshirani 1993). The spread is widened by sqrt(n / (n - 1)), without which few rows look too
    sure, but never beyond the values themselves. Where all values are the same, rows say nothing about the spread, and
    the interval is the mean itself.
    """
    import numpy as np

    rows = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float((rows * weight).sum() / weight.sum())
    if len(rows) < 2:
        return Interval(mean, mean, mean)
    draw = np.random.default_rng(seed)
    means: list[Any] = []
    at_once = max(1, DRAWN_AT_ONCE // len(rows))
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        # How often each row is drawn in each of the samples: a flat count, the samples told apart by their offset.
        drawn = draw.integers(len(rows), size=(count, len(rows))) + len(rows) * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * len(rows)).reshape(count, len(rows))
        means.append(times @ (rows * weight) / (times @ weight))
    bounds = mean + (np.quantile(np.concatenate(means), [0.025, 0.975]) - mean) * np.sqrt(len(rows) / (len(rows) - 1))
    low, high = np.clip(bounds, rows.min(), rows.max()).tolist()
    return Interval(mean, low, high)


def write_value(name: str, value: float, signed: bool = False) -> str:
    """A measure's value in words: a share in percent, a number with three figures."""
    sign = "+" if signed else ""
    if METRIC[name].unit == "share":
        return f"{100 * value:{sign}.1f}" + ("" if signed else " %")
    return f"{value:{sign}.1f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def _plain_number(number: str) -> str:
    return number.replace(",", "")


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _flatten(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Every leaf with its path. An empty object or list is a leaf too: it differs from none."""
    if isinstance(value, dict) and value:
        return list(chain.from_iterable(_flatten(inner, (*path, f".{key}")) for key, inner in value.items()))
    if isinstance(value, list) and value:
        return list(chain.from_iterable(_flatten(inner, (*path, "[]")) for inner in value))
    if value is INVALID:
        return []
    # 1 and 1.0 are the same number in JSON, true is none.
    plain = float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value
    return [(path, json.dumps(normalise(plain) if isinstance(plain, str) else plain))]


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
