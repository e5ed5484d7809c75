"""Memory for a training step on a CPU: what autograd keeps, laid end to end, and places for what passes.

Station below fused.py, attention.py and recompute.py. Imports torch at its top: to be imported inside a function. In
glibc's heap kept tensors, and the small records that autograd makes for each operation, come to lie between passing
tensors, and what is freed around them is too small for the next: it held half as much again as was in use, and how
much could not be foretold (docs/log.md).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

LASTING = 1 << 29  # bytes asked for at once; the kernel hands out a page when it is first written
SMALL = 1 << 14  # bytes of a passing tensor that the heap may hold
ALIGNED = 64  # bytes, as torch aligns its own


class Block:
    """A stretch of memory, filled from its start; once no tensor in it lives any more, from its start again."""

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size + ALIGNED, np.uint8)
        self.address = self.memory.ctypes.data
        self.filled = self.start = -self.address % ALIGNED
        self.unused = sys.getrefcount(self.memory)  # each tensor in it holds one reference more

    @property
    def room(self) -> int:
        """Bytes left."""
        if sys.getrefcount(self.memory) == self.unused:
            self.filled = self.start
        return len(self.memory) - self.filled

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count, offset = math.prod(shape), self.filled
        after = offset + count * dtype.itemsize
        self.filled = after + -(after - self.start) % ALIGNED
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)

    def size(self) -> int:
        return len(self.memory)

    def holds(self, x: Tensor) -> bool:
        return bool(0 <= x.data_ptr() - self.address < len(self.memory))


class Arena:
    """Where a step's tensors lie. While it is not in use, and on a GPU, they come from torch's allocator as always."""

    def __init__(self, used: bool = False) -> None:
        self.used = used
        # The smallest block comes first in each.
        self.kept: list[Block] = []
        self.places: list[Block] = []  # of passing tensors
        self.gradients: list[Block] = []

    def lasting(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor that is kept for the backward pass, of the other's precision and device, with anything in it."""
        size = math.prod(shape) * like.itemsize
        if not self._serves(like) or not size:
            return like.new_empty(shape)
        return _find_block(self.kept, size, LASTING).empty(shape, like.dtype)

    def keep(self, x: Tensor) -> Tensor:
        """The tensor, if it is a lasting one, else a copy that is."""
        if not self._serves(x) or any(block.holds(x) for block in self.kept):
            return x
        return self.lasting(x.shape, x).copy_(x)

    def passing(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is soon gone, of the other's device and, if not said, precision, with anything in it."""
        return self._place(self.places, shape, like, dtype or like.dtype)

    def gradient(self, x: Tensor) -> Tensor:
        """A copy in float32 that a parameter may take as its gradient, until the optimizer's step."""
        return self._place(self.gradients, x.shape, x, torch.float32).copy_(x)

    def join(self, parts: Sequence[Tensor], along: int) -> Tensor:
        """torch.cat in passing memory."""
        shape = list(parts[0].shape)
        shape[along] = sum(part.shape[along] for part in parts)
        return torch.cat(list(parts), along, out=self.passing(shape, parts[0]))

    def _place(self, places: list[Block], shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if not self._serves(like) or size < SMALL:
            return like.new_empty(shape, dtype=dtype)
        return _find_block(places, size, size).empty(shape, dtype)

    def _serves(self, like: Tensor) -> bool:
        return self.used and like.device.type == "cpu"


def _find_block(blocks: list[Block], size: int, new_size: int) -> Block:
    """The smallest block with room for so many bytes; where none has any, a new one of new_size or larger."""
    large_enough = islice(blocks, bisect_left(blocks, size, key=Block.size), None)
    block = next((block for block in large_enough if block.room >= size), None)
    if block is None:
        block = Block(max(size, new_size))
        insort(blocks, block, key=Block.size)
    return block


HEAP = Arena()
