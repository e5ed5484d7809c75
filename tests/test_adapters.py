"""Every kind of adapter learns, is kept and is loaded again as it was; what a kind can't do is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings

from qlora_tune import adapters, export
from qlora_tune import model as models
from qlora_tune import train as training
from qlora_tune.chat_format import IGNORED
from qlora_tune.cli import main
from qlora_tune.config import TrainConfig
from qlora_tune.errors import ConfigError, ExportError, ModelError, RunError
from qlora_tune.generate import answer_prompts, context_length
from qlora_tune.likelihood import pack_sequence, score_sequences
from qlora_tune.memory import estimate_memory, possible_fits
from qlora_tune.pair_setup import find_origin
from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, new_run
from qlora_tune.side_by_side import open_panel

PROMPT = {"peft_type": "PROMPT_TUNING", "max_length": "200", "learning_rate": "0.1"}
PREFIX = {"peft_type": "PREFIX_TUNING", "max_length": "200", "learning_rate": "0.1"}
WHOLE = {"load_in_4bit": "false"}
KINDS: dict[str, dict[str, str]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": "true", "init_lora_weights": "gaussian"},
    "DoRA": {"use_dora": "true"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "OLoRA": {"init_lora_weights": "olora", **WHOLE},
    "PiSSA": {"init_lora_weights": "pissa", "use_rslora": "true", **WHOLE},
    "prompt tuning": PROMPT,
    "prefix tuning": PREFIX,
}
Trained = tuple[Run, TrainConfig, Any]


@pytest.fixture(scope="module")
def train_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Trains 20 steps with a kind of adapter, once in this module: the run, its settings and the result."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = [{"instruction": f"Say {n}", "output": f"I say {n}.", "task": "say"} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done: dict[str, Trained] = {}

    def train(kind: str) -> Trained:
        if kind not in done:
            shared = {"runs_dir": str(folder), "run_name": kind, "data": [str(folder / "rows.jsonl")], "lora_r": "8"}
            shared["learning_rate"] = "5e-4"
            sizes = {"max_steps": "20", "eval_steps": "20", "per_device_train_batch_size": "4", "dtype": "float32"}
            config = settings(**{**shared, **sizes, **KINDS[kind]})
            run = new_run(config)
            done[kind] = run, config, training.train(config, run, prepare(config))
        return done[kind]

    return train


def draw_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, 2000, (rows, length), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


# ---------------------------------------------------------------- each kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_is_loaded_again_on_the_untouched_base(
    kind: str, train_kind: Callable[[str], Trained]
) -> None:
    run, config, result = train_kind(kind)
    metrics = run.read_metrics()
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])

    opened = export.open_adapter(run.adapter)
    again, ids = opened.load(), draw_ids(1, 40)
    assert torch.equal(logits_of(again, ids), logits_of(result.model, ids))
    bare = models.load_base(opened.base, opened.device, opened.precision, opened.quantization)
    with again.disable_adapter():
        assert torch.equal(logits_of(again, ids), logits_of(bare, ids))
    assert not torch.equal(logits_of(again, ids)[:, -40:], logits_of(bare, ids))

    # What was measured while it trained, maybe on a base that its initialisation had changed.
    packed = [pack_sequence(row.input_ids, row.labels) for row in result.setup.data.heldout]
    loss = sum(score_sequences(again, packed, 4).values()) / sum(sequence.learned for sequence in packed)
    measured = next(entry["eval_loss"] for entry in metrics if "eval_loss" in entry)
    assert loss == pytest.approx(measured, rel=1e-4, abs=1e-5)

    rank = adapters.saved_rank(config) / config.lora_r
    trained = sum(p.numel() for name, p in again.named_parameters() if "lora_" in name or "prompt_" in name)
    parts = estimate_memory(opened.base, config, opened.device, opened.precision, [40]).parts
    assert parts["adapter and optimizer"] * rank == 16 * trained
    assert run.read_state()["path"] == ("plain" if config.peft_type != "LORA" else "fast")


@pytest.mark.parametrize("kind", ["LoftQ", "PiSSA", "DoRA", "prompt tuning", "prefix tuning"])
def test_every_kind_leaves_as_a_zip_that_answers_as_the_run(
    kind: str, tmp_path: Path, train_kind: Callable[[str], Trained]
) -> None:
    run, _, _ = train_kind(kind)
    parity = export.export_adapter(export.open_adapter(run.adapter), run, tmp_path / "out.zip")
    assert (parity.same, parity.max_kl) == (parity.prompts, 0.0)


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA"])
def test_the_merged_model_answers_as_the_adapter(
    kind: str, tmp_path: Path, train_kind: Callable[[str], Trained]
) -> None:
    run, _, result = train_kind(kind)
    trained, ids = export.open_adapter(run.adapter), draw_ids(2, 30)
    parity = export.merge_adapter(trained, run, tmp_path / "merged", dtype="float32")
    assert parity.same == parity.prompts
    merged = logits_of(trained.load_merged(tmp_path / "merged"), ids)
    assert torch.allclose(merged, logits_of(result.model, ids), atol=1e-3)


# ---------------------------------------------------------------- what LoRA begins with


def attached(builtin: Any, tmp_path: Path, **changes: str) -> tuple[Any, TrainConfig]:
    config = settings(**changes)
    device = models.detect_device()
    bare = models.load_base(builtin[0], device, "float32", models.Quantization(config.load_in_4bit))
    return adapters.attach(bare, config, builtin[0], tmp_path / "start"), config


def test_loftq_begins_with_most_of_what_any_adapter_of_its_rank_can_give_back(builtin: Any, tmp_path: Path) -> None:
    from peft.utils.integrations import dequantize_module_weight
    from safetensors.torch import load_file

    whole = load_file(builtin[0].path / "model.safetensors")
    tuned, config = attached(builtin, tmp_path, init_lora_weights="loftq", lora_r="16", lora_alpha="64")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        layer = tuned.get_base_model().get_submodule(name)
        lost = whole[f"{name}.weight"].float() - dequantize_module_weight(layer.get_base_layer()).float()
        left = torch.linalg.norm(lost - layer.get_delta_weight("default"))
        least = torch.linalg.norm(torch.linalg.svdvals(lost)[config.lora_r :])
        assert least <= left <= 1.02 * least < 0.95 * torch.linalg.norm(lost)


@pytest.mark.parametrize("start", adapters.REPLACING)
def test_what_is_taken_out_of_the_base_is_in_the_adapter_at_first(builtin: Any, tmp_path: Path, start: str) -> None:
    tuned, _ = attached(builtin, tmp_path, init_lora_weights=start, load_in_4bit="false")
    ids = draw_ids(1, 30)
    bare = models.load_base(builtin[0], models.detect_device(), "float32", models.Quantization(False))
    assert torch.allclose(logits_of(tuned, ids), logits_of(bare, ids), atol=1e-4)
    with tuned.disable_adapter():
        assert not torch.allclose(logits_of(tuned, ids), logits_of(bare, ids), atol=1)


def test_more_rank_than_a_layer_has_directions_is_refused(builtin: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a layer with a side of 64. Use --lora-r 64 or less"):
        attached(builtin, tmp_path, init_lora_weights="loftq", lora_r="65")


# ---------------------------------------------------------------- virtual tokens


@pytest.fixture(params=["prompt tuning", "prefix tuning"])
def virtual(request: Any, builtin: Any, tmp_path: Path) -> Any:
    """The built-in base in float32 behind virtual tokens that change what it answers."""
    tuned, _ = attached(builtin, tmp_path, **KINDS[request.param])
    return tuned.eval()


def test_rows_of_a_batch_are_answered_as_each_alone_and_as_in_training(virtual: Any, builtin: Any) -> None:
    prompts = [draw_ids(1, length)[0].tolist() for length in (31, 5, 12, 30)]
    options = {"max_new_tokens": 12}
    together = answer_prompts(virtual, builtin[2], prompts, batch_size=4, **options)
    assert together == answer_prompts(virtual, builtin[2], prompts, batch_size=1, **options)
    with virtual.disable_adapter():
        assert answer_prompts(virtual, builtin[2], prompts, batch_size=4, **options) != together
    for prompt, (text, _) in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(12):  # by the forward pass of training, without a cache
            ids.append(int(logits_of(virtual, torch.tensor([ids]))[0, -1].argmax()))
        assert builtin[2].tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip().startswith(text)


def test_losses_are_those_of_the_rows_tokens_alone(virtual: Any) -> None:
    ids = draw_ids(2, 24)
    labels = ids.clone()
    labels[0, :9], labels[1, 17:] = IGNORED, IGNORED
    logits = logits_of(virtual, ids)[:, -24:-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    rows = [pack_sequence(*row) for row in zip(ids.tolist(), labels.tolist(), strict=True)]
    found = score_sequences(virtual, rows, 2)
    assert [found[row] for row in rows] == pytest.approx(losses.tolist(), rel=1e-5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad(), adapters.only_learned(virtual, inputs) as fewer:
        kept = virtual(**{name: value for name, value in fewer.items() if name != "shift_labels"}).logits[0]
    targets = fewer["shift_labels"][0]
    assert float(torch.nn.functional.cross_entropy(kept, targets, reduction="sum")) == pytest.approx(
        float(losses.sum()), rel=1e-5
    )


def test_virtual_tokens_take_of_the_context(virtual: Any, builtin: Any) -> None:
    assert context_length(virtual) == 256 - 20
    with pytest.raises(ConfigError, match=r"200 tokens behind 60 virtual ones, .* --max-length 196"):
        prepare(settings(**{**PROMPT, "num_virtual_tokens": "60"}))


def test_prefix_tuning_is_never_planned_with_recomputed_activations() -> None:
    fits = possible_fits(settings(**PREFIX), models.detect_device(), 200)
    assert fits
    assert not any(fit.checkpointing for fit in fits)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "a 4-bit base, rounded anew, .* Use loftq, or --no-load-in-4bit"),
        ({"init_lora_weights": "olora"}, "a 4-bit base, rounded anew, .* Use loftq, or --no-load-in-4bit"),
        ({"init_lora_weights": "loftq", "load_in_4bit": "false"}, "this base is not rounded"),
        ({"init_lora_weights": "loftq", "use_dora": "true"}, "leave out use_dora"),
        ({**PROMPT, "use_dora": "true"}, "virtual tokens and no LoRA"),
        ({**PREFIX, "activation_checkpointing": "on"}, "--activation-checkpointing off, or PROMPT_TUNING"),
    ],
    ids=str,
)
def test_what_can_not_be_trained_is_refused_with_what_to_use_instead(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(settings(**changes))


def test_a_refused_kind_ends_the_command_with_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "builtin", "--init-lora-weights", "pissa"]) == 2
    said = capsys.readouterr()
    assert "rounded anew" in " ".join((said.out + said.err).split())
    assert "Traceback" not in said.err


def test_virtual_tokens_are_neither_merged_nor_put_into_gguf_nor_taught_preferences(
    tmp_path: Path, finished: Any, train_kind: Callable[[str], Trained]
) -> None:
    run, _, _ = train_kind("prompt tuning")
    trained = export.open_adapter(run.adapter)
    with pytest.raises(ExportError, match="change no weight"):
        export.merge_adapter(trained, run, tmp_path / "merged")
    with pytest.raises(ExportError, match="no place for the virtual tokens"):
        export.export_gguf(trained, run, tmp_path / "gguf")
    for name in (run.path, run.adapter):
        with pytest.raises(RunError, match="preferences are learned by LoRA adapters"):
            find_origin(name, str(tmp_path))
    with pytest.raises(ModelError, match="LoRA and virtual tokens on no base together"):
        open_panel([str(run.path), str(finished[0].path)], str(tmp_path), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_dora_has_no_place_in_gguf(tmp_path: Path, train_kind: Callable[[str], Trained]) -> None:
    run, _, _ = train_kind("DoRA")
    with pytest.raises(ExportError, match="no place for DoRA"):
        export.export_gguf(export.open_adapter(run.adapter), run, tmp_path / "gguf")
