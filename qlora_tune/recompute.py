"""Activation checkpointing that leaves no holes in the heap, and can wait in the host's memory.

Station inside the fast path, beside fused.py; like it, to be imported inside a function, as it needs torch.
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


class Place:
    """Where a layer's input waits for the backward pass, the same for every micro-batch.

    All layers' places are made at once. A tensor of its own for each would come to lie between two layers' passing
    ones, and what is freed beside it is too small for the next: glibc's heap held nine times their size (docs/log.md).
    With `offload` inputs wait in the host's memory instead of the GPU's.
    """

    def __init__(self, others: list[Place], offload: bool) -> None:
        self.others, self.offload = others, offload
        self.space: Tensor | None = None
        self.device = torch.device("cpu")
        self.shape = torch.Size()
        self.gradient: Tensor | None = None

    def put(self, x: Tensor) -> None:
        if self.space is None or self.space.numel() < x.numel():
            away = self.offload and x.is_cuda
            for place in self.others:
                device = "cpu" if away else x.device
                place.space = torch.empty(x.numel(), dtype=x.dtype, device=device, pin_memory=away)
        assert self.space is not None
        self.device, self.shape = x.device, x.shape
        self.space[: x.numel()].copy_(x.reshape(-1), non_blocking=True)

    def take(self) -> Tensor:
        assert self.space is not None
        return self.space[: self.shape.numel()].view(self.shape).to(self.device, non_blocking=True)


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


def recompute(place: Place, run: Callable[..., Any], x: Tensor, *rest: Any, **named: Any) -> Any:
    """run(x, ...), of which only x is kept, in its place; the backward pass runs it again (arXiv 1604.06174)."""

    def again(ticket: Tensor, *rest: Any, **named: Any) -> Any:
        return run(Take.apply(ticket, place), *rest, **named)

    return checkpoint(again, Put.apply(x, place), *rest, use_reentrant=False, **named)


@contextmanager
def recompute_layers(inner: Any, offload: bool) -> Iterator[None]:
    """Make a model's layers keep nothing but their inputs while the block runs, each in a place of its own.

    Transformers' own switch would also ask for a gradient of the embeddings, which nothing needs.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    places: list[Place] = []
    with ExitStack() as stack:
        for module in inner.modules():
            if isinstance(module, GradientCheckpointingLayer):
                places.append(Place(places, offload))
                run = partial(recompute, places[-1])
                stack.enter_context(patch.object(module, "gradient_checkpointing", True))
                stack.enter_context(patch.object(module, "_gradient_checkpointing_func", run, create=True))
        yield
