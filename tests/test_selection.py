"""Selection: IFD is what a plain, slow computation gives; each criterion keeps what it says; nothing is lost."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qlora_tune.data import load_examples
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.selection import NO_HELP, NO_SCORE, NOT_CHOSEN, score_ifd, select_examples, write_selection
from qlora_tune.shapes import Example
from qlora_tune.turns import Message

FRUIT = ["apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum"]


def ask(question: str, answer: str, task: str | None = None, number: int = 1) -> Example:
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Example(turns, task, f"rows.jsonl:{number}")


def rows(**sizes: int) -> list[Example]:
    """So many rows a task, the tasks by turns while they last."""
    rounds = [task for at in range(max(sizes.values())) for task, size in sizes.items() if at < size]
    return [ask(f"{task} question {n}", "a" * (n % 7 + 1), task, n) for n, task in enumerate(rounds, start=1)]


@pytest.fixture(scope="module")
def model(builtin: Any) -> Any:
    """The built-in base in float32, so that only the order of sums tells batches and single rows apart."""
    from qlora_tune.model import Quantization, detect_device, load_base

    return load_base(builtin[0], detect_device(), "float32", Quantization())


@pytest.fixture(scope="module")
def sample() -> list[Example]:
    return load_examples([ROOT / "sample.jsonl"])[0]


def slow_losses(model: Any, ids: list[int], scored: Sequence[bool]) -> list[float]:
    """One row by itself, full logits, the loss of each scored token."""
    import torch

    with torch.no_grad():
        likelihood = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(likelihood[at - 1, ids[at]]) for at in range(1, len(ids)) if scored[at]]


def slow_ifd(model: Any, chat: Any, example: Example) -> float:
    """exp(mean loss of the answers' words behind their prompt - mean loss behind an empty question)."""
    opening = chat.encode_prompt([Message(role="user", content="")])
    [sequence] = chat.tokenize_example(example.messages)
    words = [label not in (-100, chat.end_of_turn_id) for label in sequence.labels]
    behind_prompt = slow_losses(model, sequence.input_ids, words)
    alone: list[float] = []
    for at, is_word in enumerate(words):
        if is_word and not words[at - 1]:
            answer = sequence.input_ids[at : words.index(False, at)]
            alone += slow_losses(model, opening + answer, [False] * len(opening) + [True] * len(answer))
    assert len(alone) == len(behind_prompt)
    return math.exp(sum(behind_prompt) / len(behind_prompt) - sum(alone) / len(alone))


def test_ifd_is_what_a_slow_computation_gives(model: Any, builtin: Any, sample: list[Example]) -> None:
    chosen = [e for e in sample if len(e.messages) <= 3][:25] + [e for e in sample if len(e.messages) > 3][:15]
    difficulties = score_ifd(model, builtin[2], chosen, 512, 8)
    assert [difficulty.source for difficulty in difficulties] == [example.source for example in chosen]
    for difficulty, example in zip(difficulties, chosen, strict=True):
        assert difficulty.ifd == pytest.approx(slow_ifd(model, builtin[2], example), rel=1e-4), example


def test_the_batch_changes_nothing(
    model: Any, builtin: Any, sample: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = score_ifd(model, builtin[2], sample[:60], 512, 32)
    monkeypatch.setattr("qlora_tune.likelihood.LEARNED_TOKENS", 5)
    monkeypatch.setattr("qlora_tune.likelihood.LOSS_ROWS", 2)
    seen: list[int] = []
    apart = score_ifd(model, builtin[2], sample[:60], 512, 3, lambda done, total: seen.append(done))
    assert seen[0] == 1  # the longest goes first, and by itself: it has more tokens than a batch may
    for one, other in zip(together, apart, strict=True):
        assert one.ifd == pytest.approx(other.ifd, rel=1e-4)
        assert one.answer_tokens == other.answer_tokens


def test_a_fresh_adapter_scores_as_its_base(builtin: Any, sample: list[Example]) -> None:
    from qlora_tune.adapters import attach_adapter
    from qlora_tune.model import Quantization, detect_device, load_base

    base = load_base(builtin[0], detect_device(), "float32", Quantization())
    before = score_ifd(base, builtin[2], sample[:10], 512, 4)
    adapted = attach_adapter(base, lora_r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["all-linear"])
    after = score_ifd(adapted, builtin[2], sample[:10], 512, 4)
    assert [d.ifd for d in after] == pytest.approx([d.ifd for d in before], rel=1e-5)


def test_the_model_answers_as_before_when_scoring_is_done(model: Any, builtin: Any, sample: list[Example]) -> None:
    ids = builtin[2].encode_prompt(sample[0].messages[:1])
    score_ifd(model, builtin[2], sample[:3], 512, 2)
    assert len(slow_losses(model, ids, [True] * len(ids))) == len(ids) - 1


def test_a_prompt_swapped_with_another_rows_raises_the_ifd(finished: Any, builtin: Any, sample: list[Example]) -> None:
    model = finished[2].model  # a base that has had brief experience of the chat template, as in the paper
    draw = random.Random(0)
    some = draw.sample(sample, 200)
    others = [some[(at + draw.randrange(1, len(some))) % len(some)] for at in range(len(some))]
    swapped = [
        replace(one, messages=(*other.messages[:-1], one.messages[-1])) for one, other in zip(some, others, strict=True)
    ]
    # Only the last answer keeps its place, so rows of several answers would compare different ones.
    single = [at for at in range(len(some)) if sum(t["role"] == "assistant" for t in swapped[at].messages) == 1]
    single = [at for at in single if sum(t["role"] == "assistant" for t in some[at].messages) == 1]
    own = score_ifd(model, builtin[2], [some[at] for at in single], 512, 16)
    foreign = score_ifd(model, builtin[2], [swapped[at] for at in single], 512, 16)
    higher = sum((b.ifd or 0) > (a.ifd or 0) for a, b in zip(own, foreign, strict=True))
    assert len(single) > 80
    assert higher / len(single) >= 0.9
    assert sum((d.ifd or 0) >= 1 for d in own) < 0.1 * len(single)
    assert sum((d.ifd or 0) >= 1 for d in foreign) > 0.7 * len(single)


def test_a_row_that_can_not_be_scored_keeps_its_place_and_says_why(model: Any, builtin: Any) -> None:
    examples = [ask("What is a pear?", "A fruit."), ask("word " * 200, "Many."), ask("What is a hen?", "A bird.")]
    difficulties = score_ifd(model, builtin[2], examples, 64, 2)
    assert [d.ifd is None for d in difficulties] == [False, True, False]
    assert "max_length is 64" in difficulties[1].problem
    selection = select_examples(examples, "ifd", 3, [0.5, difficulties[1].ifd, 0.5])
    assert [(out.index, out.reason) for out in selection.left_out] == [(1, NO_SCORE)]


def test_a_likelihood_that_is_no_number_is_no_score(builtin: Any) -> None:
    import torch

    from qlora_tune.model import Quantization, detect_device, load_base

    broken = load_base(builtin[0], detect_device(), "float32", Quantization())
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    [difficulty] = score_ifd(broken, builtin[2], [ask("What is a pear?", "A fruit.")], 64, 2)
    assert difficulty.ifd is None
    assert "finite" in difficulty.problem


def test_equal_sequences_are_scored_once_and_progress_ends_at_all(model: Any, builtin: Any) -> None:
    examples = [ask(f"Is a {fruit} a fruit?", "Yes") for fruit in FRUIT]
    seen: list[tuple[int, int]] = []
    score_ifd(model, builtin[2], examples, 64, 4, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_rows_whose_prompt_does_not_help_are_left_out_and_counted() -> None:
    examples = rows(a=6)
    selection = select_examples(examples, "ifd", 2, [0.2, 1.0, 0.9, 3.0, None, 0.5])
    assert selection.kept == (2, 5)
    assert selection.count_reasons() == {NO_HELP: 2, NOT_CHOSEN: 1, NO_SCORE: 1}
    assert [out.index for out in selection.left_out if out.reason == NO_HELP] == [1, 3]
    everything = select_examples(examples, "ifd", 100, [0.2, 1.0, 0.9, 3.0, math.nan, 0.5])
    assert everything.kept == (0, 2, 5)
    assert everything.count_reasons() == {NO_HELP: 2, NO_SCORE: 1}


def test_ifd_without_a_score_for_each_row_is_refused() -> None:
    for scores in (None, [0.5]):
        with pytest.raises(ConfigError, match="score for each of 3 examples"):
            select_examples(rows(a=3), "ifd", 2, scores)
    with pytest.raises(ConfigError, match="rows is 0"):
        select_examples(rows(a=3), "length", 0)


def test_length_keeps_the_longest_answers_and_ties_go_to_the_earlier_row() -> None:
    answers = ["short", "long" * 9, "four", "long" * 9, "long" * 9, "middling" * 2]
    examples = [ask("x" * 99, answer, number=n) for n, answer in enumerate(answers)]
    assert select_examples(examples, "length", 2).kept == (1, 3)
    assert select_examples(examples, "length", 4).kept == (1, 3, 4, 5)


def test_length_counts_learned_answers_and_calls_only() -> None:
    context = ask("q", "an answer that is context only, and long")
    context.messages[1]["learn"] = False
    both = replace(context, messages=(*context.messages, *ask("q", "short").messages))
    call = ask("q", "")
    call.messages[1]["tool_calls"] = [{"name": "look_up", "arguments": {"word": "pear"}}]
    selection = select_examples([both, call, ask("q", "two words")], "length", 1)
    assert selection.scores[0] == len("short")
    assert selection.kept == (1,)


@pytest.mark.parametrize("by", ["ifd", "length", "diversity"])
def test_tasks_keep_their_shares_and_none_vanishes(by: Any) -> None:
    examples = rows(large=60, middle=30, small=9, single=1)
    scores = [0.1 if e.task != "large" else 0.9 for e in examples]
    selection = select_examples(examples, by, 20, scores)
    assert Counter(examples[i].task for i in selection.kept) == {"large": 11, "middle": 6, "small": 2, "single": 1}
    assert selection.count_tasks(examples)["middle"] == (30, 6)
    few = select_examples(examples, by, 3, scores)
    assert {examples[i].task for i in few.kept} == {"large", "middle", "small"}
    assert list(selection.kept) == sorted(selection.kept)
    assert sorted([*selection.kept, *(out.index for out in selection.left_out)]) == list(range(len(examples)))


def test_what_a_task_can_not_give_the_others_do() -> None:
    examples = rows(a=10, b=10)
    scores = [2.0 if e.task == "a" and n > 3 else 0.5 for n, e in enumerate(examples)]
    selection = select_examples(examples, "ifd", 10, scores)
    assert selection.count_tasks(examples) == {"a": (10, 2), "b": (10, 8)}


def test_without_per_task_the_best_rows_are_kept_wherever_they_are() -> None:
    examples = rows(large=20, small=5)
    scores = [0.9 if e.task == "large" else 0.1 for e in examples]
    selection = select_examples(examples, "ifd", 10, scores, per_task=False)
    assert {examples[i].task for i in selection.kept} == {"large"}


def topics() -> list[Example]:
    """Four topics, each with ten rows that differ in one word; the topics stand one behind the other."""
    forms = [
        "How much does one kilogram of {} cost at the market?",
        "Write a short poem about the colour of a ripe {}.",
        "Translate this into French: my grandmother planted a {} tree.",
        "J'ai acheté une {} hier soir, est-ce vrai ou faux ?",
    ]
    return [ask(form.format(fruit), "Yes.") for form in forms for fruit in FRUIT]


@pytest.mark.parametrize("seed", range(8))
def test_diversity_takes_one_of_each_kind_before_a_second_of_any(seed: int) -> None:
    selection = select_examples(topics(), "diversity", 4, seed=seed)
    assert {index // 10 for index in selection.kept} == {0, 1, 2, 3}
    chosen = [selection.scores[index] or 0 for index in selection.kept]
    left = [selection.scores[out.index] or 0 for out in selection.left_out]
    assert min(chosen) > max(left)


def test_diversity_takes_copies_last() -> None:
    examples = [*topics()[:5] * 3, ask("SORT  THESE WORDS", "b, a"), ask("sort these words", "b, a")]
    selection = select_examples(examples, "diversity", 6)
    assert len({examples[i].prompt.lower().replace("  ", " ") for i in selection.kept}) == 6
    assert max(selection.scores[out.index] or 0 for out in selection.left_out) < 1e-5


def test_the_same_seed_gives_the_same_rows_and_another_one_others(sample: list[Example]) -> None:
    first, again, other = (select_examples(sample[:400], "diversity", 60, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.kept != other.kept


def test_diversity_keeps_rows_less_alike_than_chance_does(sample: list[Example]) -> None:
    def likeness(indices: Sequence[int]) -> float:
        """Words shared with the most similar of the others, on average."""
        words = [set(f"{sample[index].prompt} {sample[index].answer}".lower().split()) for index in indices]
        return sum(max(len(a & b) / len(a | b) for b in words if b is not a) for a in words) / len(words)

    kept = select_examples(sample, "diversity", 150, per_task=False).kept
    assert likeness(kept) < 0.7 * likeness(random.Random(1).sample(range(len(sample)), 150))


def test_diversity_reports_each_row_chosen() -> None:
    seen: list[tuple[int, int]] = []
    examples = rows(a=5, b=5)
    select_examples(examples, "diversity", 4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_empty_answer_or_one_of_half_a_character_breaks_no_criterion() -> None:
    examples = [ask("", ""), ask("\ud800", "\ud800"), ask("日本語の質問", "答え")]
    for by in ("length", "diversity"):
        assert len(select_examples(examples, by, 2).kept) == 2  # type: ignore[arg-type]


def test_what_is_written_reads_back_the_same_and_nothing_is_lost(tmp_path: Path, sample: list[Example]) -> None:
    from qlora_tune.turns import ToolCall

    context = ask("first", "context only", "talk", 1).messages
    context[1]["learn"] = False
    called = Message(role="assistant", content="", tool_calls=[ToolCall(name="look_up", arguments={"word": "pear"})])
    turns = (context[0], called, Message(role="tool", content="a fruit"), Message(role="assistant", content="Fruit."))
    tools = ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
    examples = [
        *sample[:30],
        Example((*context, *ask("second", "answer é").messages), "talk", "rows.jsonl:1"),
        Example(turns, None, "rows.jsonl:2", tools),
    ]
    scores: list[float | None] = [round(0.01 * n, 2) for n in range(len(examples))]
    scores[3], scores[4] = None, 1.5
    selection = select_examples(examples, "ifd", 20, scores, per_task=False)
    others = write_selection(selection, examples, tmp_path / "chosen.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen.jsonl", "chosen_left_out.jsonl"]
    for path, indices in ((tmp_path / "chosen.jsonl", selection.kept), (others, [o.index for o in selection.left_out])):
        read, report = load_examples([path])
        assert report.problems == []
        written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row, back, index in zip(written, read, indices, strict=True):
            assert (back.messages, back.task) == (examples[index].messages, examples[index].task)
            assert back.tools == examples[index].tools
            assert (row["source"], row["ifd"]) == (examples[index].source, scores[index])
    reasons = [json.loads(line)["reason"] for line in others.read_text(encoding="utf-8").splitlines()]
    assert Counter(reasons) == selection.count_reasons()


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, sample: list[Example]) -> None:
    for name in ("one", "two"):
        selection = select_examples(sample[:200], "diversity", 50, seed=5)
        write_selection(selection, sample[:200], tmp_path / f"{name}.jsonl")
    for end in ("", "_left_out"):
        assert (tmp_path / f"one{end}.jsonl").read_bytes() == (tmp_path / f"two{end}.jsonl").read_bytes()


def test_a_selection_that_leaves_nothing_out_replaces_what_an_earlier_one_left_out(tmp_path: Path) -> None:
    examples = rows(a=5)
    write_selection(select_examples(examples, "length", 2), examples, tmp_path / "rows.jsonl")
    others = write_selection(select_examples(examples, "length", 5), examples, tmp_path / "rows.jsonl")
    assert others.read_text() == ""
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5


def test_a_score_that_is_no_number_is_written_as_null(tmp_path: Path) -> None:
    examples = rows(a=2)
    others = write_selection(select_examples(examples, "ifd", 2, [math.nan, 0.5]), examples, tmp_path / "rows.jsonl")
    assert json.loads(others.read_text())["ifd"] is None


def test_a_place_that_is_no_folder_is_reported(tmp_path: Path) -> None:
    examples = rows(a=2)
    (tmp_path / "none").touch()
    with pytest.raises(DataError, match="can't be written"):
        write_selection(select_examples(examples, "length", 1), examples, tmp_path / "none" / "rows.jsonl")
