"""Attention of rows that lie end to end, each seeing only itself, and rotary position embeddings.

Station inside the fast path, beside fused.py: block by block on a CPU, by one kernel over all rows on a GPU that has
it. Sources: RoPE arXiv 2104.09864, attention over rows of several lengths 2205.14135. Imports torch at its top: whoever
uses it imports it inside a function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from qlora_tune.arena import HEAP, Arena
from qlora_tune.layout import BLOCK, LONGEST_PLAIN, WHOLE, query_blocks


class Rotate(Function):  # type: ignore[misc]
    """Rotary position embedding of x [1, heads, n, d] by cos and sin [1, 1, n, d]. In memory tokens come first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, arena: Arena = HEAP) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.arena = arena
        return _turn(x, cos, sin, 1, arena)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1, ctx.arena), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int, arena: Arena) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.mul(x, cos, out=_tokens_first(x, arena))
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


def _tokens_first(like: Tensor, arena: Arena) -> Tensor:
    """A tensor [..., heads, n, d] in whose memory all heads of a token lie together, as projections have them."""
    return arena.passing((*like.shape[:-3], like.shape[-2], like.shape[-3], like.shape[-1]), like).transpose(-3, -2)


@dataclass(frozen=True)
class Rows:
    """How the rows of a flat batch attend: block by block, or by one kernel over all rows on a GPU that has it."""

    sizes: list[int]  # of the blocks [tokens], in order
    masks: list[Tensor | None]  # added to a block's scores; None where a single row attends by sdpa
    starts: Tensor | None = None  # [rows + 1], where a kernel goes over all rows
    arena: Arena = HEAP  # for what attention keeps


class Attend(Function):  # type: ignore[misc]
    """softmax(scale q k' + mask) v of q [heads, n, d], k and v [key-value heads, n, d], to [n, heads, d].

    Queries of a block go in pieces as tall as its mask [b, b], which is added where a piece meets its own keys. Query
    heads that share keys are stacked along the rows, so keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
        arena = rows.arena
        k, v = arena.keep(k).contiguous(), arena.keep(v).contiguous()
        done, kept = arena.passing((q.shape[1], q.shape[0], q.shape[2]), q), []
        for first, mask, pieces in _blocks(rows):
            for start, end in pieces:
                own = q[:, start:end]
                asked = torch.mul(own, scale, out=arena.lasting(own.shape, q)).view(len(k), -1, q.shape[2])
                scores = arena.passing((*asked.shape[:2], end - first), q)
                torch.bmm(asked, k[:, first:end].transpose(1, 2), out=scores)
                scores.unflatten(1, (-1, end - start))[..., start - first :].add_(mask[: end - start, : end - start])
                shares = torch.softmax(scores, -1, out=arena.lasting(scores.shape, q))
                found = torch.bmm(shares, v[:, first:end], out=arena.passing(asked.shape, q))
                done[start:end].transpose(0, 1).copy_(found.view(own.shape))
                kept += [asked, shares]
        ctx.save_for_backward(k, v, *kept)
        ctx.rows, ctx.scale = rows, scale
        return done

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, *kept = ctx.saved_tensors
        arena, grad, waiting = ctx.rows.arena, grad.transpose(0, 1), iter(kept)
        of_q, of_k, of_v = (_tokens_first(each, arena) for each in (grad, k, v))
        for first, _, pieces in _blocks(ctx.rows):
            of_keys, of_values = [], []
            for start, end in pieces:
                asked, shares, own = next(waiting), next(waiting), grad[:, start:end]
                given = arena.passing(own.shape, grad).copy_(own).view(asked.shape)
                of_shares, of_scores = (arena.passing(shares.shape, grad) for _ in range(2))
                torch.bmm(given, v[:, first:end].transpose(1, 2), out=of_shares)
                torch._softmax_backward_data(of_shares, shares, -1, shares.dtype, grad_input=of_scores)
                of_asked = torch.bmm(of_scores, k[:, first:end], out=arena.passing(asked.shape, grad))
                torch.mul(of_asked.view(own.shape), ctx.scale, out=of_q[:, start:end])
                met = (len(k), end - first, k.shape[2])
                of_keys.append(torch.bmm(of_scores.transpose(1, 2), asked, out=arena.passing(met, grad)))
                of_values.append(torch.bmm(shares.transpose(1, 2), given, out=arena.passing(met, grad)))
            of_k[:, first:end].copy_(_add_up(of_keys))
            of_v[:, first:end].copy_(_add_up(of_values))
        return of_q, of_k, of_v, None, None


def _blocks(rows: Rows) -> Iterator[tuple[int, Tensor, list[tuple[int, int]]]]:
    """Each block's first token, its mask, and start and end of each of its pieces."""
    first = 0
    for size, mask in zip(rows.sizes, rows.masks, strict=True):
        assert mask is not None
        yield first, mask, [(first + start, first + end) for start, end in query_blocks(size, len(mask))]
        first += size


def _add_up(parts: Sequence[Tensor]) -> Tensor:
    """Sum of parts that start at the same row, each longer than the one before; in float32 where there are several."""
    if len(parts) == 1:
        return parts[0]
    total = parts[-1].to(torch.float32)
    for part in parts[:-1]:
        total[:, : part.shape[1]] += part
    return total.to(parts[-1].dtype)


def plan_rows(blocks: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device, arena: Arena = HEAP) -> Rows:
    """Decide how rows attend, once for all layers. `blocks` are the lengths of rows that attend in one product."""
    sizes = [sum(block) for block in blocks]
    if device.type == "cpu":
        masks = [_mask(block, dtype) if sum(block) <= LONGEST_PLAIN else None for block in blocks]
        return Rows(sizes, masks, arena=arena)
    lengths = [length for block in blocks for length in block]
    if _varlen_options() is None or dtype == torch.float32 or torch.cuda.get_device_capability(device)[0] < 8:
        return Rows(lengths, [None] * len(lengths))
    return Rows([max(lengths)], [], torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32))


def _mask(lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[n, n], of long blocks [BLOCK, BLOCK]: 0 where a token sees its own row up to itself, else minus infinity."""
    size = BLOCK if sum(lengths) > WHOLE else sum(lengths)
    mask = _causal(dtype)[:size, :size]
    if size < sum(lengths) or len(lengths) == 1:
        return mask
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return mask.masked_fill(row[:, None] != row, -torch.inf)


@cache
def _causal(dtype: torch.dtype) -> Tensor:
    return torch.full((WHOLE, WHOLE), -torch.inf, dtype=dtype).triu_(1)


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
    if None not in rows.masks:
        attended: Tensor = Attend.apply(q, k, v, rows, scale)
        return attended
    blocks, parts = [], zip(*(each.split(rows.sizes, dim=1) for each in (q, k, v)), strict=True)
    for (asked, keys, values), size, mask in zip(parts, rows.sizes, rows.masks, strict=True):
        if mask is None:
            # The kernel keeps its queries: in a passing place they would block it for everything larger.
            blocks.append(_attend_alone(rows.arena.keep(asked), keys, values, scale))
        else:
            alone = Rows([size], [mask], arena=rows.arena)
            blocks.append(Attend.apply(asked, keys, values, alone, scale))
    return torch.cat(blocks)


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (each.unsqueeze(0) for each in _repeat(q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)


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
