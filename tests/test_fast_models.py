"""The fast path on other adapters and other architectures: the stock losses and gradients, or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import Row, adapt, distance, draw_row, draw_rows, in_place, load, opened, plain, quick, unlearned, worst

from qlora_tune import attention
from qlora_tune.fast import fast_path, split_batch

# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "adapter",
    [
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["gate_proj", "o_proj"], "lora_r": 3},
        {"target_modules": ["down_proj"]},
        {"load_in_4bit": False},
    ],
    ids=lambda adapter: " ".join(map(str, adapter)) if len(adapter) > 1 else str(adapter),
)
def test_every_adapter_gets_the_plain_losses_and_gradients(builtin: Any, adapter: dict[str, Any]) -> None:
    model = load(builtin, "float32", **adapter).eval()  # dropout is off in evaluation
    before = in_place(model)
    rows = draw_rows((120, 33, 8, 15))
    expected_loss, expected = plain(model, rows)
    with opened(model) as fast:
        loss, found = quick(fast, rows)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(found, expected) < 1e-5
    assert in_place(model) == before


def test_dropout_acts_in_training_and_differs_from_draw_to_draw(builtin: Any) -> None:
    model, rows = load(builtin, "float32", lora_dropout=0.5), draw_rows((40, 8))
    with opened(model) as fast:
        losses = {quick(fast, rows)[0] for _ in range(3)}
        model.eval()
        still = {quick(fast, rows)[0] for _ in range(3)}
    assert len(losses) == 3
    assert len(still) == 1


def test_a_merged_adapter_is_part_of_the_weights(builtin: Any) -> None:
    model = load(builtin, "float32", load_in_4bit=False)
    batches = split_batch(draw_rows((40, 8)), 600, on_cpu=True)
    with torch.no_grad(), opened(model) as fast:
        before = sum(fast.loss_sum(batch).item() for batch in batches)
    model.merge_adapter()
    with torch.no_grad(), opened(model) as fast:
        after = sum(fast.loss_sum(batch).item() for batch in batches)
    assert after == pytest.approx(before, rel=1e-5)


# ---------------------------------------------------------------- architectures

SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so large that a wrong part is seen in the loss
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def tiny(kind: str, **changes: Any) -> Any:
    """A small model of a kind, all of its weights random, with an adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes}))
    for parameter in base.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin at one and zero
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    return adapt(base.to(torch.float32), lora_r=4, lora_alpha=8)


def short_rows() -> list[Row]:
    return draw_rows((37, 8, 60, 12, 12), words=300)


KNOWN = {
    "Llama": ("llama", {}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with tied words": ("llama", {"tie_word_embeddings": True}),
    "Qwen2 with biases": ("qwen2", {}),
    "Qwen3 with norms of queries": ("qwen3", {"head_dim": 16}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
    "Mistral with a window as long as the rows": ("mistral", {"sliding_window": 60}),
    "Gemma with other norms": ("gemma", {"head_dim": 16}),
    "Gemma3 with two kinds of rotation": ("gemma3_text", {"head_dim": 16, "sliding_window": 60}),
    "Phi3 with joint projections": ("phi3", {}),
    "GLM that rotates half of a head": ("glm", {"head_dim": 16}),
    "SmolLM3 with layers that rotate nothing": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Ernie that rotates neighbours": ("ernie4_5", {"head_dim": 12}),
    "OLMo2 with norms behind": ("olmo2", {}),
    "GPT-2 without dropout": ("gpt2", {**GPT2, "attn_pdrop": 0.0}),
    "OPT without dropout": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0}),
}


@pytest.mark.parametrize(("kind", "changes"), KNOWN.values(), ids=KNOWN)
def test_known_architectures_get_the_stock_losses_and_gradients(kind: str, changes: dict[str, Any]) -> None:
    model, rows = tiny(kind, **changes), short_rows()
    model.train()
    before = in_place(model)
    expected_loss, expected = plain(model, rows)
    with opened(model, longest=60) as fast:
        loss, found = quick(fast, rows, 80)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(found, expected) < 3e-5
    assert worst(found, expected) < 1e-3
    assert in_place(model) == before
    assert plain(model, rows)[0] == expected_loss


LEFT_OUT = {
    "dropout of attention": ("llama", {"attention_dropout": 0.1}),
    "dropout of attention by GPT-2's name": ("gpt2", {**GPT2, "attn_pdrop": 0.1}),
    "a window shorter than the rows": ("mistral", {"sliding_window": 59}),
    "a window in some layers": ("gemma3_text", {"head_dim": 16, "sliding_window": 59}),
    "soft caps": ("gemma2", {"head_dim": 16}),
    "a soft cap of the logits alone": ("gemma2", {"head_dim": 16, "attn_logit_softcapping": None}),
    "a soft cap too high to be seen": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": 1e4, "final_logit_softcapping": None},
    ),
    "layers that mix rows": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "a head with a bias": ("phi", {}),
    "scaled logits": ("granite", {"logits_scaling": 8.0}),
    "slopes in place of positions": ("bloom", {"n_layer": 2, "n_head": 4}),
    "attention of its own": ("gptj", {**GPT2, "rotary_dim": 8, "attn_pdrop": 0.0}),
}


@pytest.mark.parametrize(("kind", "changes"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_other_architectures_are_left_as_they_are(kind: str, changes: dict[str, Any]) -> None:
    model, rows = tiny(kind, **changes), short_rows()
    before = in_place(model.eval())
    expected, _ = plain(model, rows)
    with fast_path(model, longest=60, keep_weights=True) as fast:
        assert fast is None
        assert in_place(model) == before
        assert plain(model, rows)[0] == expected
    assert in_place(model) == before


def test_a_head_bias_too_small_to_see_is_seen() -> None:
    model = tiny("phi")
    model.get_output_embeddings().bias.data.mul_(1e-4)
    with fast_path(model, longest=60, keep_weights=True) as fast:
        assert fast is None


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_of_other_architectures_learn_the_same_whatever_their_neighbours(kind: str) -> None:
    model, row = tiny(kind), draw_row(20, 3, words=300)
    neighbours = [unlearned(each) for each in draw_rows((30, 22, 8), words=300)]
    with opened(model, longest=60) as fast:
        alone, expected = quick(fast, [row])
        loss, found = quick(fast, [*neighbours, row])
    assert loss == pytest.approx(alone, rel=1e-5)
    assert distance(found, expected) < 1e-5


def test_a_base_whose_rows_would_see_each_other_is_noticed_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of random weights hardly tell; states that don't change with a neighbour's tokens do."""
    model = tiny("llama").to(torch.bfloat16)
    plan_rows = attention.plan_rows

    def join(blocks: list[list[int]], *rest: Any) -> Any:
        return plan_rows([[sum(length for block in blocks for length in block)]], *rest)

    with fast_path(model, longest=60, keep_weights=True) as fast:
        assert fast is not None
    monkeypatch.setattr(attention, "plan_rows", join)
    with fast_path(model, longest=60, keep_weights=True) as fast:
        assert fast is None
