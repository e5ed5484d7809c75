"""Parts of a transformer in fewer passes over memory than the stock ones, with the same results.

Station inside the fast path: fast.py puts them in place. On a CPU the matrix products are a tenth of a stock step;
the rest is passes over memory, conversions and temporary copies (docs/log.md). So each function saves only what its
backward pass can't cheaply make again, and computes its gradient by hand. Sources: LoRA arXiv 2106.09685, RMSNorm
1910.07467, SwiGLU 2002.05202, RoPE 2104.09864, loss in chunks 2410.10989.

Imports torch at its top, as recompute.py does: whoever uses it imports it inside a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from qlora_tune.layout import BLOCK, HEAD_ROWS, HEAD_WORDS, LONGEST_PLAIN, WHOLE, query_blocks

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
    copies: dict[torch.dtype, Stacked] = field(default_factory=dict)

    def matrices(self) -> list[Tensor | None]:
        """All adapters' matrices, for autograd to know them."""
        return [matrix for lora in self.loras for matrix in (lora.matrices() if lora else (None, None))]

    def adapter(self, dtype: torch.dtype) -> Stacked | None:
        """The adapters as they are now.

        Copies always lie in the same place: made anew, they would lie between activations (recompute.Place).
        """
        found = [lora.matrices() if lora else (None, None) for lora in self.loras]
        if all(a is None for a, _ in found):
            return None
        if dtype not in self.copies:
            self.copies[dtype] = self._make_copies(found, dtype)
        stacked = self.copies[dtype]
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

    def forward(self, x: Tensor, adapter: Stacked | None) -> tuple[Tensor, Tensor | None]:
        """[n, in] to [n, out], and what lies between the adapters' matrices: [n, R]."""
        y = functional.linear(x, self.weight(), self.bias)
        if adapter is None:
            return y, None
        inner = x @ adapter.a.t()
        return y.addmm_(inner, adapter.b.t()), inner

    def backward(
        self, grad: Tensor, x: Tensor, inner: Tensor | None, adapter: Stacked | None, needed: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the input [n, in], where needed, and of matrices(), float32, from the one of the output."""
        of_x = grad @ self.weight() if needed else None
        if adapter is None or inner is None:
            return of_x, [None] * (2 * len(self.loras))
        of_inner = grad @ adapter.b
        if of_x is not None:
            of_x.addmm_(of_inner, adapter.a)
        of_a, found = of_inner.t() @ x, list[Tensor | None]()
        for at, out, scaling in adapter.blocks:
            if at.start == at.stop:
                found += [None, None]
            else:
                of_b = (inner[:, at].t() @ grad[:, out]).t()
                found += [of_a[at].to(torch.float32), of_b.to(torch.float32).mul_(scaling)]
        return of_x, found


class Linear(Function):  # type: ignore[misc]
    """The projections of x [..., in], one output for each layer, with gradients for x and the adapters' matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *_: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        adapter = projection.adapter(x.dtype)
        y, inner = projection.forward(flat, adapter)
        ctx.projection, ctx.adapter = projection, adapter
        ctx.save_for_backward(flat if adapter else None, inner)
        outputs: tuple[Tensor, ...] = y.view(*x.shape[:-1], -1).split(projection.sizes, -1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if len(grads) == 1 else torch.cat(grads, -1)
        x, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x, found = ctx.projection.backward(flat, x, inner, ctx.adapter, ctx.needs_input_grad[0])
        return None if of_x is None else of_x.view(*grad.shape[:-1], -1), None, *found


class SwiGLU(Function):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)) for x [..., d]. Keeps two of the four products that the stock layer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: Projection, down: Projection, *_: Tensor | None) -> Tensor:
        """`both` are gate and up."""
        flat = x.reshape(-1, x.shape[-1])
        ctx.projections, ctx.adapters = (both, down), (both.adapter(x.dtype), down.adapter(x.dtype))
        raised, of_both = both.forward(flat, ctx.adapters[0])
        gate, up = raised.chunk(2, -1)
        y, of_down = down.forward(functional.silu(gate).mul_(up), ctx.adapters[1])
        ctx.save_for_backward(flat, raised, of_both, of_down)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, raised, of_both, of_down = ctx.saved_tensors
        (both, down), (for_both, for_down) = ctx.projections, ctx.adapters
        gate, up = raised.chunk(2, -1)
        swish = functional.silu(gate)
        flat = grad.reshape(-1, grad.shape[-1])
        of_product, last = down.backward(flat, swish * up, of_down, for_down, True)
        assert of_product is not None
        into = torch.empty_like(raised)
        into_gate, into_up = into.chunk(2, -1)
        torch.mul(of_product, swish, out=into_up)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=into_gate)
        of_x, first = both.backward(into, x, of_both, for_both, ctx.needs_input_grad[0])
        return None if of_x is None else of_x.view(grad.shape), None, None, *first, *last


class RMSNorm(Function):  # type: ignore[misc]
    """x / rms(x) * weight over the last dimension, in float32 as the stock layer; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.to(torch.float32)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed = exact * inverse if exact is x else exact.mul_(inverse)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = _scaled(x, inverse)
        pulled = (grad * weight).to(torch.float32)
        shared = torch.linalg.vecdot(pulled, normed).unsqueeze(-1).div_(-x.shape[-1])
        return pulled.addcmul_(normed, shared).mul_(inverse).to(grad.dtype), None, None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a float32 number a row, in float32."""
    return x * factor if x.dtype == torch.float32 else x.to(torch.float32).mul_(factor)


class Rotate(Function):  # type: ignore[misc]
    """Rotary position embedding of x [1, heads, n, d] by cos and sin [1, 1, n, d]; the result is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x.contiguous(), cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad.contiguous(), cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


class Attend(Function):  # type: ignore[misc]
    """softmax(scale q k' + mask) v for q [heads, n, d], k and v [key-value heads, n, d], seeing only what came before.

    Queries go in blocks as tall as the mask [b, b], which is added where a block meets its own keys. Query heads that
    share keys are stacked along the rows, so keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        stacked = q.mul(scale).reshape(k.shape[0], -1, *q.shape[1:])
        attended, kept = [], []
        for start, end in query_blocks(q.shape[1], len(mask)):
            scores = torch.bmm(stacked[:, :, start:end].flatten(1, 2), k[:, :end].transpose(1, 2))
            scores.unflatten(1, (-1, end - start))[..., start:].add_(mask[: end - start, : end - start])
            kept.append(scores.softmax(-1))
            attended.append(torch.bmm(kept[-1], v[:, :end]).unflatten(1, (-1, end - start)))
        ctx.save_for_backward(stacked, k, v, *kept)
        ctx.height, ctx.scale = len(mask), scale
        return (attended[0] if len(attended) == 1 else torch.cat(attended, 2)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *kept = ctx.saved_tensors
        stacked = grad.reshape(q.shape)
        of_q, of_k, of_v = [], [], []
        for (start, end), shares in zip(query_blocks(q.shape[2], ctx.height), kept, strict=True):
            rows = stacked[:, :, start:end].flatten(1, 2)
            of_shares = torch.bmm(rows, v[:, :end].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_q.append(torch.bmm(of_scores, k[:, :end]).unflatten(1, (-1, end - start)))
            of_k.append(torch.bmm(of_scores.transpose(1, 2), q[:, :, start:end].flatten(1, 2)))
            of_v.append(torch.bmm(shares.transpose(1, 2), rows))
        whole = of_q[0] if len(of_q) == 1 else torch.cat(of_q, 2)
        return whole.mul_(ctx.scale).view(grad.shape), _add_up(of_k), _add_up(of_v), None, None


def _add_up(parts: Sequence[Tensor]) -> Tensor:
    """Sum of parts that start at the same row, each longer than the one before; in float32 where there are several."""
    if len(parts) == 1:
        return parts[0]
    total = parts[-1].to(torch.float32)
    for part in parts[:-1]:
        total[:, : part.shape[1]] += part
    return total.to(parts[-1].dtype)


class CrossEntropy(Function):  # type: ignore[misc]
    """Sum of the negative log-likelihoods of targets [n] under logits hidden [n, d] @ weight [v, d]', float32.

    The softmax runs over tiles of positions and words small enough for a processor's cache, with a running maximum
    (arXiv 1805.02867). The gradient of hidden is made along the way, so no logits outlive their tile.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for rows, chosen in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            wanted = weight[chosen].to(torch.float32)
            start = torch.linalg.vecdot(rows.to(torch.float32), wanted).unsqueeze(1)
            short = (0, 0, 0, -len(rows) % HEAD_ROUND)
            filled, at, first = (functional.pad(each, short) for each in (rows, chosen.unsqueeze(1), start))
            found = _softmax_product(filled, weight, at, first, ctx.needs_input_grad[0])
            highest, others, pulled = (each[: len(rows)] for each in found)
            own = (start - highest).exp_()
            # Where the target outweighs all others, 1 - softmax would be lost to rounding; their mass is not.
            total += torch.where(highest > start, (others + own).log() + highest - start, others.log1p()).sum()
            if ctx.needs_input_grad[0]:
                gradients.append(pulled.addcmul_(others, wanted, value=-1).div_(others + own).to(hidden.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden.mul_(grad), None, None


def _softmax_product(
    rows: Tensor, weight: Tensor, targets: Tensor, highest: Tensor, with_product: bool
) -> tuple[Tensor, ...]:
    """Highest logit, sum of exp(logit - highest), and exp(logit - highest) @ weight, of rows [n, d].

    The sums leave the targets [n, 1] out; their logits are `highest` [n, 1] at first.
    """
    mass = torch.zeros_like(highest)
    product = rows.new_zeros(rows.shape, dtype=torch.float32)
    for start, words in zip(range(0, len(weight), HEAD_WORDS), weight.split(HEAD_WORDS), strict=True):
        logits = (rows @ words.t()).to(torch.float32)
        at = (targets - start).clamp_(0, len(words) - 1)
        logits.scatter_(1, at, logits.gather(1, at).masked_fill_(at + start == targets, -torch.inf))
        higher = torch.maximum(highest, logits.amax(1, keepdim=True))
        shrink = (highest - higher).exp_()
        logits.sub_(higher).exp_()
        mass.mul_(shrink).add_(logits.sum(1, keepdim=True))
        if with_product:
            product.mul_(shrink).add_(logits.to(rows.dtype) @ words)
        highest = higher
    return highest, mass, product


@dataclass(frozen=True)
class Rows:
    """How the rows of a flat batch attend: block by block, or by one kernel over all rows on a GPU that has it."""

    sizes: list[int]  # of the blocks [tokens], in order
    masks: list[Tensor | None]  # added to a block's scores; None where a single row attends by sdpa
    starts: Tensor | None = None  # [rows + 1], where a kernel goes over all rows


def plan_rows(blocks: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Rows:
    """Decide how rows attend, once for all layers. `blocks` are the lengths of rows that attend in one product."""
    sizes = [sum(block) for block in blocks]
    if device.type == "cpu":
        return Rows(sizes, [_mask(block, dtype) if sum(block) <= LONGEST_PLAIN else None for block in blocks])
    lengths = [length for block in blocks for length in block]
    if _varlen_options() is None or dtype == torch.float32 or torch.cuda.get_device_capability(device)[0] < 8:
        return Rows(lengths, [None] * len(lengths))
    return Rows([max(lengths)], [], torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32))


def _mask(lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[n, n], of long blocks [BLOCK, BLOCK]: 0 where a token sees its own row up to itself, else minus infinity."""
    parts = [BLOCK] if sum(lengths) > WHOLE else lengths
    seen = torch.block_diag(*(torch.ones(length, length).tril_() for length in parts)).bool()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
    """Causal attention within rows: q [heads, n, d], k and v [key-value heads, n, d] to [n, heads, d]."""
    if rows.starts is not None:
        from torch.nn.attention.varlen import varlen_attn

        flat = (each.transpose(0, 1).contiguous() for each in _repeat(q, k, v))
        longest = rows.sizes[0]
        done: Tensor = varlen_attn(
            *flat, rows.starts, rows.starts, longest, longest, scale=scale, **(_varlen_options() or {})
        )
        return done
    parts = zip(*(each.split(rows.sizes, dim=1) for each in (q, k, v)), rows.masks, strict=True)
    blocks = [
        _attend_alone(q, k, v, scale) if mask is None else Attend.apply(q, k, v, mask, scale) for q, k, v, mask in parts
    ]
    return torch.cat([block.transpose(0, 1) for block in blocks])


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (each.unsqueeze(0) for each in _repeat(q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0]


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values once for each query head that uses them."""
    copies = q.shape[0] // k.shape[0]
    return (q, k, v) if copies == 1 else (q, k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0))


@cache
def _varlen_options() -> dict[str, Any] | None:
    """How this torch's attention over rows of several lengths is told to be causal; None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = signature(varlen_attn).parameters
    if "window_size" in names:
        return {"window_size": (-1, 0)}
    return {"is_causal": True} if "is_causal" in names else None
