"""How fast rows become tokens with a mask, beside what TRL's trainer does with the same rows.

    python benchmarks/prepare_speed.py --rows 50000 --rounds 5

Sides take turns, each in a fresh process with an empty cache, on one file of rows like real instruction data. Imports,
the tokenizer and TRL's tiny model are loaded before the clock starts. Prints markdown: median rows per second, lowest
and highest, the ratio to TRL's, and the tokens that each side would train on. TRL also learns the newline that the
template writes behind an answer's end of turn; but for that one token a row the counts must agree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from check_speed import write_rows

HEAD = """
import json, resource, sys, time
from qlora_tune.config import resolve_config, shipped_path
from qlora_tune.model import load_tokenizer, quiet_stack
from qlora_tune.prepare import prepare_data
path, cache = sys.argv[1:]
quiet_stack()
tokenizer, chat = load_tokenizer(shipped_path("builtin"))

def report(seconds, count):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak, *count()]))
"""
TRL = """
import datasets
import pyarrow.compute
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
datasets.disable_progress_bars()
model = AutoModelForCausalLM.from_pretrained(shipped_path("builtin"))
spent = 0.0

class Timed(SFTTrainer):
    def _prepare_dataset(self, *args, **named):
        global spent
        began = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **named)
        spent += time.perf_counter() - began
        return prepared

def to_turns(row):
    asked = "\\n\\n".join(filter(None, [row["instruction"], row["input"]]))
    return {
        "prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": row["output"]}]
    }

began = time.perf_counter()
rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
rows = rows.map(to_turns, remove_columns=rows.column_names)
spent += time.perf_counter() - began
config = SFTConfig(output_dir=cache, max_length=None, report_to="none", bf16=False, use_cpu=True)
trainer = Timed(model, config, train_dataset=rows, processing_class=tokenizer)

def count():
    labels = pyarrow.compute.list_flatten(trainer.train_dataset.data.column("labels"))
    return len(labels), pyarrow.compute.sum(pyarrow.compute.not_equal(labels, -100)).as_py()

report(spent, count)
"""
OURS = """
from qlora_tune.check import check_files
config = resolve_config({{"preset": "builtin", "data": [path], "heldout_share": "0", "max_length": "100000"}}).config
began = time.perf_counter()
if {check}:
    check_files([path], near=False)
prepared = prepare_data(config, chat)
spent = time.perf_counter() - began

def count():
    return sum(len(one.labels) for one in prepared.train), sum(one.learned for one in prepared.train)

report(spent, count)
"""
SIDES = {
    "TRL: load, chat template, tokenize, labels": TRL,
    "prepare_data": OURS.format(check=False),
    "check and prepare": OURS.format(check=True),
}


class Result(NamedTuple):
    """What one run of a side took [s, MB] and gave."""

    seconds: float
    memory: float
    tokens: int
    learned: int


def measure(side: str, data: Path, threads: int) -> Result:
    """One run of a side in a fresh process."""
    with tempfile.TemporaryDirectory() as cache:
        limits = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        limits["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        environment = {**os.environ, **limits, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", HEAD + SIDES[side], str(data), cache]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Result(*json.loads(run.stdout.splitlines()[-1]))


def check_counts(found: dict[str, list[Result]], rows: int) -> None:
    """Stop where the sides prepared different tokens, TRL's newline behind each answer apart."""
    for side, results in found.items():
        newlines = rows if SIDES[side] is TRL else 0
        counts = {(result.tokens - newlines, result.learned - newlines) for result in results}
        expected = found["prepare_data"][0]
        if counts != {(expected.tokens, expected.learned)}:
            sys.exit(f"{side}: {counts} tokens and learned tokens, expected {expected.tokens}, {expected.learned}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="for tokenizers and torch; every side gets as many")
    args = parser.parse_args()
    found: dict[str, list[Result]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows)
        size = f"{args.rows:,} rows, {data.stat().st_size / 1e6:.0f} MB"
        print(f"{size}, {args.rounds} rounds, threads: {args.threads}\n", flush=True)
        for _ in range(args.rounds):
            for side in SIDES:
                found[side].append(measure(side, data, args.threads))
    check_counts(found, args.rows)
    speeds = {side: [args.rows / result.seconds for result in results] for side, results in found.items()}
    first = median(next(iter(speeds.values())))
    print("| side | rows/s | ratio | peak memory | tokens | learned |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, values in speeds.items():
        spread = f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        memory = max(result.memory for result in found[side])
        counts = f"{found[side][0].tokens:,} | {found[side][0].learned:,}"
        print(f"| {side} | {spread} | {median(values) / first:.2f} | {memory:,.0f} MB | {counts} |")


if __name__ == "__main__":
    main()
