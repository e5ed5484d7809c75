"""What TRL is told for the plain way and for the fast path, and that both train alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune import train as training
from qlora_tune.prepare import prepare
from qlora_tune.runs import new_run
from qlora_tune.trainer import to_sft_config

ROWS = [{"instruction": f"Say {n}", "output": f"I say {n}. " * (1 + n % 7)} for n in range(40)]


def few(tmp_path: Path, **changes: Any) -> Any:
    """Settings for 40 rows of several lengths, of which eight are held out: four steps are one epoch."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    common = {"data": [str(rows)], "runs_dir": str(tmp_path / "runs"), "score_rows": "0", "heldout_share": "0.2"}
    batch = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "2", "max_steps": "4"}
    return settings(**common, **batch, **changes)


def test_the_fast_path_gets_the_whole_effective_batch_at_once(tmp_path: Path) -> None:
    config = few(tmp_path, neftune_noise_alpha="5")
    run, setup = new_run(config), prepare(config)
    plain = to_sft_config(config, run, setup)
    flat = to_sft_config(config, run, setup, flat=True)
    assert (plain.per_device_train_batch_size, plain.gradient_accumulation_steps) == (4, 2)
    assert (flat.per_device_train_batch_size, flat.gradient_accumulation_steps) == (8, 1)
    assert (plain.neftune_noise_alpha, flat.neftune_noise_alpha) == (5, None)  # the fast path makes its own noise
    same = ("learning_rate", "max_steps", "warmup_steps", "seed", "optim", "eval_steps", "save_steps", "max_grad_norm")
    assert all(getattr(plain, name) == getattr(flat, name) for name in same)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 2e-3)])
def test_the_fast_path_trains_as_the_plain_way_does_and_counts_no_padding(
    tmp_path: Path, dtype: str, near: float
) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for fast in ("true", "false"):
        config = few(tmp_path, run_name=fast, fast=fast, dtype=dtype, eval_steps="4", learning_rate="1e-4")
        run = new_run(config)
        setup = training.train(config, run, prepare(config)).setup
        found[fast] = run.read_metrics()
        assert run.read_state()["path"] == ("fast" if fast == "true" else "plain")
        *_, last = (entry for entry in found[fast] if "loss" in entry)
        lengths = [len(sequence.input_ids) for sequence in setup.data.train]
        assert len(lengths) == 32
        assert max(lengths) > 2 * min(lengths)
        assert last["tokens_per_s"] * last["elapsed_s"] == pytest.approx(sum(lengths), rel=0.02)
    for name, tolerance in (("loss", near), ("eval_loss", near), ("learning_rate", 0), ("grad_norm", 5 * near)):
        one, other = ({e["step"]: e[name] for e in found[fast] if name in e} for fast in ("true", "false"))
        assert len(one) == (1 if name == "eval_loss" else 4)
        assert one == pytest.approx(other, rel=tolerance), name
