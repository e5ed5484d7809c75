"""What only a CUDA device can show: 4-bit weights on it, paged 8-bit AdamW, half precision, merging, going on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settings

from qlora_tune import train as training
from qlora_tune.export import KL_LIMIT, merge_adapter, open_adapter
from qlora_tune.generate import generate_answers
from qlora_tune.model import Quantization, detect_device, load_base
from qlora_tune.prepare import Setup, prepare
from qlora_tune.runs import Run, new_run
from qlora_tune.train import TrainResult

pytestmark = pytest.mark.gpu
STEPS = 24
SMALLEST_IN_8_BIT = 4096  # elements of a tensor from which on bitsandbytes keeps its states in 8 bits


@pytest.fixture(scope="module", autouse=True)
def _cuda_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def optimizers() -> Any:
    """Every AdamW that bitsandbytes makes in this module, in order."""
    from bitsandbytes.optim import AdamW

    made: list[Any] = []
    original = AdamW.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "__init__", remember)
        yield made


@pytest.fixture(scope="module")
def tuned(optimizers: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, TrainResult, Any]:
    """A short run of the built-in preset on the GPU: the run, its result and the optimizer that it used."""
    config = settings(runs_dir=str(tmp_path_factory.mktemp("runs")), max_steps=STEPS, run_name="gpu")
    run = new_run(config)
    result = training.train(config, run, prepare(config))
    return run, result, optimizers[-1]


def losses(run: Run, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.read_metrics() if name in entry]


def answer_heldout(setup: Setup, model: Any) -> list[str]:
    prompts = [example.messages[:-1] for example in setup.data.heldout_examples[:16]]
    return generate_answers(model, setup.chat, prompts, max_new_tokens=24, batch_size=8)


def adapter_parameters(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_the_gpu_is_found_and_its_precision_follows_its_compute_capability() -> None:
    import torch

    device = detect_device()
    major, _ = torch.cuda.get_device_capability(0)
    assert device.kind == "cuda"
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert device.precision == ("bfloat16" if major >= 8 else "float16")


def test_a_gpu_below_compute_capability_8_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    turing = SimpleNamespace(name="Turing", major=7, minor=5, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: turing)
    assert detect_device().precision == "float16"


def test_the_base_is_held_in_double_quantized_nf4_on_the_gpu(builtin: tuple[Any, Any, Any]) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    base, _, _ = builtin
    device = detect_device()
    model = load_base(base, device, device.precision, Quantization())
    linear = [part for name, part in model.named_modules() if name.endswith("_proj")]
    assert len(linear) == 7 * model.config.num_hidden_layers
    assert all(isinstance(part, Linear4bit) for part in linear)
    for part in linear:
        assert part.weight.is_cuda
        assert part.weight.dtype == torch.uint8
        assert part.weight.numel() == part.in_features * part.out_features // 2
        assert part.weight.quant_state.quant_type == "nf4"
        assert part.weight.quant_state.nested
        assert part.compute_dtype == getattr(torch, device.precision)
    assert all(parameter.is_cuda for parameter in model.parameters())


def test_training_on_the_gpu_lowers_the_loss(tuned: tuple[Run, TrainResult, Any]) -> None:
    run, result, _ = tuned
    trained, heldout = losses(run), losses(run, "eval_loss")
    assert result.status == "finished"
    assert len(trained) == STEPS
    assert sum(trained[-4:]) < 0.8 * sum(trained[:4])
    assert heldout[-1] < heldout[0]
    assert run.read_state()["device"] == detect_device().name


def test_the_adapter_is_trained_and_left_in_float32(tuned: tuple[Run, TrainResult, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    run, result, _ = tuned
    parameters = adapter_parameters(result.model)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(parameter.is_cuda for parameter in parameters)
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    moved = [tensor for name, tensor in saved.items() if "lora_B" in name]
    assert all(tensor.abs().max() > 0 for tensor in moved)  # lora_B begins at zero


def test_the_optimizer_on_the_gpu_is_paged_8_bit_adamw(tuned: tuple[Run, TrainResult, Any]) -> None:
    import torch

    _, result, optimizer = tuned
    assert optimizer.is_paged
    assert optimizer.args.optim_bits == 8
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(each) for each in adapter_parameters(result.model)}
    assert any(parameter.numel() >= SMALLEST_IN_8_BIT for parameter in parameters)
    for parameter in parameters:
        in_8_bit = parameter.numel() >= SMALLEST_IN_8_BIT
        assert optimizer.state[parameter]["state1"].dtype == (torch.uint8 if in_8_bit else torch.float32)


def test_a_reloaded_adapter_answers_as_the_trained_model_did(tuned: tuple[Run, TrainResult, Any]) -> None:
    run, result, _ = tuned
    before = answer_heldout(result.setup, result.model)
    with result.model.disable_adapter():
        base = answer_heldout(result.setup, result.model)
    after = answer_heldout(result.setup, open_adapter(run.adapter).load())
    assert after == before
    assert before != base


def test_merging_on_the_gpu_gives_the_trained_model_within_the_kl_limit(
    tuned: tuple[Run, TrainResult, Any], tmp_path: Path
) -> None:
    run = tuned[0]
    trained = open_adapter(run.adapter)
    assert trained.device.kind == "cuda"
    divergence = merge_adapter(trained, run, tmp_path / "merged")
    assert 0 <= divergence <= KL_LIMIT
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 1e6


def test_float16_as_older_gpus_need_it_trains_without_overflow(tmp_path: Path) -> None:
    import torch

    config = settings(runs_dir=str(tmp_path), max_steps=STEPS, dtype="float16", heldout_share=0)
    run = new_run(config)
    result = training.train(config, run, prepare(config))
    trained = losses(run)
    assert sum(trained[-4:]) < 0.9 * sum(trained[:4])
    assert {parameter.dtype for parameter in adapter_parameters(result.model)} == {torch.float32}


def test_a_run_goes_on_from_its_checkpoint_with_paged_states(tmp_path: Path, optimizers: list[Any]) -> None:
    # States are paged from 100,000 elements on; at rank 512 those of the built-in model's feed-forward layers are.
    changes = {
        "lora_r": 512,
        "lora_alpha": 512,
        "learning_rate": 2e-4,
        "eval_steps": 4,
        "load_best_model_at_end": False,
    }
    config = settings(runs_dir=str(tmp_path), max_steps=8, run_name="long", heldout_share=0, **changes)
    run, setup = new_run(config), prepare(config)
    training.train(config, run, setup)
    states = [state["state1"] for state in optimizers[-1].state.values()]
    assert any(getattr(state, "is_paged", False) for state in states)
    uninterrupted = losses(run)
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    result = training.train(config, run, setup, resume=True)
    assert result.status == "finished"
    assert len(losses(run)) == 8
    assert losses(run)[4:] == pytest.approx(uninterrupted[4:], rel=2e-2)
