"""The linear layers, norms and MLPs of a model that fused functions stand in for, and how they are called.

Station between the functions (fused.py, attention.py) and the fast path that puts them in place. Norms and rotary
embeddings are first compared with the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Relative difference of results up to which a piece counts as the same; bfloat16 rounds to one part in 256.
SAME = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}
# Names of linear layers that have the same input, and of an MLP's
QUERIES = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def find_replacements(model: Any, keep_weights: bool, arena: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """The modules that a fused function stands in for, each with its new forward, which keeps tensors in the arena."""
    from torch.nn import SiLU

    from qlora_tune import fused

    # The linear layers inside an adapter's are reached through it.
    inside = {module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")}
    outside = [module for module in model.modules() if module not in inside]
    linears = {module: found for module in outside if (found := _linear_part(module))}
    replaced: dict[Any, Callable[..., Any]] = {}

    def project(*modules: Any) -> Any:
        return _project([linears[module] for module in modules], keep_weights, arena)

    for module in outside:
        queries, mlp = ([getattr(module, name, None) for name in names] for names in (QUERIES, MLP))
        act = getattr(module, "act_fn", None)
        if type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
            replaced[module] = partial(_norm, fused.RMSNorm.apply, module, arena)
        elif linears.keys() >= {*mlp} and (isinstance(act, SiLU) or type(act).__name__ == "SiLUActivation"):
            replaced[module] = partial(_swiglu, fused.SwiGLU.apply, project(*mlp[:2]), project(mlp[2]))
            for linear in mlp:
                del linears[linear]  # the MLP no longer calls it
        elif linears.keys() >= {*queries}:
            shared = Shared(fused.Linear.apply, project(*queries))
            replaced |= {linear: partial(shared.output, at) for at, linear in enumerate(queries)}
        elif module in linears.keys() - replaced.keys():
            replaced[module] = partial(Shared(fused.Linear.apply, project(module)).output, 0)
    return list(replaced.items())


class Shared:
    """Linear layers of the same input: all are computed when the first is called, and handed out as they are called."""

    def __init__(self, apply: Callable[..., Any], projection: Any) -> None:
        self.apply, self.projection = apply, projection
        self.x: Any = None
        self.waiting: dict[int, Any] = {}

    def output(self, at: int, x: Any, *_: Any, **__: Any) -> Any:
        if x is not self.x or at not in self.waiting:
            self.x, self.waiting = x, dict(enumerate(self.apply(x, self.projection, *self.projection.matrices())))
        y = self.waiting.pop(at)
        if not self.waiting:
            self.x = None
        return y


def _swiglu(apply: Callable[..., Any], both: Any, down: Any, x: Any) -> Any:
    return apply(x, both, down, *both.matrices(), *down.matrices())


def _norm(apply: Callable[..., Any], norm: Any, arena: Any, x: Any) -> Any:
    return apply(x, norm.weight, _epsilon(norm), arena)


def _linear_part(module: Any) -> tuple[Any, Any] | None:
    """A linear layer and its adapter, if any, as fused functions take them; None where it is or does something else."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from qlora_tune.fused import Lora

    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, Linear4bit) and type(base) is not nn.Linear:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    if not isinstance(module, LoraLayer):
        return (base, None) if isinstance(base, Linear4bit) else None
    name = only_adapter(module)
    if name is None or module.merged or not isinstance(module.lora_dropout[name], nn.Identity):
        return None

    def matrices() -> tuple[Any, Any]:
        if module.disable_adapters:
            return None, None
        name = module.active_adapters[0]  # in preference training by turns a frozen one of the same shape
        return module.lora_A[name].weight, module.lora_B[name].weight

    return base, Lora(matrices, module.scaling[name])


def _project(parts: Sequence[tuple[Any, Any]], keep_weights: bool, arena: Any) -> Any:
    """Linear layers of the same input as one projection."""
    import torch

    from qlora_tune.fused import Projection

    linears = [linear for linear, _ in parts]
    sizes = [linear.out_features for linear in linears]
    biases = [linear.bias for linear in linears]
    some = next((bias for bias in biases if bias is not None), None)
    bias = None
    if some is not None:
        filled = [some.new_zeros(size) if b is None else b.detach() for b, size in zip(biases, sizes, strict=True)]
        bias = torch.cat(filled)
    makers = [weight_of(linear, False) for linear in linears]

    def weight() -> Any:
        return makers[0]() if len(makers) == 1 else arena.join([make() for make in makers], 0)

    quantized = all(getattr(linear.weight, "quant_state", None) is not None for linear in linears)
    kept = weight() if keep_weights and quantized else None
    return Projection(weight if kept is None else lambda: kept, bias, sizes, [lora for _, lora in parts], arena)


def only_adapter(module: Any) -> str | None:
    """The name of a layer's only active adapter, where that is plain LoRA without biases; else None."""
    active = list(getattr(module, "active_adapters", []))
    if len(active) != 1 or active[0] not in getattr(module, "lora_A", {}) or active[0] in module.lora_variant:
        return None
    matrices = module.lora_A[active[0]], module.lora_B[active[0]]
    return active[0] if all(getattr(each, "bias", True) is None for each in matrices) else None


def weight_of(linear: Any, keep: bool) -> Callable[[], Any]:
    """What gives a linear layer's weight in the compute precision."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return lambda: linear.weight
    if keep:
        kept = dequantize_4bit(linear.weight, state).detach()
        return lambda: kept
    return lambda: dequantize_4bit(linear.weight, state)


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _is_plain_norm(norm: Any) -> bool:
    """Whether a norm of this name is x / rms(x) * weight, with a weight that is not trained."""
    import torch

    from qlora_tune.fused import RMSNorm

    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1 or weight.requires_grad:
        return False
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        return is_same(norm(x), RMSNorm.apply(x, weight, _epsilon(norm)))


def rotating(inner: Any) -> list[Any]:
    """The Python modules of a model's layers that hold a function for rotary position embeddings."""
    homes = {type(module).__module__ for module in inner.modules()}
    return [sys.modules[name] for name in sorted(homes) if hasattr(sys.modules[name], "apply_rotary_pos_emb")]


def rotate_faster(stock: Callable[..., Any], arena: Any) -> Callable[..., Any]:
    """Rotary position embeddings in fewer passes, where they are the usual ones on all of a head."""
    import torch

    from qlora_tune.attention import Rotate

    def rotate(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        if rest or named or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return stock(q, k, cos, sin, *rest, **named)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return Rotate.apply(q, cos, sin, arena), Rotate.apply(k, cos, sin, arena)

    chance = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=chance) for heads in (4, 2))
    half = torch.randn(1, 5, 4, generator=chance)
    cos, sin = (torch.cat([wave, wave], -1) for wave in (half.cos(), half.sin()))
    try:
        same = all(is_same(a, b) for a, b in zip(stock(q, k, cos, sin), rotate(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments: another kind of embedding
        same = False
    return rotate if same else stock


def is_same(one: Any, other: Any, computed_in: Any = None) -> bool:
    """Whether two results agree to the rounding of the precision that they were computed in, by default their own."""
    import torch

    tolerance = SAME[str(computed_in or one.dtype).removeprefix("torch.")]
    distance = torch.linalg.vector_norm((one - other).float())
    return bool(distance <= tolerance * torch.linalg.vector_norm(one.float()))
