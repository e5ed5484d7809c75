"""Peak memory of training on a CPU, estimated before anything is loaded and measured afterwards.

    python benchmarks/memory.py

24 combinations of shape, length of the longest row, rows of a micro-batch, rank and activation checkpointing, each
trained for four steps of four micro-batches in fresh processes, on rows whose lengths are drawn anew for each. Half of
the rows have full length. The libraries' constant is the peak of a base of next to nothing. Prints markdown: medians
over the draws, and last the estimate against the measured peak, the constant taken off both, with lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from throughput import SHAPES, build_base, run_child, train_ours

ACCUMULATION, STEPS = 4, 4
TINY = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
COMBINATIONS = [
    *(("7M", 256, 4, 16, False), ("7M", 256, 16, 64, False), ("7M", 512, 4, 16, True), ("7M", 512, 2, 64, False)),
    *(("7M", 1024, 1, 16, False), ("7M", 1024, 2, 16, True), ("7M", 1024, 2, 64, False), ("7M", 1536, 1, 8, False)),
    *(("30M", 256, 4, 16, False), ("30M", 256, 8, 64, False), ("30M", 512, 4, 16, False), ("30M", 512, 4, 16, True)),
    *(("30M", 1024, 1, 64, True), ("30M", 1024, 2, 16, False), ("30M", 1024, 2, 64, True), ("30M", 2000, 1, 16, False)),
    *(
        ("135M", 256, 1, 16, False),
        ("135M", 256, 4, 16, False),
        ("135M", 256, 8, 64, False),
        ("135M", 512, 2, 16, True),
    ),
    *(
        ("135M", 512, 4, 8, False),
        ("135M", 1024, 1, 16, False),
        ("135M", 1024, 2, 64, True),
        ("135M", 2000, 1, 16, True),
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go, besides the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one draw of rows for each")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)  # a folder, a combination, a seed: what a child does
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, length, rows, rank, checkpointing, seed = Path(args.one[0]), *map(int, args.one[1:])
        print("FIGURES " + json.dumps(measure(folder, length, rows, rank, bool(checkpointing), seed)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        SHAPES["tiny"] = TINY
        for shape in ("tiny", "7M", "30M", "135M"):
            build_base(Path(scratch) / shape, shape)
        constant = run(Path(scratch) / "tiny", 64, 1, 8, False, 1)
        print(
            f"libraries' constant: {constant['measured'] / 1e9:.3f} GB, taken as {constant['constant'] / 1e9:.3f} GB\n"
        )
        print("| base | longest row | rows | rank | checkpointing | measured | estimated | without libraries |")
        print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
        for shape, length, rows, rank, checkpointing in COMBINATIONS[args.start :: args.stride]:
            draws = [run(Path(scratch) / shape, length, rows, rank, checkpointing, seed) for seed in args.seeds]
            for draw in draws:
                draw["estimated"] = sum(draw["parts"].values())
                draw["ratio"] = (draw["estimated"] - draw["constant"]) / (draw["measured"] - constant["measured"])
            middle = {key: statistics.median(draw[key] for draw in draws) for key in ("measured", "estimated", "ratio")}
            low, high = min(draw["ratio"] for draw in draws), max(draw["ratio"] for draw in draws)
            print(
                f"| {shape} | {length} | {rows} | {rank} | {'on' if checkpointing else 'off'} "
                f"| {middle['measured'] / 1e9:.2f} GB | {middle['estimated'] / 1e9:.2f} GB "
                f"| {middle['ratio']:.2f} ({low:.2f} to {high:.2f}) |",
                flush=True,
            )
            found.append({"shape": shape, "length": length, "rows": rows, "rank": rank, **middle, "draws": draws})
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ratios = [entry["ratio"] for entry in found]
    print(f"\n{sum(abs(ratio - 1) <= 0.1 for ratio in ratios)} of {len(ratios)} within 10 %")


def run(folder: Path, length: int, rows: int, rank: int, checkpointing: bool, seed: int) -> dict[str, Any]:
    """One combination in a fresh process."""
    numbers = [str(number) for number in (length, rows, rank, int(checkpointing), seed)]
    return run_child([__file__, "--one", str(folder), *numbers])


def measure(folder: Path, length: int, rows: int, rank: int, checkpointing: bool, seed: int) -> dict[str, Any]:
    """Train in this process. Returns the measured peak, the estimated one and its parts [bytes]."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    chance = random.Random(seed)
    data = []
    for number in range(rows * ACCUMULATION * STEPS):
        size = length if number % 2 == 0 else chance.randint(length // 4, length)
        ids = chance.choices(range(2, vocabulary), k=size)
        data.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
    flags = {
        "lora_r": rank,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": ACCUMULATION,
        "activation_checkpointing": "on" if checkpointing else "off",
        "max_length": length,
    }
    with tempfile.TemporaryDirectory() as scratch:
        train_ours("ours", folder, data, STEPS, Path(scratch), flags)
        state = json.loads(next(Path(scratch).glob("*/state.json")).read_text())
    from qlora_tune.memory import cpu_libraries

    return {"measured": state["peak_bytes"], "constant": cpu_libraries(), "parts": state["estimated_parts"]}


if __name__ == "__main__":
    main()
