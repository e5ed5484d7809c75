"""The terminal face of training and scoring: make or find a run, train it, let it answer, say what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qlora_tune import processes, terminal
from qlora_tune.adapters import describe_adapter
from qlora_tune.cli_data import DataFiles
from qlora_tune.config import AUTO, ResolvedConfig, TrainConfig, resolve_config
from qlora_tune.contracts import NO_CONTRACTS, read_contracts
from qlora_tune.errors import ConfigError, TuneError
from qlora_tune.flags import AnySettings, given_flags
from qlora_tune.launch import DeviceLock, lock_device, refuse_busy_device
from qlora_tune.model import quiet_stack
from qlora_tune.plan import pick_here
from qlora_tune.runs import UNSEEN, Run, latest_run, new_run, open_run
from qlora_tune.terminal import console, say
from qlora_tune.terminal_progress import TrainProgress, scoring_progress

if TYPE_CHECKING:
    from qlora_tune.chat_format import ChatFormat
    from qlora_tune.comparison import Comparison
    from qlora_tune.export import Trained
    from qlora_tune.prepare import Setup
    from qlora_tune.rotation import Planned
    from qlora_tune.shapes import Example

    Choose = Callable[[list[Example]], list[Example]]  # which unseen rows to score

ConfigFile = Annotated[Path | None, Parameter(help="TOML file of settings.", show_default=False)]
FIT_TERMINAL = 7  # columns of the experiment's table; its file has them all
RunsDir = Annotated[str, Parameter(help="Folder that holds all runs.")]


class Stopped(Exception):  # noqa: N818 - a stop is no error
    """A run was stopped by a signal and saved; the exit code tells the shell."""

    code = 130


def train(
    *files: DataFiles,
    config: ConfigFile = None,
    resume: Annotated[Path | None, Parameter(help="Run to go on with, as it was set up.", show_default=False)] = None,
    settings: AnySettings = None,
) -> None:
    """Train an adapter on FILES and score it on held-out rows."""
    if resume is not None:
        given = [*files, *given_flags(settings), *(["config"] if config else [])]
        if given:
            raise ConfigError(
                f"--resume goes on with the run's own settings; {', '.join(map(str, given))} can't be changed. "
                "Start a new run instead."
            )
        _resume(open_run(resume))
        return
    launched = _find_launched(config) if config and not files and not given_flags(settings) else None
    if launched:
        run = _start(launched)
    else:
        resolved = resolve_settings(files, config, settings)
        if resolved.config.holdout_tasks == [AUTO]:
            if processes.count() > 1:
                raise ConfigError("holdout_tasks auto trains one run after the other, in one process only.")
            _rotate(resolved)
            return
        run = train_settings(resolved)
    say(f"chat with it:  python -m qlora_tune chat {run.path}\nexport it:     python -m qlora_tune export {run.path}")


def resolve_settings(files: tuple[str, ...], config: Path | None, settings: Any) -> ResolvedConfig:
    flags = given_flags(settings)
    if files:
        flags["data"] = [*files, *flags.get("data", [])]
    return resolve_config(flags, config, pick_here)


def find_run(name: Path | None, runs_dir: str) -> Run:
    run = open_run(name, runs_dir) if name else latest_run(runs_dir)
    run.require_adapter()
    quiet_stack(run.log_file)
    return run


def open_trained(run: Run, model_name_or_path: str | None) -> Trained:
    from qlora_tune.export import open_adapter

    return open_adapter(run.adapter, model_name_or_path)


def train_settings(resolved: ResolvedConfig) -> Run:
    """Make a run, train, score. Raises Stopped when a signal ended it."""
    from qlora_tune.model import detect_device
    from qlora_tune.prepare import prepare

    kind = detect_device().kind
    refuse_busy_device(kind)
    setup = prepare(resolved.config)
    with lock_device(kind) as lock:
        run = new_run(resolved.config)
        lock.write_holder(run)
        quiet_stack(run.log_file)
        say(f"preset {resolved.config.preset}: {resolved.preset_reason}")
        return _fit(run, resolved.config, setup, resume=False)


def _find_launched(config: Path) -> Run | None:
    """The run whose settings this file holds, where it was made and waits for its process."""
    run = Run(config.parent)
    waits = config.name == "config.toml" and (run.path / "state.json").is_file()
    return run if waits and run.read_state()["status"] == "preparing" else None


def _start(run: Run, resume: bool = False) -> Run:
    """Train a run whose folder exists. Raises Stopped when a signal ended it."""
    from qlora_tune.model import detect_device

    with lock_device(detect_device().kind) as lock:
        return _train_locked(run, lock, resume)


def _train_locked(run: Run, lock: DeviceLock, resume: bool, choose: Choose = list) -> Run:
    from qlora_tune.prepare import prepare

    lock.write_holder(run)
    quiet_stack(run.log_file)
    config = run.read_config()
    try:
        return _fit(run, config, prepare(config), resume, choose)
    except TuneError as error:
        if run.read_state()["status"] == "preparing":
            run.update_state(status="failed", reason=str(error))
        raise


def _rotate(resolved: ResolvedConfig) -> None:
    """Train on all tasks, then without each cluster of them, and show what each task gained unseen and seen."""
    from qlora_tune import rotation
    from qlora_tune.memory import forget_peak
    from qlora_tune.model import detect_device, free_memory

    device = detect_device()
    refuse_busy_device(device.kind)
    experiment = rotation.open_rotation(resolved.config)
    count = len(experiment.planned)
    say(f"experiment {experiment.path}: {count} runs, one on all tasks and one without each of these clusters")
    for planned in experiment.planned[1:]:
        say(f"{planned.run.name}: {', '.join(planned.tasks)}")
    say(f"preset {resolved.config.preset}: {resolved.preset_reason}")
    with lock_device(device.kind) as lock:
        for number, planned in enumerate(experiment.planned, 1):
            what = f"without {', '.join(planned.tasks)}" if planned.tasks else "all tasks"
            console.rule(f"run {number} of {count}: {what}", align="left")
            free_memory()
            forget_peak(device)
            try:
                _go_on(planned, lock, experiment.choose_rows if planned.tasks else list)
            except (Stopped, KeyboardInterrupt):
                say(f"the experiment goes on with the same command and --run-name {experiment.path.name}")
                raise
    table = experiment.write_table()
    console.rule("task types never seen", align="left")
    heads, *rows = rotation.table_rows(*experiment.read_gains())
    terminal.show_table(heads[:FIT_TERMINAL], [row[:FIT_TERMINAL] for row in rows])
    say(f"table: {table}\nits runs: python -m qlora_tune runs --runs-dir {experiment.path}")


def _go_on(planned: Planned, lock: DeviceLock, choose: Choose) -> None:
    """Bring one run of an experiment to its scores, from wherever it stands."""
    run = planned.run
    if planned.is_trained():
        if planned.is_scored():
            say(f"finished and scored already: {run.path}")
            return
        trained = open_trained(run, None)
        score_run(run, run.read_config(), trained.load(), trained.chat, run.read_heldout(), choose(run.read_unseen()))
        return
    resume = planned.is_made()
    _train_locked(run if resume else new_run(planned.config), lock, resume, choose)


def _resume(run: Run) -> None:
    run.require_unfinished()
    if run.read_config().preference_data:
        raise ConfigError(f"{run.path}: was trained on preferences. Go on with: {run.resume_command()}")
    _start(run, resume=True)


def _fit(run: Run, config: TrainConfig, setup: Setup, resume: bool, choose: Choose = list) -> Run:
    from qlora_tune.prepare import data_files

    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    several = f" in {processes.count()} processes" if processes.count() > 1 else ""
    say(
        f"run {run.path}\n"
        f"data {', '.join(data_files(config))}\n"
        f"base {setup.base.name} {'in 4-bit ' + config.bnb_4bit_quant_type if config.load_in_4bit else 'unquantized'}, "
        f"{setup.precision}, on {setup.device.name}\n"
        f"{setup.total_steps(config)} steps of {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} = {effective} rows{several}, learning rate {config.learning_rate:g}, "
        f"{describe_adapter(config)}"
    )
    for file, notes in setup.data.report.notes.items():
        for note in notes:
            say(f"{Path(file).name}: {note}")
    terminal.show_data_summary(setup.data.summary())
    report = setup.data.report
    if report.rejected or report.changed:
        say(f"{report.rejected} rows rejected, {report.changed} changed; all in {run.path / 'problems.jsonl'}:")
        terminal.show_problems(report)
    try:
        return _fit_and_score(run, config, setup, resume, choose)
    finally:
        run.forget_process()


def _fit_and_score(run: Run, config: TrainConfig, setup: Setup, resume: bool, choose: Choose) -> Run:
    from qlora_tune.train import train as fit

    with TrainProgress(resume) as progress:
        result = fit(
            config, run, setup, resume=resume, on_metrics=progress.update, on_stop=progress.stopping, on_note=say
        )
    if result.status == "stopped":
        say(f"stopped and saved. Go on with: {run.resume_command()}")
        raise Stopped
    state = run.read_state()
    estimated = sum(state["estimated_parts"].values())
    say(f"memory: {state['peak_bytes'] / 1e9:.2f} GB at most, {estimated / 1e9:.2f} GB estimated")
    loss = state.get("eval_loss")
    if loss is not None:
        say(f"held-out loss of the adapter that was kept: {loss:.4f}")
    console.rule("score", align="left")
    try:
        data = setup.data
        score_run(run, config, result.model, setup.chat, data.heldout_examples, choose(data.unseen_examples))
    except KeyboardInterrupt:
        say(f"trained and saved, not scored. Score it with: python -m qlora_tune evaluate {run.path}")
        raise
    return run


def score_run(
    run: Run, config: TrainConfig, model: Any, chat: ChatFormat, heldout: list[Example], unseen: list[Example]
) -> None:
    """Score the held-out rows, then those of tasks that were kept out of training."""
    score(run, config, model, chat, heldout)
    if unseen:
        console.rule("task types it never saw", align="left")
        score(run, config, model, chat, unseen, UNSEEN)


def score(run: Run, config: TrainConfig, model: Any, chat: ChatFormat, examples: list[Example], name: str = "") -> None:
    """Score rows and keep the scores in the run; under a name where they are not its held-out rows."""
    from qlora_tune.comparison import HEADLINE, write_comparison
    from qlora_tune.report import write_report

    if not examples or not config.score_rows:
        why = "--score-rows is 0" if examples else "no rows are held out (--heldout-data FILE)"
        say(f"not scored: {why}")
        return
    comparison = score_rows(config, model, chat, examples, plain_text=not name, run=run)
    answers = write_comparison(run, comparison, name)
    if not name:
        total = comparison.total()
        run.update_state(score_base=total.base[HEADLINE], score_tuned=total.tuned[HEADLINE])
    terminal.show_comparison(comparison)
    say(f"all answers: {answers}")
    if name in ("", UNSEEN):
        say(f"report: {write_report(run)}")


def score_rows(
    config: TrainConfig,
    model: Any,
    chat: ChatFormat,
    examples: list[Example],
    *,
    plain_text: bool,
    run: Run | None = None,
) -> Comparison:
    """Let a model answer rows, with progress; plain text is read too where asked. A run is told how far it is."""
    from qlora_tune.evaluate import compare
    from qlora_tune.prepare import find_plain_text

    with scoring_progress() as progress:

        def on_progress(who: str, done: int, total: int) -> None:
            progress(who, done, total)
            if run:
                run.update_state(scoring=[who, done, total])

        return compare(
            model,
            chat,
            examples,
            score_rows=config.score_rows,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.per_device_eval_batch_size,
            seed=config.seed,
            contracts=read_contracts(Path(config.contracts)) if config.contracts else NO_CONTRACTS,
            plain_text=find_plain_text(config) if plain_text else None,
            on_progress=on_progress,
        )
