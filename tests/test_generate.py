"""Answers: batched, streamed and one at a time are the same, and all end at the end of turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_tune import generate
from qlora_tune.errors import ModelError
from qlora_tune.generate import faster_answers, fit_context, generate_answers, stop_ids, stream_reply
from qlora_tune.shapes import Message


@pytest.fixture(scope="module")
def exact(finished: Any) -> tuple[Any, Any]:
    """The short run's model computed in float32, where batching changes nothing that greedy decoding could see."""
    from qlora_tune.adapters import load_adapter
    from qlora_tune.export import open_adapter
    from qlora_tune.model import load_base

    trained = open_adapter(finished[0].adapter)
    model = load_base(trained.base, trained.device, "float32", trained.quantization)
    return load_adapter(model, trained.adapter, trained.base), trained.chat


def prompts(finished: Any, count: int) -> list[list[Message]]:
    return [list(example.messages[:-1]) for example in finished[2].setup.data.heldout_examples[:count]]


def test_batched_answers_equal_those_given_one_at_a_time(exact: Any, finished: Any) -> None:
    model, chat = exact
    asked = prompts(finished, 12)
    batched = generate_answers(model, chat, asked, max_new_tokens=24, batch_size=5)
    alone = [generate_answers(model, chat, [p], max_new_tokens=24, batch_size=1)[0] for p in asked]
    assert batched == alone
    assert len(set(batched)) > 3


def test_a_streamed_answer_equals_the_whole_one_and_arrives_in_pieces(exact: Any, finished: Any) -> None:
    model, chat = exact
    (asked,) = prompts(finished, 1)
    pieces = list(stream_reply(model, chat, asked, max_new_tokens=24))
    assert "".join(pieces).strip() == generate_answers(model, chat, [asked], max_new_tokens=24, batch_size=1)[0]
    assert len(pieces) > 1


def test_closing_the_stream_stops_the_model(exact: Any, finished: Any) -> None:
    model, chat = exact
    calls = []
    handle = model.get_base_model().model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    try:
        stream = stream_reply(model, chat, prompts(finished, 1)[0], max_new_tokens=400, temperature=5.0)
        next(stream)
        stream.close()
    finally:
        handle.remove()
    assert len(calls) < 100


def test_sampling_differs_from_greedy_and_answers_end_at_the_end_of_turn(exact: Any, finished: Any) -> None:
    import torch

    model, chat = exact
    (asked,) = prompts(finished, 1)
    torch.manual_seed(0)
    sampled = {"".join(stream_reply(model, chat, asked, max_new_tokens=12, temperature=3.0)) for _ in range(3)}
    assert len(sampled) > 1
    assert stop_ids(chat) == [chat.end_of_turn_id, chat.tokenizer.eos_token_id]
    assert not any("<|im_end|>" in text for text in sampled)


def test_a_talk_longer_than_the_context_loses_its_oldest_turns_only(exact: Any) -> None:
    model, chat = exact
    turns = [Message(role="system", content="Be kind.")]
    for number in range(30):
        turns += [Message(role="user", content=f"Say {number}."), Message(role="assistant", content=f"{number}")]
    turns.append(Message(role="user", content="And the last?"))
    kept = fit_context(model, chat, turns, max_new_tokens=256)
    assert kept[0] == turns[0]
    assert kept[1:] == turns[-len(kept) + 1 :]
    assert kept[1]["role"] == "user"
    context = model.config.max_position_embeddings
    assert len(chat.encode_prompt(kept)) + context // 4 <= context
    assert len(chat.encode_prompt([turns[0], *turns[-len(kept) - 1 :]])) + context // 4 > context  # no turn too few
    assert fit_context(model, chat, kept, max_new_tokens=256) == kept
    with pytest.raises(ModelError, match=f"of the {context} that this base sees"):
        fit_context(model, chat, [*turns, Message(role="user", content="too long " * 400)], max_new_tokens=256)
    tokens = chat.tokenizer("".join(stream_reply(model, chat, kept, max_new_tokens=9999, temperature=5.0)))
    assert len(tokens["input_ids"]) <= context


def noisy(builtin: Any, *, in_4bit: bool = True, precision: Any = "bfloat16", **adapter: Any) -> Any:
    """The built-in base with a fresh adapter that changes what it says. bfloat16 shows every change of rounding."""
    import torch

    from qlora_tune.adapters import attach_adapter
    from qlora_tune.model import Quantization, detect_device, load_base

    base = load_base(builtin[0], detect_device(), precision, Quantization(load_in_4bit=in_4bit))
    sizes = {"lora_r": 8, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["all-linear"]}
    model = attach_adapter(base, **{**sizes, **adapter})
    chance = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = (torch.randn(weight.shape, generator=chance) * 0.1).to(weight.device, weight.dtype)
    return model


def patched(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def answer(model: Any, chat: Any, asked: list[list[Message]]) -> list[str]:
    batched = generate_answers(model, chat, asked, max_new_tokens=40, batch_size=8)
    return [*batched, "".join(stream_reply(model, chat, asked[0], max_new_tokens=20))]


@pytest.mark.parametrize(
    ("changes", "packed", "adapted"),  # of the seven projections of eight layers
    [
        ({}, 56, 56),
        pytest.param({"use_dora": True}, 56, 0, marks=pytest.mark.reliability),
        ({"target_modules": ["q_proj"]}, 56, 8),
        ({"in_4bit": False}, 0, 0),
    ],
    ids=["plain", "dora", "one-target", "unquantized"],
)
def test_answers_are_the_same_with_and_without_the_speed_up(
    changes: Any, packed: int, adapted: int, builtin: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chat, asked = noisy(builtin, **changes), builtin[2], prompts(finished, 16)
    with faster_answers(model.eval()):
        assert len(patched(model)) == adapted + (packed if model.device.type == "cpu" else 0)
    tuned = answer(model, chat, asked)
    with model.disable_adapter():
        base = answer(model, chat, asked)
    assert not patched(model)
    monkeypatch.setattr(generate, "_shortcuts", lambda model: [])
    monkeypatch.setattr(generate, "ROUND", 10**6)
    assert answer(model, chat, asked) == tuned
    with model.disable_adapter():
        assert answer(model, chat, asked) == base
    assert tuned != base


def test_weights_that_would_fill_the_memory_are_not_kept(builtin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(builtin).eval()
    monkeypatch.setattr(generate, "KEPT_SHARE", 10**9)
    with faster_answers(model):
        assert len(patched(model)) == 56
        assert all("base_layer" not in name for name in patched(model))


def test_nothing_stays_changed_after_answers_or_after_a_failure(builtin: Any, finished: Any) -> None:
    import torch

    model, chat, asked = noisy(builtin), builtin[2], prompts(finished, 4)
    threads = torch.get_num_threads()

    def fail(done: int) -> None:
        assert patched(model)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate_answers(model, chat, asked, max_new_tokens=4, batch_size=2, on_progress=fail)
    assert not patched(model)
    stream = stream_reply(model, chat, asked[0], max_new_tokens=200, temperature=5.0)
    next(stream)
    stream.close()
    assert not patched(model)
    assert torch.get_num_threads() == threads


def test_the_speed_up_ends_with_the_last_of_several_answers(builtin: Any) -> None:
    model = noisy(builtin).eval()
    first, second = faster_answers(model), faster_answers(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert patched(model)
    second.__exit__(None, None, None)
    assert not patched(model)


@pytest.mark.parametrize("room", [1, 5, 40])
def test_answers_end_where_the_context_does(finished: Any, room: int) -> None:
    """A base with learned positions has none beyond; rows in one batch have room of their own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    chat = finished[2].setup.chat
    prompts = [[5] * length for length in (64 - room, 20, 64, 70)]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(chat.tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    stops = list(stop_ids(chat))
    with torch.no_grad():
        model.transformer.wte.weight[stops] = 0  # and so are their logits: it never ends by itself
    counted = []
    decode = generate.decode_answer

    def count(chat: Any, row: list[int]) -> str:
        counted.append(len(row))
        return str(decode(chat, row))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "decode_answer", count)
        answers = generate.answer_prompts(model, chat, prompts, max_new_tokens=30, batch_size=4)
    assert counted == [30, min(30, room)]  # by length of the prompt
    assert answers[2:] == [("", False)] * 2
