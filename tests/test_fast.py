"""The fast path: its batches, and the plain way's losses and gradients on the built-in base."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from itertools import permutations
from random import Random
from typing import Any

import pytest
import torch
from losses import (
    Row,
    distance,
    draw_row,
    draw_rows,
    in_place,
    load,
    norm,
    opened,
    plain,
    quick,
    take_gradients,
    unlearned,
    worst,
)

from qlora_tune.chat_format import IGNORED
from qlora_tune.fast import fast_path, split_batch
from qlora_tune.generate import generate_answers
from qlora_tune.layout import BATCH_ROUND, BLOCK_ROUND, TOGETHER

MIXED = (9, 230, 31, 118, 64, 12)


@pytest.fixture(scope="module")
def exact(builtin: Any) -> Any:
    """A model in float32, in training mode."""
    return load(builtin, "float32")


@pytest.fixture(scope="module")
def rounded(builtin: Any) -> Any:
    """The same in bfloat16."""
    return load(builtin, "bfloat16")


# ---------------------------------------------------------------- batches


def some_rows(chance: Random) -> list[Row]:
    """Rows whose tokens are all different, none of them a filler's 0."""
    rows, used = [], 1
    for _ in range(chance.randint(1, 20)):
        length = chance.choice([1, 2, chance.randint(3, 40), chance.randint(3, 40), chance.randint(100, 400)])
        ids = list(range(used, used + length))
        used += length
        learned = chance.choice([0, 0.3, 0.8, 1])
        rows.append({"input_ids": ids, "labels": [t if chance.random() < learned else IGNORED for t in ids]})
    return rows


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_batches_hold_every_row_once_and_learn_what_the_labels_say(seed: int, on_cpu: bool) -> None:
    chance = Random(seed)
    rows, max_tokens = some_rows(chance), chance.choice([1, 50, 128, 300, 2048])
    batches = split_batch(rows, max_tokens, on_cpu)
    found: list[tuple[int, ...]] = []
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        ids = batch.input_ids[0].tolist()
        lengths = [length for block in batch.blocks for length in block]
        assert sum(lengths) == len(ids)
        assert batch.position_ids.tolist() == [[at for length in lengths for at in range(length)]]
        parts = [tuple(part.tolist()) for part in batch.input_ids[0].split(lengths)]
        own = [part for part in parts if any(part)]
        assert all(set(part) == {0} for part in parts if part not in own)
        assert batch.tokens == sum(len(part) for part in own)
        assert batch.tokens <= max_tokens or len(own) == 1
        found += own
        pairs.update(
            (ids[at], target) for at, target in zip(batch.learned.tolist(), batch.targets.tolist(), strict=True)
        )
    assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows)
    shifted = [pair for row in rows for pair in zip(row["input_ids"], row["labels"][1:], strict=False)]
    assert pairs == Counter(pair for pair in shifted if pair[1] != IGNORED)


@pytest.mark.parametrize("seed", range(20))
def test_a_cpu_gets_few_different_shapes(seed: int) -> None:
    for batch in split_batch(some_rows(Random(seed)), 700, on_cpu=True):
        assert batch.input_ids.shape[1] % BATCH_ROUND == 0
        assert all(sum(block) % BLOCK_ROUND == 0 for block in batch.blocks)
        *_, last = batch.blocks
        assert all(sum(block) <= TOGETHER + BLOCK_ROUND or len(block) <= 2 for block in batch.blocks)
        assert sum(last) < BATCH_ROUND or any(batch.input_ids[0, -sum(last) :])


def test_a_gpu_gets_no_fillers_and_rows_of_their_own() -> None:
    (batch,) = split_batch(draw_rows([30, 8, 55]), 200, on_cpu=False)
    assert batch.blocks == [[55], [30], [8]]
    assert batch.input_ids.shape[1] == batch.tokens == 93


def test_fillers_are_never_learned_from() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    (batch,) = split_batch([row], 100, on_cpu=True)
    assert batch.input_ids.shape[1] == BATCH_ROUND
    assert (batch.learned.tolist(), batch.targets.tolist(), batch.tokens) == ([0, 1], [6, 7], 3)


def test_rows_without_a_learned_token_are_a_loss_of_zero(exact: Any) -> None:
    rows = [unlearned(row) for row in draw_rows([20, 7])]
    assert split_batch([], 100, on_cpu=True) == []
    with opened(exact) as fast:
        (batch,) = split_batch(rows, 100, on_cpu=True)
        loss = fast.loss_sum(batch)
        loss.backward()
    assert (len(batch.targets), loss.item()) == (0, 0)
    assert norm(take_gradients(exact)) == 0


# ---------------------------------------------------------------- the same losses and gradients


def test_every_part_of_the_builtin_base_is_replaced(exact: Any) -> None:
    with opened(exact):
        names = Counter(name.rpartition(".")[2] for name in in_place(exact)["forwards"])
    layers = exact.config.num_hidden_layers
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "input_layernorm", "post_attention_layernorm"]
    assert {name: names[name] for name in parts} == dict.fromkeys(parts, layers)
    assert names["norm"] == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_gradients_equal_the_plain_ones_in_float32(exact: Any, seed: int) -> None:
    rows = draw_rows(MIXED, seed)
    expected_loss, expected = plain(exact, rows)
    with opened(exact) as fast:
        loss, found = quick(fast, rows)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(found) == 2 * 7 * exact.config.num_hidden_layers
    assert distance(found, expected) < 1e-5
    assert worst(found, expected) < 1e-5


@pytest.fixture(scope="module", params=[0, 1])
def measured(request: Any, exact: Any, rounded: Any) -> dict[str, Any]:
    """Loss and gradients of the same rows: true ones in float32, then four ways in bfloat16."""
    rows = draw_rows(MIXED, request.param)
    found = {"truth": plain(exact, rows), "sdpa": plain(rounded, rows, autocast=True)}
    rounded.set_attn_implementation("eager")
    found["eager"] = plain(rounded, rows, autocast=True)
    rounded.set_attn_implementation("sdpa")
    with opened(rounded) as fast:
        found["fast"] = quick(fast, rows)
    return found


def test_bfloat16_losses_and_norms_are_the_plain_ones(measured: dict[str, Any]) -> None:
    assert measured["fast"][0] == pytest.approx(measured["sdpa"][0], rel=1e-3)
    # Stock attentions differ from each other by up to 1.2e-3 here, and from the truth by 2.8e-3.
    assert norm(measured["fast"][1]) == pytest.approx(norm(measured["sdpa"][1]), rel=2e-3)
    assert norm(measured["fast"][1]) == pytest.approx(norm(measured["truth"][1]), rel=4e-3)


def test_bfloat16_gradients_differ_as_those_of_two_stock_attentions_do(measured: dict[str, Any]) -> None:
    fast, sdpa, eager = (measured[name][1] for name in ("fast", "sdpa", "eager"))
    assert distance(fast, sdpa) < 1.5 * distance(eager, sdpa)
    assert worst(fast, sdpa) < 2 * worst(eager, sdpa)


def test_bfloat16_gradients_are_as_near_to_the_truth_as_the_plain_ones(measured: dict[str, Any]) -> None:
    truth, fast, sdpa = (measured[name][1] for name in ("truth", "fast", "sdpa"))
    assert distance(fast, truth) < 1.3 * distance(sdpa, truth)


@pytest.mark.parametrize("max_tokens", [1, 130, 300])
def test_how_a_batch_is_split_changes_nothing(exact: Any, max_tokens: int) -> None:
    rows = draw_rows(MIXED)
    with opened(exact) as fast:
        whole_loss, whole = quick(fast, rows, 2048)
        loss, found = quick(fast, rows, max_tokens)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert distance(found, whole) < 1e-5


def test_kept_and_unkept_weights_give_the_very_same(rounded: Any) -> None:
    rows = draw_rows(MIXED)
    results = []
    for keep in (True, False):
        with opened(rounded, keep_weights=keep) as fast:
            results.append(quick(fast, rows))
    (one_loss, one), (other_loss, other) = results
    assert one_loss == other_loss
    assert all(torch.equal(one[name], other[name]) for name in one)


# In one product with short rows, first or last, beside long ones, in blocks of its own.
NEIGHBOURS = {"first": (30, 12), "last": (250, 90), "among short ones": (45, 41, 39, 8, 5), "like it": (40, 40)}


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_learns_the_same_whatever_its_neighbours(exact: Any, rounded: Any, name: str, precision: str) -> None:
    model, near = (exact, 1e-5) if precision == "float32" else (rounded, 1e-3)
    row = draw_row(40, seed=5, turns=2)
    neighbours = [unlearned(each) for each in draw_rows(NEIGHBOURS[name], seed=6)]
    with opened(model) as fast:
        alone_loss, alone = quick(fast, [row])
        loss, found = quick(fast, [*neighbours, row])
    assert loss == pytest.approx(alone_loss, rel=near)
    assert distance(found, alone) < near


def test_the_loss_of_a_row_beside_others_is_that_of_the_stock_model(exact: Any) -> None:
    row, near = draw_row(40, seed=5, turns=2), draw_rows((45, 41, 8), seed=6)
    with opened(exact) as fast:
        found, _ = quick(fast, [*(unlearned(each) for each in near), row])
    assert found == pytest.approx(plain(exact, [row])[0], rel=1e-5)


# ---------------------------------------------------------------- what else happens to a model


def test_an_evaluation_and_a_generation_change_no_later_gradient(rounded: Any, builtin: Any) -> None:
    rows, chat = draw_rows((120, 33, 8)), builtin[2]
    with opened(rounded) as fast:
        loss, before = quick(fast, rows)
        rounded.eval()
        with torch.no_grad():
            for batch in split_batch(rows, 600, on_cpu=True):
                fast.loss_sum(batch)
        rounded.train()
        evaluated = quick(fast, rows)
    rounded.eval()
    answers = generate_answers(rounded, chat, [[{"role": "user", "content": "Hi"}]], max_new_tokens=4, batch_size=1)
    rounded.train()
    with opened(rounded) as fast:
        generated = quick(fast, rows)
    assert len(answers) == 1
    for again, after in (evaluated, generated):
        assert again == loss
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_everything_is_put_back_also_after_an_exception(exact: Any) -> None:
    before = in_place(exact)
    loss, _ = plain(exact, draw_rows((12, 5)))
    with opened(exact):
        during = in_place(exact)
    assert in_place(exact) == before
    assert all(during[key] != before[key] for key in ("forwards", "attention", "attentions", "rotary"))
    with pytest.raises(KeyError, match="inside"), opened(exact):
        raise KeyError("inside")
    assert in_place(exact) == before
    assert plain(exact, draw_rows((12, 5)))[0] == loss


def test_nothing_keeps_the_model_in_memory(builtin: Any) -> None:
    model = load(builtin, "bfloat16")
    with opened(model) as fast:
        quick(fast, draw_rows((12,)))
    gone = weakref.ref(model.get_base_model())
    del fast, model
    gc.collect()
    assert gone() is None


def test_no_mask_is_made_for_a_whole_batch(exact: Any) -> None:
    masks: list[Any] = []
    (batch,) = split_batch(draw_rows((33, 8)), 600, on_cpu=True)
    with opened(exact) as fast, torch.no_grad():
        for layer in fast.backbone.layers:
            hook = layer.self_attn.register_forward_pre_hook(
                lambda module, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
            )
            fast.loss_sum(batch)
            hook.remove()
    assert masks == [None] * len(fast.backbone.layers)


def test_noise_is_alpha_over_the_root_of_length_times_width(exact: Any) -> None:
    seen: list[torch.Tensor] = []

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["inputs_embeds"].detach())

    with opened(exact, neftune_noise_alpha=5.0) as fast:
        (batch,) = split_batch(draw_rows((200, 50, 20)), 600, on_cpu=True)
        hook = fast.backbone.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            fast.loss_sum(batch)
            exact.eval()
            fast.loss_sum(batch)
        exact.train()
        hook.remove()
    stock = exact.get_input_embeddings()(batch.input_ids).detach()
    noise, none = seen[0] - stock, seen[1] - stock
    assert not none.any()
    lengths = [length for block in batch.blocks for length in block]
    assert {200, 50, 20} <= set(lengths)
    for length, part in zip(lengths, noise[0].split(lengths), strict=True):
        limit = 5.0 / math.sqrt(length * stock.shape[-1])
        assert part.abs().max() <= limit * (1 + 1e-4)
        assert part.abs().max() > 0.95 * limit
        assert part.square().mean().sqrt().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert abs(part.mean().item()) < 0.1 * limit


def test_queries_keys_and_values_may_be_asked_for_in_any_order_and_of_any_input(exact: Any) -> None:
    attention = exact.get_base_model().base_model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    one, other = torch.randn(2, 1, 7, exact.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = {(name, which): getattr(attention, name)(x) for name in names for which, x in enumerate((one, other))}
        with opened(exact):
            orders = [[(name, 0) for name in order] for order in permutations(names)]
            orders += [[("q_proj", 0), ("k_proj", 1), ("v_proj", 0)], [("k_proj", 0), ("k_proj", 0), ("v_proj", 1)]]
            for order in orders:
                for name, which in order:
                    found = getattr(attention, name)((one, other)[which])
                    assert torch.allclose(found, stock[name, which], rtol=1e-5, atol=1e-5)
            for name in names:
                getattr(attention, name)(one)
            assert attention.q_proj.forward.func.__self__.x is None  # nothing is held once all were asked for


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_activations_give_the_same_gradients(exact: Any, offload: bool) -> None:
    rows, ran = draw_rows((120, 33, 8)), []
    layer = exact.get_base_model().base_model.layers[0].mlp
    with opened(exact) as fast:
        loss, before = quick(fast, rows, 130)
    with opened(exact, checkpointing=True, offload=offload) as fast:
        hook = layer.register_forward_pre_hook(lambda *_: ran.append(1))
        again, after = quick(fast, rows, 130)
        hook.remove()
    assert len(ran) == 2 * len(split_batch(rows, 130, on_cpu=True))
    assert again == loss
    assert distance(after, before) < 1e-6
    assert not exact.get_base_model().is_gradient_checkpointing


def test_between_two_layers_only_their_places_hold_memory(exact: Any) -> None:
    """What autograd would keep of a layer is gone once the layer is through, its input too."""
    (batch,) = split_batch(draw_rows((120, 33, 8)), 600, on_cpu=True)
    held: list[Any] = []

    def hold(module: Any, inputs: tuple[torch.Tensor, ...], *_: Any) -> None:
        held.append(weakref.ref(inputs[0]))

    with opened(exact, checkpointing=True) as fast:
        hooks = [layer.register_forward_pre_hook(hold) for layer in fast.backbone.layers]
        hooks += [layer.mlp.register_forward_hook(hold) for layer in fast.backbone.layers]
        loss = fast.loss_sum(batch)
        assert len(held) == len(hooks)
        assert not [tensor for tensor in held if tensor() is not None]
        (states,), (kept,) = fast.backbone.layers[0]._gradient_checkpointing_func.args[0].kept, fast.arena.kept
        one = batch.input_ids.numel() * 4 * exact.config.hidden_size
        assert states.filled - states.start == len(fast.backbone.layers) * one
        assert len(kept.memory) - kept.room < 3 * one  # the last norm's
        loss.backward()
        del loss
        assert all(block.room == len(block.memory) - block.start for block in (states, kept))
        for hook in hooks:
            hook.remove()
    take_gradients(exact)


def test_a_micro_batch_may_wait_for_its_backward_pass_while_another_runs(exact: Any) -> None:
    """Memory of what autograd keeps is used again only when nothing in it is needed any more."""
    first, second = (split_batch(draw_rows(lengths), 600, on_cpu=True)[0] for lengths in ((120, 33, 8), (90, 77)))
    with opened(exact) as fast:
        fast.loss_sum(first).backward()
        fast.loss_sum(second).backward()
        expected = take_gradients(exact)
        waiting = fast.loss_sum(first)
        fast.loss_sum(second).backward()
        waiting.backward()
    assert distance(take_gradients(exact), expected) < 1e-6


def test_a_switched_off_adapter_is_the_base(exact: Any) -> None:
    rows = draw_rows((120, 33, 8))
    exact.requires_grad_(False)
    try:
        with torch.no_grad(), opened(exact) as fast:
            (batch,) = split_batch(rows, 600, on_cpu=True)
            tuned = fast.loss_sum(batch).item()
            with exact.disable_adapter():
                base = fast.loss_sum(batch).item()
            again = fast.loss_sum(batch).item()
    finally:
        for name, parameter in exact.named_parameters():
            parameter.requires_grad_("lora_" in name)
    with exact.disable_adapter():
        stock = plain_loss(exact, rows)
    assert tuned == again
    assert base == pytest.approx(stock, rel=1e-5)
    assert abs(tuned - base) > 1e-3 * base


def plain_loss(model: Any, rows: list[Row]) -> float:
    """Sum of the stock losses, row by row, without gradients."""
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
    return total


def test_chance_in_training_mode_does_not_keep_the_fast_path_off(builtin: Any) -> None:
    model = load(builtin, "float32", lora_dropout=0.5)
    with fast_path(model, longest=256, keep_weights=True, neftune_noise_alpha=50.0) as fast:
        assert fast is not None
        assert model.training
