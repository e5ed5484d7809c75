"""Parts of a transformer in fewer passes over memory than the stock ones, with the same results.

Station inside the fast path: fast.py puts them in place. On a CPU the matrix products are a tenth of a stock step;
the rest is passes over memory, conversions and temporary copies (docs/log.md). So each function saves only what its
backward pass can't cheaply make again, and computes its gradient by hand. Sources: LoRA arXiv 2106.09685, RMSNorm
1910.07467, SwiGLU 2002.05202, loss in chunks 2410.10989. attention.py has the rest.

Imports torch at its top, as all stations inside the fast path do: whoever uses it imports it inside a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from qlora_tune.arena import HEAP, Arena
from qlora_tune.layout import HEAD_ROWS, HEAD_WORDS

HEAD_ROUND = 64  # positions are filled up to a multiple of this, as oneDNN makes a kernel for every new shape
Matrices = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Lora:
    """The adapter of one linear layer: `matrices()` gives its [r, in] and [out, r] as they are now, or None twice."""

    matrices: Callable[[], Matrices]
    scaling: float


@dataclass(frozen=True)
class Stacked:
    """Adapters side by side in the compute precision: [R, in] and, in a block for each layer, scaled, [out, R]."""

    a: Tensor
    b: Tensor
    blocks: list[tuple[slice, slice, float]]  # each layer's part of R and of the outputs, and its scaling


@dataclass(frozen=True)
class Projection:
    """Frozen linear layers of the same input as one, with or without LoRA adapters beside them.

    `weight()` gives [out, in] in the compute precision, kept or dequantized at once; `sizes` are the layers' outputs.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    sizes: list[int]
    loras: list[Lora | None]
    arena: Arena = HEAP  # for what autograd keeps
    copies: dict[tuple[torch.dtype, int], Stacked] = field(default_factory=dict)

    def matrices(self) -> list[Tensor | None]:
        """All adapters' matrices, for autograd to know them."""
        return [matrix for lora in self.loras for matrix in (lora.matrices() if lora else (None, None))]

    def adapter(self, dtype: torch.dtype) -> Stacked | None:
        """The adapters as they are now.

        Copies always lie in the same place, each adapter's in another: made anew, they would lie between activations
        (recompute.Place), and a reference's must leave those that wait for their backward pass alone.
        """
        found = [lora.matrices() if lora else (None, None) for lora in self.loras]
        which = next((id(a) for a, _ in found if a is not None), None)
        if which is None:
            return None
        if (dtype, which) not in self.copies:
            self.copies[dtype, which] = self._make_copies(found, dtype)
        stacked = self.copies[dtype, which]
        for (a, b), (inner, outer, scaling) in zip(found, stacked.blocks, strict=True):
            if a is not None and b is not None:
                stacked.a[inner].copy_(a.detach())
                stacked.b[outer, inner].copy_(b.detach().mul(scaling))
        return stacked

    def _make_copies(self, found: Sequence[Matrices], dtype: torch.dtype) -> Stacked:
        blocks, rank, out = [], 0, 0
        for (a, _), lora, size in zip(found, self.loras, self.sizes, strict=True):
            more = 0 if a is None else len(a)
            blocks.append((slice(rank, rank + more), slice(out, out + size), lora.scaling if lora else 0.0))
            rank, out = rank + more, out + size
        some = next(a for a, _ in found if a is not None)
        a, b = some.new_zeros(rank, some.shape[1], dtype=dtype), some.new_zeros(out, rank, dtype=dtype)
        return Stacked(a.detach(), b.detach(), blocks)

    def forward(self, x: Tensor, adapter: Stacked | None, kept: bool = False) -> tuple[Tensor, Tensor | None]:
        """[n, in] to [n, out], which autograd keeps or not, and what lies between the adapters' matrices: [n, R]."""
        y = (self.arena.lasting if kept else self.arena.passing)((len(x), sum(self.sizes)), x)
        if self.bias is None:
            torch.mm(x, self.weight().t(), out=y)
        else:
            torch.addmm(self.bias, x, self.weight().t(), out=y)
        if adapter is None:
            return y, None
        inner = torch.mm(x, adapter.a.t(), out=self.arena.lasting((len(x), len(adapter.a)), x))
        return y.addmm_(inner, adapter.b.t()), inner

    def backward(
        self, grad: Tensor, x: Tensor, inner: Tensor | None, adapter: Stacked | None, needed: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the input [n, in], where needed, and of matrices(), float32, from the one of the output."""
        of_x = None
        if needed:
            weight = self.weight()
            of_x = torch.mm(grad, weight, out=self.arena.passing((len(grad), weight.shape[1]), grad))
        if adapter is None or inner is None:
            return of_x, [None] * (2 * len(self.loras))
        of_inner = torch.mm(grad, adapter.b, out=self.arena.passing(inner.shape, grad))
        if of_x is not None:
            of_x.addmm_(of_inner, adapter.a)
        of_a = torch.mm(of_inner.t(), x, out=self.arena.passing(adapter.a.shape, x))
        found: list[Tensor | None] = []
        for at, out, scaling in adapter.blocks:
            if at.start == at.stop:
                found += [None, None]
            else:
                rows = grad[:, out]
                of_b = self.arena.passing((at.stop - at.start, rows.shape[1]), grad)
                torch.mm(inner[:, at].t(), rows, out=of_b)
                found += [self.arena.gradient(of_a[at]), self.arena.gradient(of_b.t()).mul_(scaling)]
        return of_x, found


class Linear(Function):  # type: ignore[misc]
    """The projections of x [..., in], one output for each layer, with gradients for x and the adapters' matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *_: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        adapter = projection.adapter(x.dtype)
        y, inner = projection.forward(flat, adapter)
        ctx.projection, ctx.adapter = projection, adapter
        ctx.save_for_backward(projection.arena.keep(flat) if adapter else None, inner)
        outputs: tuple[Tensor, ...] = y.view(*x.shape[:-1], -1).split(projection.sizes, -1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projection = ctx.projection
        grad = grads[0] if len(grads) == 1 else projection.arena.join(grads, -1)
        x, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x, found = projection.backward(flat, x, inner, ctx.adapter, ctx.needs_input_grad[0])
        return None if of_x is None else of_x.view(*grad.shape[:-1], -1), None, *found


class SwiGLU(Function):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)) for x [..., d]. Keeps two of the four products that the stock layer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: Projection, down: Projection, *_: Tensor | None) -> Tensor:
        """`both` are gate and up."""
        flat = x.reshape(-1, x.shape[-1])
        ctx.projections, ctx.adapters = (both, down), (both.adapter(x.dtype), down.adapter(x.dtype))
        raised, of_both = both.forward(flat, ctx.adapters[0], kept=True)
        gate, up = raised.chunk(2, -1)
        product = torch.ops.aten.silu.out(gate, out=both.arena.passing(gate.shape, gate)).mul_(up)
        y, of_down = down.forward(product, ctx.adapters[1])
        ctx.save_for_backward(both.arena.keep(flat), raised, of_both, of_down)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, raised, of_both, of_down = ctx.saved_tensors
        (both, down), (for_both, for_down) = ctx.projections, ctx.adapters
        gate, up = raised.chunk(2, -1)
        swish, product = (both.arena.passing(gate.shape, gate) for _ in range(2))
        torch.ops.aten.silu.out(gate, out=swish)
        torch.mul(swish, up, out=product)
        flat = grad.reshape(-1, grad.shape[-1])
        of_product, last = down.backward(flat, product, of_down, for_down, True)
        del product
        assert of_product is not None
        into = both.arena.passing(raised.shape, raised)
        into_gate, into_up = into.chunk(2, -1)
        torch.mul(of_product, swish, out=into_up)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=into_gate)
        of_x, first = both.backward(into, x, of_both, for_both, ctx.needs_input_grad[0])
        return None if of_x is None else of_x.view(grad.shape), None, None, *first, *last


class RMSNorm(Function):  # type: ignore[misc]
    """x / rms(x) * weight over the last dimension, in float32 as the stock layer; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, arena: Arena = HEAP) -> Tensor:
        exact = _in_float32(x, arena)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(arena.keep(x), weight, arena.keep(inverse))
        normed = exact * inverse if exact is x else exact.mul_(inverse)
        ctx.arena = arena
        return arena.lasting(x.shape, x).copy_(normed).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, pulled = _in_float32(x, ctx.arena), ctx.arena.passing(grad.shape, grad)
        normed = x * inverse if normed is x else normed.mul_(inverse)
        pulled = _in_float32(torch.mul(grad, weight, out=pulled), ctx.arena)
        products = torch.mul(pulled, normed, out=ctx.arena.passing(grad.shape, grad, torch.float32))
        shared = products.sum(-1, keepdim=True).div_(-x.shape[-1])
        pulled.addcmul_(normed, shared).mul_(inverse)
        return ctx.arena.passing(grad.shape, grad).copy_(pulled), None, None, None


def _in_float32(x: Tensor, arena: Arena) -> Tensor:
    return x if x.dtype == torch.float32 else arena.passing(x.shape, x, torch.float32).copy_(x)


class CrossEntropy(Function):  # type: ignore[misc]
    """Sum of the negative log-likelihoods of targets [n] under logits hidden [n, d] @ weight [v, d]', float32.

    The softmax runs over tiles of positions and words small enough for a processor's cache, with a running maximum
    (arXiv 1805.02867). The gradient of hidden is made along the way, so no logits outlive their tile.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, arena: Arena = HEAP) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for rows, chosen in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            wanted = weight[chosen].to(torch.float32)
            start = torch.linalg.vecdot(rows.to(torch.float32), wanted).unsqueeze(1)
            short = (0, 0, 0, -len(rows) % HEAD_ROUND)
            filled, at, first = (functional.pad(each, short) for each in (rows, chosen.unsqueeze(1), start))
            found = _softmax_product(filled, weight, at, first, ctx.needs_input_grad[0], arena)
            highest, others, pulled = (each[: len(rows)] for each in found)
            own = (start - highest).exp_()
            # Where the target outweighs all others, 1 - softmax would be lost to rounding; their mass is not.
            total += torch.where(highest > start, (others + own).log() + highest - start, others.log1p()).sum()
            if ctx.needs_input_grad[0]:
                gradients.append(pulled.addcmul_(others, wanted, value=-1).div_(others + own).to(hidden.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden.mul_(grad), None, None, None


def _softmax_product(
    rows: Tensor, weight: Tensor, targets: Tensor, highest: Tensor, with_product: bool, arena: Arena
) -> tuple[Tensor, ...]:
    """Highest logit, sum of exp(logit - highest), and exp(logit - highest) @ weight, of rows [n, d].

    The sums leave the targets [n, 1] out; their logits are `highest` [n, 1] at first.
    """
    mass = torch.zeros_like(highest)
    product = rows.new_zeros(rows.shape, dtype=torch.float32)
    for start, words in zip(range(0, len(weight), HEAD_WORDS), weight.split(HEAD_WORDS), strict=True):
        product_shape = (len(rows), len(words))
        logits = _in_float32(torch.mm(rows, words.t(), out=arena.passing(product_shape, rows)), arena)
        at = (targets - start).clamp_(0, len(words) - 1)
        logits.scatter_(1, at, logits.gather(1, at).masked_fill_(at + start == targets, -torch.inf))
        higher = torch.maximum(highest, logits.amax(1, keepdim=True))
        shrink = (highest - higher).exp_()
        logits.sub_(higher).exp_()
        mass.mul_(shrink).add_(logits.sum(1, keepdim=True))
        if with_product:
            share = logits if rows.dtype == torch.float32 else arena.passing(product_shape, rows).copy_(logits)
            product.mul_(shrink).add_(torch.mm(share, words, out=arena.passing(rows.shape, rows)))
            del share
        highest = higher
    return highest, mass, product
