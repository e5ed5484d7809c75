"""Fused functions against the stock computation, written plainly for torch's own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_tune import attention, fused
from qlora_tune.fused import Lora, Projection

SCALING = 1.7


@dataclass(frozen=True)
class Case:
    """A fused function and its stock counterpart, both of the same tensors by name."""

    fused: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    learned: tuple[str, ...]  # those that get gradients

    def results(self, function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What a function gives, and the gradients under a fixed random gradient of it. Adapters stay float32."""
        tensors = {
            name: value if name.startswith("lora") or not value.is_floating_point() else value.to(dtype)
            for name, value in self.tensors.items()
        }
        for name in self.learned:
            tensors[name] = tensors[name].clone().requires_grad_()
        found = function(**tensors)
        found.backward(random(*found.shape, seed=99).to(found.dtype))
        return {"value": found.detach()} | {name: tensors[name].grad for name in self.learned}


def random(*shape: int, seed: int) -> Tensor:
    # Rounded to bfloat16, so that the truth in float32 starts from the very same numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def distance(one: Tensor, truth: Tensor) -> float:
    return float((one.double() - truth.double()).norm() / truth.double().norm())


def project(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None) -> Tensor:
    y = functional.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    return y + functional.linear(functional.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype)) * SCALING


def projection(*layers: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]) -> Projection:
    """Linear layers of the same input, each with weight, bias and its adapter's matrices, as one projection."""
    weights, biases, *_ = zip(*layers, strict=True)
    loras = [None if a is None else Lora(lambda a=a, b=b: (a, b), SCALING) for _, _, a, b in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    return Projection(lambda: torch.cat(weights), bias, [len(weight) for weight in weights], loras)


def linear(adapter: bool, bias: bool) -> Case:
    tensors = {"x": random(2, 37, 24, seed=0), "weight": random(40, 24, seed=1) / 5}
    if bias:
        tensors["bias"] = random(40, seed=2)
    if adapter:
        tensors |= {"lora_a": random(8, 24, seed=3) / 5, "lora_b": random(40, 8, seed=4) / 5}

    def fast(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
    ) -> Tensor:
        (y,) = fused.Linear.apply(x, projection((weight, bias, lora_a, lora_b)), lora_a, lora_b)
        return y

    def stock(x: Tensor, weight: Tensor, bias: Tensor | None = None, **adapter: Tensor) -> Tensor:
        return project(x, weight, bias, adapter.get("lora_a"), adapter.get("lora_b"))

    return Case(fast, stock, tensors, ("x", "lora_a", "lora_b") if adapter else ("x",))


def several(sizes: dict[str, tuple[int, int]], adapted: str, bias: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of layers of the same input, named by a letter, with [in, out]; and what is learned."""
    tensors, learned = {"x": random(2, 37, 24, seed=0)}, ["x"]
    for at, (name, (wide, high)) in enumerate(sizes.items()):
        tensors[f"weight_{name}"] = random(high, wide, seed=10 + at) / 5
        if bias:
            tensors[f"bias_{name}"] = random(high, seed=20 + at)
        if name in adapted:
            tensors[f"lora_a_{name}"] = random(8, wide, seed=30 + at) / 5
            tensors[f"lora_b_{name}"] = random(high, 8, seed=40 + at) / 5
            learned += [f"lora_a_{name}", f"lora_b_{name}"]
    return tensors, learned


def parts(named: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    kinds = ("bias", "lora_a", "lora_b")
    return named[f"weight_{name}"], *(named.get(f"{kind}_{name}") for kind in kinds)  # type: ignore[return-value]


def side_by_side(adapted: str, bias: bool) -> Case:
    """Of queries, keys and values (q, k, v), those named have an adapter."""
    tensors, learned = several({"q": (24, 40), "k": (24, 16), "v": (24, 16)}, adapted, bias)

    def fast(x: Tensor, **named: Tensor) -> Tensor:
        each = [parts(named, name) for name in "qkv"]
        return torch.cat(fused.Linear.apply(x, projection(*each), *(m for part in each for m in part[2:])), -1)

    def stock(x: Tensor, **named: Tensor) -> Tensor:
        return torch.cat([project(x, *parts(named, name)) for name in "qkv"], -1)

    return Case(fast, stock, tensors, tuple(learned))


def swiglu(adapted: str, bias: bool) -> Case:
    """Of gate, up and down (g, u, d), those named have an adapter."""
    tensors, learned = several({"g": (24, 56), "u": (24, 56), "d": (56, 24)}, adapted, bias)

    def fast(x: Tensor, **named: Tensor) -> Tensor:
        each = [parts(named, name) for name in "gud"]
        both, down = projection(*each[:2]), projection(each[2])
        return fused.SwiGLU.apply(x, both, down, *(m for part in each for m in part[2:]))

    def stock(x: Tensor, **named: Tensor) -> Tensor:
        gate, up, down = (partial(project, **dict(zip(ARGUMENTS, parts(named, name), strict=True))) for name in "gud")
        return down(functional.silu(gate(x)) * up(x))

    return Case(fast, stock, tensors, tuple(learned))


ARGUMENTS = ("weight", "bias", "lora_a", "lora_b")


def norm() -> Case:
    def stock(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * wide.to(x.dtype)

    tensors = {"x": random(2, 37, 48, seed=0) * 3, "weight": 1 + random(48, seed=1) / 4}
    return Case(lambda x, weight: fused.RMSNorm.apply(x, weight, 1e-5), stock, tensors, ("x",))


def rotate() -> Case:
    def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        lower, upper = x.chunk(2, -1)
        return x * cos + torch.cat([-upper, lower], -1) * sin

    angles = torch.arange(29).unsqueeze(1) * 10.0 ** -torch.linspace(0, 3, 8)
    waves = {"cos": torch.cat([angles.cos()] * 2, -1)[None, None], "sin": torch.cat([angles.sin()] * 2, -1)[None, None]}
    rounded = {name: wave.bfloat16().float() for name, wave in waves.items()}
    # By place: autograd's functions take names from torch 2.12 on only.
    tensors = {"x": random(1, 6, 29, 16, seed=0), **rounded}
    return Case(lambda x, cos, sin: attention.Rotate.apply(x, cos, sin), stock, tensors, ("x",))


def causal(lengths: Sequence[int]) -> Tensor:
    """What a token may see of rows end to end: what came before it in its own row, and itself."""
    rows = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    at = torch.arange(len(rows))
    return (rows[:, None] == rows) & (at[:, None] >= at)


def attending(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Eager attention as Transformers writes it: [heads, n, d], softmax in float32."""
    k, v = (each.repeat_interleave(len(q) // len(each), 0) for each in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def attend(heads: int, kv_heads: int, lengths: Sequence[int], height: int | None = None) -> Case:
    """Rows in one product, or one row in blocks of queries of a height."""
    n, width, scale, kv = sum(lengths), 16, 0.3, [(name, kv_heads) for name in "kv"]
    seen = causal([height or n] if height else lengths)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = attention.Rows([n], [mask.to(q.dtype)])
        return attention.Attend.apply(q, k, v, rows, scale).transpose(0, 1)

    tensors = {name: random(h, n, width, seed=h + at) for at, (name, h) in enumerate([("q", heads), *kv])}
    return Case(fast, partial(attending, seen=causal(lengths), scale=scale), tensors, ("q", "k", "v"))


def cross_entropy(positions: int, words: int) -> Case:
    def stock(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy((hidden @ weight.t()).to(torch.float32), targets, reduction="sum")

    chance = torch.Generator().manual_seed(5)
    tensors = {
        "hidden": random(positions, 24, seed=0),
        "weight": random(words, 24, seed=1) / 2,
        "targets": torch.randint(words, (positions,), generator=chance),
    }
    return Case(
        lambda hidden, weight, targets: fused.CrossEntropy.apply(hidden, weight, targets), stock, tensors, ("hidden",)
    )


def nearly_certain(positions: int, words: int) -> Case:
    """Targets that the model almost knows: 0.3 nats a token. Their gradients are small differences of large numbers."""
    case = cross_entropy(positions, words)
    weight = random(words, 256, seed=1)
    hidden = (weight[case.tensors["targets"]] * 12 / 256 + random(positions, 256, seed=0) / 10).bfloat16().float()
    return Case(case.fused, case.stock, {**case.tensors, "hidden": hidden, "weight": weight}, case.learned)


CASES = {
    "linear": linear(adapter=False, bias=False),
    "linear with a bias": linear(adapter=False, bias=True),
    "linear with an adapter": linear(adapter=True, bias=False),
    "linear with both": linear(adapter=True, bias=True),
    "three linears": side_by_side("qkv", bias=False),
    "three linears with biases": side_by_side("qkv", bias=True),
    "three linears, two with adapters": side_by_side("qv", bias=False),
    "swiglu": swiglu("", bias=False),
    "swiglu with adapters": swiglu("gud", bias=False),
    "swiglu with adapters and biases": swiglu("gud", bias=True),
    "swiglu with an adapter on gate": swiglu("g", bias=False),
    "swiglu with adapters on up and down": swiglu("ud", bias=False),
    "norm": norm(),
    "rotate": rotate(),
    "attend in one block": attend(4, 4, [45]),
    "attend in blocks of queries": attend(4, 4, [45], height=16),
    "attend with grouped heads": attend(6, 2, [45]),
    "attend with grouped heads in blocks": attend(6, 2, [45], height=16),
    "attend to rows of their own": attend(4, 2, [20, 1, 17, 9]),
    "loss in one tile": cross_entropy(40, 300),
    "loss in several tiles of words": cross_entropy(40, 2 * fused.HEAD_WORDS + 77),
    "loss in several tiles of positions": cross_entropy(2 * fused.HEAD_ROWS + 77, 300),
    "loss of nearly certain words": nearly_certain(200, fused.HEAD_WORDS + 904),
    "loss in several tiles of both": cross_entropy(fused.HEAD_ROWS + 9, fused.HEAD_WORDS + 77),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_values_and_gradients_equal_the_stock_ones_in_float32(case: Case) -> None:
    expected, found = (case.results(function, torch.float32) for function in (case.stock, case.fused))
    assert len(found) == 1 + len(case.learned)
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert found[name].dtype == expected[name].dtype
        assert distance(found[name], expected[name]) < 1e-5, name


@each_case
def test_bfloat16_is_about_as_near_to_the_truth_as_the_stock_computation(case: Case) -> None:
    truth = case.results(case.stock, torch.float32)
    stock, found = (case.results(function, torch.bfloat16) for function in (case.stock, case.fused))
    for name, expected in truth.items():
        chance = 0 if expected.dim() else 1e-4  # rounding errors of a sum may cancel
        assert found[name].dtype == stock[name].dtype
        assert distance(found[name], expected) <= 1.5 * distance(stock[name], expected) + chance, name


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] not in ("norm", "loss")])
def test_gradients_are_those_of_the_values_in_float64(name: str) -> None:
    # Not norm and loss: they compute in float32 whatever they are given, too coarse for differences.
    case = CASES[name]
    wide = {each: value.double() for each, value in case.tensors.items()}
    leaves = [wide[each].clone().requires_grad_() for each in case.learned]
    rest = {each: value for each, value in wide.items() if each not in case.learned}

    def function(*leaves: Tensor) -> Tensor:
        return case.fused(**dict(zip(case.learned, leaves, strict=True)), **rest)

    # Fast mode: along a random direction. The gradients of adapters are float32 by design.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("loss")])
def test_the_loss_is_the_same_without_gradients(name: str) -> None:
    case = CASES[name]
    with torch.no_grad():
        assert distance(case.fused(**case.tensors), case.stock(**case.tensors)) < 1e-6
    with_gradients = case.results(case.fused, torch.float32)["value"]
    assert torch.equal(case.fused(**case.tensors), with_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_logits_of_ten_thousand_is_finite_and_right(dtype: torch.dtype) -> None:
    case = cross_entropy(70, fused.HEAD_WORDS + 500)
    logits = case.tensors["hidden"] @ case.tensors["weight"].t()
    case.tensors["weight"] *= 1e4 / logits.abs().max()
    expected, found = (case.results(function, dtype) for function in (case.stock, case.fused))
    assert (case.tensors["hidden"] @ case.tensors["weight"].t()).abs().max() == pytest.approx(1e4)
    for name, value in found.items():
        assert torch.isfinite(value).all()
        assert distance(value, expected[name]) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_certain_and_right_word_costs_nothing_and_pulls_at_nothing() -> None:
    hidden = torch.full((3, 1), 1e4, requires_grad=True)
    weight = torch.cat([torch.ones(1, 1), -torch.ones(fused.HEAD_WORDS + 3, 1)])
    loss = fused.CrossEntropy.apply(hidden, weight, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert (loss.item(), hidden.grad.abs().max().item()) == (0, 0)


def test_nothing_learned_is_a_loss_of_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = fused.CrossEntropy.apply(hidden, torch.randn(20, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 8)


# Rows that attend in one product; one in one block of queries, one in several, and one that goes to sdpa.
MIXED = [[5, 3, 8], [attention.WHOLE - 112], [attention.WHOLE + 88], [attention.LONGEST_PLAIN + 14], [1, 15]]


def drawn(blocks: Sequence[Sequence[int]], seed: int = 0) -> list[Tensor]:
    n = sum(sum(block) for block in blocks)
    return [random(heads, n, 8, seed=seed + at) for at, heads in enumerate((4, 2, 2))]


def attended(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Sequence[int]]) -> Tensor:
    return attention.attend(q, k, v, attention.plan_rows(blocks, q.dtype, q.device), 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_every_length_attend_as_they_do_alone(dtype: torch.dtype) -> None:
    lengths = [length for block in MIXED for length in block]
    plan = attention.plan_rows(MIXED, dtype, torch.device("cpu"))
    assert [mask is None for mask in plan.masks] == [False, False, False, True, False]
    assert len(plan.masks[1]) == sum(MIXED[1])
    assert len(plan.masks[2]) == attention.BLOCK
    one, other = ([each.to(dtype).requires_grad_() for each in drawn(MIXED)] for _ in range(2))
    found = attended(*one, MIXED)
    rows = zip(*(each.split(lengths, 1) for each in other), strict=True)
    alone = [attending(*row, causal([row[0].shape[1]]), 0.4).transpose(0, 1) for row in rows]
    expected = torch.cat(alone)
    grad = random(*expected.shape, seed=9).to(dtype)
    found.backward(grad)
    expected.backward(grad)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    assert distance(found.detach(), expected.detach()) < near
    for fast, stock in zip(one, other, strict=True):
        assert distance(fast.grad, stock.grad) < near


def test_rows_never_see_each_other() -> None:
    lengths = [length for block in MIXED for length in block]
    for row in (0, 1, 3, 4, 5, 7):
        start, end = sum(lengths[:row]), sum(lengths[: row + 1])
        before = drawn(MIXED)
        after = [each.clone() for each in before]
        for each, fresh in zip(after, drawn(MIXED, seed=50), strict=True):
            each[:, start:end] = 1e3 * fresh[:, start:end]
        with torch.no_grad():
            changed = (attended(*before, MIXED) != attended(*after, MIXED)).flatten(1).any(1)
        assert changed[start:end].all()
        assert int(changed.sum()) == end - start


def test_gradients_of_a_row_touch_no_other_row() -> None:
    blocks = [[5, 3, 8], [attention.WHOLE + 88]]
    leaves = [each.requires_grad_() for each in drawn(blocks)]
    attended(*leaves, blocks)[5:8].sum().backward()
    for leaf in leaves:
        touched = leaf.grad.abs().amax((0, 2)) > 0
        assert not touched[:5].any()
        assert not touched[8:].any()
    assert leaves[2].grad[:, 5:8].abs().min() > 0


@pytest.mark.parametrize(
    "length", [attention.WHOLE, attention.WHOLE + 1, attention.LONGEST_PLAIN, attention.LONGEST_PLAIN + 1]
)
def test_the_limits_between_kinds_of_attention_leave_no_step(length: int) -> None:
    q, k, v = drawn([[length]])
    expected = attending(q, k, v, causal([length]), 0.4).transpose(0, 1)
    assert distance(attended(q, k, v, [[length]]), expected) < 1e-5


def test_a_token_sees_itself_and_what_came_before() -> None:
    n = 6
    q, k = torch.zeros(1, n, n), torch.zeros(1, n, n)
    found = attended(q, k, torch.eye(n).unsqueeze(0), [[n]])[:, 0]
    expected = torch.ones(n, n).tril() / torch.arange(1, n + 1).unsqueeze(1)
    torch.testing.assert_close(found, expected)
    assert math.isclose(found[0, 0], 1)
