"""How rows lie in micro-batches and attend in blocks: what the fast path works by, and the memory estimate counts with.

Station below both; without torch, so that an estimate needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

# On a CPU rows up to these lengths [tokens] attend by plain products, the longer ones of them in blocks of queries.
# Beyond, sdpa keeps no scores, whose memory grows with the square of the length.
WHOLE, BLOCK, LONGEST_PLAIN = 512, 256, 1536
HEAD_ROWS, HEAD_WORDS = 512, 4096  # positions and words whose logits exist at the same time
# On a CPU short rows attend together, masked from each other, until so many tokens: fewer and larger products.
TOGETHER = 192
# What attends together, and a whole micro-batch, are filled up to multiples of these [tokens] on a CPU: oneDNN makes a
# kernel for every new shape, which took a fifth of a step and 0.3 GB (docs/log.md).
BLOCK_ROUND, BATCH_ROUND = 16, 128


def group_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each micro-batch of up to max_tokens, longest rows first.

    A row that is longer gets a micro-batch of its own.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def group_blocks(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the rows of each block of a micro-batch on a CPU: those that attend in one product."""
    blocks: list[list[int]] = []
    for index, length in enumerate(lengths):
        if blocks and sum(lengths[other] for other in blocks[-1]) + length <= TOGETHER:
            blocks[-1].append(index)
        else:
            blocks.append([index])
    return blocks


def query_blocks(length: int, height: int) -> list[tuple[int, int]]:
    """Start and end of each block of `height` queries of a row; a block sees the keys up to its own end."""
    return [(start, min(start + height, length)) for start in range(0, length, height)]
