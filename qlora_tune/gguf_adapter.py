"""A LoRA adapter as one GGUF file, the form in which llama.cpp and Ollama load it onto a base in GGUF.

llama.cpp computes W x + scale * alpha / rank * B (A x) with tensors NAME.lora_a and NAME.lora_b, NAME being the base
layer's in GGUF. In most architectures these are PEFT's matrices as they are; where GGUF holds the query and key rows in
the order of interleaved rotary embeddings, the rows of B stand in that order too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tune.errors import ExportError
from qlora_tune.runs import read_json, write_json

if TYPE_CHECKING:
    import torch

# GGUF's name of a Transformers model_type, and whether its query and key rows are interleaved. Each was compared with
# llama.cpp's own converter, tensor by tensor (docs/log.md).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "olmo2": ("olmo2", False),
}
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
SAME = 1e-6  # relative distance of products: the scaling is rounded to float32 once


@dataclass(frozen=True)
class LoraPair:
    """One layer's matrices: a (rank, inputs), b (outputs, rank), and what their product is multiplied by."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def write_gguf_adapter(adapter: Path, base: Mapping[str, Any], target: Path, name: str, base_name: str) -> None:
    """Write an adapter's folder as a GGUF file in float32, as it was trained.

    `base` is the base's config.json. Raises ExportError for an architecture that is not in ARCHITECTURES, for DoRA
    (llama.cpp has no place for its magnitudes) and for a layer that GGUF has no name for.
    """
    from gguf import GGUFWriter

    pairs = read_peft_pairs(adapter)
    architecture, names = _name_layers(base, list(pairs))
    rank, scaling = _shared(pairs)
    writer = GGUFWriter(target, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scaling * rank)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    for layer, pair in pairs.items():
        order = _row_order(base, layer, pair.b.shape[0])
        writer.add_tensor(f"{names[layer]}.lora_a", pair.a.numpy())
        writer.add_tensor(f"{names[layer]}.lora_b", pair.b[order].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(path: Path, base: Mapping[str, Any], layers: list[str]) -> dict[str, LoraPair]:
    """Read a GGUF adapter back as PEFT holds it, by the names of the base's layers.

    Raises ExportError where the file is no LoRA adapter of this architecture, or lacks a layer or has another one.
    """
    import torch
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture, names = _name_layers(base, layers)
    fields = {key: reader.get_field(key) for key in ("general.type", "adapter.type", "general.architecture")}
    kinds = tuple(field.contents() if field else None for field in fields.values())
    alpha = reader.get_field("adapter.lora.alpha")
    if kinds != ("adapter", "lora", architecture) or alpha is None:
        raise ExportError(f"{path.name}: says {kinds}, expected a LoRA adapter for {architecture}. It was not kept.")
    # The reader hands out memory that ends with it.
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    wanted = {f"{name}.lora_{side}" for name in names.values() for side in "ab"}
    if wanted != set(tensors):
        raise ExportError(
            f"{path.name}: holds {len(tensors)} tensors, the adapter {len(wanted)}, and {len(wanted ^ set(tensors))} "
            "names differ. It was not kept."
        )
    pairs = {}
    for layer, name in names.items():
        a, rows = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        b = torch.empty_like(rows)
        b[_row_order(base, layer, len(rows))] = rows
        pairs[layer] = LoraPair(a, b, float(alpha.contents()) / b.shape[1])
    return pairs


def read_header_text(path: Path) -> str:
    """Everything in a GGUF file that is not a tensor's numbers, as lines of text."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    entries = [f"{name}: {field.contents()}" for name, field in reader.fields.items()]
    return "\n".join([*entries, *(tensor.name for tensor in reader.tensors)])


def refuse_other_products(path: Path, found: Mapping[str, LoraPair], expected: Mapping[str, LoraPair]) -> None:
    """Raise ExportError where a layer's scaled product B A is not the one that was trained."""
    import torch

    for layer, pair in expected.items():
        products = [each.scaling * (each.b.double() @ each.a.double()) for each in (found[layer], pair)]
        distance = torch.linalg.vector_norm(products[0] - products[1])
        if not distance <= SAME * torch.linalg.vector_norm(products[1]):
            share = float(distance / torch.linalg.vector_norm(products[1]))
            raise ExportError(f"{path.name}: {layer} is {share:.1%} away from what was trained. It was not kept.")


def read_peft_pairs(adapter: Path) -> dict[str, LoraPair]:
    """The matrices of an adapter's folder by layer, in float32. Raises ExportError for what is no plain LoRA."""
    from safetensors.torch import load_file

    config = read_json(adapter / "adapter_config.json")
    if config["peft_type"] != "LORA":
        raise ExportError(
            f"GGUF has no place for the virtual tokens of {config['peft_type']}. Export the zip, which PEFT loads."
        )
    if config["use_dora"]:
        raise ExportError("GGUF has no place for DoRA's magnitudes. Export the merged model: --merged.")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        match = _PEFT_NAME.fullmatch(name)
        if not match:
            raise ExportError(f"{name} is no matrix of a LoRA adapter. Export the merged model: --merged.")
        sides.setdefault(match["layer"], {})[match["side"]] = tensor.float()
    return {layer: LoraPair(pair["A"], pair["B"], scaling) for layer, pair in sorted(sides.items())}


def write_peft_pairs(folder: Path, pairs: Mapping[str, LoraPair]) -> None:
    """Put matrices into an adapter's folder in the place of its own, with the scaling that they have."""
    from safetensors.torch import save_file

    rank, scaling = _shared(pairs)
    changes = {"use_rslora": False, "lora_alpha": scaling * rank}
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | changes)
    prefix = "base_model.model."
    sides = (
        (f"{prefix}{layer}.lora_{side}.weight", matrix)
        for layer, pair in pairs.items()
        for side, matrix in (("A", pair.a), ("B", pair.b))
    )
    save_file(dict(sides), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shared(pairs: Mapping[str, LoraPair]) -> tuple[int, float]:
    """The rank and scaling of all layers: a file has one alpha."""
    pair = next(iter(pairs.values()))
    return pair.a.shape[0], pair.scaling


def _name_layers(base: Mapping[str, Any], layers: list[str]) -> tuple[str, dict[str, str]]:
    """GGUF's name of the architecture, and of each layer's weight."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = base.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"A GGUF adapter can't be written for a base of type {kind!r}: known are {', '.join(ARCHITECTURES)}. "
            "Export the merged model (--merged) and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    architecture = ARCHITECTURES[kind][0]
    known = get_tensor_name_map(
        next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), base["num_hidden_layers"]
    )
    names = {layer: known.get_name(f"{layer}.weight", try_suffixes=(".weight",)) for layer in layers}
    unknown = [layer for layer, name in names.items() if not name]
    if unknown:
        raise ExportError(f"GGUF has no name for {unknown[0]} of a base of type {kind!r}. Export with --merged.")
    return architecture, {layer: str(name) for layer, name in names.items()}


def _row_order(base: Mapping[str, Any], layer: str, rows: int) -> torch.Tensor:
    """For each row of B in GGUF, the row of PEFT's that stands there.

    A head's rows are two halves in Transformers, rotated together pair by pair; interleaved they stand side by side.
    """
    import torch

    order = torch.arange(rows)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer.rpartition(".")[2])
    if not heads or not ARCHITECTURES[base["model_type"]][1]:
        return order
    count = base.get(heads) or base["num_attention_heads"]
    return order.view(count, 2, -1).transpose(1, 2).reshape(-1)
