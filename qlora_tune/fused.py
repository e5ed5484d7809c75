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
Adapter = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, with or without a LoRA adapter beside it.

    `weight()` gives [out, in] in the compute precision: kept, or dequantized at once. `matrices()` gives the adapter's
    [r, in] and [out, r] as they are now, in float32.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    matrices: Callable[[], tuple[Tensor | None, Tensor | None]] = lambda: (None, None)
    scaling: float = 1.0
    copies: list[Tensor] = field(default_factory=list)

    def adapter(self, dtype: torch.dtype) -> Adapter | None:
        """The adapter's matrices in the compute precision.

        Copies always lie in the same place: made anew, they would lie between activations (recompute.Place).
        """
        lora_a, lora_b = self.matrices()
        if lora_a is None or lora_b is None:
            return None
        if lora_a.dtype == dtype:
            return lora_a.detach(), lora_b.detach()
        if not self.copies:
            self.copies.extend(torch.empty_like(matrix, dtype=dtype) for matrix in (lora_a, lora_b))
        for copy, matrix in zip(self.copies, (lora_a, lora_b), strict=True):
            copy.copy_(matrix.detach())
        return self.copies[0], self.copies[1]

    def forward(self, x: Tensor, adapter: Adapter | None) -> tuple[Tensor, Tensor | None]:
        """[n, in] to [n, out], and what lies between the adapter's matrices: [n, r]."""
        y = functional.linear(x, self.weight(), self.bias)
        if adapter is None:
            return y, None
        inner = x @ adapter[0].t()
        return y.addmm_(inner, adapter[1].t(), alpha=self.scaling), inner

    def input_gradient(
        self, grad: Tensor, of_inner: Tensor | None, adapter: Adapter | None, onto: Tensor | None = None
    ) -> Tensor:
        """Gradient [n, in] from that of the output [n, out] and of what lies between the adapter's matrices.

        It is added onto another one where that is given, which saves a pass.
        """
        of_x = grad @ self.weight() if onto is None else onto.addmm_(grad, self.weight())
        return of_x if adapter is None else of_x.addmm_(of_inner, adapter[0])

    def inner_gradient(self, grad: Tensor, adapter: Adapter | None) -> Tensor | None:
        """Gradient [n, r] of what lies between the adapter's matrices."""
        return None if adapter is None else (grad @ adapter[1]).mul_(self.scaling)

    def adapter_gradients(self, grad: Tensor, of_inner: Tensor, x: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the adapter's matrices, float32."""
        of_a = (of_inner.t() @ x).to(torch.float32)
        return of_a, (inner.t() @ grad).t().to(torch.float32).mul_(self.scaling)


class Linear(Function):  # type: ignore[misc]
    """A projection of x [..., in], with gradients for x, lora_a and lora_b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, projection: Projection) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        adapter = projection.adapter(x.dtype)
        y, inner = projection.forward(flat, adapter)
        ctx.projection, ctx.adapter = projection, adapter
        ctx.save_for_backward(flat if adapter else None, inner)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projection, adapter = ctx.projection, ctx.adapter
        x, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_inner = projection.inner_gradient(flat, adapter)
        of_x = projection.input_gradient(flat, of_inner, adapter) if ctx.needs_input_grad[0] else None
        of_a, of_b = projection.adapter_gradients(flat, of_inner, x, inner) if adapter else (None, None)
        return None if of_x is None else of_x.view(*grad.shape[:-1], -1), of_a, of_b, None


class SwiGLU(Function):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)) for x [..., d]. Keeps two of the four products that the stock layer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *_: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gate, up, down = projections
        adapters = [projection.adapter(x.dtype) for projection in projections]
        gated, of_gate = gate.forward(flat, adapters[0])
        raised, of_up = up.forward(flat, adapters[1])
        y, of_down = down.forward(functional.silu(gated).mul_(raised), adapters[2])
        ctx.projections, ctx.adapters = projections, adapters
        ctx.save_for_backward(flat, gated, raised, of_gate, of_up, of_down)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gated, raised, of_gate, of_up, of_down = ctx.saved_tensors
        gate, up, down = ctx.projections
        flat = grad.reshape(-1, grad.shape[-1])
        swish = functional.silu(gated)
        found: list[Tensor | None] = []

        def pull(
            projection: Projection, at: int, into: Tensor, came: Tensor, inner: Tensor, onto: Tensor | None = None
        ) -> Tensor | None:
            """Gradient of a projection's input; those of its adapter are put aside."""
            adapter = ctx.adapters[at]
            of_inner = projection.inner_gradient(into, adapter)
            found.extend(projection.adapter_gradients(into, of_inner, came, inner) if adapter else (None, None))
            wanted = at == 2 or ctx.needs_input_grad[0]
            return projection.input_gradient(into, of_inner, adapter, onto) if wanted else None

        of_product = pull(down, 2, flat, swish * raised, of_down)
        assert of_product is not None
        of_swish = of_product * raised
        of_x = pull(up, 1, of_product.mul_(swish), x, of_up)
        of_x = pull(gate, 0, torch.ops.aten.silu_backward(of_swish, gated), x, of_gate, of_x)
        return None if of_x is None else of_x.view(grad.shape), None, *found[4:], *found[2:4], *found[:2]


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
