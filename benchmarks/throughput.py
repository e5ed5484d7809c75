"""Training speed and memory beside TRL's SFTTrainer: same base, rows, learned tokens, effective batch, LoRA and rate.

    python benchmarks/throughput.py --shapes 7M 30M 135M --rounds 5 --json benchmarks/throughput.json

Sides take turns, each run in a fresh process:

- trl: SFTTrainer and PEFT on a 4-bit base, everything else left at TRL's defaults.
- trl-grouped: without activation checkpointing, rows grouped by length.
- trl-packed: without activation checkpointing, rows packed (bfd); its steps hold other rows, so its losses differ.
- ours: qlora_tune.train at its defaults. ours-plain: the same with --no-fast.
- unsloth: where it is installed and a GPU is there.

A base has random weights of a Llama's shape. Rows have the lengths of chat data: 1 to 6 turns, log-normal around 180
tokens, at most 1,024, about half of the tokens learned. Speed counts tokens that enter the embedding, without
padding, over the steps after the first ones. Prints markdown: medians, lowest and highest, ratios to `trl`, and the
largest difference between the losses of any step and those of `trl`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("trl", "trl-grouped", "trl-packed", "ours", "ours-plain", "unsloth")
EFFECTIVE_ROWS = 8  # TRL's default
RATE, RANK = 2e-4, 16
PAD = 0  # a token that no row holds
SHAPES = {
    "7M": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
    "30M": {"vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 11},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "0.6B": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "1.7B": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "8B": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
}
STEPS = {"7M": 16, "30M": 9, "135M": 7, "0.6B": 12, "1.7B": 12, "8B": 8}
HEADS = {"tiny": (1, 1), "7M": (4, 2), "30M": (6, 3), "135M": (9, 3), "0.6B": (16, 8), "1.7B": (16, 8), "8B": (32, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7M", "30M", "135M"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:4]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps at first that don't count")
    parser.add_argument("--json", type=Path, help="where the figures go, besides the table")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a side and a folder: what a child process does
    args = parser.parse_args()
    if args.one:
        print("FIGURES " + json.dumps(measure(args.one[0], Path(args.one[1]), args.warmup)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            build_base(Path(folder) / shape, shape)
            write_rows(Path(folder) / shape / "rows.json", SHAPES[shape]["vocab_size"], STEPS[shape])
        for turn, shape in itertools.product(range(args.rounds), args.shapes):
            for side in args.sides:
                figures = run_side(side, Path(folder) / shape, args.warmup)
                found.append({"shape": shape, "side": side, "round": turn, **figures})
                print(f"… {shape} {side}: {figures['tokens_per_s']:,.0f} tokens/s", file=sys.stderr, flush=True)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found, args.shapes, args.sides)


def build_base(folder: Path, shape: str) -> None:
    """Write a base of random weights, with the built-in base's tokenizer, which is only there to be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from qlora_tune.config import shipped_path

    heads, key_value_heads = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape != "8B",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_path("builtin")).save_pretrained(folder)


def write_rows(path: Path, vocabulary: int, steps: int) -> None:
    """Seeded chats: turns of a question and a learned answer; tokens drawn by Zipf's law, so that there is something
    to learn."""
    chance = random.Random(0)
    weights = [1 / rank for rank in range(1, vocabulary - 1)]
    rows = []
    for _ in range(EFFECTIVE_ROWS * (steps + 1)):
        length = min(1024, max(24, round(math.exp(chance.gauss(math.log(180), 0.8)))))
        ids = chance.choices(range(2, vocabulary), weights, k=length)
        turns = min(chance.randint(1, 6), length // 12)
        ends = sorted([*chance.sample(range(4, length), 2 * turns - 1), length])
        labels = [-100] * length
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            labels[start:end] = ids[start:end]
        rows.append({"input_ids": ids, "labels": labels})
    path.write_text(json.dumps(rows), encoding="utf-8")


def run_side(side: str, folder: Path, warmup: int) -> dict[str, Any]:
    """One run of a side in a fresh process."""
    return run_child([__file__, "--one", side, str(folder), "--warmup", str(warmup)])


def run_child(arguments: list[str]) -> dict[str, Any]:
    """Run a benchmark's script in a fresh process. Returns what it printed behind FIGURES; ends where it failed."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


def measure(side: str, folder: Path, warmup: int) -> dict[str, Any]:
    """Train a few steps in this process. Returns speed, peak memory and the loss of every step."""
    from qlora_tune.memory import peak_bytes
    from qlora_tune.model import detect_device

    rows = json.loads((folder / "rows.json").read_text())
    train = train_ours if side.startswith("ours") else train_with_trl
    with tempfile.TemporaryDirectory() as scratch:
        marks = train(side, folder, rows, STEPS[folder.name], Path(scratch))
    times, tokens, losses = zip(*marks, strict=True)
    seconds = times[-1] - times[warmup - 1]
    speed = (tokens[-1] - tokens[warmup - 1]) / seconds
    learned = sum(label != -100 for row in rows for label in row["labels"]) / sum(len(row["labels"]) for row in rows)
    return {
        "tokens_per_s": speed,
        "learned_tokens_per_s": speed * learned,
        "peak_bytes": peak_bytes(detect_device()),
        "losses": losses,
    }


def train_with_trl(
    side: str, folder: Path, rows: list[dict[str, Any]], steps: int, scratch: Path
) -> list[tuple[float, int, float]]:
    """As a user would write it, but for the rows, which come as tokens, so that all sides learn the same ones."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_cuda = torch.cuda.is_available()
    changes: dict[str, Any] = {}
    if side == "trl-grouped":
        changes = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    if side == "trl-packed":  # rows of 1,024 tokens: as many of them as hold an effective batch
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        packed = max(1, round(EFFECTIVE_ROWS * mean / 1024))
        changes = {"gradient_checkpointing": False, "packing": True, "max_length": 1024}
        changes |= {"per_device_train_batch_size": packed, "gradient_accumulation_steps": 1}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": EFFECTIVE_ROWS,
        "gradient_accumulation_steps": 1,
        **changes,
    }
    lora: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if side == "unsloth":
        model, tokenizer, lora_config = load_unsloth(folder, lora), AutoTokenizer.from_pretrained(folder), None
        settings["gradient_checkpointing"] = False  # unsloth brings its own
    else:
        model = load_quantized(folder)
        tokenizer, lora_config = AutoTokenizer.from_pretrained(folder), LoraConfig(**lora)
    tokenizer.pad_token_id = PAD
    counted = count_tokens(model, PAD)
    marks: list[tuple[float, int, float]] = []

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                marks.append((time.perf_counter(), int(counted), logs["loss"]))

    args = SFTConfig(
        output_dir=str(scratch),
        use_cpu=not on_cuda,  # else it refuses bf16 on a machine without a GPU
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config,
        callbacks=[Mark()],
    ).train()
    return marks


def load_quantized(folder: Path) -> Any:
    """A base in NF4 with double quantization, as the documentation of Transformers has it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )


def load_unsloth(folder: Path, lora: dict[str, Any]) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=1024, load_in_4bit=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=lora["r"], lora_alpha=lora["lora_alpha"], target_modules=targets, use_gradient_checkpointing="unsloth"
    )


def train_ours(
    side: str,
    folder: Path,
    rows: list[dict[str, Any]],
    steps: int,
    scratch: Path,
    changes: dict[str, Any] | None = None,
) -> list[tuple[float, int, float]]:
    """Through the package's own train(), with every speed-related setting at its default but for the changes."""
    from unittest.mock import patch

    from qlora_tune import model as models

    models.quiet_stack()
    from qlora_tune import train as training
    from qlora_tune.chat_format import TokenizedExample
    from qlora_tune.config import resolve_config
    from qlora_tune.data import DataReport
    from qlora_tune.prepare import PreparedData, Setup, precision_of
    from qlora_tune.runs import new_run

    flags: dict[str, Any] = {
        "preset": "none",
        "model_name_or_path": str(folder),
        "per_device_train_batch_size": EFFECTIVE_ROWS,
        "gradient_accumulation_steps": 1,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "max_steps": steps,
        "eval_steps": steps,
        "load_best_model_at_end": False,
        "runs_dir": str(scratch),
        **(changes or {}),
    }
    if side == "ours-plain":
        flags["fast"] = False
    config = resolve_config(flags).config
    device = models.detect_device()
    base = models.BaseModel(folder.name, None, folder, "0")
    tokenizer, chat = models.load_tokenizer(folder)
    tokenizer.pad_token_id = PAD
    data = PreparedData([TokenizedExample(row["input_ids"], row["labels"]) for row in rows], [], [], DataReport())
    setup = Setup(device, precision_of(config, device), base, tokenizer, chat, data)
    marks: list[tuple[float, int, float]] = []
    counted: list[Any] = []
    load_base = models.load_base

    def load_counted(*positional: Any) -> Any:
        model = load_base(*positional)
        counted.append(count_tokens(model, PAD))
        return model

    def mark(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            marks.append((time.perf_counter(), int(counted[0]), entry["loss"]))

    with patch.object(models, "load_base", load_counted):
        training.train(config, new_run(config), setup, on_metrics=mark)
    return marks


def count_tokens(model: Any, pad_id: int) -> Any:
    """Count what enters the embedding from now on, once a row and without padding, in a tensor."""
    import torch

    count = torch.zeros((), dtype=torch.int64, device=model.device)

    def add(module: Any, inputs: tuple[Any, ...]) -> None:
        count.add_((inputs[0] != pad_id).sum())

    model.get_input_embeddings().register_forward_pre_hook(add)
    return count


def print_table(found: list[dict[str, Any]], shapes: list[str], sides: list[str]) -> None:
    """Medians with spread; the ratio is the median of each round's own, as speeds drift over the day."""
    print("| shape | side | tokens/s | learned/s | ratio to trl | peak memory | losses differ by |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for shape, side in itertools.product(shapes, sides):
        runs = [entry for entry in found if (entry["shape"], entry["side"]) == (shape, side)]
        first = {e["round"]: e for e in found if (e["shape"], e["side"]) == (shape, sides[0])}
        speeds = [run["tokens_per_s"] for run in runs]
        ratios = [run["tokens_per_s"] / first[run["round"]]["tokens_per_s"] for run in runs]
        learned = median(run["learned_tokens_per_s"] for run in runs)
        memory = median(run["peak_bytes"] for run in runs) / 1e9
        apart = max(abs(a - b) for a, b in zip(runs[0]["losses"], first[runs[0]["round"]]["losses"], strict=True))
        print(
            f"| {shape} | {side} | {median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) | {learned:,.0f} | "
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {memory:.2f} GB | {apart:.4f} |"
        )


if __name__ == "__main__":
    main()
