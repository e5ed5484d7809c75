"""Fewer and better examples: score how much each prompt helps its answer, choose some, set the others aside.

Stands between quality and the split: examples go in, the ones worth training on come out, in file order. That a few
good rows can do the work of many is shown by LIMA (arXiv 2305.11206), AlpaGasus (2307.08701) and Deita (2312.15685).
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_tune.chat_format import IGNORED, ChatFormat
from qlora_tune.errors import ConfigError, TemplateError
from qlora_tune.likelihood import PackedSequence, pack_sequence, score_sequences
from qlora_tune.row_files import to_row, write_rows
from qlora_tune.shapes import NO_TASK, Example
from qlora_tune.turns import Message

Criterion = Literal["ifd", "length", "diversity", "reward"]
# What the score of each criterion is called in the files that are written.
SCORE_NAMES: dict[Criterion, str] = {
    "ifd": "ifd",
    "length": "answer_bytes",
    "diversity": "distance",
    "reward": "reward",
}
NO_HELP = "its prompt does not help: IFD of 1 or more"
NO_SCORE = "can't be scored: longer than max_length, or without a word"
NOT_CHOSEN = "not among the best"
NGRAM = 4  # [characters]
NGRAM_BITS = 18  # n-grams are counted in 2 ** 18 buckets for their rarity, then folded into FEATURES signed sums
FEATURES = 512
GOLDEN = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio


@dataclass(frozen=True)
class Difficulty:
    """How hard one example's answers are for the base, with the prompt in front and without; or why that is unknown.

    The figures are means over the answers' tokens, their ends of turn left out, in nats a token.
    """

    source: str
    answer_tokens: int = 0
    nll_with_prompt: float = math.nan
    nll_alone: float = math.nan
    problem: str = ""

    @property
    def ifd(self) -> float | None:
        """Perplexity of the answers behind their prompt over their perplexity alone; None where that is unknown."""
        return None if self.problem else math.exp(self.nll_with_prompt - self.nll_alone)


@dataclass(frozen=True)
class LeftOut:
    """An example that was not chosen, by number, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """What was chosen, and what was not: both are numbers of examples, in file order.

    A score is an IFD, a reward, the answers' length in UTF-8 bytes, or the cosine distance to the nearest example
    chosen before it (for one left out: to the nearest chosen at all).
    """

    by: Criterion
    kept: tuple[int, ...]
    left_out: tuple[LeftOut, ...]
    scores: tuple[float | None, ...]  # of every example

    def count_reasons(self) -> Counter[str]:
        """How many examples were left out for which reason."""
        return Counter(left_out.reason for left_out in self.left_out)

    def count_tasks(self, examples: Sequence[Example]) -> dict[str, tuple[int, int]]:
        """Rows of each task, and how many of them were chosen. What has none is a task that won't be learned."""
        rows = Counter(example.task or NO_TASK for example in examples)
        chosen = Counter(examples[index].task or NO_TASK for index in self.kept)
        return {task: (rows[task], chosen[task]) for task in sorted(rows)}


class _Pair(NamedTuple):
    """One example's sequences, and each of its answers alone; or why there are none."""

    whole: list[PackedSequence]
    alone: list[PackedSequence]
    problem: str = ""


def score_ifd(
    model: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Difficulty]:
    """Measure instruction-following difficulty with the model as it is; one Difficulty per example, in order.

    With its prompt, a conversation is the very sequence that training would see, cut after the last turn within
    max_length [tokens]. Alone, each of its answers stands by itself behind an empty question: the chat template with
    nothing in it, so that both sides have the same format around the same tokens, and the ratio is about the words.
    `on_progress` gets sequences done and sequences in all; equal ones, such as a class's name, are scored once.

    The model must know the chat template: one that doesn't needs brief experience first, as in the paper. On
    sample.jsonl, a row with another row's prompt had the higher IFD for the built-in base in 65 % of the cases, and
    after 24 steps of training in 97 %. Source: Li et al., arXiv 2308.12032, with the ratio of perplexities of
    Superfiltering, arXiv 2402.00530.
    """
    opening = chat.encode_prompt([Message(role="user", content="")])
    pairs = [_to_pair(chat, opening, example, max_length) for example in examples]
    distinct = list(dict.fromkeys(sequence for pair in pairs for sequence in (*pair.whole, *pair.alone)))
    nll = score_sequences(model, distinct, batch_size, on_progress)
    return [_to_difficulty(example.source, pair, nll) for example, pair in zip(examples, pairs, strict=True)]


def select_examples(
    examples: Sequence[Example],
    by: Criterion,
    rows: int,
    scores: Sequence[float | None] | None = None,
    seed: int = 42,
    per_task: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """Choose `rows` examples: the highest IFDs below 1 or rewards, the longest answers, or the most unlike each other.

    "ifd" and "reward" use `scores`: one per example, None where it is unknown. "length" is Zhao et al.'s baseline,
    which is strong (arXiv 2402.04833). "diversity" is greedy k-center (Sener and Savarese, arXiv 1708.00489) on hashed
    character n-grams, from a start that `seed` draws; `on_progress` gets rows chosen and rows to choose. With
    `per_task`, each task gives rows in proportion to its size, one at least while there are rows. Ties go to the
    earlier row, and fewer rows are chosen where no more are fit. Raises ConfigError.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}, expected 1 or more: how many examples to keep.")
    scored = by in ("ifd", "reward")
    if scored and (scores is None or len(scores) != len(examples)):
        found = "none" if scores is None else str(len(scores))
        raise ConfigError(f'"{by}" needs a score for each of {len(examples)} examples, found {found}.')
    known = list(scores) if scored and scores else [_count_answer_bytes(example) for example in examples]
    unfit = _find_unfit(known, math.inf if by == "reward" else 1) if scored else {}
    groups = _group_by_task(examples, per_task)
    fit = {task: [index for index in members if index not in unfit] for task, members in groups.items()}
    shares = _share_rows({task: len(members) for task, members in groups.items()}, fit, rows)
    if by == "diversity":
        chosen, known = _spread(examples, fit, shares, random.Random(seed), on_progress)
    else:
        # sorted() keeps the order of equals, so ties go to the earlier row.
        ranked = {task: sorted(members, key=lambda index: -(known[index] or 0.0)) for task, members in fit.items()}
        chosen = {index for task, members in ranked.items() for index in members[: shares[task]]}
    return Selection(
        by,
        tuple(sorted(chosen)),
        tuple(LeftOut(i, unfit.get(i, NOT_CHOSEN)) for i in range(len(examples)) if i not in chosen),
        tuple(known),
    )


def name_left_out(path: Path) -> Path:
    """Where the examples that were not chosen are written, beside those that were."""
    return path.with_name(f"{path.stem}_left_out.jsonl")


def write_selection(selection: Selection, examples: Sequence[Example], path: Path) -> Path:
    """Write the chosen examples as JSON Lines, and all others beside them with the reason. Returns the latter's path.

    Both are written whole or not at all. Raises DataError where that fails.
    """
    others = name_left_out(path)
    rest = ({**_to_row(selection, examples, out.index), "reason": out.reason} for out in selection.left_out)
    write_rows({others: rest, path: (_to_row(selection, examples, index) for index in selection.kept)})
    return others


def _to_pair(chat: ChatFormat, opening: list[int], example: Example, max_length: int) -> _Pair:
    try:
        sequences = chat.tokenize_example(example.messages, max_length)
    except TemplateError as error:
        return _Pair([], [], str(error))
    # The end of turn is format, not answer: the built-in base charged 8 nats for it, more than for most words.
    labels = [[IGNORED if i == chat.end_of_turn_id else i for i in sequence.labels] for sequence in sequences]
    runs = (run for row in labels for run in groupby(row, key=lambda label: label != IGNORED))
    answers = [list(run) for learned, run in runs if learned]
    return _Pair(
        [pack_sequence(sequence.input_ids, row) for sequence, row in zip(sequences, labels, strict=True)],
        [pack_sequence([*opening, *answer], [IGNORED] * len(opening) + answer) for answer in answers],
        "" if answers else "has no answer to learn",
    )


def _to_difficulty(source: str, pair: _Pair, nll: Mapping[PackedSequence, float]) -> Difficulty:
    if pair.problem:
        return Difficulty(source, problem=pair.problem)
    tokens = sum(sequence.learned for sequence in pair.whole)
    with_prompt, alone = (sum(nll[sequence] for sequence in part) / tokens for part in (pair.whole, pair.alone))
    problem = "" if math.isfinite(with_prompt + alone) else "the model gives it no finite likelihood"
    return Difficulty(source, tokens, with_prompt, alone, problem)


def _find_unfit(scores: Sequence[float | None], limit: float) -> dict[int, str]:
    unfit: dict[int, str] = {}
    for index, score in enumerate(scores):
        if score is None or not math.isfinite(score):
            unfit[index] = NO_SCORE
        elif score >= limit:
            unfit[index] = NO_HELP
    return unfit


def _count_answer_bytes(example: Example) -> int:
    """The length of all learned answers. Bytes come closer to tokens than characters do, where scripts are mixed."""
    learned = [turn for turn in example.messages if turn["role"] == "assistant" and turn.get("learn", True)]
    calls = [json.dumps(turn["tool_calls"], ensure_ascii=False) for turn in learned if "tool_calls" in turn]
    return sum(len(text.encode("utf-8", "replace")) for text in [*(turn["content"] for turn in learned), *calls])


def _group_by_task(examples: Sequence[Example], per_task: bool) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.task or "") if per_task else "", []).append(index)
    return groups


def _share_rows(sizes: Mapping[str, int], fit: Mapping[str, Sequence[int]], rows: int) -> dict[str, int]:
    """Share rows out among tasks as seats in a parliament: one each, the largest first, then by Webster's method."""
    shares = dict.fromkeys(sizes, 0)
    waiting = [(-math.inf, -size, number, task) for number, (task, size) in enumerate(sizes.items()) if fit[task]]
    heapq.heapify(waiting)
    for _ in range(min(rows, sum(map(len, fit.values())))):
        _, size, number, task = heapq.heappop(waiting)
        shares[task] += 1
        if shares[task] < len(fit[task]):
            heapq.heappush(waiting, (size / (2 * shares[task] + 1), size, number, task))
    return shares


def _spread(
    examples: Sequence[Example],
    groups: Mapping[str, list[int]],
    shares: Mapping[str, int],
    draw: random.Random,
    on_progress: Callable[[int, int], None],
) -> tuple[set[int], list[float | None]]:
    """Choose each group's share by k-center: always the example farthest from all that are chosen."""
    import numpy as np

    features = _hash_texts([" ".join(turn["content"] for turn in example.messages) for example in examples])
    chosen: list[int] = []
    scores: list[float | None] = [None] * len(examples)
    for task, members in groups.items():
        rows = features[members]
        distances = np.ones(len(members), dtype=np.float32)  # to the nearest that is chosen
        for pick in range(shares[task]):
            # A chosen one's distance is set below all others; the first of equals is taken.
            at = int(distances.argmax()) if pick else draw.randrange(len(members))
            chosen.append(members[at])
            scores[members[at]] = float(distances[at])
            distances = np.minimum(distances, np.maximum(0, 1 - rows @ rows[at]))
            distances[at] = -1
            on_progress(len(chosen), sum(shares.values()))
        for index, distance in zip(members, distances.tolist(), strict=True):
            scores[index] = distance if distance >= 0 else scores[index]
    return set(chosen), scores


def _hash_texts(texts: Sequence[str]) -> Any:
    """TF-IDF of character n-grams, a row of unit length [FEATURES] a text; their products are cosine similarities.

    Signed sums keep the products right on average where n-grams meet (Weinberger et al., arXiv 0902.2206).
    """
    import numpy as np

    seen_in = np.zeros(2**NGRAM_BITS, dtype=np.int64)
    for text in texts:
        seen_in[np.unique(_hash_ngrams(text))] += 1
    rarity = np.log((1 + len(texts)) / (1 + seen_in)) + 1
    features = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for row, text in enumerate(texts):
        buckets, counts = np.unique(_hash_ngrams(text), return_counts=True)
        signs = 1 - 2 * (buckets // FEATURES % 2)
        weights = (1 + np.log(counts)) * rarity[buckets] * signs
        sums = np.bincount(buckets % FEATURES, weights, minlength=FEATURES)
        features[row] = sums / (np.linalg.norm(sums) or 1.0)
    return features


def _hash_ngrams(text: str) -> Any:
    """The bucket of each n-gram, case and spacing aside, by Fibonacci hashing of a polynomial in the characters."""
    import numpy as np

    plain = f" {' '.join(text.casefold().split())} ".ljust(NGRAM)
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    grams = np.zeros(len(codes) - NGRAM + 1, dtype=np.uint64)
    for place in range(NGRAM):
        grams = grams * np.uint64(1_000_003) + codes[place : place + len(grams)]
    mixed = grams * np.uint64(GOLDEN)
    return (((mixed ^ (mixed >> np.uint64(32))) * np.uint64(GOLDEN)) >> np.uint64(64 - NGRAM_BITS)).astype(np.int64)


def _to_row(selection: Selection, examples: Sequence[Example], index: int) -> dict[str, Any]:
    """An example as a row that is read back the same, with where it came from and its score (null where unknown)."""
    example, score = examples[index], selection.scores[index]
    known = score if score is not None and math.isfinite(score) else None
    return {**to_row(example), SCORE_NAMES[selection.by]: known}
