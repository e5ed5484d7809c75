"""Preference training: what it begins as, what it holds still, what it gains, and that it stops and goes on soundly."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_votes import cast

from qlora_tune.adapters import load_adapter
from qlora_tune.data import load_examples
from qlora_tune.errors import ConfigError, RunError
from qlora_tune.export import open_adapter
from qlora_tune.pair_scores import PairScore, PairScores, score_pairs
from qlora_tune.pair_setup import REFERENCE, find_origin, prepare_preferences
from qlora_tune.prefer import PreferResult, make_settings, prefer
from qlora_tune.prepare import other_examples
from qlora_tune.runs import Run, new_run, read_json
from qlora_tune.turns import Message
from qlora_tune.votes import append_vote


def sample_votes(path: Path, count: int) -> str:
    """Votes that prefer the right answer of rows of sample.jsonl to the right one of another row of their task."""
    examples, _ = load_examples([ROOT / "sample.jsonl"])
    draw = random.Random(1)
    by_task: dict[str | None, list[Any]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    for example in draw.sample(examples, count):
        wrong = [other.answer for other in by_task[example.task] if other.answer != example.answer]
        answers = {"a": example.answer, "base": draw.choice(wrong)}
        append_vote(path, cast("a", prompt=example.messages[:-1], task=example.task, answers=answers))
    return str(path)


@dataclass
class Preferred:
    """A short preference training on the shared run's adapter."""

    run: Run
    before: Run
    config: Any
    setup: Any
    result: PreferResult


def start(before: Run, runs_dir: Path, data: str, **flags: Any) -> Preferred:
    origin = find_origin(before.path, str(before.path.parent))
    config = make_settings(origin, [data], {"runs_dir": str(runs_dir), "score_rows": 0, **flags})
    setup = prepare_preferences(config, origin)
    run = new_run(config)
    return Preferred(run, before, config, setup, prefer(config, run, setup, origin))


@pytest.fixture(scope="session")
def preferred(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Preferred:
    folder = tmp_path_factory.mktemp("preferred")
    data = sample_votes(folder / "votes.jsonl", 120)
    flags = {"max_steps": 6, "heldout_share": 0.2, "eval_steps": 3, "learning_rate": 2e-4, "warmup_ratio": 0}
    return start(finished[0], folder / "runs", data, run_name="liked", **flags)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_first_loss_is_ln_2_because_it_begins_as_its_reference(preferred: Preferred) -> None:
    first = next(entry for entry in preferred.run.read_metrics() if "loss" in entry)
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("ipo", marks=pytest.mark.reliability)])
def test_the_fast_path_trains_as_trl_does(finished: Any, tmp_path: Path, loss_type: str) -> None:
    data = sample_votes(tmp_path / "votes.jsonl", 20)
    origin = find_origin(finished[0].path, str(finished[0].path.parent))
    found = {}
    for path in ("fast", "plain"):
        flags: dict[str, Any] = {"fast": path == "fast", "loss_type": loss_type, "learning_rate": 1e-3}
        flags |= {"max_steps": 3, "eval_steps": 3, "warmup_ratio": 0, "per_device_train_batch_size": 3, "score_rows": 0}
        # Activations recomputed, as the reference's turn must not disturb those of the trained adapter.
        flags |= {"activation_checkpointing": "on" if loss_type == "ipo" else "off", "gradient_accumulation_steps": 2}
        config = make_settings(origin, [data], {"runs_dir": str(tmp_path / "runs"), "run_name": path, **flags})
        setup = prepare_preferences(config, origin)
        setup = replace(setup, trained=replace(setup.trained, precision="float32"))
        run = new_run(config)
        prefer(config, run, setup, origin)
        assert run.read_state()["path"] == path
        found[path] = run
    names = ("loss", "eval_loss", "rewards/margins")
    fast, plain = ([[e.get(n, 0) for n in names] for e in found[path].read_metrics()] for path in ("fast", "plain"))
    assert len(fast) == 4
    assert fast[2][2] != 0  # it has moved
    assert [value for entry in fast for value in entry] == pytest.approx(
        [v for e in plain for v in e], rel=1e-5, abs=1e-5
    )
    norms = ([e["grad_norm"] for e in found[path].read_metrics() if "grad_norm" in e] for path in ("fast", "plain"))
    assert next(norms) == pytest.approx(next(norms), rel=1e-4)


def test_the_reference_is_the_instruction_tuned_adapter_and_stays_as_it_was(preferred: Preferred) -> None:
    assert weights(preferred.run.path / REFERENCE) == weights(preferred.before.adapter)
    assert weights(preferred.run.adapter) != weights(preferred.before.adapter)
    for folder in (preferred.run.checkpoints / "checkpoint-6" / "ref", preferred.run.path / REFERENCE):
        kept, before = (load_file(f / "adapter_model.safetensors") for f in (folder, preferred.before.adapter))
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], before[name]) for name in before)
        assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert not (preferred.run.adapter / "ref").exists()
    assert list(preferred.result.model.peft_config) == ["default"]


def test_the_loss_falls_below_ln_2_and_the_margins_rise(preferred: Preferred) -> None:
    held = [entry for entry in preferred.run.read_metrics() if "eval_loss" in entry]
    assert [entry["step"] for entry in held] == [3, 6]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] < math.log(2)
    assert held[-1]["eval_rewards/margins"] > held[0]["eval_rewards/margins"] > 0
    assert preferred.result.scores
    assert preferred.result.scores.accuracy.mean > 0.6
    assert preferred.result.scores.margin.low > 0


def test_the_figures_of_held_out_pairs_are_those_of_trl(preferred: Preferred) -> None:
    scores = preferred.result.scores
    assert scores
    last = [entry for entry in preferred.run.read_metrics() if "eval_loss" in entry][-1]
    losses = [math.log1p(math.exp(-scores.beta * pair.gain)) for pair in scores.pairs]
    assert sum(losses) / len(losses) == pytest.approx(last["eval_loss"], rel=0.02)
    kept = read_json(preferred.run.path / "preferences.json")
    assert kept["accuracy"] == list(scores.accuracy)
    assert len(kept["pairs"]) == kept["rows"] == len(preferred.setup.heldout)


def test_the_saved_adapter_gives_the_very_likelihoods_that_were_scored(preferred: Preferred) -> None:
    trained = open_adapter(preferred.run.adapter)
    model = load_adapter(trained.load(), preferred.run.path / REFERENCE, trained.base, "ref")
    assert score_pairs(model, preferred.setup.heldout, preferred.config.beta, 32) == preferred.result.scores


def test_pairs_have_the_tokens_of_instruction_tuning(preferred: Preferred) -> None:
    chat = preferred.setup.trained.chat
    for pair, tokens in preferred.setup.train[:30]:
        for text, ids in ((pair.chosen, tokens.chosen_ids), (pair.rejected, tokens.rejected_ids)):
            messages = [*pair.prompt, Message(role="assistant", content=text)]
            sequence = chat.tokenize_example(messages)[-1]
            assert sequence.input_ids == [*tokens.prompt_ids, *ids]
            assert ids[-1] == chat.end_of_turn_id


def test_what_is_too_long_is_left_out_whole_and_said(finished: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "chosen": "a b " * (60 * n), "rejected": "no"} for n in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    origin = find_origin(finished[0].path, "")
    setup = prepare_preferences(make_settings(origin, [str(tmp_path / "rows.jsonl")], {"heldout_share": 0}), origin)
    reasons = [(problem.line, problem.reason) for problem in setup.report.problems]
    assert len(setup.train) + len(reasons) == 3
    assert all("max_length is 256" in reason for _, reason in reasons)
    assert reasons[-1][0] == 3


def test_pairs_are_held_out_of_those_that_fit(finished: Any, tmp_path: Path) -> None:
    long = [{"prompt": f"Say {n}", "chosen": "a b " * 300, "rejected": "no"} for n in range(40)]
    short = [{"prompt": f"{n * 7919} and then?", "chosen": f"{n}", "rejected": "no"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*long, *short])))
    origin = find_origin(finished[0].path, "")
    setup = prepare_preferences(make_settings(origin, [str(tmp_path / "rows.jsonl")], {"heldout_share": 0.2}), origin)
    assert (len(setup.train), len(setup.heldout), setup.report.rejected) == (16, 4, 40)


def test_settings_come_from_the_run_but_for_what_this_stage_changes(finished: Any) -> None:
    run, before, _ = finished
    config = make_settings(find_origin(run.path, ""), ["p.jsonl"], {"beta": "0.5", "max_steps": "7"})
    assert (config.learning_rate, config.num_train_epochs) == (pytest.approx(before.learning_rate / 40), 1)
    assert (config.beta, config.max_steps, config.max_length, config.lora_r) == (
        0.5,
        7,
        before.max_length,
        before.lora_r,
    )
    effective = [c.per_device_train_batch_size * c.gradient_accumulation_steps for c in (before, config)]
    assert effective[0] == effective[1]
    assert [Path(file).name for file in (*config.data, *config.heldout_data)] == [
        "sample.jsonl",
        "sample_heldout.jsonl",
    ]
    with pytest.raises(ConfigError, match=r"loss_type = 'dpo' .*'sigmoid' or 'ipo'"):
        make_settings(find_origin(run.path, ""), ["p.jsonl"], {"loss_type": "dpo"})


def test_a_held_out_row_whose_prompt_is_trained_on_is_no_longer_held_out(finished: Any, tmp_path: Path) -> None:
    before = finished[0]
    voted = before.read_heldout()[:5]
    for example in voted:
        answers = {"a": example.answer, "base": "no such thing"}
        append_vote(tmp_path / "votes.jsonl", cast("a", prompt=example.messages[:-1], answers=answers))
    liked = start(
        before, tmp_path / "runs", str(tmp_path / "votes.jsonl"), heldout_share=0, max_steps=1, run_name="voted"
    )
    assert liked.setup.taken == 5
    assert len(liked.run.read_heldout()) == len(before.read_heldout()) - 5
    path = tmp_path / "other.jsonl"
    rows = [{"messages": list(example.messages)} for example in before.read_heldout()[:8]]
    path.write_text("\n".join(map(json.dumps, rows)))
    kept, report = other_examples(liked.run, [str(path)], liked.setup.trained.chat)
    assert (len(kept), report.rejected) == (3, 5)


def test_an_adapters_folder_will_do_without_its_run(finished: Any, tmp_path: Path) -> None:
    import shutil

    alone = Path(shutil.copytree(finished[0].adapter, tmp_path / "alone"))
    data = sample_votes(tmp_path / "votes.jsonl", 20)
    origin = find_origin(alone, "")
    assert origin.run is None
    flags = {"max_steps": 1, "runs_dir": str(tmp_path / "runs"), "loss_type": "ipo", "learning_rate": 1e-12}
    config = make_settings(origin, [data], flags)
    assert (config.data, config.max_length, config.lora_r) == ([], 256, finished[1].lora_r)
    run = new_run(config)
    result = prefer(config, run, prepare_preferences(config, origin), origin)
    assert (result.status, run.has_adapter, run.read_heldout()) == ("finished", True, [])
    first = next(entry for entry in run.read_metrics() if "loss" in entry)
    assert first["loss"] == pytest.approx(1 / (2 * config.beta) ** 2, rel=1e-4)  # of IPO at a margin of 0
    # Nothing was rounded on the way: TRL would cast what is trained to bfloat16.
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (alone, run.adapter))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)


def test_a_run_that_is_trained_on_preferences_is_no_place_to_begin(preferred: Preferred) -> None:
    with pytest.raises(RunError, match="trained on preferences already"):
        find_origin(preferred.run.path, "")


def test_accuracy_and_margin_count_the_gain_over_the_reference() -> None:
    pairs = [PairScore("a", -10, -2, -9, -4), PairScore("b", -1, -5, -3, -6), PairScore("c", -1, -2, -1, -2)]
    scores = PairScores(0.5, pairs)
    assert [pair.gain for pair in pairs] == [3, -1, 0]
    assert scores.accuracy.mean == pytest.approx(1 / 3)
    assert scores.margin.mean == pytest.approx(0.5 * 2 / 3)
    assert (scores.likelier_before.mean, scores.likelier_after.mean) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_tune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.reliability
@pytest.mark.parametrize(("stage", "more"), [("prefer", ["--score-rows", "0"]), ("reward", [])])
def test_a_stopped_run_goes_on_to_the_same_adapter(stage: str, more: list[str], finished: Any, tmp_path: Path) -> None:
    data = sample_votes(tmp_path / "votes.jsonl", 120)
    flags = ["--max-steps", "12", "--eval-steps", "4", "--runs-dir", str(tmp_path / "runs"), *more]
    whole = command(stage, str(finished[0].path), "--data", data, *flags, "--run-name", "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    assert "chosen answer has the higher reward" in output
    cut = Run(tmp_path / "runs" / "cut")
    process = command(stage, str(finished[0].path), "--data", data, *flags, "--run-name", "cut")
    deadline = time.monotonic() + 240
    while not (cut.path.exists() and any(entry["step"] >= 2 for entry in cut.read_metrics())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, cut.read_state()["status"]) == (130, "stopped"), output
    assert f"python -m qlora_tune {stage} --resume {cut.path}" in output
    refused = command("train", "--resume", str(cut.path))
    assert f"{stage} --resume" in refused.communicate(timeout=60)[0]
    resumed = command(stage, "--resume", str(cut.path))
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert weights(cut.adapter) == weights(tmp_path / "runs" / "whole" / "adapter")
