"""Losses and gradients of a model with an adapter, the plain way and the fast one, for tests to compare."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from random import Random
from typing import Any

import torch

from qlora_tune import adapters
from qlora_tune import model as models
from qlora_tune.chat_format import IGNORED
from qlora_tune.fast import FastModel, fast_path, split_batch
from qlora_tune.model import Device, Quantization

Row = dict[str, list[int]]
Gradients = dict[str, torch.Tensor]
CPU = Device("cpu", "CPU", 2**34, "bfloat16")


def draw_row(length: int, seed: int, turns: int = 1, words: int = 2048) -> Row:
    """A row of random tokens with so many learned stretches; the last one goes on to its end."""
    chance = Random(seed)
    ids = [chance.randrange(16, words) for _ in range(length)]
    labels = [IGNORED] * length
    ends = sorted([*chance.sample(range(1, length), 2 * turns - 1), length])
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def draw_rows(lengths: Sequence[int], seed: int = 0, words: int = 2048) -> list[Row]:
    """Rows with one to six learned stretches each."""
    return [draw_row(n, seed * 1000 + at, min(1 + at % 6, n // 4), words) for at, n in enumerate(lengths)]


def unlearned(row: Row) -> Row:
    return row | {"labels": [IGNORED] * len(row["labels"])}


def load(builtin: Any, precision: Any, load_in_4bit: bool = True, **adapter: Any) -> Any:
    """The built-in base with an adapter that changes what it answers."""
    model = models.load_base(builtin[0], CPU, precision, Quantization(load_in_4bit=load_in_4bit))
    return adapt(model, **adapter).train()


def adapt(model: Any, **changes: Any) -> Any:
    options = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["all-linear"], **changes}
    adapted = adapters.attach_adapter(model, **options)
    adapters.keep_adapter_in_fp32(adapted)
    chance = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the adapter, and every gradient of lora_A
            parameter.data = torch.randn(parameter.shape, generator=chance).mul_(0.02).to(parameter.device)
    return adapted


def take_gradients(model: Any) -> Gradients:
    """The adapter's gradients, which are gone from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def learned_tokens(rows: Sequence[Row]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def plain(model: Any, rows: Sequence[Row], autocast: bool = False) -> tuple[float, Gradients]:
    """Mean loss over learned tokens and its gradients: the model's own forward on rows padded to the longest."""
    width = max(len(row["input_ids"]) for row in rows)
    device = model.get_input_embeddings().weight.device

    def padded(lists: Iterator[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([each + [fill] * (width - len(each)) for each in lists], device=device)

    ids = padded((row["input_ids"] for row in rows), 0)
    labels = padded((row["labels"] for row in rows), IGNORED)
    mask = padded(([1] * len(row["input_ids"]) for row in rows), 0)
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="mean")
    loss.backward()
    return float(loss.detach()), take_gradients(model)


def quick(fast: FastModel, rows: Sequence[Row], max_tokens: int = 600) -> tuple[float, Gradients]:
    """The same by the fast path, micro-batch by micro-batch."""
    total, learned = 0.0, max(1, learned_tokens(rows))
    for batch in split_batch(rows, max_tokens, fast.embeddings.weight.device.type == "cpu"):
        loss = fast.loss_sum(batch) / learned
        loss.backward()
        total += float(loss.detach())
    return total, take_gradients(fast.model)


@contextmanager
def opened(model: Any, longest: int = 300, keep_weights: bool = True, **named: Any) -> Iterator[FastModel]:
    """The fast path, which must be usable."""
    with fast_path(model, longest=longest, keep_weights=keep_weights, **named) as fast:
        assert fast is not None
        yield fast


def distance(found: Gradients, truth: Gradients) -> float:
    """Relative L2 distance over all gradients."""
    assert found.keys() == truth.keys()
    assert all(gradient is not None for gradient in [*found.values(), *truth.values()])
    squares = [
        ((found[name] - truth[name]).double().square().sum(), truth[name].double().square().sum()) for name in truth
    ]
    return math.sqrt(sum(a.item() for a, _ in squares) / sum(b.item() for _, b in squares))


def worst(found: Gradients, truth: Gradients) -> float:
    """Relative L2 distance of the tensor that is farthest off."""
    return max(distance({name: found[name]}, {name: truth[name]}) for name in truth)


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def in_place(model: Any) -> dict[str, Any]:
    """Everything that the fast path puts somewhere."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = model.get_base_model()
    homes = {type(module).__module__ for module in inner.modules()}
    return {
        "forwards": {
            name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)
        },
        "attention": inner.config._attn_implementation,
        "attentions": sorted(ALL_ATTENTION_FUNCTIONS),
        "rotary": {name: getattr(sys.modules[name], "apply_rotary_pos_emb", None) for name in homes},
        "training": model.training,
    }
