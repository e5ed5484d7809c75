"""The terminal face of scoring again: a run, or somebody's adapter or model on rows that are named."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_tune import terminal
from qlora_tune.cli_train import RunsDir, open_trained, score, score_rows, score_run
from qlora_tune.config import TrainConfig
from qlora_tune.contracts import read_contracts
from qlora_tune.data import DataReport
from qlora_tune.errors import ConfigError
from qlora_tune.launch import refuse_busy_gpu
from qlora_tune.model import detect_device, quiet_stack
from qlora_tune.runs import UNSEEN, Run, latest_run
from qlora_tune.terminal import say

OTHER_HELP = "Score on the rows of these files instead of the held-out ones; may repeat."
CONTRACTS_HELP = "TOML file of what the answers of each task must hold, instead of the run's own."
LONGEST_NAME = 100  # of files that were scored on, in the names of what is written of them
OUTPUT_HELP = "Folder for the scores of what is no run; NAME-scores by itself."


def evaluate(
    run: Path | None = None,
    *,
    data: Annotated[tuple[str, ...], Parameter(help=OTHER_HELP, negative=(), show_default=False)] = (),
    contracts: Annotated[Path | None, Parameter(help=CONTRACTS_HELP, show_default=False)] = None,
    output: Annotated[Path | None, Parameter(help=OUTPUT_HELP, show_default=False)] = None,
    load_in_4bit: Annotated[bool, Parameter(help="Hold a whole model in 4 bits.", negative=())] = False,
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    runs_dir: RunsDir = "runs",
) -> None:
    """Score RUN again, or any adapter (folder, zip, hub id) or whole model's folder on the rows of --data."""
    from qlora_tune.chat import find_adapter
    from qlora_tune.outsiders import is_model

    if contracts:
        read_contracts(contracts)
    name = run or latest_run(runs_dir).path
    with tempfile.TemporaryDirectory() as scratch:
        place, found = (name, None) if is_model(name) else find_adapter(name, runs_dir, Path(scratch))
        if found is None:
            _evaluate_outsider(name, place, data, contracts, output, load_in_4bit, model_name_or_path)
            return
    if output or load_in_4bit:
        raise ConfigError("--output and --load-in-4bit are for what is no run: a run keeps its scores in its folder.")
    quiet_stack(found.log_file)
    _evaluate_run(found, data, contracts, model_name_or_path)


def _evaluate_run(run: Run, data: tuple[str, ...], contracts: Path | None, model_name_or_path: str | None) -> None:
    from qlora_tune.prepare import other_examples

    config = run.read_config()
    if contracts:
        config = config.model_copy(update={"contracts": str(contracts)})
    if not config.score_rows:  # that was for the end of training
        config = config.model_copy(update={"score_rows": TrainConfig().score_rows})
    trained = open_trained(run, model_name_or_path)
    refuse_busy_gpu(trained.device)
    if not data:
        score_run(run, config, trained.load(), trained.chat, run.read_heldout(), run.read_unseen())
        return
    examples, report = other_examples(run, data, trained.chat)
    _show_left_out(report)
    # Files and folders are named as they are called, "." too. "" and "unseen" are the run's own rows.
    name = "-".join(Path(file).resolve().stem for file in data)[:LONGEST_NAME]
    score(run, config, trained.load(), trained.chat, examples, f"other-{name}" if name in ("", UNSEEN) else name)


def _show_left_out(report: DataReport) -> None:
    if report.problems:
        say(f"{report.rejected} of {report.rows_in} rows not scored:")
        terminal.show_problems(report)


def _evaluate_outsider(
    name: Path,
    place: Path,
    data: tuple[str, ...],
    contracts: Path | None,
    output: Path | None,
    load_in_4bit: bool,
    model_name_or_path: str | None,
) -> None:
    from qlora_tune.comparison import write_comparison
    from qlora_tune.outsiders import find_rows, open_outsider

    if not data:
        raise ConfigError(f"{name} comes with no held-out rows. Name rows that are new to it with --data FILE.")
    folder = output or Path(f"{name.stem if name.suffix == '.zip' else name.resolve().name}-scores")
    if folder.exists() and not (folder / "scores.json").is_file():
        raise ConfigError(f"{folder}: is there already and holds no scores. Choose another place with --output.")
    if (folder / "state.json").exists():
        raise ConfigError(f"{folder}: is a run, which keeps its own scores. Choose another place with --output.")
    refuse_busy_gpu(detect_device())
    outsider = open_outsider(place, model_name_or_path, load_in_4bit)
    examples, report = find_rows(outsider, data)
    _show_left_out(report)
    if outsider.trained_on is None:
        say("not known what it was trained on: the rows may not be new to it")
    changes = {"contracts": str(contracts) if contracts else None, "model_name_or_path": outsider.base}
    config = TrainConfig().model_copy(update=changes)
    comparison = score_rows(config, outsider.model, outsider.chat, examples, plain_text=True)
    folder.mkdir(parents=True, exist_ok=True)
    terminal.show_comparison(comparison)
    say(f"all answers: {write_comparison(Run(folder), comparison)}")
