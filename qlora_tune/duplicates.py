"""Which examples are copies of one another: exactly, but for case and spacing, nearly, or across a split.

Digests of every row are held as numbers, so that a file larger than memory can be searched. Near copies are found by
MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3) and each
candidate is then verified by the exact Jaccard similarity of its shingles.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, NamedTuple
from zlib import adler32, crc32

from qlora_tune.shapes import Example

SIMILAR = 0.8  # Jaccard similarity from which two rows are near duplicates, as in the Pile's and Alpaca's cleaning
SIMILAR_INPUT = 0.6  # of the inputs of two prompts: a word in ten may be another
SHINGLE_WORDS = 3
SHINGLE_CHARACTERS = 5  # in scripts that put no spaces between words
_WORD = re.compile(r"\w+")
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer letters.
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_PASSAGE = 10  # shared shingles from which a passage counts as the same
_FEW = 12  # rows that may share a shingle which still tells two of them apart from all others
_COMMON = 200  # a shingle in more training rows than this is no longer compared: an instruction used over and over
_CANDIDATES = 20
_ARRAY_BYTES = 112  # of an array besides its numbers
_PERMUTATIONS, _BANDS = 64, 16  # a pair at 0.8 becomes a candidate with a probability of 0.9998


def exact_key(example: Example) -> int:
    """A digest of the conversation as it is."""
    return _digest(json.dumps([list(example.messages), list(example.tools)], sort_keys=True, default=str))


def loose_key(example: Example) -> int:
    """A digest of the conversation without case, spacing and punctuation."""
    return _digest("\n".join(_plain_turns(example)))


def prompt_key(example: Example) -> int:
    """A digest of what stands before the last answer, without case, spacing and punctuation."""
    return _digest("\n".join(_plain_turns(example)[:-1]))


def plain_text(text: str) -> str:
    """Text without case, spacing and punctuation; symbols stay where there is nothing else."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(folded)) or "".join(folded.split())


def shingles(text: str) -> set[str]:
    """Groups of three words, or of five characters in a script without spaces; fewer where the text is shorter."""
    words = _WORD.findall(text.casefold())
    if _has_spaces(text):
        size, joiner, units = SHINGLE_WORDS, " ", words
    else:
        size, joiner, units = SHINGLE_CHARACTERS, "", list("".join(words))
    size = max(1, min(size, len(units)))
    return {joiner.join(units[i : i + size]) for i in range(len(units) - size + 1)}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """Shared members over all members of both."""
    return len(one & other) / max(len(one | other), 1)


@dataclass
class Copies:
    """What was found: for each row that copies another, that other row, by number."""

    exact: dict[int, int] = field(default_factory=dict)
    loose: dict[int, int] = field(default_factory=dict)
    near: dict[int, tuple[int, float]] = field(default_factory=dict)  # and their similarity
    conflicting: dict[int, int] = field(default_factory=dict)  # same prompt, another answer

    def groups(self) -> list[tuple[list[int], dict[int, str]]]:
        """Rows that are copies of one another, and how each later one is one, in the order of their first rows."""
        edges = [(row, first, "exact duplicate") for row, first in self.exact.items()]
        edges += [(row, first, "duplicate but for case or spacing") for row, first in self.loose.items()]
        edges += [(row, first, "near duplicate") for row, (first, _) in self.near.items()]
        members: dict[int, list[int]] = defaultdict(list)
        for row, first in join_pairs((row, first) for row, first, _ in edges).items():
            members[first].append(row)
        kinds = {row: kind for row, _, kind in edges}
        return [(rows, {row: kinds[row] for row in rows if row in kinds}) for rows in members.values()]


def join_pairs(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Which numbers the pairs bring together: for each, in order, the first of its group."""
    leader: dict[int, int] = {}

    def lead(number: int) -> int:
        while leader.setdefault(number, number) != number:
            number = leader[number]
        return number

    for pair in pairs:
        one, other = sorted(map(lead, pair))
        leader[other] = one
    return {number: lead(number) for number in sorted(leader)}


class DuplicateFinder:
    """Collects rows as numbers and says at the end which are copies. Rows count from 0 in the order of `add`."""

    def __init__(self, near: bool, limit: int | None = None) -> None:
        self._exact, self._loose, self._prompt = array("Q"), array("Q"), array("Q")
        self._near, self._limit = near, limit  # beyond so many bytes of sketches near copies are given up
        self._sketches: list[Sketch] = []
        self._held = 0

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, example: Example) -> None:
        """Take in one more row."""
        self._exact.append(exact_key(example))
        turns = _plain_turns(example)
        self._loose.append(_digest("\n".join(turns)))
        self._prompt.append(_digest("\n".join(turns[:-1])))
        if self._near:
            self._sketches.append(sketch(example))
            self._held += sum(part.nbytes + _ARRAY_BYTES for part in self._sketches[-1])
            if self.gave_up:
                self._near, self._sketches = False, []

    @property
    def gave_up(self) -> bool:
        """Whether near copies are not searched because sketches took more than their limit."""
        return self._limit is not None and self._held > self._limit

    def find(self) -> Copies:
        """Search all rows. The first of a group is the original; each row is named under the closest kind only."""
        copies = Copies()
        copies.exact = dict(_later_of_equal(self._exact))
        copies.loose = {row: first for row, first in _later_of_equal(self._loose) if row not in copies.exact}
        known = {*copies.exact, *copies.loose}
        copies.conflicting = {row: first for row, first in _later_of_equal(self._prompt) if row not in known}
        if self._near:
            for row, first, similarity in find_near(self._sketches, skip=known):
                copies.near[row] = (first, similarity)
        return copies


@dataclass(frozen=True)
class Leak:
    """A held-out row that training also holds: both by number, how, and how much of it."""

    heldout: int
    train: int
    kind: Literal["same conversation", "same prompt", "near copy", "same passage"]
    share: float


class LeakFinder:
    """Searches training rows, one after another, for what held-out rows hold.

    Found are the same conversation, the same prompt (but for case, spacing and punctuation), near copies, and the
    same passage or question under another instruction. What many rows share, such as an instruction that is used
    over and over, tells nothing and is left out of the comparison.
    """

    def __init__(self, heldout: Sequence[Example]) -> None:
        self._examples = heldout
        self._exact = _group(map(exact_key, heldout))
        self._prompt = _group(map(prompt_key, heldout))
        self._shingles = [shingles(example.prompt) for example in heldout]
        self._rows_of: dict[str, list[int]] = defaultdict(list)
        for row, found in enumerate(self._shingles):
            for shingle in found:
                self._rows_of[shingle].append(row)
        self._frequency: Counter[str] = Counter()
        self._sure: dict[int, Leak] = {}
        self._candidates: list[tuple[int, int, set[str], Example]] = []
        self._seen = 0

    def add(self, example: Example) -> None:
        """Compare one more training row."""
        number, self._seen = self._seen, self._seen + 1
        for row in self._prompt.pop(prompt_key(example), ()):
            self._sure.setdefault(row, Leak(row, number, "same prompt", 1.0))
        for row in self._exact.pop(exact_key(example), ()):
            self._sure[row] = Leak(row, number, "same conversation", 1.0)
        shared: dict[int, set[str]] = defaultdict(set)
        own = shingles(example.prompt)
        for shingle in own:
            rows = self._rows_of.get(shingle, ())
            if not rows:
                continue
            self._frequency[shingle] += 1
            if self._frequency[shingle] <= _COMMON:
                for row in rows:
                    shared[row].add(shingle)
        self._candidates += [
            (row, number, found, example)
            for row, found in shared.items()
            if row not in self._sure and 2 * len(found) >= min(len(own), len(self._shingles[row]), 2 * _PASSAGE)
        ]

    def find(self) -> list[Leak]:
        """All leaks, one for each held-out row, in the order of the held-out rows."""
        common = {shingle for shingle, count in self._frequency.items() if count > max(3, self._seen // 100)}
        common |= {shingle for shingle, rows in self._rows_of.items() if len(rows) > max(3, len(self._examples) // 100)}
        best: dict[int, Leak] = {}
        for row, number, shared, example in self._candidates:
            leak = self._judge(row, number, shared - common, common, example)
            if leak and (row not in best or leak.share > best[row].share):
                best[row] = leak
        return [leak for _, leak in sorted({**best, **self._sure}.items())]

    def _judge(self, row: int, number: int, shared: set[str], common: set[str], example: Example) -> Leak | None:
        telling, others = len(self._shingles[row] - common), len(shingles(example.prompt) - common)
        kind = _judge_pair(self._examples[row], example, len(shared), telling, others)
        return Leak(row, number, kind, len(shared) / min(telling, max(others, 1))) if kind else None


def find_related(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Pairs of examples, by number, of which one would leak into a score if the other were trained on.

    They are what LeakFinder finds across two sets of rows: near copies, and the same passage or question under other
    words. Only what at most 12 rows share tells two apart from all others.
    """
    import numpy as np

    hashed = [_hash(shingles(example.prompt)) for example in examples]
    number = len(hashed)
    if number < 2:
        return
    owners = np.repeat(np.arange(number), [len(one) for one in hashed])
    _, where, counts = np.unique(np.concatenate(hashed), return_inverse=True, return_counts=True)
    order = np.argsort(where, kind="stable")
    starts = np.cumsum(counts) - counts
    telling = np.bincount(owners, weights=counts[where] <= max(3, number // 100), minlength=number)
    pairs = [np.empty(0, dtype=np.int64)]
    for size in range(2, _FEW + 1):
        rows = owners[order[starts[counts == size][:, None] + np.arange(size)]]
        one, other = np.triu_indices(size, 1)
        pairs.append((rows[:, one] * number + rows[:, other]).ravel())
    found, shared = np.unique(np.concatenate(pairs), return_counts=True)
    enough = 2 * shared >= np.minimum(2 * _PASSAGE, np.minimum(telling[found // number], telling[found % number]))
    for pair, count in zip(found[enough].tolist(), shared[enough].tolist(), strict=True):
        one, other = divmod(pair, number)
        if _judge_pair(examples[one], examples[other], count, int(telling[one]), int(telling[other])):
            yield one, other


def _judge_pair(
    one: Example, other: Example, shared: int, telling: int, others: int
) -> Literal["near copy", "same passage"] | None:
    """What two examples are to each other that share so many of their telling shingles; None: nothing."""
    if not telling or not shared:
        return None
    share = shared / min(telling, max(others, 1))
    if share < 0.5:
        return None
    answers = jaccard(shingles(one.answer), shingles(other.answer))
    same_input = _share_input(one, other)
    if share >= SIMILAR and (same_input or answers >= 0.5 or not _has_parts(one)):
        return "near copy" if answers >= 0.5 else "same passage"
    if shared >= _PASSAGE and (same_input or answers >= SIMILAR or not _has_parts(one)):
        return "same passage"
    # An equal last part is no passage where it is a question that many rows end in: then little of the rest is shared.
    return "same passage" if same_input and share > 0.5 and len(_last_part(one).split()) >= _PASSAGE else None


def _group(keys: Iterable[int]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return rows


def _has_parts(example: Example) -> bool:
    """Whether a prompt is an instruction with an input behind it."""
    return "\n\n" in example.prompt.strip()


def _share_input(one: Example, other: Example) -> bool:
    """Whether the inputs are alike: the last parts, or the longest ones where not both of them open the prompt."""
    parts, others = (
        [plain_text(part) for part in example.prompt.strip().split("\n\n") if part.strip()] for example in (one, other)
    )
    if parts[-1:] == others[-1:] or sorted(parts) == sorted(others):
        return True
    pairs = [(parts[-1], others[-1])] if parts and others else []
    longest, longest_other = max(parts, key=len, default=""), max(others, key=len, default="")
    if parts[:1] != [longest] or others[:1] != [longest_other]:
        pairs.append((longest, longest_other))
    return any(len(shingles(a)) >= _PASSAGE and jaccard(shingles(a), shingles(b)) >= SIMILAR_INPUT for a, b in pairs)


def _last_part(example: Example) -> str:
    return plain_text(example.prompt.strip().rpartition("\n\n")[2])


class Sketch(NamedTuple):
    """An example as numbers: its shingles, those that tell it apart, and the words of its input and of its answer."""

    whole: Any
    telling: Any  # shingles of input and answer, without the instruction that many rows may share
    input: Any
    answer: Any


def sketch(example: Example) -> Sketch:
    """Hash an example for the search of near copies: 8 bytes a shingle or word, sorted."""
    last = _last_part(example)
    words = (_WORD.findall(text.casefold()) for text in (last, example.answer))
    whole = _hash(shingles(f"{example.prompt}\n{example.answer}"))
    parted = "\n\n" in example.prompt
    return Sketch(whole, _hash(shingles(f"{last}\n{example.answer}")) if parted else whole, *map(_hash, words))


def find_near(
    sketches: Sequence[Sketch], skip: Iterable[int] = (), best: bool = True
) -> Iterator[tuple[int, int, float]]:
    """Rows whose shingles are 80 % or more those of an earlier row: the row, that row (`best`: the most alike; else
    each one), the similarity.

    Input and answer must be alike too, half of their words: rows under one long instruction are no copies. Rows in
    `skip` are not searched. Candidates are those whose inputs and answers together look alike by MinHash, at most 20;
    each is verified.
    """
    from rensa import RMinHash, RMinHashLSH

    left_out = set(skip)
    index = RMinHashLSH(threshold=SIMILAR, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    for row, one in enumerate(sketches):
        if row in left_out or not len(one.whole):
            continue
        signature = RMinHash(num_perm=_PERMUTATIONS, seed=1)
        signature.update([shingle.tobytes() for shingle in one.telling[:, None]])
        candidates = sorted(index.query(signature))[:_CANDIDATES]
        similar = sorted((-_similarity(one, sketches[earlier]), earlier) for earlier in candidates)
        found = [(earlier, -likeness) for likeness, earlier in similar if -likeness >= SIMILAR]
        yield from ((row, earlier, likeness) for earlier, likeness in found[: 1 if best else None])
        index.insert(row, signature)


def _similarity(one: Sketch, other: Sketch) -> float:
    """Jaccard similarity of the whole; 0 where inputs or answers differ in most of their words."""
    if _overlap(one.input, other.input) < 0.5 or _overlap(one.answer, other.answer) < 0.5:
        return 0.0
    return _overlap(one.whole, other.whole)


def _overlap(one: Any, other: Any) -> float:
    import numpy as np

    if not len(one) and not len(other):
        return 1.0
    shared = np.intersect1d(one, other, assume_unique=True).size
    return float(shared / (len(one) + len(other) - shared))


def _hash(found: Iterable[str]) -> Any:
    import numpy as np

    encoded = [one.encode("utf-8", "surrogatepass") for one in found]
    return np.unique(np.array([crc32(one) << 32 | adler32(one) for one in encoded], dtype=np.uint64))


def _later_of_equal(keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows whose key an earlier row has, with the first that has it."""
    import numpy as np

    values = np.asarray(keys, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    first = -1
    for position, row in enumerate(order):
        if position == 0 or values[row] != values[order[position - 1]]:
            first = int(row)
        else:
            yield int(row), first


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _plain_turns(example: Example) -> list[str]:
    """Who says what, as plain_text, a turn each; with the calls, so that those of different functions are not alike."""
    said = []
    for turn in example.messages:
        calls = f" {json.dumps(turn['tool_calls'], default=str)}" if turn.get("tool_calls") else ""
        said.append(f"{turn['role']} {plain_text(turn['content'] + calls)}")
    return said


def _has_spaces(text: str) -> bool:
    """Whether most letters are of a script that puts spaces between words."""
    return text.isascii() or len(_UNSPACED.findall(text, 0, 2000)) <= 0.3 * sum(map(str.isalpha, text[:2000]))
