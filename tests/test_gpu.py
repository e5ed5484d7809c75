"""What only a CUDA device can show: 4-bit weights on it, paged 8-bit AdamW, half precision, merging, going on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settings
from losses import adapt, distance, draw_row, draw_rows, in_place, opened, plain, quick, take_gradients, unlearned

from qlora_tune import attention
from qlora_tune import train as training
from qlora_tune.export import KL_LIMIT, merge_adapter, open_adapter
from qlora_tune.fast import split_batch
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
    parity = merge_adapter(trained, run, tmp_path / "merged")
    assert 0 <= parity.mean_kl <= KL_LIMIT
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


# ---------------------------------------------------------------- the fast path

LENGTHS = (9, 230, 31, 118, 64, 12)


@pytest.fixture(scope="module")
def adapted(builtin: tuple[Any, Any, Any]) -> Any:
    """The built-in base in bfloat16 with an adapter that changes what it answers, in training mode."""
    device = detect_device()
    if device.precision != "bfloat16":
        pytest.skip("needs a CUDA device that computes in bfloat16")
    return adapt(load_base(builtin[0], device, "bfloat16", Quantization())).train()


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("max_tokens", [128, 2048])
def test_the_fast_path_on_the_gpu_gives_the_plain_loss_and_gradients(
    adapted: Any, max_tokens: int, keep_weights: bool
) -> None:
    rows, before = draw_rows(LENGTHS), in_place(adapted)
    expected_loss, expected = plain(adapted, rows, autocast=True)
    with opened(adapted, keep_weights=keep_weights) as fast:
        loss, found = quick(fast, rows, max_tokens)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert distance(found, expected) < 2e-2
    assert in_place(adapted) == before
    assert plain(adapted, rows, autocast=True)[0] == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 2), (700, 3), (1600,)])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_rows_of_several_lengths_attend_as_they_do_alone_on_the_gpu(
    adapted: Any, lengths: tuple[int, ...], precision: str
) -> None:
    import torch

    device, dtype = torch.device("cuda", 0), getattr(torch, precision)
    plan = attention.plan_rows([[length] for length in lengths], dtype, device)
    kernel = attention._varlen_options() is not None and precision == "bfloat16"
    assert (plan.starts is not None) == kernel
    assert not any(mask is not None for mask in plan.masks)
    chance = torch.Generator(device).manual_seed(0)
    shape = sum(lengths), 32
    q, k, v = (torch.randn(h, *shape, device=device, generator=chance).to(dtype).requires_grad_() for h in (6, 2, 2))
    found = attention.attend(q, k, v, plan, 0.2)
    pull = torch.randn(found.shape, device=device, generator=chance).to(dtype)
    results = [found.detach(), *torch.autograd.grad(found, (q, k, v), pull)]
    # The truth: each row alone, in float64.
    wide = [each.detach().double().requires_grad_() for each in (q, k, v)]
    alone = []
    for row in zip(*(each.split(lengths, 1) for each in wide), strict=True):
        key, value = (each.repeat_interleave(3, 0) for each in row[1:])
        later = torch.ones(len(key[0]), len(key[0]), device=device).triu(1).bool()
        scores = (row[0] @ key.transpose(1, 2) * 0.2).masked_fill(later, -torch.inf)
        alone.append((scores.softmax(-1) @ value).transpose(0, 1))
    truth = torch.cat(alone)
    expected = [truth.detach(), *torch.autograd.grad(truth, wide, pull.double())]
    for one, other in zip(results, expected, strict=True):
        # Against 1 for gradients that are zero: of a lone token's query and key.
        assert (one - other).norm() < (2e-2 if kernel else 1e-2) * other.norm().clamp(min=1)


def test_nothing_leaves_a_mask_or_a_filler_on_the_gpu(adapted: Any) -> None:
    import torch

    masks: list[Any] = []
    (batch,) = split_batch(draw_rows(LENGTHS), 2048, on_cpu=False)
    assert batch.input_ids.shape[1] == batch.tokens == sum(LENGTHS)
    with opened(adapted) as fast, torch.no_grad():
        hook = fast.backbone.layers[0].self_attn.register_forward_pre_hook(
            lambda module, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
        )
        fast.loss_sum(batch)
        hook.remove()
    assert masks == [None]


def test_a_row_on_the_gpu_learns_the_same_whatever_its_neighbours(adapted: Any) -> None:
    row, neighbours = draw_row(40, seed=5, turns=2), [unlearned(each) for each in draw_rows((230, 45, 8), seed=6)]
    with opened(adapted) as fast:
        alone_loss, alone = quick(fast, [row])
        loss, found = quick(fast, [*neighbours, row])
    assert loss == pytest.approx(alone_loss, rel=2e-3)
    assert distance(found, alone) < 2e-2


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_activations_give_the_same_gradients_on_the_gpu(adapted: Any, offload: bool) -> None:
    rows = draw_rows(LENGTHS)
    with opened(adapted) as fast:
        loss, before = quick(fast, rows, 300)
    with opened(adapted, checkpointing=True, offload=offload) as fast:
        again, after = quick(fast, rows, 300)
    assert again == pytest.approx(loss, rel=1e-4)
    assert distance(after, before) < 5e-3
    assert not any(gradient is not None for gradient in take_gradients(adapted).values())


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_a_few_steps_on_the_gpu_train_as_the_plain_way_does(tmp_path: Path, dtype: str) -> None:
    found = {}
    for fast in ("true", "false"):
        changes = {"run_name": fast, "fast": fast, "dtype": dtype, "learning_rate": 1e-4, "max_steps": 8}
        config = settings(runs_dir=str(tmp_path), heldout_share=0, **changes)
        run = new_run(config)
        training.train(config, run, prepare(config))
        assert run.read_state()["path"] == ("fast" if fast == "true" else "plain")
        found[fast] = losses(run)
    assert len(found["true"]) == 8
    assert found["true"][-1] < found["true"][0]
    assert found["true"] == pytest.approx(found["false"], rel=2e-2)
