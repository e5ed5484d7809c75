"""Base, quantization and adapter: what is loaded is what was meant, and what doesn't fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tune import adapters
from qlora_tune import base as bases
from qlora_tune import model as models
from qlora_tune.config import shipped_path
from qlora_tune.errors import ModelError
from qlora_tune.model import Device, Quantization

CPU = Device("cpu", "CPU", 2**34, "bfloat16")


def load(builtin: Any, **quantization: Any) -> Any:
    return models.load_base(builtin[0], CPU, "bfloat16", Quantization(**quantization))


def adapted(builtin: Any, **changes: Any) -> Any:
    options = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["all-linear"], **changes}
    return adapters.attach_adapter(load(builtin), **options)


def test_the_base_is_loaded_in_nf4_with_double_quantization(builtin: Any) -> None:
    model = load(builtin)
    linear = [part for part in model.modules() if type(part).__name__ == "Linear4bit"]
    assert len(linear) == 7 * model.config.num_hidden_layers
    state = linear[0].weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_an_evaluation_does_not_change_the_gradients_of_training(builtin: Any) -> None:
    model = adapted(builtin)
    adapters.keep_adapter_in_fp32(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide every gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, 2000, (2, 48), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == 2 * 7 * model.config.num_hidden_layers
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_4bit_layer_is_kept_from_being_repacked(builtin: Any) -> None:
    flags = [p.support_avx512bf16_for_cpu for p in load(builtin).modules() if hasattr(p, "support_avx512bf16_for_cpu")]
    assert flags
    assert not any(flags)


def test_all_linear_layers_but_the_head_get_an_adapter(builtin: Any) -> None:
    names = {n.split(".lora_A")[0].split(".")[-1] for n, p in adapted(builtin).named_parameters() if "lora_A" in n}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("target", ["query_key_value", "embed_tokens", "lm_head", "typo_proj"])
def test_targets_that_are_no_linear_layer_are_refused_with_those_that_are(builtin: Any, target: str) -> None:
    with pytest.raises(ModelError, match=f"{target} is no linear layer .* k_proj") as caught:
        adapted(builtin, target_modules=["q_proj", target])
    assert "lm_head" not in str(caught.value).split("Expected")[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "no such folder"),
        ("./nowhere/there", "no such folder"),
        ("HuggingFaceTB/SmolLM2-135M", "not on this machine and the hub can't be reached"),
    ],
)
def test_a_base_that_can_not_be_found_is_an_error(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        bases.find_base(name)


def copied_base(tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(shipped_path("builtin"), folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoModel": "evil.py"}}, "never run here"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_bases_that_can_not_be_tuned_soundly_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        bases.find_base(str(copied_base(tmp_path, **config)))


def test_weights_in_another_format_than_safetensors_are_refused(tmp_path: Path) -> None:
    folder = copied_base(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no config.json with safetensors"):
        bases.find_base(str(folder))


def test_a_base_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = copied_base(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[: len(weights) // 2], weights[:100], b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="is damaged"):
            bases.find_base(str(folder))


def test_the_fingerprint_follows_the_weights_not_the_folder_or_the_sharding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(shipped_path("builtin") / "model.safetensors")
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:9]}, tmp_path / "a.safetensors")
    save_file({n: weights[n] for n in names[9:]}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert bases.fingerprint_weights(shards) == bases.find_base("builtin").fingerprint
    weights[names[0]].view(-1)[0] += 1
    save_file(weights, tmp_path / "c.safetensors")
    assert bases.fingerprint_weights([tmp_path / "c.safetensors"]) != bases.find_base("builtin").fingerprint


def changed_base(tmp_path: Path) -> Any:
    from safetensors.torch import load_file, save_file

    folder = copied_base(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:8] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return bases.find_base(str(folder))


def test_an_adapter_is_refused_on_another_base(tmp_path: Path, finished: Any) -> None:
    other = changed_base(tmp_path)
    model = models.load_base(other, CPU, "bfloat16", Quantization())
    with pytest.raises(ModelError, match="was trained on builtin"):
        adapters.load_adapter(model, finished[0].adapter, other)


def test_an_incomplete_adapter_is_refused(tmp_path: Path, builtin: Any, finished: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    shutil.copytree(finished[0].adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[next(iter(weights))]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="incomplete or was changed"):
        adapters.load_adapter(load(builtin), folder, builtin[0])
    whole = (finished[0].adapter / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(ModelError, match="the adapter is damaged"):
        adapters.load_adapter(load(builtin), folder, builtin[0])
    (folder / "qlora_tune.json").write_text("{}")
    with pytest.raises(ModelError, match="is damaged"):
        adapters.load_adapter(load(builtin), folder, builtin[0])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model.safetensors missing"):
        adapters.load_adapter(load(builtin), folder, builtin[0])
