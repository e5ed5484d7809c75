"""Scores of the built-in base, tuned on the sample: several seeds, task by task, on rows that were not trained on.

    python benchmarks/sample_scores.py --seeds 1 2 3

Each seed is one run of the command line: train, score on sample_heldout.jsonl, then on new phrasings and on task
types that never occur in the pairs. Prints markdown: means over the seeds, with the lowest and highest.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OTHER_FILES = {"new phrasings": "sample_rephrased", "unseen task types": "sample_unseen"}
Scores = dict[str, dict[str, Any]]  # by set of rows


def run_seed(seed: int, folder: Path, extra: list[str]) -> tuple[Scores, float]:
    """Train and score one seed. Returns its scores by set of rows, and the CPU time of the tuning stage [s]."""
    run = folder / f"seed-{seed}"
    qlora_tune = [sys.executable, "-m", "qlora_tune"]
    where = ["--runs-dir", str(folder), "--run-name", run.name]
    train = ["train", "--preset", "builtin", "--seed", str(seed), "--score-rows", "1000"]  # more than there are
    subprocess.run([*qlora_tune, *train, *where, *extra], check=True, stdout=sys.stderr)
    scores = {"held-out": read_json(run / "scores.json")}
    for name, stem in OTHER_FILES.items():
        file = str(ROOT / f"{stem}.jsonl")
        subprocess.run([*qlora_tune, "evaluate", str(run), "--data", file], check=True, stdout=sys.stderr)
        scores[name] = read_json(run / f"scores-{stem}.json")
    return scores, read_json(run / "state.json")["train_cpu_s"]


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def spread(values: list[float]) -> str:
    return f"{mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def total_table(seeds: list[Scores]) -> str:
    lines = ["| rows | count | base | tuned |", "| --- | ---: | ---: | ---: |"]
    for name in seeds[0]:
        sides = [spread([scores[name]["all"][side]["exact_match"] for scores in seeds]) for side in ("base", "tuned")]
        lines.append(f"| {name} | {seeds[0][name]['all']['rows']} | {' | '.join(sides)} |")
    return "\n".join(lines)


def shares(scores: dict[str, Any], side: str) -> dict[str, float]:
    return {task["task"]: task[side]["exact_match"] for task in scores["by_task"]}


def task_table(seeds: list[Scores], names: list[str]) -> str:
    """Means over the seeds, one line a task and one column a set of rows; base scores where they are not 0."""
    lines = [f"| task | base | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for task in shares(seeds[0][names[0]], "tuned"):
        base = mean(shares(scores[name], "base")[task] for scores in seeds for name in names)
        cells = [f"{mean(shares(scores[name], 'tuned')[task] for scores in seeds):.0%}" for name in names]
        lines.append(f"| {task} | {base:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sample-scores"), help="folder of the runs")
    args, extra = parser.parse_known_args()  # other flags go to `train`
    results = [run_seed(seed, args.runs_dir, extra) for seed in args.seeds]
    seeds, cpu_s = [scores for scores, _ in results], [seconds for _, seconds in results]
    print(total_table(seeds))
    print(f"\nTuning stage: {mean(cpu_s):.0f} CPU-seconds ({min(cpu_s):.0f} to {max(cpu_s):.0f}).\n")
    print(task_table(seeds, ["held-out", "new phrasings"]))
    print()
    print(task_table(seeds, ["unseen task types"]))


if __name__ == "__main__":
    main()
