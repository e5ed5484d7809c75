"""The same eight rows give the same gradients, however they are split into micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings

from qlora_tune import train as training
from qlora_tune.prepare import prepare
from qlora_tune.runs import new_run

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def gradients(tmp_path: Path, rows: int, accumulated: int, fast: str) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients that reach the first optimizer step, and the loss that is shown for it."""
    from transformers import TrainerCallback

    data = tmp_path / "rows.jsonl"
    if not data.exists():  # answers of very different lengths: a mean of means would differ
        lines = [json.dumps({"instruction": f"Count to {n}", "output": "one " * (1 + n * n % 37)}) for n in range(8)]
        data.write_text("\n".join(lines))
    config = settings(
        data=[str(data)], runs_dir=str(tmp_path / "runs"), run_name=f"{rows}x{accumulated}-{fast}", max_steps="1",
        per_device_train_batch_size=str(rows), gradient_accumulation_steps=str(accumulated), heldout_share="0",
        dtype="float32", fast=fast, max_grad_norm="1000", lora_dropout="0",
    )  # fmt: skip
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    build = training.build_trainer

    def with_look(*given: Any, **more: Any) -> Any:
        trainer = build(*given, **more)
        trainer.add_callback(Look())
        return trainer

    run = new_run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_trainer", with_look)
        training.train(config, run, prepare(config))
    return found, run.read_metrics()[0]["loss"]


@pytest.mark.parametrize("fast", ["true", "false"])
def test_gradients_and_losses_do_not_depend_on_the_micro_batches(tmp_path: Path, fast: str) -> None:
    (whole, loss), *others = [gradients(tmp_path, *layout, fast) for layout in LAYOUTS]
    assert sum(gradient.abs().sum() > 0 for gradient in whole.values()) > 20
    for other, other_loss in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other.keys() == whole.keys()
        for name, gradient in whole.items():
            difference = (other[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert difference < 1e-5, name
