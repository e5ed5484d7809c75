"""Numbers that are not finite end a run within a step, wherever they arise, and are in no file that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import short

from qlora_tune import train as training
from qlora_tune.errors import RunError
from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, new_run, step_of

AT = 2  # the step after which something goes wrong; a checkpoint is whole by then where they are written at each


def of(trainer: Any) -> torch.nn.Parameter:
    """A trained weight."""
    return next(p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.requires_grad)


def spoil_weight(trainer: Any) -> None:
    of(trainer).data[0, 0] = float("nan")


def spoil_gradient(trainer: Any) -> None:
    of(trainer).register_hook(lambda gradient: gradient * float("inf"))


def spoil_optimizer(trainer: Any) -> None:
    trainer.optimizer.state[of(trainer)]["exp_avg_sq"][0, 0] = float("inf")


def spoil_input(trainer: Any) -> None:
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, given, found: found * float("nan"))


# What goes wrong, how often checkpoints are written, whether rows are held out, what is said, and at which step
CASES: dict[str, tuple[Callable[[Any], None], str, str, str, int]] = {
    "loss": (spoil_input, "1", "0", "loss", AT + 1),
    "gradient": (spoil_gradient, "1", "0", "gradient", AT + 1),
    "weight, no checkpoint at that step": (spoil_weight, "3", "0", "loss", AT + 1),
    "weight, at a checkpoint": (spoil_weight, "1", "0", "lora_B", AT),
    "weight, at an evaluation": (spoil_weight, "1", "0.2", "eval_loss", AT),
    "optimizer": (spoil_optimizer, "1", "0", "exp_avg_sq of the optimizer", AT),
}


def non_finite(folder: Path) -> list[str]:
    """Tensors in files that hold a number that is not finite."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.name == "optimizer.pt":
            state = torch.load(path, weights_only=True)["state"]
            tensors = {f"{at}.{key}": value for at, values in state.items() for key, value in values.items()}
        else:
            continue
        found += [f"{path}: {name}" for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return found


@pytest.mark.parametrize("fast", ["true", pytest.param("false", marks=pytest.mark.reliability)])
@pytest.mark.parametrize("name", CASES)
def test_a_number_that_is_not_finite_ends_the_run_within_a_step_and_is_in_no_file(
    tmp_path: Path, name: str, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, every, heldout, named, step = CASES[name]
    config = short(tmp_path, max_steps="5", eval_steps=every, heldout_share=heldout, fast=fast)
    run, made = new_run(config), {}
    build = training.build_trainer

    def keep(*given: Any, **more: Any) -> Any:
        made["trainer"] = build(*given, **more)
        return made["trainer"]

    def look(entry: dict[str, Any]) -> None:
        if entry["step"] == AT and "loss" in entry:
            spoil(made["trainer"])

    monkeypatch.setattr(training, "build_trainer", keep)
    with pytest.raises(RunError, match=named.replace(".", r"\.")):
        training.train(config, run, prepare(config), on_metrics=look)
    assert run.read_state()["status"] == "failed"
    assert max(entry["step"] for entry in run.read_metrics()) == step
    assert non_finite(run.path) == []
    assert not run.has_adapter
    check_resumes(run, [AT - 1, AT] if step > AT and every == "1" else [AT - 1] if every == "1" else [])


def check_resumes(run: Run, sealed: list[int]) -> None:
    """The checkpoints from before are whole, and training goes on from the last one."""
    whole = sorted(step_of(path.parent) for path in run.checkpoints.glob("*/manifest.json"))
    assert whole == sealed
    config = run.read_config()
    result = training.train(config, run, prepare(config), resume=True)
    assert result.status == "finished"
    assert non_finite(run.path) == []
    assert [entry["step"] for entry in run.read_metrics() if "loss" in entry] == [1, 2, 3, 4, 5]
