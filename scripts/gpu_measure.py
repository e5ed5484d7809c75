"""Train on random 4-bit weights of a real model's shape and print speed and memory; scripts/gpu_check.py calls this.

Usage: python scripts/gpu_measure.py SHAPE ROWS [--cpu-dry-run]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

WARMUP_STEPS, TIMED_STEPS = 2, 10
EFFECTIVE_ROWS = 16  # per optimizer step, as in all GPU presets
MIN_LENGTH, MAX_LENGTH = 64, 1024  # of the rows [tokens]
LEARNED_SHARE = 0.4  # of each row, at its end, as answers have it in instruction data
FIGURES = "FIGURES "  # opens the line that hands over what was found


@dataclass(frozen=True)
class Shape:
    """A model's real dimensions, and the preset that is meant for it."""

    preset: str
    dimensions: dict[str, Any]


QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "qwen3-1.7b": Shape(
        "gpu-6gb",
        {
            **QWEN3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": Shape(
        "gpu-16gb",
        {
            **QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "tiny": Shape(
        "builtin",
        {
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    ),
}


def main() -> int:
    """Measure one shape with so many rows a micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("rows", type=int, help="rows of a micro-batch; 16 make a step")
    parser.add_argument("--cpu-dry-run", action="store_true", help="short rows, for the CPU")
    options = parser.parse_args()
    print(FIGURES + json.dumps(measure_training(SHAPES[options.shape], options.rows, options.cpu_dry_run)))
    return 0


def measure_training(shape: Shape, micro_batch_rows: int, dry_run: bool) -> dict[str, Any]:
    """Train an adapter on random 4-bit weights of a real shape through the package's own train(), and time it.

    Only the loading of the base is replaced. Tokens are counted where they enter the embedding, without padding,
    so that the figure stays comparable whatever the batches look like.
    """
    from qlora_tune import model as models

    models.quiet_stack()
    import torch

    from qlora_tune import train as training
    from qlora_tune.config import resolve_config
    from qlora_tune.prepare import prepare
    from qlora_tune.runs import new_run

    with tempfile.TemporaryDirectory() as scratch:
        config = resolve_config(
            {
                "preset": shape.preset,
                "model_name_or_path": "builtin",  # lends its tokenizer; its weights are not loaded
                "max_steps": WARMUP_STEPS + TIMED_STEPS,
                "per_device_train_batch_size": micro_batch_rows,
                "gradient_accumulation_steps": EFFECTIVE_ROWS // micro_batch_rows,
                "load_best_model_at_end": False,
                "eval_steps": WARMUP_STEPS + TIMED_STEPS,  # also when checkpoints are written: after the timed steps
                "runs_dir": scratch,
            }
        ).config
        setup = replace(prepare(config), data=make_rows(shape.dimensions["vocab_size"], dry_run))
        device = setup.device.kind
        begin = time.perf_counter()
        model = build_random_base(shape, device, getattr(torch, setup.precision))
        tokens = count_tokens(model, setup.tokenizer.pad_token_id)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        build_s = time.perf_counter() - begin
        marks: list[tuple[float, int, int, float]] = []  # after each step: time, tokens, positions, loss

        def mark(entry: dict[str, Any]) -> None:
            if "loss" in entry:
                real, all_positions = tokens.tolist()
                marks.append((time.perf_counter(), real, all_positions, entry["loss"]))

        with patch.object(models, "load_base", lambda *_, **__: model):
            run = new_run(config)
            result = training.train(config, run, setup, on_metrics=mark)
            state = run.read_state()
    return {
        **summarise(marks),
        **describe_model(model, result.model, device),
        "build_s": round(build_s, 1),
        "path": state["path"],
        "fit": state["fit"],
        "estimated_bytes": sum(state["estimated_parts"].values()),
    }


def make_rows(vocabulary: int, dry_run: bool) -> Any:
    """Seeded rows of mixed lengths in place of a data file's."""
    from qlora_tune.chat_format import IGNORED, TokenizedExample
    from qlora_tune.data import DataReport
    from qlora_tune.prepare import PreparedData

    chance = random.Random(0)
    longest = MAX_LENGTH // 16 if dry_run else MAX_LENGTH
    shortest = MIN_LENGTH // 16 if dry_run else MIN_LENGTH
    rows = []
    for number in range(EFFECTIVE_ROWS * (WARMUP_STEPS + TIMED_STEPS)):
        # Log-uniform, as real instruction data is skewed; one row has full length, because it sets the peak memory.
        length = round(math.exp(chance.uniform(math.log(shortest), math.log(longest)))) if number else longest
        ids = [chance.randrange(16, vocabulary) for _ in range(length)]
        prompt = round(length * (1 - LEARNED_SHARE))
        rows.append(TokenizedExample(ids, [IGNORED] * prompt + ids[prompt:]))
    return PreparedData(rows, [], [], DataReport())


def build_random_base(shape: Shape, device: str, dtype: Any) -> Any:
    """A randomly initialised model whose linear layers are then quantized one by one, as loading would leave them.

    It is built in 16 bits first: the 8B shape takes 16 GB for a moment.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape.dimensions), dtype=dtype)
    paths = [path for path, part in model.named_modules() if isinstance(part, torch.nn.Linear) and path != "lm_head"]
    for path in paths:
        linear = model.get_submodule(path)
        quantized = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        quantized.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantized.to(device))
    model.is_loaded_in_4bit = True  # what from_pretrained sets, and PEFT and TRL go by
    model.config.use_cache = False
    return model


def count_tokens(model: Any, pad_id: int) -> Any:
    """Count what enters the embedding from now on: a tensor of real tokens and of all positions."""
    import torch

    counts = torch.zeros(2, dtype=torch.int64, device=model.device)

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        ids = inputs[0]
        counts[0] += (ids != pad_id).sum()
        counts[1] += ids.numel()

    model.get_input_embeddings().register_forward_pre_hook(count)
    return counts


def summarise(marks: list[tuple[float, int, int, float]]) -> dict[str, Any]:
    """Speed over the timed steps. Raises ValueError when steps are missing or a loss is not finite."""
    if len(marks) != WARMUP_STEPS + TIMED_STEPS or not all(math.isfinite(loss) for *_, loss in marks):
        raise ValueError(f"expected {WARMUP_STEPS + TIMED_STEPS} steps of finite loss, got {marks}")
    times, real, positions, losses = zip(*marks[WARMUP_STEPS - 1 :], strict=True)
    steps = [after - before for before, after in itertools.pairwise(times)]
    tokens = real[-1] - real[0]
    return {
        "tokens_per_s": round(tokens / (times[-1] - times[0])),
        "step_s_median": round(statistics.median(steps), 4),
        "step_s_all": [round(step, 4) for step in steps],
        "tokens_timed": tokens,
        "padding_share": round(1 - tokens / (positions[-1] - positions[0]), 4),
        "loss_first": round(marks[0][-1], 4),
        "loss_last": round(losses[-1], 4),
    }


def describe_model(base: Any, tuned: Any, device: str) -> dict[str, Any]:
    """Peak memory and sizes. Raises ValueError when the adapter is not in float32 or the base not in 4 bits."""
    import torch
    from bitsandbytes.nn import Linear4bit

    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    if {parameter.dtype for parameter in trained} != {torch.float32}:
        raise ValueError(f"the adapter is in { ({parameter.dtype for parameter in trained}) }, expected float32")
    quantized = [part for part in base.modules() if isinstance(part, Linear4bit)]
    if not quantized or any(part.weight.dtype != torch.uint8 for part in quantized):
        raise ValueError("the base's linear layers are not held in 4 bits")
    on_cuda = device == "cuda"
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_cuda else None,
        "quantized_parameters": sum(part.in_features * part.out_features for part in quantized),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "adapter_dtype": "float32",
    }


if __name__ == "__main__":
    sys.exit(main())
