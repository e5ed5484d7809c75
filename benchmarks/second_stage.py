"""Peak memory of preference training beside instruction tuning of the same sequences, on the same base.

    python benchmarks/second_stage.py --rounds 3 --json benchmarks/second_stage.json

The sides take turns, each run in a fresh process, two steps of two micro-batches: `train`, `prefer` from an adapter
of the same rank, and `prefer` with --no-fast. A pair is two sequences, so a micro-batch of one pair is held against
one of two rows: the very same sequences, of which the same tokens are learned.
Half of the answers end at full length, and a quarter of it is prompt. Prints markdown: medians, lowest and highest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from memory import SEED
from throughput import build_base, run_child, train_ours

SIDES = ("train", "prefer", "prefer-plain")
ACCUMULATION, STEPS = 2, 2
COMBINATIONS = [("7M", 512, 2), ("30M", 512, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the figures go, besides the table")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # a side, a folder and a combination: a child's work
    args = parser.parse_args()
    if args.one:
        side, folder, length, pairs = args.one[0], Path(args.one[1]), int(args.one[2]), int(args.one[3])
        print("FIGURES " + json.dumps(measure(side, folder, length, pairs)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in dict.fromkeys(shape for shape, _, _ in COMBINATIONS):
            build_base(Path(scratch) / shape, shape)
            run_child([__file__, "--one", "begin", str(Path(scratch) / shape), "64", "1"])
        for turn, combination, side in itertools.product(range(args.rounds), COMBINATIONS, args.sides):
            shape, length, pairs = combination
            figures = run_child([__file__, "--one", side, str(Path(scratch) / shape), str(length), str(pairs)])
            found.append({"shape": shape, "length": length, "pairs": pairs, "side": side, "round": turn, **figures})
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found, args.sides)


def measure(side: str, folder: Path, length: int, pairs: int) -> dict[str, Any]:
    """Train in this process. Returns its peak memory [bytes]; `begin` leaves the adapter that `prefer` begins with."""
    made = make_pairs(json.loads((folder / "config.json").read_text())["vocab_size"], length, pairs)
    if side == "begin":
        train_ours("ours", folder, to_rows(made), 1, folder / "runs")
        return {}
    flags = {"gradient_accumulation_steps": ACCUMULATION, "max_length": length}
    with tempfile.TemporaryDirectory() as scratch:
        if side.startswith("prefer"):
            changes = {**flags, "per_device_train_batch_size": pairs, "fast": side == "prefer"}
            prefer_ours(folder, made, Path(scratch), changes)
        else:
            flags["per_device_train_batch_size"] = 2 * pairs
            train_ours("ours", folder, to_rows(made), STEPS, Path(scratch), flags)
        return {"peak_bytes": json.loads(next(Path(scratch).glob("*/state.json")).read_text())["peak_bytes"]}


def make_pairs(vocabulary: int, length: int, pairs: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Seeded prompts, each with two answers."""
    chance = random.Random(SEED)
    made = []
    for _ in range(pairs * ACCUMULATION * STEPS):
        sizes = [3 * length // 4, chance.randint(length // 8, 3 * length // 4)]
        chance.shuffle(sizes)
        prompt, *answers = (chance.choices(range(2, vocabulary), k=size) for size in (length // 4, *sizes))
        made.append((prompt, answers[0], answers[1]))
    return made


def to_rows(pairs: list[tuple[list[int], list[int], list[int]]]) -> list[dict[str, Any]]:
    """The sequences of pairs as rows of instruction tuning."""
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, *answers in pairs
        for answer in answers
    ]


def prefer_ours(
    folder: Path, pairs: list[tuple[list[int], list[int], list[int]]], scratch: Path, changes: dict[str, Any]
) -> None:
    """Through the package's own prefer(), from the adapter that `begin` left."""
    from qlora_tune import model as models

    models.quiet_stack()
    from qlora_tune.data import DataReport
    from qlora_tune.export import Trained
    from qlora_tune.pair_setup import Origin, PreferenceSetup
    from qlora_tune.prefer import make_settings, prefer
    from qlora_tune.preferences import PreferencePair, TokenizedPair
    from qlora_tune.prepare import precision_of, quantization_of
    from qlora_tune.runs import list_runs, new_run

    first = list_runs(folder / "runs")[0]
    origin = Origin(first.adapter, first)
    file = scratch / "pairs.json"
    file.write_text(json.dumps(pairs), encoding="utf-8")
    flags = {"max_steps": STEPS, "eval_steps": STEPS, "load_best_model_at_end": False, "runs_dir": str(scratch)}
    config = make_settings(origin, [str(file)], {**flags, **changes})
    device = models.detect_device()
    base = models.BaseModel(folder.name, None, folder, "0")
    tokenizer, chat = models.load_tokenizer(folder)
    trained = Trained(
        first.adapter, base, device, precision_of(config, device), quantization_of(config), tokenizer, chat
    )
    tokens = [(PreferencePair((), "", "", f"pairs:{n}"), TokenizedPair(*pair)) for n, pair in enumerate(pairs)]
    setup = PreferenceSetup(trained, tokens, [], DataReport(), [], [], 0)
    prefer(config, new_run(config), setup, origin)


def print_table(found: list[dict[str, Any]], sides: list[str]) -> None:
    """Medians with spread; the ratio to the first side is the median of each round's own."""
    print("| base | longest row | pairs | side | peak memory | ratio |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for combination, side in itertools.product(COMBINATIONS, sides):
        alike = [entry for entry in found if (entry["shape"], entry["length"], entry["pairs"]) == combination]
        peaks = {name: [entry["peak_bytes"] / 1e9 for entry in alike if entry["side"] == name] for name in sides}
        ratios = [own / first for own, first in zip(peaks[side], peaks[sides[0]], strict=True)]
        peak, ratio = (f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in (peaks[side], ratios))
        print(f"| {' | '.join(map(str, combination))} | {side} | {peak} GB | {ratio} |")


if __name__ == "__main__":
    main()
