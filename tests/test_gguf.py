"""The adapter for llama.cpp and Ollama: what was trained, read back, and in llama.cpp itself where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import run, scale_a_tensor, trained  # noqa: F401 - fixtures

from qlora_tune import export as exports
from qlora_tune.errors import ExportError
from qlora_tune.export import export_gguf
from qlora_tune.generate import generate_answers, stop_ids
from qlora_tune.gguf_adapter import (
    LoraPair,
    read_gguf_adapter,
    read_peft_pairs,
    refuse_other_products,
    write_gguf_adapter,
    write_peft_pairs,
)

ROPE_PAIR = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def exported(trained: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    target = tmp_path_factory.mktemp("out") / "gguf"
    parity = export_gguf(trained, run, target)
    assert (parity.prompts, parity.same) == (20, 20)
    assert 0 <= parity.max_kl < 1e-6
    return target


def make_adapter(folder: Path, **changes: Any) -> Path:
    """An adapter with a rank of 2 on the query layer of ROPE_PAIR, whose matrices count up."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **changes}).save_pretrained(folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = torch.arange(8.0).view(2, 4), torch.arange(16.0).view(8, 2)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def test_the_folder_holds_what_llama_cpp_and_ollama_need(exported: Path, run: Any, trained: Any) -> None:  # noqa: F811
    name = f"{run.name}.gguf"
    papers = {"Modelfile", "chat_template.jinja", "README.md", "recipe.toml"}
    assert {path.name for path in exported.iterdir()} == {name, *papers}
    modelfile = (exported / "Modelfile").read_text()
    assert f"ADAPTER ./{name}\n" in modelfile
    assert f'PARAMETER stop "{trained.chat.end_of_turn}"\n' in modelfile
    assert "20 of 20 greedy answers equal" in (exported / "README.md").read_text()


def test_the_header_says_what_llama_cpp_asks_for(exported: Path, run: Any) -> None:  # noqa: F811
    from gguf import GGUFReader

    config = run.read_config()
    alpha, rank = config.lora_alpha, config.lora_r
    reader = GGUFReader(exported / f"{run.name}.gguf")
    asked = ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha", "general.base_model.0.name")
    assert [reader.get_field(key).contents() for key in asked] == ["adapter", "lora", "llama", alpha, "builtin"]
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * 8
    assert shapes["blk.7.attn_k.weight.lora_a"] == (rank, 192)
    assert shapes["blk.7.attn_k.weight.lora_b"] == (64, rank)


def test_query_rows_stand_in_the_order_of_interleaved_rotary_embeddings(tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_gguf_adapter(make_adapter(tmp_path / "a"), ROPE_PAIR, tmp_path / "a.gguf", "a", "b")
    rows = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    # Two heads of four rows, each two halves: rows 0 and 2 of a head are rotated together.
    assert rows["blk.0.attn_q.weight.lora_b"][:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert rows["blk.0.attn_q.weight.lora_a"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    write_gguf_adapter(tmp_path / "a", ROPE_PAIR | {"model_type": "qwen3"}, tmp_path / "q.gguf", "a", "b")
    rows = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "q.gguf").tensors}
    assert rows["blk.0.attn_q.weight.lora_b"][:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize(("use_rslora", "alpha"), [(False, 6.0), (True, 6.0 * 2**0.5)])
def test_what_is_read_back_multiplies_as_what_was_written(tmp_path: Path, use_rslora: bool, alpha: float) -> None:
    from gguf import GGUFReader

    adapter, path = make_adapter(tmp_path / "a", use_rslora=use_rslora), tmp_path / "a.gguf"
    write_gguf_adapter(adapter, ROPE_PAIR, path, "a", "b")
    assert GGUFReader(path).get_field("adapter.lora.alpha").contents() == pytest.approx(alpha)
    expected = read_peft_pairs(adapter)
    found = read_gguf_adapter(path, ROPE_PAIR, list(expected))
    refuse_other_products(path, found, expected)
    write_peft_pairs(adapter, found)
    again = read_peft_pairs(adapter)
    assert again.keys() == expected.keys()
    for layer, pair in expected.items():
        assert torch.equal(again[layer].a, pair.a)
        assert torch.equal(again[layer].b, pair.b)
        assert again[layer].scaling == pytest.approx(pair.scaling)
    other = {layer: LoraPair(pair.a, pair.b, pair.scaling * 1.1) for layer, pair in found.items()}
    with pytest.raises(ExportError, match=r"q_proj is 10.0% away from what was trained"):
        refuse_other_products(path, other, expected)


def test_what_gguf_has_no_place_for_is_refused_in_words(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    with pytest.raises(ExportError, match=r"base of type 'mamba': known are llama, .*--merged"):
        write_gguf_adapter(adapter, ROPE_PAIR | {"model_type": "mamba"}, tmp_path / "a.gguf", "a", "b")
    with pytest.raises(ExportError, match="GGUF has no name for model.layers.0.self_attn.q_proj"):
        write_gguf_adapter(adapter, ROPE_PAIR | {"num_hidden_layers": 0}, tmp_path / "a.gguf", "a", "b")
    with pytest.raises(ExportError, match="no place for DoRA"):
        write_gguf_adapter(make_adapter(tmp_path / "d", use_dora=True), ROPE_PAIR, tmp_path / "a.gguf", "a", "b")


def test_a_file_of_another_kind_or_with_other_layers_is_refused(exported: Path, run: Any, tmp_path: Path) -> None:  # noqa: F811
    path = exported / f"{run.name}.gguf"
    base = {"model_type": "llama", "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    with pytest.raises(ExportError, match="expected a LoRA adapter for qwen3"):
        read_gguf_adapter(path, base | {"model_type": "qwen3"}, [])
    with pytest.raises(ExportError, match="holds 112 tensors, the adapter 2"):
        read_gguf_adapter(path, base, ["model.layers.0.self_attn.q_proj"])


def scale_before_writing(folder: Path) -> None:
    scale_a_tensor(folder, "adapter_model.safetensors", "lora_B")


BREAKS: dict[str, tuple[Callable[[str], str], str]] = {
    "template": (lambda text: text.replace("{{ .Content }}", " {{ .Content }}", 1), "template"),
    "stop word": (lambda text: "".join(line for line in text.splitlines(True) if "stop" not in line), "end answers at"),
}


@pytest.mark.parametrize("what", [*BREAKS, "tensor", "jinja"])
def test_a_broken_gguf_export_is_not_kept(what: str, trained: Any, run: Any, tmp_path: Path) -> None:  # noqa: F811
    write = exports._write_gguf_files
    message = {"tensor": r"is 10.0% away from what was trained", "jinja": "chat template make other tokens"}.get(what)

    def broken(trained: Any, run: Any, folder: Path) -> None:
        if what == "tensor":
            import shutil
            from dataclasses import replace

            shutil.copytree(trained.adapter, tmp_path / "scaled")
            scale_a_tensor(tmp_path / "scaled", "adapter_model.safetensors", "lora_B")
            trained = replace(trained, adapter=tmp_path / "scaled")
        write(trained, run, folder)
        if what in BREAKS:
            path = folder / "Modelfile"
            path.write_text(BREAKS[what][0](path.read_text()))
        if what == "jinja":
            path = folder / "chat_template.jinja"
            path.write_text("Hello! " + path.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "_write_gguf_files", broken)
        with pytest.raises(ExportError, match=message or BREAKS[what][1]):
            export_gguf(trained, run, tmp_path / "out" / "gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_llama_cpp_answers_as_what_was_trained(exported: Path, trained: Any, run: Any, tmp_path: Path) -> None:  # noqa: F811
    """The base in float32 on both sides, so that nothing but the adapter and its places is compared."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from dataclasses import replace

    from gguf_base import answer, write_base

    plain = replace(trained, precision="float32")
    model = plain.load()
    base = plain.load().unload().dequantize().float()
    write_base(base, trained.tokenizer, tmp_path / "base.gguf")
    chat, rows = trained.chat, run.read_heldout()[:100]
    prompts = [row.messages[:-1] for row in rows]
    expected = generate_answers(model, chat, prompts, max_new_tokens=32, batch_size=25)
    given = {"n_ctx": 256, "logits_all": True, "verbose": False, "n_threads": 2}
    tuned = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=str(exported / f"{run.name}.gguf"), **given)
    found, largest = [], 0.0
    for prompt, text in zip(prompts, expected, strict=True):
        ids = chat.encode_prompt(prompt)
        tokens, logits = answer(tuned, ids, stop_ids(chat), 32)
        found.append(chat.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        if found[-1] == text:
            with torch.inference_mode():
                ours = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 :][: len(logits)]
            p, q = (torch.log_softmax(each.double(), -1) for each in (ours, logits))
            largest = max(largest, float((p.exp() * (p - q)).sum(-1).max()))
    assert sum(one == other for one, other in zip(found, expected, strict=True)) == 100
    assert largest < 1e-4
    bare = llama_cpp.Llama(str(tmp_path / "base.gguf"), **given)
    without = [answer(bare, chat.encode_prompt(prompt), stop_ids(chat), 32)[0] for prompt in prompts[:10]]
    assert [chat.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in without] != expected[:10]
    print(f"largest KL {largest:.1e}")
