"""Training: what TRL is told, what is learned, and runs that stop, go on and fail soundly."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import settings

from qlora_tune import adapters, lifecycle
from qlora_tune import train as training
from qlora_tune.adapters import attach_adapter, only_learned
from qlora_tune.data import load_examples
from qlora_tune.errors import DataError, MemoryLimitError, RunError
from qlora_tune.model import load_base
from qlora_tune.prepare import other_examples, prepare, quantization_of
from qlora_tune.runs import Run, keep_whole_checkpoints, new_run, step_of


def rows_file(path: Path, count: int = 40) -> str:
    lines = [json.dumps({"instruction": f"Say {n}", "output": f"I say {n}.", "task": "say"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


def short(tmp_path: Path, **changes: Any) -> Any:
    return settings(
        data=[rows_file(tmp_path / "rows.jsonl")],
        runs_dir=str(tmp_path / "runs"),
        per_device_train_batch_size="4",
        **{"max_steps": "4", "score_rows": "0", **changes},
    )


def fit(config: Any) -> tuple[Run, Any]:
    run = new_run(config)
    return run, training.train(config, run, prepare(config))


@pytest.mark.parametrize("fast", ["true", "false"])
def test_adapter_weights_are_float32_and_all_of_them_move(tmp_path: Path, fast: str) -> None:
    # The last weights, not the best: after the first step lora_A has not moved yet, as lora_B was zero.
    config = short(tmp_path, learning_rate="2e-5", warmup_ratio="0", load_best_model_at_end="false", fast=fast)
    setup = prepare(config)
    fresh = attach_adapter(
        load_base(setup.base, setup.device, setup.precision, quantization_of(config)),
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=["all-linear"],
        seed=config.seed,
    )
    before = {name: p.detach().clone() for name, p in fresh.named_parameters() if "lora_A" in name}
    during: list[set[torch.dtype]] = []
    run = new_run(config)
    holder: dict[str, Any] = {}
    keep = adapters.keep_adapter_in_fp32

    def watch(model: Any) -> None:
        keep(model)
        holder["model"] = model

    def look(entry: dict[str, Any]) -> None:
        during.append({p.dtype for p in holder["model"].parameters() if p.requires_grad})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "keep_adapter_in_fp32", watch)
        result = training.train(config, run, setup, on_metrics=look)
    assert during
    assert all(dtypes == {torch.float32} for dtypes in during)
    after = {name: p for name, p in result.model.named_parameters() if "lora_A" in name}
    # TRL rounds the first values to bfloat16; what moves is counted from there.
    moved = [(before[n].bfloat16().float() != p).float().mean().item() for n, p in after.items()]
    assert len(moved) == 56
    assert min(moved) > 0.9


def test_the_loss_falls_and_every_step_is_recorded(finished: Any) -> None:
    run, config, _ = finished
    metrics = run.read_metrics()
    steps = [entry for entry in metrics if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, config.max_steps + 1))
    assert sum(e["loss"] for e in steps[-5:]) < 0.8 * sum(e["loss"] for e in steps[:5])
    for key in ("learning_rate", "grad_norm", "tokens_per_s", "memory_bytes", "elapsed_s", "left_s", "total_steps"):
        assert all(math.isfinite(entry[key]) for entry in steps), key
    assert [entry["step"] for entry in metrics if "eval_loss" in entry] == [6, 12, 18, 24]


def test_rows_in_are_rows_kept_and_rejected_and_all_end_of_turns_are_learned(finished: Any) -> None:
    run, _, result = finished
    data, summary = result.setup.data, json.loads((run.path / "data.json").read_text())
    assert summary["rows_in"] == summary["rows_kept"] + summary["rows_rejected"]
    assert summary["rows_kept"] == len({s.source for s in data.train}) + len(data.heldout_examples)
    assert all(result.setup.chat.end_of_turn_id in s.labels for s in data.train + data.heldout)


def test_held_out_loss_is_the_mean_over_learned_tokens(finished: Any) -> None:
    run, _, result = finished
    model, heldout = result.model.eval(), result.setup.data.heldout
    total, tokens = 0.0, 0
    for sequence in heldout:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, result.setup.precision == "bfloat16"):
            logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += int((labels[:, 1:] != -100).sum())
    best = min(entry["eval_loss"] for entry in run.read_metrics() if "eval_loss" in entry)
    assert run.read_state()["eval_loss"] == best
    assert total / tokens == pytest.approx(best, rel=0.01)


def test_scoring_only_learned_positions_changes_neither_loss_nor_gradients(tmp_path: Path) -> None:
    config = short(tmp_path, dtype="float32")
    setup = prepare(config)
    model = attach_adapter(
        load_base(setup.base, setup.device, "float32", quantization_of(config)),
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["all-linear"],
        seed=1,
    )
    longest = max(len(sequence.input_ids) for sequence in setup.data.train[:4])
    pad = lambda ids, fill: ids + [fill] * (longest - len(ids))  # noqa: E731
    inputs = {
        "input_ids": torch.tensor([pad(s.input_ids, 0) for s in setup.data.train[:4]]),
        "labels": torch.tensor([pad(s.labels, -100) for s in setup.data.train[:4]]),
        "attention_mask": torch.tensor([pad([1] * len(s.input_ids), 0) for s in setup.data.train[:4]]),
    }

    def backward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected_loss, expected = backward(whole[:, :-1], inputs["labels"][:, 1:])
    with only_learned(model, inputs) as fewer:
        targets = fewer.pop("shift_labels")
        part = model(**fewer).logits
        loss, found = backward(part, targets)
    assert part.shape[1] == int((inputs["labels"][:, 1:] != -100).sum()) < whole[..., 0].numel()
    torch.testing.assert_close(loss, expected_loss)
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert model(**inputs).logits.shape == whole.shape  # the hook is gone


def test_other_rows_are_scored_but_for_those_trained_on_or_too_long(tmp_path: Path) -> None:
    config = short(tmp_path, max_steps="1")
    run, result = fit(config)
    chat = result.setup.chat
    heldout, *_ = result.setup.data.heldout_examples
    prompts = {example.messages[0]["content"] for example in result.setup.data.heldout_examples}
    rows = [json.loads(line) for line in Path(config.data[0]).read_text().splitlines()]
    trained_on = next(row for row in rows if row["instruction"] not in prompts)
    asked = [
        {"instruction": "Say a thing that no row says.", "output": "A thing."},
        {"instruction": heldout.messages[0]["content"], "output": heldout.messages[-1]["content"]},
        {"instruction": "Say this. " * 300, "output": "No."},
        trained_on | {"output": "Another answer."},
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in asked))
    examples, report = other_examples(run, [str(other)], chat)
    assert [example.messages[-1]["content"] for example in examples] == ["A thing.", heldout.messages[-1]["content"]]
    assert report.rows_in == len(asked) == len(examples) + report.rejected
    assert any("max_length" in problem.reason for problem in report.problems)
    with pytest.raises(DataError, match="given twice"):
        other_examples(run, [str(other)] * 2, chat)
    rows_file(Path(config.data[0]), 39)
    with pytest.raises(DataError, match="gone or have changed"):
        other_examples(run, [str(other)], chat)


def test_the_adapter_of_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = short(tmp_path, max_steps="6", eval_steps="1", learning_rate="0.05", warmup_ratio="0", heldout_share="0.3")
    run, _ = fit(config)
    losses = {e["step"]: e["eval_loss"] for e in run.read_metrics() if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best != 6, "a rate this high must end worse than it was at its best"
    kept = load_file(run.adapter / "adapter_model.safetensors")
    expected = load_file(run.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name].float(), expected[name].float()) for name in expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"neftune_noise_alpha": "5", "lora_dropout": "0.1"},
        {"lora_target_modules": "q_proj,v_proj", "gradient_accumulation_steps": "2", "weight_decay": "0.01"},
        {"activation_checkpointing": "on", "lr_scheduler_type": "constant_with_warmup"},
        {"load_in_4bit": False, "dtype": "float32"},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"fast": "false", "neftune_noise_alpha": "5", "lora_dropout": "0.1", "activation_checkpointing": "on"},
        {"fast": "false", "use_dora": True},
    ],
)
def test_every_option_trains_and_its_adapter_loads_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    from qlora_tune.export import open_adapter

    run, result = fit(short(tmp_path, max_steps="2", **changes))
    losses = [entry["loss"] for entry in run.read_metrics() if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    ids = torch.tensor([result.setup.data.train[0].input_ids])
    again = open_adapter(run.adapter).load()
    result.model.eval()
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids).logits, result.model(ids).logits)


def test_early_stopping_ends_a_run_that_gets_worse(tmp_path: Path) -> None:
    config = short(
        tmp_path, max_steps="30", eval_steps="1", early_stopping_patience="2", learning_rate="0.05", warmup_ratio="0"
    )
    run, result = fit(config)
    assert result.status == "finished"
    assert run.read_state()["steps"] < 30


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    config = short(tmp_path, max_steps="8", eval_steps="8", heldout_share="0")
    run = new_run(config)
    setup = prepare(config)
    attach = adapters.attach

    def poisoned(*given: Any) -> Any:
        adapted = attach(*given)
        torch.nn.init.constant_(next(p for n, p in adapted.named_parameters() if "lora_A" in n), float("nan"))
        return adapted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "attach", poisoned)
        with pytest.raises(RunError, match="not a finite number at step 1"):
            training.train(config, run, setup)
    assert run.read_state()["status"] == "failed"
    assert not list(run.path.rglob("adapter_model.safetensors"))


def test_the_first_step_of_a_short_run_learns(tmp_path: Path) -> None:
    run, _ = fit(short(tmp_path, max_steps="1"))
    assert run.read_metrics()[0]["learning_rate"] == run.read_config().learning_rate


def test_a_full_device_says_what_to_change(tmp_path: Path) -> None:
    config = short(tmp_path)
    run = new_run(config)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_trainer", full)
        with pytest.raises(MemoryLimitError, match="--per-device-train-batch-size 1 --gradient-accumulation-steps 4"):
            training.train(config, run, prepare(config))
    assert run.read_state()["status"] == "failed"


PLAIN = pytest.param({"lora_dropout": "0.1", "fast": "false"}, marks=pytest.mark.reliability)


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=str)
def test_a_run_that_was_terminated_and_resumed_ends_with_the_same_losses(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    common = {"max_steps": "16", "eval_steps": "4", "neftune_noise_alpha": "5", **changes}
    whole, _ = fit(short(tmp_path, run_name="whole", **common))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    command = [sys.executable, "-m", "qlora_tune", "train"]
    more = ["--preset=builtin", "--per-device-train-batch-size=4", "--score-rows=0", "--run-name=cut"]
    place = [str(tmp_path / "rows.jsonl"), f"--runs-dir={tmp_path / 'runs'}"]
    cut = Run(tmp_path / "runs" / "cut")
    process = subprocess.Popen([*command, *place, *flags, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_step(cut, 5, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # people press twice; the checkpoint must not be lost for it
    _, complaints = process.communicate(timeout=120)
    assert (process.returncode, complaints) == (130, b"")
    assert cut.read_state()["status"] == "stopped"
    stopped_at = max(entry["step"] for entry in cut.read_metrics())
    assert 5 <= stopped_at < 16
    assert step_of(keep_whole_checkpoints(cut)[-1]) == stopped_at

    moved = cut.path.rename(tmp_path / "moved")
    cut = Run(moved)
    done = subprocess.run([*command, "--resume", str(moved)], capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"going on after step {stopped_at}".encode() in done.stdout
    for name in ("loss", "eval_loss"):
        left_alone = {e["step"]: e[name] for e in whole.read_metrics() if name in e}
        resumed = {e["step"]: e[name] for e in cut.read_metrics() if name in e}
        assert resumed == pytest.approx(left_alone, abs=1e-4)
        assert len(resumed) == (16 if name == "loss" else 4)
    ends = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, cut)]
    assert ends[0] == ends[1]


def test_the_best_checkpoint_is_looked_for_where_the_run_is_now(finished: Any) -> None:
    from transformers import TrainerControl, TrainerState

    run, _, result = finished
    state = TrainerState(best_model_checkpoint="/somewhere/else/checkpoints/checkpoint-12")
    recorder = lifecycle.recorder(run, result.setup.device, lambda entry: None, lifecycle.Stop(), has_heldout=True)
    args = SimpleNamespace(optim="adamw_torch", save_total_limit=2)
    recorder.on_train_begin(args, state, TrainerControl(), model=result.model)
    assert state.best_model_checkpoint == str(run.checkpoints / "checkpoint-12")


def wait_for_step(run: Run, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not any(entry["step"] >= step for entry in run.read_metrics()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    config = short(tmp_path, max_steps="2")
    run, _ = fit(config)
    with pytest.raises(RunError, match="this run is finished"):
        training.train(config, run, prepare(config), resume=True)
    run.update_state(status="stopped")
    edited = config.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(RunError, match=r"its learning_rate \(0.002, now 0.5\) have changed"):
        training.train(edited, run, prepare(edited), resume=True)
    Path(config.data[0]).write_text('{"instruction": "new", "output": "rows"}\n' * 9)
    with pytest.raises(RunError, match="data files have changed"):
        training.train(config, run, prepare(config), resume=True)


def test_all_rows_too_long_is_an_error_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "x " * 500, "output": "y"}) + "\n")
    with pytest.raises(DataError, match="tokens long, max_length is 256"):
        prepare(settings(data=[str(path)]))


def test_held_out_files_replace_the_split_and_leaks_are_named(tmp_path: Path) -> None:
    train_rows, heldout_rows = tmp_path / "t.jsonl", tmp_path / "h.jsonl"
    rows_file(train_rows, 10)
    rows_file(heldout_rows, 14)
    setup = prepare(settings(data=[str(train_rows)], heldout_data=[str(heldout_rows)]))
    assert len(setup.data.train) == 10
    assert [example.source for example in setup.data.heldout_examples] == [f"h.jsonl:{n}" for n in range(11, 15)]
    assert (setup.data.report.rows_in, setup.data.report.kept, setup.data.report.rejected) == (24, 14, 10)


@pytest.mark.parametrize(
    "name",
    ["alpaca/alpaca_en_demo.json", "sharegpt/dummy_conversation.json", "messages/toy_chat_fine_tuning.jsonl"],
)
def test_real_files_train_and_their_rows_add_up(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / name
    config = settings(
        data=[str(path)], runs_dir=str(tmp_path), max_steps="10", score_rows="0", per_device_train_batch_size="2",
        heldout_share="0.02", eval_steps="10",
    )  # fmt: skip
    run, result = fit(config)
    summary = json.loads((run.path / "data.json").read_text())
    problems = [json.loads(line) for line in (run.path / "problems.jsonl").read_text().splitlines()]
    assert summary["rows_in"] == load_examples([path])[1].rows_in == summary["rows_kept"] + summary["rows_rejected"]
    assert summary["rows_rejected"] == sum(problem["action"] == "rejected" for problem in problems)
    assert summary["rows_kept"] == len({s.source for s in result.setup.data.train + result.setup.data.heldout})
    assert len([e for e in run.read_metrics() if "loss" in e]) == 10


def test_bfloat16_is_used_only_where_the_processor_has_it() -> None:
    from qlora_tune.model import detect_device

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    device = detect_device()
    if device.kind == "cpu" and flags:
        expected = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
        assert device.precision == expected
    assert os.environ["GOMP_SPINCOUNT"] == "5000"
