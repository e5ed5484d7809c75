"""Everything that leaves: the adapter as a zip, the merged model. Each is loaded again and compared before "done"."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_tune import adapters
from qlora_tune import model as models
from qlora_tune.adapter_record import (
    ADAPTER_RECORD,
    read_adapter_record,
    refuse_changed_files,
    refuse_other_base,
)
from qlora_tune.base import BaseModel, find_base
from qlora_tune.card import Form, public_text, write_model_card
from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ExportError, ModelError
from qlora_tune.generate import stop_ids, stop_words
from qlora_tune.gguf_adapter import (
    read_gguf_adapter,
    read_peft_pairs,
    refuse_other_products,
    write_gguf_adapter,
    write_peft_pairs,
)
from qlora_tune.leaks import Private, find_private, refuse_private
from qlora_tune.model import Device, Precision, Quantization
from qlora_tune.modelfile import find_pieces, refuse_other_modelfile, write_modelfile
from qlora_tune.parity import Parity, compared_rows, measure_parity, refuse_other_format, refuse_other_weights
from qlora_tune.recipe import RECIPE, RecipeBase, make_recipe, write_recipe
from qlora_tune.runs import Run, is_reward_model, read_json
from qlora_tune.shapes import Example

# Only these files leave: what a trainer writes beside them holds local paths.
ADAPTER_FILES = ("adapter_model.safetensors", ADAPTER_RECORD)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PACKED_FILES = (*ADAPTER_FILES, *TOKENIZER_FILES, "adapter_config.json", "generation_config.json", "README.md", RECIPE)
# Mean KL divergence of next tokens, merged model against the adapter on the same base [nats]. Measured on this stack:
# 7e-6 to 5e-4 when merged right and rounded to bf16, 5e-2 when merged wrong, 0.2 for a whole tuning.
KL_LIMIT = 2e-3
SAME_KL = 1e-6  # at most, of an adapter that is the same: on one base nothing differs


@dataclass(frozen=True)
class Trained:
    """An adapter with everything that is needed to load it: a run's, or an unpacked export."""

    adapter: Path
    base: BaseModel
    device: Device
    precision: Precision
    quantization: Quantization
    tokenizer: Any
    chat: ChatFormat

    def load(self, adapter: Path | None = None) -> Any:
        """Load the base as it was in training, with this adapter or another one of the same base."""
        model = models.load_base(self.base, self.device, self.precision, self.quantization)
        return adapters.load_adapter(model, adapter or self.adapter, self.base)

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens the adapter puts before each sequence; 0 where it is LoRA."""
        return int(read_json(self.adapter / "adapter_config.json").get("num_virtual_tokens", 0))

    def context_length(self) -> int:
        """The longest prompt with its answer that the base was made for [tokens]."""
        return (self.base.context_length() or 1 << 30) - self.virtual_tokens

    @models.one_at_a_time
    def load_merged(self, folder: Path) -> Any:
        """Load a merged model as it is: a plain one, unquantized."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, self.precision),
            device_map={"": 0 if self.device.kind == "cuda" else "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )


def open_adapter(adapter: Path, base: str | None = None, *, reward: bool = False) -> Trained:
    """Find what an adapter's folder needs; `base` says where its base model is now, if it moved.

    Raises ModelError when the folder holds no adapter, or the base is missing or is another one, and where a reward
    model is given for an adapter that answers, or the other way round.
    """
    record = read_adapter_record(adapter)
    refuse_changed_files(adapter, record)
    if is_reward_model(adapter) and not reward:
        raise ModelError(
            f"{adapter}: is a reward model, which scores answers and writes none. Use it beside what answers: "
            "python -m qlora_tune compare RUN base --reward REWARD_RUN"
        )
    if reward and not is_reward_model(adapter):
        raise ModelError(
            f"{adapter}: is no reward model but an adapter that answers. Train one: "
            "python -m qlora_tune reward RUN --data PAIRS.jsonl"
        )
    found = find_base(base or record["base_model"], None if base else record["base_revision"])
    if found.fingerprint != record["base_fingerprint"]:
        refuse_other_base(adapter, record, found)
    quantization = Quantization(
        record["load_in_4bit"], record["bnb_4bit_quant_type"], record["bnb_4bit_use_double_quant"]
    )
    tokenizer, chat = models.load_tokenizer(adapter)
    return Trained(adapter, found, models.detect_device(), record["precision"], quantization, tokenizer, chat)


def export_adapter(trained: Trained, run: Run, target: Path) -> Parity:
    """Write the adapter as a zip: weights, tokenizer, chat template, generation config, recipe, model card.

    Unpacked again and loaded on the base, it must make the same tokens of held-out prompts, end at the same ones, and
    give the very answers and distributions that the run's own adapter gives. Raises ExportError when it doesn't, or
    when a file holds something private (leaks). Returns how the two agree, which also stands in the card.
    """
    if target.suffix.lower() != ".zip" or target.is_dir():
        raise ExportError(f"{target}: expected the name of a .zip file to write.")
    target.parent.mkdir(parents=True, exist_ok=True)
    private = find_private(run, trained.base.path)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / target.stem
        folder.mkdir()
        _write_adapter_files(trained, run, folder)
        _refuse_private(folder, trained, run, private)
        packed = Path(scratch) / target.name
        _write_zip(folder, packed)
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(unpacked)
        parity = _compare_adapters(trained, unpacked / target.stem, compared_rows(run))
        _write_papers(trained, run, folder, parity, "adapter")
        _refuse_private(folder, trained, run, private)
        _write_zip(folder, packed)
        packed.replace(target)
    return parity


def merge_adapter(
    trained: Trained,
    run: Run,
    target: Path,
    into: Literal["quantized", "original"] = "quantized",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> Parity:
    """Write a plain model with the adapter merged in; returns how it agrees with what was trained.

    "quantized" merges into the dequantized 4-bit base, which is what was trained; "original" into the 16-bit base,
    which is close to it, not equal. Loaded again, its next-token distributions on held-out rows must stay within
    KL_LIMIT of the adapter's on the same base, and where both compute in float32 its answers must be the same. Raises
    ExportError otherwise, and leaves nothing behind. In bfloat16 the merged weights are rounded once, which can turn a
    near tie between two tokens; float32 changes nothing.
    """
    from transformers import GenerationConfig

    if target.exists():
        raise ExportError(f"{target} is there already. Delete it, or choose another place (--output).")
    if trained.virtual_tokens:
        raise ExportError("Virtual tokens change no weight, so nothing can be merged. Export the adapter as a zip.")
    rows, private = compared_rows(run), find_private(run, trained.base.path)
    original = replace(trained, quantization=Quantization(load_in_4bit=False))
    source = original if into == "original" else trained
    merged = _merge(source, dtype)
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.config.use_cache = True
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        merged.generation_config = GenerationConfig()
        merged.save_pretrained(scratch, safe_serialization=True)
        _write_generation_config(trained, scratch)
        _copy(trained.adapter, scratch, TOKENIZER_FILES)
        _clean_config(scratch / "config.json")
        _refuse_private(scratch, trained, run, private, into)
        refuse_other_format(trained.chat, scratch, rows)
        del merged
        parity = _compare_merged(source, scratch, rows)
        exact = dtype == trained.precision == "float32"
        if not parity.mean_kl <= KL_LIMIT or (exact and parity.same < parity.prompts):
            raise ExportError(
                f"The merged model answers otherwise than the adapter: {parity.describe()}; expected a mean KL of at "
                f"most {KL_LIMIT:.0e}{' and equal answers' if exact else ''}. It was not kept."
            )
        if source is not trained:
            parity = _compare_merged(trained, scratch, rows, same_base=False)
        _write_papers(trained, run, scratch, parity, into)
        _refuse_private(scratch, trained, run, private, into)
        scratch.chmod(0o755)
        for path in scratch.iterdir():
            path.chmod(0o644)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return parity


def export_gguf(trained: Trained, run: Run, target: Path) -> Parity:
    """Write a folder for llama.cpp and Ollama: the adapter as GGUF, a Modelfile, the chat template, the card.

    The GGUF is read back: its products must be the trained adapter's, and as an adapter on the base it must give the
    very answers and distributions of the trained one. The Modelfile, read back, must render the prompts of held-out
    rows as the chat template does, and end answers at the same tokens. Raises ExportError otherwise, and for a base
    that has no place in gguf_adapter.ARCHITECTURES; nothing is left behind then.
    """
    if target.exists():
        raise ExportError(f"{target} is there already. Delete it, or choose another place (--output).")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        _write_gguf_files(trained, run, folder)
        parity = _compare_gguf(trained, run, folder)
        _write_papers(trained, run, folder, parity, "gguf")
        _refuse_private(folder, trained, run, find_private(run, trained.base.path), "gguf")
        folder.rename(target)
    return parity


def _merge(trained: Trained, dtype: str) -> Any:
    """Merge layer by layer in float32, so that each weight is rounded once and memory holds one such layer."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = models.load_base(trained.base, trained.device, trained.precision, trained.quantization)
    if trained.quantization.load_in_4bit:
        model = model.dequantize()
    tuned = adapters.load_adapter(model, trained.adapter, trained.base)
    for layer in tuned.modules():
        if isinstance(layer, BaseTunerLayer):
            weights = layer.get_base_layer().to(torch.float32)
            layer.merge(safe_merge=True)
            weights.to(getattr(torch, dtype))
    return tuned.unload().to(getattr(torch, dtype))


def _write_adapter_files(trained: Trained, run: Run, folder: Path) -> None:
    source = trained.adapter
    _copy(source, folder, ADAPTER_FILES + TOKENIZER_FILES)
    config = read_json(source / "adapter_config.json")
    config["base_model_name_or_path"] = trained.base.label
    config["revision"] = trained.base.revision
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    record = read_json(source / ADAPTER_RECORD)
    record["base_model"] = trained.base.label
    (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _write_generation_config(trained, folder)
    _write_papers(trained, run, folder, None, "adapter")


def _write_gguf_files(trained: Trained, run: Run, folder: Path) -> None:
    chat = trained.chat
    write_gguf_adapter(
        trained.adapter, trained.base.read_config(), folder / f"{run.name}.gguf", run.name, trained.base.label
    )
    _copy(trained.adapter, folder, ("chat_template.jinja",))
    context = trained.base.context_length()
    text = write_modelfile(find_pieces(chat), stop_words(chat), f"{run.name}.gguf", trained.base.label, context)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _write_generation_config(trained: Trained, folder: Path) -> None:
    """Without it nothing stops generation at the chat template's end of turn."""
    content = {"eos_token_id": stop_ids(trained.chat), "pad_token_id": trained.tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _clean_config(path: Path) -> None:
    content = read_json(path)
    for key in ("quantization_config", "_name_or_path"):
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_papers(trained: Trained, run: Run, folder: Path, parity: Parity | None, form: Form) -> None:
    """The model card, and the recipe where the run has one."""
    base = trained.base
    card = write_model_card(run, base, stop_ids(trained.chat), parity, form)
    (folder / "README.md").write_text(card, encoding="utf-8")
    recipe = make_recipe(run, RecipeBase(name=base.label, revision=base.revision, fingerprint=base.fingerprint))
    if recipe:
        write_recipe(recipe, folder)


def _refuse_private(folder: Path, trained: Trained, run: Run, private: Private, form: Form = "adapter") -> None:
    public = public_text(run, trained.base, stop_ids(trained.chat), form)
    refuse_private(folder, private, trained.base.path, [public, str(trained.tokenizer.chat_template)])


def _write_zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{folder.name}/{path.name}")


def _compare_adapters(trained: Trained, folder: Path, rows: list[Example]) -> Parity:
    """Compare an unpacked adapter with the trained one, both on one base. Raises ExportError where they differ."""
    refuse_other_format(trained.chat, folder, rows)
    model = trained.load(folder)
    adapters.load_adapter(model, trained.adapter, trained.base, "trained")

    def ready(name: str) -> Any:
        model.set_adapter(name)
        return model

    parity = measure_parity(lambda: ready("trained"), lambda: ready("default"), trained.chat, rows)
    if parity.same < parity.prompts or not parity.max_kl <= SAME_KL:
        raise ExportError(
            f"The exported adapter answers otherwise than the trained one: {parity.describe()}. It was not kept."
        )
    return parity


def _compare_gguf(trained: Trained, run: Run, folder: Path) -> Parity:
    """Compare what was written for llama.cpp and Ollama with the trained adapter, all of it read back."""
    rows, path = compared_rows(run), folder / f"{run.name}.gguf"
    expected = read_peft_pairs(trained.adapter)
    found = read_gguf_adapter(path, trained.base.read_config(), list(expected))
    refuse_other_products(path, found, expected)
    refuse_other_modelfile((folder / "Modelfile").read_text(encoding="utf-8"), trained.chat, rows)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        back = Path(scratch)
        _write_adapter_files(trained, run, back)
        _copy(folder, back, ("chat_template.jinja",))
        write_peft_pairs(back, found)
        return _compare_adapters(trained, back, rows)


def _compare_merged(trained: Trained, folder: Path, rows: list[Example], same_base: bool = True) -> Parity:
    tuned, merged = trained.load(), trained.load_merged(folder)
    if same_base:
        refuse_other_weights(tuned, merged)
    return measure_parity(lambda: tuned, lambda: merged, trained.chat, rows)
