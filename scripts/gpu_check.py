"""Check and measure the package on a CUDA machine; scripts/gpu_check.sh prepares the environment and calls this.

Steps, each a process of its own with its own time limit: the gpu tests, the default command, and training steps of
two real model shapes with random weights (scripts/gpu_measure.py). What became of each step goes to
one JSON as soon as it is known. Exit code: 0 all steps passed, 1 some failed, 2 no CUDA device, or no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from gpu_measure import EFFECTIVE_ROWS, FIGURES
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "pyarrow", "triton")
TAIL_LINES = 80


@dataclass(frozen=True)
class Step:
    """One check: its command, its time limit [s], and how its figures are read once it ended well.

    `read_figures` gets the process's output and may raise ValueError when that shows a failure after all.
    """

    name: str
    command: list[str]
    limit_s: int
    read_figures: Callable[[str], dict[str, Any]]


def main() -> int:
    """Run all steps. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Check and measure the package on a CUDA machine.")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--cpu-dry-run", action="store_true", help="same paths on the CPU, on tiny shapes")
    options = parser.parse_args()
    if find_version("torch") is None:
        print(f"torch is not installed for {sys.executable}, so no GPU can be used from it.")
        return 2
    environment = describe_environment()
    if environment["gpu"] is None and not options.cpu_dry_run:
        print("No CUDA device is visible here, so there is nothing to check. --cpu-dry-run tries the script itself.")
        return 2
    target = options.json or default_target(environment["gpu"], options.cpu_dry_run)
    target.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for step in plan_steps(Path(scratch), options.cpu_dry_run):
            print(f"… {step.name}", flush=True)
            results.append(run_step(step, Path(scratch)))
            report = {"environment": environment, "dry_run": options.cpu_dry_run, "steps": results}
            target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(environment, results)
    print(f"results: {target}")
    return 0 if all(result["status"] == "ok" for result in results) else 1


def default_target(gpu: str | None, dry_run: bool) -> Path:
    """Where the results go unasked: $OUT where it is set, else benchmarks/gpu; a dry run leaves no trace in git."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]) / "gpu_check.json"
    if dry_run or gpu is None:
        return ROOT / "build" / "gpu_check.json"
    label = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return ROOT / "benchmarks" / "gpu" / f"{time.strftime('%Y-%m-%d')}-{label}.json"


def plan_steps(scratch: Path, dry_run: bool) -> list[Step]:
    """The steps in order; their limits add up to less than nine minutes."""
    python, runs = sys.executable, scratch / "runs"
    measure = [python, str(Path(__file__).resolve().with_name("gpu_measure.py"))]
    short = ["--cpu-dry-run"] if dry_run else []
    tests = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfEs", "-vv"]
    tests += ["--timeout", "100", str(ROOT / "tests")]
    default = [python, "-m", "qlora_tune", "--runs-dir", str(runs)]
    if dry_run:
        default = [python, "-m", "qlora_tune", "train", "--preset", "builtin", "--max-steps", "3"]
        default += ["--score-rows", "4", "--runs-dir", str(runs)]
    measured = [("tiny", 1, 60), ("tiny", 4, 60)]
    if not dry_run:
        measured = [("qwen3-1.7b", 1, 50), ("qwen3-1.7b", 4, 40), ("qwen3-8b", 1, 85), ("qwen3-8b", 4, 60)]
    return [
        Step("gpu tests", tests, 140, lambda output: read_test_figures(output, dry_run)),
        Step("default command", default, 150, lambda _: read_run_figures(runs, dry_run)),
        *(
            Step(
                f"{shape}, {rows} x {EFFECTIVE_ROWS // rows} rows",
                [*measure, shape, str(rows), *short],
                limit,
                read_own_figures,
            )
            for shape, rows, limit in measured
        ),
    ]


def run_step(step: Step, scratch: Path) -> dict[str, Any]:
    """Run one step to its end or its limit. Never raises: what went wrong is the result."""
    log = scratch / "log.txt"
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        # A process group of its own, so that nothing it started outlives its limit and keeps the GPU.
        process = subprocess.Popen(step.command, cwd=scratch, stdout=output, stderr=subprocess.STDOUT, process_group=0)
        try:
            status = "ok" if process.wait(step.limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.perf_counter() - begin
    text = log.read_text(encoding="utf-8", errors="replace")
    figures: dict[str, Any] = {}
    if status == "ok":
        try:
            figures = step.read_figures(text)
        except (ValueError, LookupError, OSError) as error:
            status, text = "failed", f"{text}\n{type(error).__name__}: {error}"
    result = {"name": step.name, "status": status, "seconds": round(seconds, 1), "figures": figures}
    return (
        result
        if status == "ok"
        else {**result, "exit_code": process.returncode, "output": text.splitlines()[-TAIL_LINES:]}
    )


def read_test_figures(output: str, dry_run: bool) -> dict[str, Any]:
    """The counts in pytest's last line; on a GPU a skipped test is a failure, because something hid the GPU."""
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    if not dry_run and (counts.get("skipped") or not counts.get("passed")):
        raise ValueError(f"tests were skipped on a machine with a GPU: {counts}")
    return counts


def read_run_figures(runs: Path, dry_run: bool) -> dict[str, Any]:
    """What the newest run's folder says about the default command."""
    folder = max(runs.iterdir(), key=lambda path: path.stat().st_mtime)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("device", "precision", "steps", "eval_loss", "score_base", "score_tuned")
    figures = {name: state[name] for name in names}
    if not dry_run and figures["device"].startswith("CPU"):
        raise ValueError(f"the default command trained on {figures['device']}")
    figures["training_s"] = metrics[-1]["elapsed_s"]
    figures["tokens_per_s"] = round([entry["tokens_per_s"] for entry in metrics if "tokens_per_s" in entry][-1])
    figures["peak_allocated_bytes"] = max(entry["memory_bytes"] for entry in metrics)
    return figures


def read_own_figures(output: str) -> dict[str, Any]:
    """What a measuring process handed over."""
    lines = [line for line in output.splitlines() if line.startswith(FIGURES)]
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix(FIGURES))
    return figures


def describe_environment() -> dict[str, Any]:
    """Versions, GPU and driver, and the requirements that the machine doesn't meet."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        **{name: find_version(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "driver": read_driver(),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "compute_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "unmet_requirements": find_unmet(),
    }


def find_version(name: str) -> str | None:
    """A package's version, or None when it isn't there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_driver() -> str | None:
    """The NVIDIA driver's version, or None when it can't be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout else None


def find_unmet() -> list[str]:
    """Requirements of the project, and of all that it needs in turn, which this machine doesn't meet."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [("qlora-tune", line) for line in project["dependencies"]]
    unmet, seen = [], set()
    while waiting:
        owner, line = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = find_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{owner} needs {line}, found {found or 'none'}")
        elif requirement.name not in seen:
            seen.add(requirement.name)
            waiting += [(requirement.name, each) for each in requires(requirement.name) or []]
    return sorted(unmet)


def print_table(environment: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Print each step's fate and main figures, and the end of the output of those that failed."""
    print(f"\n{environment['gpu'] or 'CPU (dry run)'}, torch {environment['torch']}, driver {environment['driver']}")
    for problem in environment["unmet_requirements"]:
        print(f"unmet: {problem}")
    print(f"{'step':28} {'result':10} {'seconds':>8} {'tokens/s':>9} {'peak GB':>8}  more")
    for result in results:
        figures = result["figures"]
        memory = figures.get("peak_allocated_bytes")
        more = [
            f"{name} {figures[name]}" for name in ("passed", "skipped", "score_base", "score_tuned") if name in figures
        ]
        print(
            f"{result['name']:28} {result['status']:10} {result['seconds']:8.1f} {figures.get('tokens_per_s', ''):>9} "
            f"{f'{memory / 1e9:.2f}' if memory else '':>8}  {', '.join(more)}"
        )
    for result in results:
        if result["status"] != "ok":
            print(f"\n--- {result['name']}: {result['status']}", *result["output"], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
