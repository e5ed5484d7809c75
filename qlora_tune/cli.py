"""The terminal face: flags from the settings' one declaration, commands thin over the package's functions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.markup import escape

from qlora_tune import __version__, terminal
from qlora_tune.cli_data import DataFiles, check, mix, pairs, select
from qlora_tune.config import (
    BUILTIN,
    ResolvedConfig,
    TrainConfig,
    list_presets,
    pick_preset,
    resolve_config,
    shipped_path,
)
from qlora_tune.errors import ConfigError, DataError, RunError, TuneError, join_problems
from qlora_tune.flags import AnySettings, given_flags, suggest_command, with_dashes
from qlora_tune.model import quiet_stack
from qlora_tune.runs import Run, latest_run, list_runs, new_run, open_run
from qlora_tune.terminal import console, say

if TYPE_CHECKING:
    from qlora_tune.chat_format import ChatFormat
    from qlora_tune.export import Trained
    from qlora_tune.prepare import Setup
    from qlora_tune.shapes import Example

HELP = """Instruction-tune a language model with QLoRA on one small GPU, or none.

Without a command: the whole job on the built-in base and sample.jsonl, offline: check, train, score before and
after, export."""


ConfigFile = Annotated[Path | None, Parameter(help="TOML file of settings.", show_default=False)]
OTHER_HELP = "Score on the rows of these files instead of the held-out ones; may repeat."
RunsDir = Annotated[str, Parameter(help="Folder that holds all runs.")]

app = App(name="qlora_tune", help=HELP, version=__version__, version_flags=["--version"])
for command in (check, mix, select, pairs):
    app.command(command)


@app.default
def demo(*, runs_dir: RunsDir = "runs", seed: Annotated[str, Parameter(help="Seed of the whole run.")] = "42") -> None:
    """The whole job on the built-in base and sample.jsonl."""
    resolved = resolve_config({"preset": BUILTIN, "runs_dir": runs_dir, "seed": seed})
    resolved = dataclasses.replace(resolved, preset_reason="the default command works offline on any machine")
    console.rule("check the data", align="left")
    check()
    console.rule("train", align="left")
    run = _train(resolved)
    console.rule("task types that it never saw", align="left")
    evaluate(run.path, data=(str(shipped_path("sample_unseen.jsonl")),))
    console.rule("export", align="left")
    export(run.path)
    console.rule("next", align="left")
    name, reason = _pick_auto()
    say(
        f"chat with it:         python -m qlora_tune chat {run.path}\n"
        f"look at the tokens:   python -m qlora_tune preview\n"
        f"train on your data:   python -m qlora_tune train YOUR.jsonl\n"
        f"preset here:          {name} ({reason})"
    )


@app.command
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
        _resume(resume)
        return
    run = _train(_resolve(files, config, settings))
    say(f"chat with it:  python -m qlora_tune chat {run.path}\nexport it:     python -m qlora_tune export {run.path}")


@app.command
def preview(
    *files: DataFiles,
    rows: Annotated[int, Parameter(help="How many sequences to show.", validator=Number(gte=1))] = 3,
    line: Annotated[int | None, Parameter(help="Show the row of this line instead.", show_default=False)] = None,
    config: ConfigFile = None,
    settings: AnySettings = None,
) -> None:
    """Show rows of FILES as the tokens that will be trained on, the learned ones on green."""
    from qlora_tune.prepare import prepare

    setup = prepare(_resolve(files, config, settings).config)
    sequences = setup.data.train + setup.data.heldout
    if line is not None:
        sequences = [sequence for sequence in sequences if sequence.source.endswith(f":{line}")]
    if not sequences:
        reasons = [str(problem) for problem in setup.data.report.problems if problem.line == line]
        if reasons:
            raise DataError(join_problems(f"Line {line} is not trained or scored on:", reasons))
        raise DataError(f"Line {line} holds no row that is trained or scored on. See: python -m qlora_tune check FILE")
    for sequence in sequences[: None if line else rows]:
        figures = f"{len(sequence.input_ids)} tokens, {sequence.learned} learned"
        console.rule(f"{sequence.source}   {figures}", align="left")
        console.print(terminal.show_tokens(setup.tokenizer, sequence.input_ids, sequence.labels), soft_wrap=True)
    console.rule()
    terminal.show_report(setup.data.report)
    terminal.show_data_summary(setup.data.summary())
    ends = sum(setup.chat.end_of_turn_id in sequence.labels for sequence in setup.data.train)
    say(f"end-of-turn {setup.chat.end_of_turn} is learned in {ends} of {len(setup.data.train)} sequences")
    say(f"learned tokens are {'on green' if console.is_terminal else 'between ⟦ and ⟧'}")


@app.command
def presets() -> None:
    """List the presets."""
    terminal.show_presets(list_presets())


@app.command(name="config")
def show_config(
    *,
    config: ConfigFile = None,
    markdown: Annotated[bool, Parameter(help="Print all settings as markdown, for docs/settings.md.")] = False,
    settings: AnySettings = None,
) -> None:
    """Print every setting, its value and where the value came from."""
    if markdown:
        print(terminal.settings_markdown(), end="")
        return
    terminal.show_config(_resolve((), config, settings))


@app.command
def runs(*, runs_dir: RunsDir = "runs") -> None:
    """List all runs with their state and scores."""
    terminal.show_runs(list_runs(runs_dir))


@app.command
def evaluate(
    run: Path | None = None,
    *,
    data: Annotated[tuple[str, ...], Parameter(help=OTHER_HELP, negative=(), show_default=False)] = (),
    runs_dir: RunsDir = "runs",
) -> None:
    """Score a finished run again: base and tuned model answer the held-out rows, or those of other files."""
    from qlora_tune.prepare import other_examples

    found = _find_run(run, runs_dir)
    config, trained = found.read_config(), _open_run(found, None)
    examples, report = other_examples(found, data, trained.chat) if data else (found.read_heldout(), None)
    if report and report.problems:
        say(f"{report.rejected} of {report.rows_in} rows not scored:")
        terminal.show_problems(report)
    name = "-".join(Path(file).stem for file in data)
    _score(found, config, trained.load(), trained.chat, examples, name)


@app.command
def chat(
    run: Path | None = None,
    *,
    runs_dir: RunsDir = "runs",
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, Parameter(help="Sample from the likeliest tokens of this share.")] = 1.0,
    max_new_tokens: Annotated[int, Parameter(help="Longest answer [tokens].")] = 256,
) -> None:
    """Chat with the model of a run or an adapter's folder, tuned or base; the newest run without a name."""
    from qlora_tune.export import open_adapter
    from qlora_tune.generate import fit_context, stream_reply

    if not 0 <= temperature < 100 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError("Expected --temperature from 0 to 100, --top-p above 0 and at most 1, --max-new-tokens >= 1.")
    if run is not None and run.suffix == ".zip":
        raise RunError(f"{run}: unpack it first, then chat with the folder.")
    if run is not None and (run / "adapter_config.json").is_file():
        trained = open_adapter(run, model_name_or_path)
    else:
        trained = _open_run(_find_run(run, runs_dir), model_name_or_path)
    model = trained.load()
    say(f"adapter {trained.adapter}, base {trained.base.name}")

    def reply(messages: Any, tuned: bool) -> Any:
        with contextlib.nullcontext() if tuned else model.disable_adapter():
            yield from stream_reply(
                model,
                trained.chat,
                messages,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
            )

    terminal.chat_loop(reply, lambda messages: fit_context(model, trained.chat, messages, max_new_tokens))


@app.command
def export(
    run: Path | None = None,
    *,
    runs_dir: RunsDir = "runs",
    output: Annotated[Path | None, Parameter(help="Zip or folder to write.", show_default=False)] = None,
    merged: Annotated[bool, Parameter(help="Write the merged 16-bit model instead of the adapter.")] = False,
    into: Annotated[
        Literal["quantized", "original"],
        Parameter(help="Merge into the dequantized 4-bit base (what was trained), or the original one (close)."),
    ] = "quantized",
    dtype: Annotated[Literal["bfloat16", "float32"], Parameter(help="Number format of the merged model.")] = "bfloat16",
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
) -> None:
    """Export a run's adapter as a zip, or the merged model; each is loaded again and compared."""
    from qlora_tune.export import export_adapter, merge_adapter

    found = _find_run(run, runs_dir)
    trained = _open_run(found, model_name_or_path)
    if merged:
        target = output or found.path / "merged"
        divergence = merge_adapter(trained, found, target, into, dtype)
        done = f"merged model: {target} (loaded again; mean KL from what was trained {divergence:.1e} nats)"
    else:
        target = output or found.path / f"{found.name}.zip"
        export_adapter(trained, found, target)
        size = target.stat().st_size / 1e6
        done = f"adapter: {target} ({size:.1f} MB; unpacked, loaded again, answers equal)"
    say(done)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 for anything the user can mend, 130 interrupted."""
    tokens = [with_dashes(token) for token in (sys.argv[1:] if arguments is None else arguments)]
    quiet_stack()
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # text that can't be shown or read must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(suggest_command(tokens, list(app)) or str(error))
    except TuneError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'this machine'}: {error.strerror or error}")
    except KeyboardInterrupt:
        terminal.errors.print("interrupted")
        return 130
    except _Stopped as stopped:
        return stopped.code
    return 0


class _Stopped(Exception):  # noqa: N818 - a stop is no error
    """A run was stopped by a signal and saved; the exit code tells the shell."""

    code = 130


def _fail(message: str) -> int:
    terminal.errors.print(f"[bold red]error:[/] {escape(terminal.printable(message))}", soft_wrap=True)
    return 2


def _resolve(files: tuple[str, ...], config: Path | None, settings: Any) -> ResolvedConfig:
    flags = given_flags(settings)
    if files:
        flags["data"] = [*files, *flags.get("data", [])]
    return resolve_config(flags, config, _pick_auto)


def _pick_auto() -> tuple[str, str]:
    from qlora_tune.base import is_downloaded
    from qlora_tune.model import detect_device

    device = detect_device()
    return pick_preset(device.kind, device.memory_bytes / 1e9, is_downloaded)


def _find_run(name: Path | None, runs_dir: str) -> Run:
    run = open_run(name, runs_dir) if name else latest_run(runs_dir)
    run.require_adapter()
    quiet_stack(run.log_file)
    return run


def _open_run(run: Run, model_name_or_path: str | None) -> Trained:
    from qlora_tune.export import open_adapter

    return open_adapter(run.adapter, model_name_or_path)


def _train(resolved: ResolvedConfig) -> Run:
    """Make a run, train, score. Raises _Stopped when a signal ended it."""
    from qlora_tune.prepare import prepare

    setup = prepare(resolved.config)
    run = new_run(resolved.config)
    quiet_stack(run.log_file)
    say(f"preset {resolved.config.preset}: {resolved.preset_reason}")
    return _fit(run, resolved.config, setup, resume=False)


def _resume(path: Path) -> None:
    from qlora_tune.prepare import prepare

    run = open_run(path)
    run.require_unfinished()
    quiet_stack(run.log_file)
    config = run.read_config()
    _fit(run, config, prepare(config), resume=True)


def _fit(run: Run, config: TrainConfig, setup: Setup, resume: bool) -> Run:
    from qlora_tune.prepare import data_files
    from qlora_tune.train import train as fit

    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    say(
        f"run {run.path}\n"
        f"data {', '.join(data_files(config))}\n"
        f"base {setup.base.name} {'in 4-bit ' + config.bnb_4bit_quant_type if config.load_in_4bit else 'unquantized'}, "
        f"{setup.precision}, on {setup.device.name}\n"
        f"{setup.total_steps(config)} steps of {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} = {effective} rows, learning rate {config.learning_rate:g}, "
        f"LoRA r {config.lora_r}"
    )
    for file, notes in setup.data.report.notes.items():
        for note in notes:
            say(f"{Path(file).name}: {note}")
    terminal.show_data_summary(setup.data.summary())
    report = setup.data.report
    if report.rejected or report.changed:
        say(f"{report.rejected} rows rejected, {report.changed} changed; all in {run.path / 'problems.jsonl'}:")
        terminal.show_problems(report)
    with terminal.TrainProgress(resume) as progress:
        result = fit(config, run, setup, resume=resume, on_metrics=progress.update, on_stop=progress.stopping)
    if result.status == "stopped":
        say(f"stopped and saved. Go on with: python -m qlora_tune train --resume {run.path}")
        raise _Stopped
    loss = run.read_state().get("eval_loss")
    if loss is not None:
        say(f"held-out loss of the adapter that was kept: {loss:.4f}")
    console.rule("score", align="left")
    try:
        _score(run, config, result.model, setup.chat, setup.data.heldout_examples)
    except KeyboardInterrupt:
        say(f"trained and saved, not scored. Score it with: python -m qlora_tune evaluate {run.path}")
        raise
    return run


def _score(
    run: Run, config: TrainConfig, model: Any, chat: ChatFormat, examples: list[Example], name: str = ""
) -> None:
    from qlora_tune import evaluate as scores

    if not examples or not config.score_rows:
        why = "--score-rows is 0" if examples else "no rows are held out (--heldout-data FILE)"
        say(f"not scored: {why}")
        return
    with terminal.scoring_progress() as progress:
        comparison = scores.compare(
            model,
            chat,
            examples,
            score_rows=config.score_rows,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.per_device_eval_batch_size,
            seed=config.seed,
            on_progress=progress,
        )
    answers = scores.write_comparison(run, comparison, name)
    if not name:
        total = comparison.total()
        run.update_state(score_base=total.base / total.rows, score_tuned=total.tuned / total.rows)
    terminal.show_comparison(comparison)
    say(f"all answers: {answers}")
