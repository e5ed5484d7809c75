"""How long examples are, as a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HISTOGRAM_BARS = 20


@dataclass(frozen=True)
class Histogram:
    """How long the examples are: counts[i] of them from edges[i] to below edges[i + 1]."""

    unit: str  # "tokens" or "characters"
    edges: list[int]
    counts: list[int]
    median: int
    longest: int
    limit: int | None = None  # max_length


def count_lengths(lengths: Sequence[int], unit: str, limit: int | None) -> Histogram | None:
    """Bars of one width over the lengths up to the 99.5th percentile; the last one takes all that is longer."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    top = ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]
    width = max(1, math.ceil((top + 1) / HISTOGRAM_BARS))
    counts = [0] * HISTOGRAM_BARS
    for length in lengths:
        counts[min(length // width, HISTOGRAM_BARS - 1)] += 1
    edges = [width * i for i in range(HISTOGRAM_BARS)] + [max(ordered[-1] + 1, width * HISTOGRAM_BARS)]
    return Histogram(unit, edges, counts, ordered[len(ordered) // 2], ordered[-1], limit if unit == "tokens" else None)
