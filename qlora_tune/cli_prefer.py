"""The terminal face of preferences: votes written as pairs, and preference training with what it gained and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qlora_tune import terminal
from qlora_tune.cli_data import Output
from qlora_tune.cli_train import RunsDir, Stopped, score_run
from qlora_tune.config import TrainConfig
from qlora_tune.errors import ConfigError, DataError, TuneError
from qlora_tune.flags import AnyPreferSettings, given_flags
from qlora_tune.launch import lock_device, refuse_busy_device
from qlora_tune.model import quiet_stack
from qlora_tune.row_files import refuse_overwriting
from qlora_tune.runs import Run, new_run, open_run
from qlora_tune.scores import write_value
from qlora_tune.terminal import console, say
from qlora_tune.terminal_progress import TrainProgress

if TYPE_CHECKING:
    from qlora_tune.pair_scores import PairScores
    from qlora_tune.pair_setup import Origin, PreferenceSetup

    Plan = Callable[[Path, Sequence[str], Mapping[str, Any]], tuple[Origin | None, TrainConfig]]
    Fit = Callable[[TrainConfig, Run, PreferenceSetup, Origin | None, bool], None]

PAIRS_HELP = "Votes of compare --vote, or files of prompt, chosen and rejected; may repeat."
PairFiles = Annotated[tuple[str, ...], Parameter(help=PAIRS_HELP, negative=(), show_default=False)]
Resume = Annotated[Path | None, Parameter(help="Run to go on with, as it was set up.", show_default=False)]


def votes(run: Path, output: Output, *, runs_dir: RunsDir = "runs") -> None:
    """Write the votes of a RUN, or of a file of votes, as preference pairs (prompt, chosen, rejected) into OUTPUT."""
    from qlora_tune.preferences import read_pairs, write_pairs

    source = run if run.is_file() else open_run(run, runs_dir).path / "votes.jsonl"
    if not source.exists():
        raise DataError(f"{source}: no votes yet. Vote with: python -m qlora_tune compare {run} base --vote")
    refuse_overwriting([output], [source])
    pairs, report = read_pairs([source])
    write_pairs(output, pairs)
    say(f"{len(pairs)} pairs of {report.kept} votes: {output}")
    terminal.show_problems(report)


def prefer(
    source: Path | None = None,
    *,
    data: PairFiles = (),
    resume: Resume = None,
    settings: AnyPreferSettings = None,
) -> None:
    """Train the adapter of SOURCE (a run, or an adapter's folder) on preference pairs, into a run of its own."""
    from qlora_tune.pair_setup import find_origin
    from qlora_tune.prefer import make_settings

    def plan(name: Path, files: Sequence[str], flags: Mapping[str, Any]) -> tuple[Origin, TrainConfig]:
        origin = find_origin(name, flags.get("runs_dir", "runs"))
        return origin, make_settings(origin, files, flags)

    train_pairs("prefer", source, data, resume, given_flags(settings), plan, _fit)


def train_pairs(
    stage: str,
    source: Path | None,
    data: Sequence[str],
    resume: Path | None,
    flags: Mapping[str, Any],
    plan: Plan,
    fit: Fit,
) -> None:
    """Begin a training on pairs, where `plan` says from what and how, or resume one; `fit` trains in the run."""
    from qlora_tune.model import detect_device
    from qlora_tune.pair_setup import prepare_preferences

    if resume is not None:
        if source or data or flags:
            given = ", ".join(map(str, filter(None, [source, *data, *flags])))
            raise ConfigError(f"--resume goes on with the run's own settings; {given} can't be changed.")
        _resume(open_run(resume), stage, fit)
        return
    if source is None or not data:
        raise ConfigError(f"Name an instruction-tuned run or adapter, and pairs: {stage} RUN --data FILE")
    origin, config = plan(source, data, flags)
    kind = detect_device().kind
    refuse_busy_device(kind)
    setup = prepare_preferences(config, origin)
    with lock_device(kind) as lock:
        run = new_run(config)
        if origin:
            run.update_state(began_with=origin.place)
        lock.write_holder(run)
        quiet_stack(run.log_file)
        _fit_in(run, config, setup, origin, fit, False)


def _resume(run: Run, stage: str, fit: Fit) -> None:
    from qlora_tune.model import detect_device
    from qlora_tune.pair_setup import prepare_preferences, reopen_origin

    run.require_unfinished()
    if run.stage != stage:
        raise ConfigError(f"{run.path}: is no run of {stage}. Go on with: {run.resume_command()}")
    config = run.read_config()
    with lock_device(detect_device().kind) as lock:
        lock.write_holder(run)
        quiet_stack(run.log_file)
        try:
            origin, begun = reopen_origin(run)
            setup = prepare_preferences(config, origin)
        except TuneError as error:
            run.update_state(status="failed", reason=str(error))
            raise
        _fit_in(run, config, setup, origin, fit, begun)


def _fit_in(
    run: Run, config: TrainConfig, setup: PreferenceSetup, origin: Origin | None, fit: Fit, resume: bool
) -> None:
    """Say what is trained on what, and do it."""
    from qlora_tune.prepare import count_steps

    report = setup.report
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    say(
        f"run {run.path}\nbegins with {setup.trained.adapter}\n"
        f"{len(setup.train)} pairs to train on, {len(setup.heldout)} held out, of {report.rows_in} rows\n"
        f"{count_steps(config, len(setup.train))} steps of {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} = {effective} pairs, learning rate {config.learning_rate:g}"
    )
    if report.problems:
        say(f"{report.rejected} rows give no pair, {report.changed} changed; all in {run.path / 'problems.jsonl'}:")
        terminal.show_problems(report)
    if setup.taken:
        say(f"{setup.taken} held-out rows are no longer held out: their prompts are trained on")
    try:
        fit(config, run, setup, origin, resume)
    finally:
        run.forget_process()


def with_progress(fit: Callable[..., Any], run: Run, resume: bool, *setup: Any) -> Any:
    """Train with a bar of progress. Raises Stopped when a signal ended it."""
    with TrainProgress(resume) as progress:
        result = fit(*setup, resume=resume, on_metrics=progress.update, on_stop=progress.stopping)
    if result.status == "stopped":
        say(f"stopped and saved. Go on with: {run.resume_command()}")
        raise Stopped
    return result


def _fit(config: TrainConfig, run: Run, setup: PreferenceSetup, origin: Origin | None, resume: bool) -> None:
    from qlora_tune.prefer import prefer as fit

    say(f"{config.loss_type} with beta {config.beta:g}")
    result = with_progress(fit, run, resume, config, run, setup, origin)
    if result.scores:
        _show_pairs(result.scores)
    console.rule("instructions: base against tuned", align="left")
    score_run(run, config, result.model, setup.trained.chat, setup.examples, setup.unseen)
    _show_damage(run)
    say(f"chat with it:  python -m qlora_tune chat {run.path}\nexport it:     python -m qlora_tune export {run.path}")


def _show_pairs(scores: PairScores) -> None:
    console.rule("held-out pairs", align="left")

    def share(name: str) -> str:
        mean, low, high = getattr(scores, name)
        return f"{mean:.1%} ({low:.1%} to {high:.1%})"

    mean, low, high = scores.margin
    terminal.show_table(
        [f"{len(scores.pairs)} pairs", "before", "after (95 %)"],
        [
            ["chosen answer has the higher reward", "all 0", share("accuracy")],
            ["margin of the rewards", "0", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"],
            ["chosen answer is the likelier one", share("likelier_before"), share("likelier_after")],
        ],
    )


def _show_damage(run: Run) -> None:
    from qlora_tune.pair_scores import measure_damage

    before = Run(Path(run.read_state().get("began_with", "")))
    found = measure_damage(before, run)
    if found is None:
        return
    (mean, low, high), count = found
    change, least, most = (write_value("exact_match", value, signed=True) for value in (mean, low, high))
    say(f"exact match against {before.name}, same {count} rows: {change} ({least} to {most})")
