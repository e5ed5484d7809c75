"""Activation checkpointing that leaves no holes in the heap, and can wait in the host's memory.

Station inside the fast path, beside fused.py. Imports torch at its top: to be imported inside a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from qlora_tune.arena import Arena


class Place:
    """Where a layer's input waits for the backward pass: in an arena, on the GPU or, with `offload`, in host memory."""

    def __init__(self, arena: Arena, offload: bool) -> None:
        self.arena, self.offload = arena, offload
        self.waiting: Tensor | None = None
        self.device = torch.device("cpu")
        self.gradient: Tensor | None = None

    def put(self, x: Tensor) -> None:
        self.device = x.device
        if self.offload and x.is_cuda:
            self.waiting = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        else:
            self.waiting = self.arena.keep(x.detach())

    def take(self) -> Tensor:
        assert self.waiting is not None
        return self.waiting.to(self.device, non_blocking=True).detach()


class Put(Function):  # type: ignore[misc]
    """Put x into its place and give a ticket for it: no element, so that what holds the ticket holds no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> Tensor:
        ctx.place = place
        place.put(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        gradient, ctx.place.gradient = ctx.place.gradient, None
        return gradient, None


class Take(Function):  # type: ignore[misc]
    """What was put for a ticket; its gradient goes back past the ticket."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return place.take()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.place.gradient = grad
        return grad.new_empty(0), None


def recompute(arena: Arena, offload: bool, run: Callable[..., Any], x: Tensor, *rest: Any, **named: Any) -> Any:
    """run(x, ...), of which only x is kept, in its place; the backward pass runs it again (arXiv 1604.06174)."""
    place = Place(arena, offload)

    def again(ticket: Tensor, *rest: Any, **named: Any) -> Any:
        return run(Take.apply(ticket, place), *rest, **named)

    return checkpoint(again, Put.apply(x, place), *rest, use_reentrant=False, **named)


@contextmanager
def recompute_layers(inner: Any, offload: bool) -> Iterator[None]:
    """Make a model's layers keep nothing but their inputs while the block runs, each in a place of its own.

    Transformers' own switch would also ask for a gradient of the embeddings, which nothing needs.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    arena = Arena(used=True)
    with ExitStack() as stack:
        for module in inner.modules():
            if isinstance(module, GradientCheckpointingLayer):
                run = partial(recompute, arena, offload)
                stack.enter_context(patch.object(module, "gradient_checkpointing", True))
                stack.enter_context(patch.object(module, "_gradient_checkpointing_func", run, create=True))
        yield
