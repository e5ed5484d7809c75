"""The terminal face: flags from the settings' one declaration, commands thin over the package's functions."""

from __future__ import annotations

import dataclasses
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.markup import escape

from qlora_tune import __version__, disk, processes, terminal
from qlora_tune.cli_compare import compare
from qlora_tune.cli_data import DataFiles, check, mix, pairs, select
from qlora_tune.cli_evaluate import evaluate
from qlora_tune.cli_grow import grow, review
from qlora_tune.cli_prefer import prefer, votes
from qlora_tune.cli_reward import reward
from qlora_tune.cli_share import push, reproduce
from qlora_tune.cli_train import (
    ConfigFile,
    RunsDir,
    Stopped,
    find_run,
    open_trained,
    resolve_settings,
    train,
    train_settings,
)
from qlora_tune.config import BUILTIN, list_presets, resolve_config, shipped_path
from qlora_tune.errors import ConfigError, DataError, ModelError, TuneError, join_problems
from qlora_tune.flags import AnySettings, suggest_command, with_dashes
from qlora_tune.model import quiet_stack
from qlora_tune.plan import pick_here
from qlora_tune.runs import latest_run, list_runs
from qlora_tune.terminal import console, say
from qlora_tune.text_signs import printable
from qlora_tune.turns import Message

HELP = """Instruction-tune a language model with QLoRA on one small GPU, or none.

Without a command: the whole job on the built-in base and sample.jsonl, offline: check, train, score before and
after, export."""


app = App(name="qlora_tune", help=HELP, version=__version__, version_flags=["--version"])
for command in (train, prefer, reward, evaluate, compare, votes, reproduce, check, mix, select, pairs, grow, review):
    app.command(command)


@app.default
def demo(*, runs_dir: RunsDir = "runs", seed: Annotated[str, Parameter(help="Seed of the whole run.")] = "42") -> None:
    """The whole job on the built-in base and sample.jsonl."""
    resolved = resolve_config({"preset": BUILTIN, "runs_dir": runs_dir, "seed": seed})
    resolved = dataclasses.replace(resolved, preset_reason="the default command works offline on any machine")
    console.rule("check the data", align="left")
    check()
    console.rule("train", align="left")
    run = train_settings(resolved)
    console.rule("task types that it never saw", align="left")
    evaluate(run.path, data=(str(shipped_path("sample_unseen.jsonl")),))
    console.rule("export", align="left")
    export(run.path)
    console.rule("next", align="left")
    name, reason = pick_here()
    say(
        f"chat with it:         python -m qlora_tune chat {run.path}\n"
        f"look at the tokens:   python -m qlora_tune preview\n"
        f"train on your data:   python -m qlora_tune train YOUR.jsonl\n"
        f"preset here:          {name} ({reason})"
    )


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

    setup = prepare(resolve_settings(files, config, settings).config)
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
    terminal.show_config(resolve_settings((), config, settings))


@app.command
def runs(*, runs_dir: RunsDir = "runs") -> None:
    """List all runs with their state and scores."""
    terminal.show_runs(list_runs(runs_dir))


@app.command
def chat(
    run: Path | None = None,
    *,
    runs_dir: RunsDir = "runs",
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    temperature: Annotated[
        float | None, Parameter(help="0 takes the likeliest token each time, as by itself; 1 by itself with --best-of.")
    ] = None,
    top_p: Annotated[float, Parameter(help="Sample from the likeliest tokens of this share.")] = 1.0,
    max_new_tokens: Annotated[int, Parameter(help="Longest answer [tokens].")] = 256,
    best_of: Annotated[
        int | None, Parameter(help="Draw so many answers, show the one of the highest reward.", validator=Number(gte=2))
    ] = None,
    reward: Annotated[Path | None, Parameter(help="Run of the reward model that finds the best.")] = None,
) -> None:
    """Chat with the model of a run, an adapter's folder or its zip, tuned or base; the newest run without a name.

    OWNER/NAME, where nothing of that name lies here, is an adapter on the model hub.
    """
    from qlora_tune.chat import check_sampling, find_adapter, load_chat
    from qlora_tune.reward_model import open_reward_model

    if (best_of is None) != (reward is None) or (best_of and temperature == 0):
        raise ConfigError("--best-of N draws answers at a temperature above 0, and --reward RUN chooses. Give both.")
    if temperature is None:
        temperature = 1.0 if best_of else 0.0
    sampling = check_sampling(temperature, top_p, max_new_tokens)
    judge = open_reward_model(reward, runs_dir, model_name_or_path) if reward else None
    with tempfile.TemporaryDirectory() as scratch:
        adapter, own = find_adapter(run or latest_run(runs_dir).path, runs_dir, Path(scratch))
        if own:
            quiet_stack(own.log_file)
        model = load_chat(adapter, model_name_or_path, judge=judge)

    def reply(messages: list[Message], tuned: bool) -> Iterator[str]:
        if best_of is None:
            yield from model.reply("tuned" if tuned else "base", messages, **sampling)
            return
        drawn = model.draw_best(best_of, tuned, messages, **sampling)
        rewards = ", ".join("none" if found is None else f"{found:+.2f}" for found, _ in drawn)
        console.print(f"(best of {best_of}; rewards {rewards})", style="dim")
        yield drawn[0][1]

    say(f"adapter {run if adapter.is_relative_to(scratch) else adapter}")
    terminal.chat_loop(reply, lambda messages: model.fit(messages, max_new_tokens))


@app.command
def export(
    run: Path | None = None,
    *,
    runs_dir: RunsDir = "runs",
    output: Annotated[Path | None, Parameter(help="Zip or folder to write.", show_default=False)] = None,
    merged: Annotated[bool, Parameter(help="Write the merged 16-bit model instead of the adapter.")] = False,
    gguf: Annotated[bool, Parameter(help="Write the adapter for llama.cpp and Ollama, with a Modelfile.")] = False,
    into: Annotated[
        Literal["quantized", "original"] | None,
        Parameter(help="Merge into the dequantized 4-bit base (as trained; so by itself) or the original (close)."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, Parameter(help="Number format of the merged model; bfloat16 by itself.")
    ] = None,
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    push_to_hub: Annotated[
        str | None, Parameter(help="Upload it to OWNER/NAME on the model hub, with HF_TOKEN of the environment.")
    ] = None,
    private: Annotated[bool, Parameter(negative="--public", help="Whom the repository is shown to.")] = True,
    dry_run: Annotated[bool, Parameter(help="With --push-to-hub: show what would leave, upload nothing.")] = False,
) -> None:
    """Export a run's adapter as a zip, as GGUF, or the merged model; each is loaded again and compared."""
    from qlora_tune.export import export_adapter, export_gguf, merge_adapter
    from qlora_tune.hub_models import check_repository, require_token
    from qlora_tune.launch import refuse_busy_gpu
    from qlora_tune.leaks import has_its_data

    if merged and gguf:
        raise ConfigError("--merged writes a whole model, --gguf the adapter alone. Choose one of them.")
    if (into or dtype) and not merged:
        raise ConfigError("--into and --dtype say how the merged model is made. Give --merged too, or leave them out.")
    if (dry_run or not private) and not push_to_hub:
        raise ConfigError("--dry-run and --public are about what --push-to-hub OWNER/NAME uploads. Name that too.")
    token = require_token() if push_to_hub and check_repository(push_to_hub) and not dry_run else None
    found = find_run(run, runs_dir)
    trained = open_trained(found, model_name_or_path)
    refuse_busy_gpu(trained.device)
    if merged:
        target = output or found.path / "merged"
        parity = merge_adapter(trained, found, target, into or "quantized", dtype or "bfloat16")
        done = f"merged model: {target}"
    elif gguf:
        target = output or found.path / "gguf"
        parity = export_gguf(trained, found, target)
        done = f"adapter for llama.cpp and Ollama: {target}"
    else:
        target = output or found.path / f"{found.name}.zip"
        parity = export_adapter(trained, found, target)
        done = f"adapter: {target} ({target.stat().st_size / 1e6:.1f} MB)"
    say(f"{done}\nloaded again and compared with the trained model: {parity.describe()}")
    if not has_its_data(found):
        say("its data files are gone or have changed: it was searched for texts of the held-out rows alone")
    if push_to_hub:
        push(target, push_to_hub, private, token)


@app.command
def doctor(*, runs_dir: RunsDir = "runs") -> None:
    """Try everything that training needs on this machine, and say what is wrong and what to do."""
    from qlora_tune.doctor import examine

    fatal = []
    for finding in examine(runs_dir):
        terminal.show_finding(finding.what, finding.found, finding.advice, finding.fatal)
        fatal += [f"{finding.what}: {finding.found}"] if finding.fatal else []
    if fatal:
        raise ModelError(join_problems("Training can't work on this machine:", fatal))
    say("training can work on this machine")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 for anything the user can mend, 130 interrupted."""
    tokens = [with_dashes(token) for token in (sys.argv[1:] if arguments is None else arguments)]
    quiet_stack()
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # text that can't be shown or read must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        with processes.together(tokens):
            if processes.index():
                from qlora_tune.train import train_along

                train_along()
            else:
                app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(suggest_command(tokens, list(app)) or str(error))
    except TuneError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        terminal.errors.print("interrupted")
        return 130
    except Stopped as stopped:
        return stopped.code
    except Exception as error:
        if not isinstance(error, OSError) and not disk.is_full(error):
            raise
        return _fail(disk.describe(error))
    return 0


def _fail(message: str) -> int:
    terminal.errors.print(f"[bold red]error:[/] {escape(printable(message))}", soft_wrap=True)
    return 2
