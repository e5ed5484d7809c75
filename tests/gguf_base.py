"""The built-in base as a GGUF file, for llama.cpp: what its own converter would make, for this one architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map


def write_base(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a Llama in float32; its weights are taken from the model, which may be a dequantized one."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_vocabulary(writer, tokenizer, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = value.detach().float()
        if count := heads.get(name.split(".")[-2]):
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[{index}]") for index in range(size)])
    writer.add_token_types([TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def answer(llama: Any, prompt: list[int], stops: list[int], max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """llama.cpp's greedy answer to a prompt's tokens, and the logits it chose from."""
    llama.reset()
    llama.eval(prompt)
    found: list[int] = []
    logits = []
    while len(found) < max_new_tokens:
        logits.append(torch.from_numpy(llama.scores[llama.n_tokens - 1].copy()))
        token = int(logits[-1].argmax())
        if token in stops:
            break
        found.append(token)
        llama.eval([token])
    return found, torch.stack(logits)
