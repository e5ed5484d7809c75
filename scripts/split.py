"""Which texts and entities are kept for the held-out rows: decided by a hash of the text, for every file alike.

The corpus and the pairs draw a text again when it is reserved; held-out rows draw until it is. So the held-out
part of the world stays unread whatever the seed, and rows can be added later without pretraining again.
"""

import hashlib
import itertools
import re
from collections.abc import Callable
from functools import cache, wraps
from random import Random
from typing import TypeVar

TEXTS = 64  # one text in so many is reserved: never in the corpus, never in a pair
ENTITIES = 6  # countries, animals, jobs, words, first names: no pair asks about them; the corpus does tell of them
SHORTEST_LIST = 3  # [words] shorter lists are too few to reserve any
Item = TypeVar("Item")
_LIST = re.compile(r"\w+(?:, \w+){2,}")


def rank(text: str) -> int:
    """A number that only the text decides, whatever its case and white space."""
    return int.from_bytes(hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:4])


def is_reserved(text: str, one_in: int = TEXTS) -> bool:
    """Whether a text belongs to the held-out part."""
    return rank(text) % one_in == 0


def holds_reserved_list(text: str) -> bool:
    """Whether any run of words between commas, of any length, is a reserved list."""
    for found in _LIST.findall(text):
        words = found.split(", ")
        for start in range(len(words) - SHORTEST_LIST + 1):
            for end in range(start + SHORTEST_LIST, len(words) + 1):
                if is_reserved(", ".join(words[start:end])):
                    return True
    return False


def split_by(reserved: Callable[[Item], bool]) -> Callable[[Callable[..., Item]], Callable[..., Item]]:
    """Let a maker draw from one side of the split: never a reserved item, or with held_out=True only those."""

    def decorate(make: Callable[..., Item]) -> Callable[..., Item]:
        @wraps(make)
        def draw(rng: Random, *args: int, held_out: bool = False) -> Item:
            while True:
                item = make(rng, *args)
                if reserved(item) == held_out:
                    return item

        return draw

    return decorate


def expand(template: str) -> list[str]:
    """All sentences of a template in which {one|two|three} stands for one of the words."""
    parts = [part.split("|") for part in re.split(r"[{}]", template)]
    return ["".join(words) for words in itertools.product(*parts)]


@cache
def sentences_of(templates: tuple[str, ...], held_out: bool) -> list[str]:
    """The sentences of a group on one side of the split; one in eight, at least two, are held out."""
    every = sorted((sentence for template in templates for sentence in expand(template)), key=rank)
    reserved = max(2, len(every) // 8)
    return every[:reserved] if held_out else every[reserved:]
