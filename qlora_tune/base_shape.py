"""A base model's sizes, from its config.json and the headers of its safetensors; never a weight.

Station between a base's files (base.py) and what is foretold of its training: memory and time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_tune.base import BaseModel, read_header


@dataclass(frozen=True)
class BaseShape:
    """A base model's sizes [numbers of weights or units]."""

    linear: dict[str, tuple[int, int]]  # the layers' 2-D weights by module name
    other: int  # parameters that stay unquantized: embeddings, head, norms, biases
    layers: int
    hidden: int
    mlp: int
    heads: int
    query: int  # width of all query heads
    key_value: int  # width of all key, or value, heads
    vocabulary: int

    @property
    def in_layers(self) -> int:
        return sum(rows * columns for rows, columns in self.linear.values())


@lru_cache(maxsize=4)
def read_shape(base: BaseModel) -> BaseShape:
    """Read a base's sizes from its config.json and the headers of its safetensors; what one lacks the other tells.

    Of a base whose weights are not here yet, config.json alone tells: the model is built without memory.
    """
    config = base.read_config()
    tensors = dict(_read_headers(base) if any(base.path.glob("*.safetensors")) else _build_empty(base))
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    inside = {name: shape for name, shape in tensors.items() if re.search(r"\.\d+\.", name)}
    linear = {name.removesuffix(".weight"): (s[0], s[1]) for name, s in inside.items() if len(s) == 2}
    outside = [(s[0], s[1]) for name, s in tensors.items() if name not in inside and len(s) == 2]
    words, width = max(outside, key=math.prod, default=(0, 0))
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or width
    heads = _number(config, "num_attention_heads", "n_head") or max(1, hidden // 64)
    head = _number(config, "head_dim") or hidden // heads
    return BaseShape(
        linear=linear,
        other=sum(math.prod(s) for s in tensors.values()) - sum(math.prod(s) for s in linear.values()),
        layers=len({match[1] for name in linear if (match := re.search(r"\.(\d+)\.", name))})
        or _number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        mlp=_number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        heads=heads,
        query=heads * head,
        key_value=(_number(config, "num_key_value_heads") or heads) * head,
        vocabulary=_number(config, "vocab_size") or words,
    )


def _read_headers(base: BaseModel) -> Iterator[tuple[str, list[int]]]:
    """Each tensor's name and shape."""
    for file in sorted(base.path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = read_header(stream)[1]
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _build_empty(base: BaseModel) -> Iterator[tuple[str, list[int]]]:
    """Each tensor's name and shape, of a model on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    yield from ((name, list(parameter.shape)) for name, parameter in model.named_parameters())


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is a number; 0 where none is."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)
