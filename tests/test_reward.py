"""Reward models: what they begin as, where the reward is read, that it comes back to the last bit, and what uses it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_prefer import sample_votes
from test_votes import cast

from qlora_tune.adapters import REWARD_HEAD
from qlora_tune.answer_files import Answers, Question
from qlora_tune.chat import load_chat
from qlora_tune.cli import main
from qlora_tune.data import load_examples
from qlora_tune.errors import ModelError
from qlora_tune.export import open_adapter
from qlora_tune.pair_setup import prepare_preferences
from qlora_tune.pair_trainer import CENTER, build_reward_trainer
from qlora_tune.reward import (
    PairReward,
    RewardResult,
    RewardScores,
    plan_reward,
    score_pair_rewards,
    train_reward_model,
)
from qlora_tune.reward_model import (
    RewardModel,
    agree_with_votes,
    begin_reward_model,
    compare_means,
    load_reward_model,
    open_reward_model,
    score_answers,
)
from qlora_tune.runs import Run, latest_run, new_run, read_json
from qlora_tune.selection import NO_SCORE, select_examples
from qlora_tune.turns import Message
from qlora_tune.votes import key_prompt


@dataclass
class Rewarded:
    """A short training of a reward model on the shared run's adapter."""

    run: Run
    before: Run
    setup: Any
    config: Any
    result: RewardResult


@pytest.fixture(scope="session")
def rewarded(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Rewarded:
    folder, before = tmp_path_factory.mktemp("rewarded"), finished[0]
    flags = {"max_steps": 6, "heldout_share": 0.2, "eval_steps": 3, "runs_dir": str(before.path.parent)}
    flags |= {"run_name": "judge", "per_device_eval_batch_size": 8, "load_best_model_at_end": False}
    origin, config = plan_reward(before.path, [sample_votes(folder / "votes.jsonl", 120)], flags)
    setup = prepare_preferences(config, origin)
    run = new_run(config)
    return Rewarded(run, before, setup, config, train_reward_model(config, run, setup, origin))


@pytest.fixture(scope="module")
def judge(rewarded: Rewarded) -> RewardModel:
    return load_reward_model(open_reward_model(rewarded.run.path, ""))


def whole(setup: Any) -> list[list[int]]:
    """Both conversations of the held-out pairs as tokens."""
    pairs = [tokens for _, tokens in setup.heldout]
    return [pair.prompt_ids + answer for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]


def test_it_begins_as_the_instruction_tuned_adapter_with_a_head_that_is_not_quantized(rewarded: Rewarded) -> None:
    model = begin_reward_model(rewarded.setup.trained, rewarded.before.adapter, rewarded.config)
    tuned = load_file(rewarded.before.adapter / "adapter_model.safetensors")
    found = {name.replace(".default", ""): weight for name, weight in model.named_parameters() if "lora_" in name}
    assert found.keys() == tuned.keys()
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.score.modules_to_save.default.weight"}
    head = model.get_parameter(trained.pop())
    assert (head.dtype, tuple(head.shape)) == (torch.float32, (1, 192))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"


def test_head_and_adapter_are_trained_and_saved_in_one_safetensors_file(rewarded: Rewarded) -> None:
    saved = load_file(rewarded.run.adapter / "adapter_model.safetensors")
    begun = load_file(rewarded.run.path / "reference" / "adapter_model.safetensors")
    fresh = begin_reward_model(rewarded.setup.trained, rewarded.before.adapter, rewarded.config)
    assert saved.keys() - begun.keys() == {REWARD_HEAD}
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert not torch.equal(saved[REWARD_HEAD], fresh.get_base_model().score.weight)
    assert all(not torch.equal(saved[name], begun[name]) for name in begun)


def test_the_figures_of_held_out_pairs_are_those_of_trl(rewarded: Rewarded) -> None:
    scores = rewarded.result.scores
    assert scores
    last = [entry for entry in rewarded.run.read_metrics() if "eval_loss" in entry][-1]
    losses = [math.log1p(math.exp(p.rejected - p.chosen)) + CENTER * (p.chosen + p.rejected) ** 2 for p in scores.pairs]
    assert last["step"] == 6
    assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=0.02)
    assert last["eval_accuracy"] == pytest.approx(scores.accuracy.mean, abs=0.1)
    kept = read_json(rewarded.run.path / "rewards.json")
    assert kept["accuracy"] == list(scores.accuracy)
    assert len(kept["pairs"]) == kept["rows"] == len(rewarded.setup.heldout)


def test_loaded_again_it_gives_the_same_rewards_to_the_last_bit(rewarded: Rewarded, judge: RewardModel) -> None:
    assert score_pair_rewards(judge, rewarded.setup.heldout, 8) == rewarded.result.scores


def test_padding_and_neighbours_change_no_reward(rewarded: Rewarded) -> None:
    exact = replace(open_reward_model(rewarded.run.path, ""), precision="float32")  # nothing is rounded
    judge, sequences = load_reward_model(exact), whole(rewarded.setup)[:12]
    assert len({len(sequence) for sequence in sequences}) > 4
    together = judge.score_tokens(sequences, 12)
    alone = judge.score_tokens(sequences, 1)
    assert together == pytest.approx(alone, abs=2e-4)
    assert max(alone.values()) - min(alone.values()) > 0.02


def test_training_reads_the_reward_at_the_end_of_turn_even_where_that_pads(rewarded: Rewarded) -> None:
    setup, trained = rewarded.setup, rewarded.setup.trained
    tokenizer = open_adapter(rewarded.before.adapter).tokenizer
    tokenizer.pad_token = trained.chat.end_of_turn
    model = begin_reward_model(trained, rewarded.before.adapter, rewarded.config)
    pairs = [tokens for _, tokens in setup.heldout][:6]
    trainer = build_reward_trainer(
        model, rewarded.config, rewarded.run, trained.device, trained.precision, tokenizer, pairs, [], plain=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        found = model.eval()(**batch).logits[:, 0].tolist()
    head = model.get_base_model().score.weight
    sequences = [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    ]
    assert {sequence[-1] for sequence in sequences} == {trained.chat.end_of_turn_id}
    expected = RewardModel(model, "default", head.detach(), trained.chat, None).score_tokens(sequences, 12)
    assert found == pytest.approx([expected[tuple(sequence)] for sequence in sequences], abs=0.05)


def test_one_base_answers_and_scores(rewarded: Rewarded, judge: RewardModel) -> None:
    opened = open_reward_model(rewarded.run.path, "")
    model = load_chat(rewarded.before.adapter, judge=opened)
    assert model.judge
    assert model.judge.model is model.model
    asked = [Message(role="user", content="What is the capital of Kenya?")]
    first = "".join(model.reply("tuned", asked, max_new_tokens=12))
    sequences = whole(rewarded.setup)
    assert model.judge.score_tokens(sequences, 8) == judge.score_tokens(sequences, 8)
    assert "".join(model.reply("tuned", asked, max_new_tokens=12)) == first


def test_the_best_of_several_answers_is_the_one_of_the_highest_reward(rewarded: Rewarded, judge: RewardModel) -> None:
    model = load_chat(rewarded.before.adapter, judge=open_reward_model(rewarded.run.path, ""))
    asked = [Message(role="user", content="Tell me about the lion.")]
    torch.manual_seed(3)
    drawn = model.draw_best(6, True, asked, max_new_tokens=12, temperature=1.5, top_p=1.0)
    known = [reward for reward, _ in drawn if reward is not None]
    assert len(drawn) == 6
    assert len(set(known)) > 1
    assert known == sorted(known, reverse=True)
    again = judge.score([([*asked, Message(role="assistant", content=drawn[0][1])], ())])
    assert again[0] == pytest.approx(known[0], abs=0.05)


def test_what_cannot_be_encoded_or_is_too_long_has_no_reward(judge: RewardModel) -> None:
    asked = Message(role="user", content="Say something.")
    answers = ["yes", "", "word " * 400]
    rewards = judge.score([([asked, Message(role="assistant", content=text)], ()) for text in answers])
    assert [reward is None for reward in rewards] == [False, True, True]


def test_answerers_are_compared_on_rows_where_all_have_a_reward() -> None:
    means = compare_means([{"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 2.0}, {"a": 9.0, "b": None}])
    assert means["a"] == (0.5, (0, 0, 0))
    assert means["b"][0] == 2.0
    assert means["b"][1].mean == 1.5
    assert compare_means([]) == {}


def test_each_answer_gets_its_own_reward_and_votes_on_seen_prompts_do_not_count(
    rewarded: Rewarded, judge: RewardModel
) -> None:
    pairs = [pair for pair, _ in rewarded.setup.heldout]
    rows = [Answers(Question(p.prompt, p.tools, None, None, p.source), {"a": p.chosen, "b": p.rejected}) for p in pairs]
    found = score_answers(judge, rows, 8)
    expected = [(p.chosen, p.rejected) for p in rewarded.result.scores.pairs]  # type: ignore[union-attr]
    assert [(row["a"], row["b"]) for row in found] == expected
    votes = [cast("a", prompt=p.prompt, answers={"a": p.chosen, "base": p.rejected}) for p in pairs]
    ties = [cast("tie", prompt=p.prompt, answers={"a": p.chosen, "base": p.rejected}) for p in pairs]
    assert agree_with_votes(judge, [*votes, *ties], 8) == [chosen > rejected for chosen, rejected in expected]
    seen = replace(judge, seen=frozenset(key_prompt(p.prompt, p.tools) for p in pairs[1:]))
    assert len(agree_with_votes(seen, votes, 8)) == sum(p.prompt == pairs[0].prompt for p in pairs)
    trained_on = [pair for pair, _ in rewarded.setup.train]
    assert judge.seen == {key_prompt(p.prompt, p.tools) for p in trained_on}


def test_accuracy_stands_beside_that_of_the_longer_answer() -> None:
    pairs = [PairReward("a", 1, 0, 3, 5), PairReward("b", 2, 1, 4, 4), PairReward("c", 0, 1, 9, 2)]
    scores = RewardScores(pairs)
    assert scores.accuracy.mean == pytest.approx(2 / 3)
    assert scores.longer.mean == pytest.approx(1.5 / 3)
    assert scores.gain.mean == pytest.approx(0.5 / 3)
    assert scores.margin.mean == pytest.approx(1 / 3)


def test_a_bare_base_will_do(tmp_path: Path) -> None:
    flags = {"max_steps": 1, "heldout_share": 0, "runs_dir": str(tmp_path), "run_name": "bare"}
    origin, config = plan_reward(Path("builtin"), [sample_votes(tmp_path / "votes.jsonl", 20)], flags)
    assert origin is None
    run = new_run(config)
    result = train_reward_model(config, run, prepare_preferences(config, None), None)
    assert (result.status, result.scores, run.stage) == ("finished", None, "reward")
    assert load_reward_model(open_reward_model(run.path, "")).score(
        [([Message(role="user", content="Hello"), Message(role="assistant", content="Hi")], ())]
    )


@pytest.mark.parametrize("words", ["chat {}", "evaluate {}", "export {}", "compare {} base", "reward {} --data x"])
def test_every_command_says_what_a_reward_model_is(
    rewarded: Rewarded, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.format(rewarded.run.path).split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a reward model, which scores answers" in said or "trained on preferences already" in said


def test_an_adapter_that_answers_is_no_reward_model(rewarded: Rewarded) -> None:
    with pytest.raises(ModelError, match="is no reward model"):
        open_reward_model(rewarded.before.path, "")
    assert rewarded.run.has_adapter
    assert latest_run(rewarded.run.path.parent).name != rewarded.run.name


@pytest.mark.parametrize(
    "words", ["chat {} --best-of 4", "chat {} --reward {}", "chat {} --best-of 2 --reward {} --temperature 0"]
)
def test_best_of_wants_a_reward_model_and_a_temperature(
    words: str, rewarded: Rewarded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.replace("{}", str(rewarded.run.path)).split()) == 2
    assert "--best-of N draws answers" in " ".join(capsys.readouterr().err.split())


def test_rows_of_the_highest_rewards_are_selected() -> None:
    examples, _ = load_examples([ROOT / "sample.jsonl"])
    selection = select_examples(examples[:4], "reward", 2, [0.5, 3.0, None, 2.0], per_task=False)
    assert selection.kept == (1, 3)
    assert [left.reason for left in selection.left_out if left.index == 2] == [NO_SCORE]


def test_select_and_compare_show_rewards(
    rewarded: Rewarded, judge: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Name {n} things.", "completion": f"{n} things"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    best, runs_dir = tmp_path / "best.jsonl", str(rewarded.run.path.parent)
    select = ["select", str(tmp_path / "rows.jsonl"), "--by", "reward", "--rows", "2", "--output", str(best)]
    assert main([*select, "--reward", str(rewarded.run.path)]) == 0
    kept = [json.loads(line)["reward"] for line in best.read_text().splitlines()]
    others = [json.loads(line)["reward"] for line in (tmp_path / "best_left_out.jsonl").read_text().splitlines()]
    assert min(kept) >= max(others)
    answers = [
        {"prompt": row["prompt"], "answer": f"{row['completion']} {who}", "answerer": who}
        for row in rows
        for who in "ab"
    ]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, answers)))
    capsys.readouterr()
    named = [f"{tmp_path}/said.jsonl#{who}" for who in "ab"]
    assert main(["compare", *named, "--reward", "judge", "--runs-dir", runs_dir, "--rows", "3"]) == 0
    said = capsys.readouterr().out
    assert "against the first" in said
