"""How fast `check` reads, beside what any training must do anyway: load the same file with `datasets` and tokenize it.

    python benchmarks/check_speed.py --rows 50000 --rounds 3

Sides take turns, each in a fresh process with one thread, on one file of rows like real instruction data (several
sample texts each). Prints markdown: median rows per second, lowest and highest, and the ratio to the first side.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
HEAD = "import os, sys, time, resource\nos.environ['OMP_NUM_THREADS'] = os.environ['RAYON_NUM_THREADS'] = '1'\n"
TAIL = "\nprint(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
LOAD = """
import datasets
from qlora_tune.config import shipped_path
from transformers import AutoTokenizer
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(shipped_path("builtin"), model_max_length=10**9)
began = time.perf_counter()
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
rows.map(lambda batch: tokenizer([a + b for a, b in zip(batch["instruction"], batch["output"])]), batched=True)
"""
CHECK = """
from qlora_tune.check import check_files
began = time.perf_counter()
report = check_files([sys.argv[1]], near={near})
assert report.kept == report.rows_in
"""
SIDES = {
    "datasets: load and tokenize": LOAD,
    "check, without near duplicates": CHECK.format(near=False),
    "check, with near duplicates": CHECK.format(near=True),
}


def write_rows(path: Path, rows: int) -> None:
    """Rows of about 600 characters: sample texts strung together, with shuffled words, so that few are alike."""
    lines = (ROOT / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["instruction"] + " " + row["output"] for row in map(json.loads, lines) if "instruction" in row]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            words = " ".join(draw.choices(texts, k=7)).split()
            draw.shuffle(words)
            split = len(words) // 3
            row = {"instruction": " ".join(words[:split]), "input": "", "output": " ".join(words[split:]) + "."}
            file.write(json.dumps(row) + "\n")


def measure(side: str, data: Path) -> tuple[float, float]:
    """One run of a side in a fresh process: seconds after imports, and peak memory [MB]."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", HEAD + SIDES[side] + TAIL, str(data), cache]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(found[-2]), float(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows)
        print(f"{args.rows:,} rows, {data.stat().st_size / 1e6:.0f} MB, {args.rounds} rounds\n")
        for _ in range(args.rounds):
            for side in SIDES:
                found[side].append(measure(side, data))
    speeds = {side: [args.rows / seconds for seconds, _ in runs] for side, runs in found.items()}
    first = median(speeds[next(iter(SIDES))])
    print("| side | rows/s | ratio | peak memory |\n| --- | ---: | ---: | ---: |")
    for side, values in speeds.items():
        spread = f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        print(f"| {side} | {spread} | {median(values) / first:.2f} | {max(mb for _, mb in found[side]):,.0f} MB |")


if __name__ == "__main__":
    main()
