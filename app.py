"""The page: look at the data, start and watch a run, chat with base and tuned model, compare runs, export.

Thin over the package: a handler turns fields into arguments, calls one function and shows what it returned.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, CycloptsError, Parameter

from qlora_tune.model import detect_device, free_memory, quiet_stack

quiet_stack()
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Uploads and downloads pass through here. Only this user can open it, and it goes when the page ends.
CACHE = tempfile.TemporaryDirectory(prefix="qlora-tune-page-")
os.environ["GRADIO_TEMP_DIR"] = CACHE.name

import gradio as gr  # reads both when it is imported

from qlora_tune import chat, launch, page_guard
from qlora_tune import page_parts as parts
from qlora_tune.comparison import pick_answers, read_comparison
from qlora_tune.config import TrainConfig, describe_setting, list_presets, resolve_config, shipped_path
from qlora_tune.data import find_data, parse_columns
from qlora_tune.errors import ConfigError, DataError, RunError, TuneError
from qlora_tune.export import export_adapter, merge_adapter, open_adapter
from qlora_tune.flags import TRAIN_FLAGS, as_field, flags_of_fields, group_of, is_list
from qlora_tune.plan import pick_here, plan_run
from qlora_tune.preview import check_as_trained, view_row
from qlora_tune.repair import repair_files
from qlora_tune.report import write_report
from qlora_tune.runs import Run, list_runs
from qlora_tune.text_signs import printable

SAMPLE = "the built-in sample"
MAX_UPLOAD_BYTES = 1 << 30
MAIN = ["model_name_or_path", "data", "preset", "num_train_epochs", "max_length"]
MAIN += ["per_device_train_batch_size", "learning_rate", "heldout_share"]
NAMES = [*MAIN, *(name for name in TRAIN_FLAGS if name not in (*MAIN, "runs_dir", "holdout_clusters"))]
KEPT = ("data", "heldout_data", "map", "encoding", "preset", "run_name")  # a change of preset leaves these
runs_dir = "runs"  # set once, by serve


def make_field(name: str, usual: Any, choices: list[str] | None) -> Any:
    """The widget of one setting, from its declaration, with the value that it usually has."""
    field = TrainConfig.model_fields[name]
    kind, words = str(field.annotation), describe_setting(name).replace("`", "")
    about: Any = {"label": name, "info": words, "render": False}
    if choices:
        return gr.Dropdown(choices, value=choices[0], allow_custom_value=name != "preset", **about)
    if field.annotation is bool:
        return gr.Checkbox(usual, **about)
    if "Literal" in kind:
        return gr.Dropdown(list(get_args(field.annotation)), value=usual, **about)
    if "int" in kind or "float" in kind:
        whole = field.annotation is int
        return gr.Number(usual, precision=0 if whole else None, step=1 if whole else abs(usual or 1) / 10, **about)
    return gr.Textbox(usual, lines=2 if is_list(name) else 1, **about)


def make_fields() -> dict[str, Any]:
    """All settings' widgets, as the builtin preset fills them."""
    usual, presets = resolve_config({"preset": "builtin"}).config, list_presets()
    bases = dict.fromkeys(preset.settings.get("model_name_or_path", "builtin") for preset in presets)
    choices = {"preset": ["auto", *(preset.name for preset in presets), "none"], "data": [SAMPLE]}
    choices["model_name_or_path"] = list(bases)
    return {name: make_field(name, as_field(getattr(usual, name)), choices.get(name)) for name in NAMES}


def read_fields(values: Any) -> dict[str, Any]:
    """What the fields say otherwise than their preset, as flags."""
    given = dict(zip(NAMES, values, strict=True))
    preset = given.pop("preset") or "auto"
    given["data"] = "" if given["data"] in (SAMPLE, None) else given["data"]
    flags = {} if preset == "auto" else {"preset": preset}
    flags |= flags_of_fields(given, resolve_config({"preset": preset}, pick_auto=pick_here).config)
    return flags if runs_dir == "runs" else {**flags, "runs_dir": runs_dir}


def read_config(values: Any) -> TrainConfig:
    return resolve_config(read_fields(values), pick_auto=pick_here).config


def fill_fields(preset: str) -> tuple[Any, ...]:
    """What the fields show after a change of preset."""
    config = resolve_config({"preset": preset or "auto"}, pick_auto=pick_here).config
    return tuple(gr.skip() if name in KEPT else as_field(getattr(config, name)) for name in NAMES)


def on(trigger: Any, fn: Any, inputs: Any, say: Any, outputs: Any, busy: str = "", **options: Any) -> Any:
    """Call a function on an event, or any of several. A problem is said in `say`, and the outputs stay as they are."""

    def call(*values: Any) -> Any:
        if busy:
            yield (parts.show_message(busy, "soft"), *(gr.skip(),) * len(outputs))
        try:
            result, said = fn(*values), ""
        except Exception as error:
            result, said = (gr.skip(),) * len(outputs), parts.show_problem(error)
        yield (said, *(result if isinstance(result, tuple) else (result,))) if outputs else said

    listen = functools.partial(gr.on, trigger) if isinstance(trigger, list) else trigger
    return listen(call, inputs, [say, *outputs], **{"api_visibility": "private", "show_progress": "minimal", **options})


def reveal(trigger: Any, component: Any, say: Any, visible: bool) -> None:
    """Show or hide a part of the page on a click."""
    on(trigger, lambda: type(component)(visible=visible), None, say, [component])


def part(text: str = "", **options: Any) -> Any:
    """A place for HTML of page_parts, which escapes what it shows."""
    return gr.Markdown(text, sanitize_html=False, latex_delimiters=[], container=False, **options)


def hand_out(path: Path) -> Any:
    """A button that downloads one file, from a copy in the page's cache: the only place it serves files from."""
    copy = shutil.copy(path, Path(tempfile.mkdtemp(dir=CACHE.name)) / path.name)
    return gr.DownloadButton(f"Download {path.name}", value=str(copy), visible=True)


def runs_by_name() -> dict[str, Run]:
    """All runs, newest first."""
    return {run.name: run for run in reversed(list_runs(runs_dir))}


def find_run(name: str | None) -> Run:
    if not name:
        raise RunError("No run is chosen. Start one on the tab Train.")
    if not (run := runs_by_name().get(name)):
        raise RunError(f"Run {name} is gone.")
    return run


def check_data(data: str, *values: Any) -> Any:
    """Report on the chosen data and what the settings would cut of it, with its first row."""
    seen = 0

    def on_row() -> None:
        nonlocal seen
        seen += 1

    yield parts.show_message("Reading the rows …", "soft"), *(gr.skip(),) * 6
    try:
        config = read_config(values)
        files = [str(shipped_path("sample.jsonl"))] if data in (SAMPLE, "", None) else find_data([data])
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(check_as_trained, config, files, on_row)
            while wait([job], timeout=0.5).not_done:
                yield parts.show_message(f"Reading the rows … {seen:,}", "soft"), *(gr.skip(),) * 6
        report = job.result()
        if refused := [file.refused for file in report.files if file.refused]:
            raise DataError("\n".join(refused))
        row = show_row(files[0], 1, *values)
    except Exception as error:
        yield parts.show_problem(error), None, "", "", gr.skip(), gr.skip(), gr.Column(visible=False)
        return
    several = gr.Dropdown(files, value=files[0], visible=len(files) > 1)
    yield "", report, parts.show_check(report), row, several, 1, gr.Column(visible=True)


def show_row(file: str, line: float, *values: Any) -> str:
    return parts.show_row(view_row(Path(file), max(1, int(line or 1)), read_config(values)))


def repair(report: Any, *values: Any) -> tuple[Any, ...]:
    config, name = read_config(values), Path(report.files[0].path).name.split(".")[0]
    with tempfile.TemporaryDirectory(dir=CACHE.name) as scratch:
        target = Path(scratch) / f"{name}-repaired.jsonl"
        done = repair_files(report, target, columns=parse_columns(config.map), encoding=config.encoding)
        words = f"{done.rows_in:,} rows: {done.kept:,} kept, {done.repaired:,} mended, {done.dropped:,} dropped."
        kept = str(launch.keep_upload(done.output, runs_dir))
        shown = parts.show_message(words, "good"), kept, gr.Button(visible=True)
        return hand_out(done.output), hand_out(done.log), *shown


def take_upload(file: str) -> tuple[Any, Any]:
    kept = str(launch.keep_upload(Path(file), runs_dir))
    return kept, gr.Dropdown([SAMPLE, kept], value=kept)


def show_card(*values: Any) -> tuple[str, str, Any]:
    plan = plan_run(read_fields(values))
    return parts.show_card(plan), plan.command, gr.Button(interactive=not plan.problems)


def start(*values: Any) -> Any:
    plan = plan_run(read_fields(values))
    if plan.problems or plan.config is None or plan.device is None:
        raise RunError("\n".join(["Not started.", *plan.problems]))
    release_chat()
    run = launch.launch_run(plan.config, plan.device.kind)
    return gr.Dropdown(list(runs_by_name()), value=run.name)


def watch(name: str | None, seen: Any) -> tuple[Any, ...]:
    """What has changed of the run shown since it was last looked at; nothing where nothing has."""
    runs, asked = runs_by_name(), name
    names = list(runs)
    if name not in runs:
        name = next((run.name for run in runs.values() if run.is_alive()), next(iter(names), None))
    if name is None:
        empty = parts.show_message("No run yet. What a run does is shown here while it goes on.", "soft")
        hidden = (gr.Button(visible=False) for _ in range(4))
        return gr.Dropdown([], value=None), None, False, empty, "", "", gr.Button(visible=True), *hidden
    run = runs[name]
    alive, output = run.is_alive(), run.path / launch.OUTPUT_FILE
    stamps = [path.stat().st_mtime_ns for path in (*run.path.glob("*.json*"), output) if path.exists()]
    if seen == (now := (name, names, alive, stamps)):
        return (gr.skip(),) * 11
    log = output.read_bytes()[-20_000:].decode(errors="ignore") if output.exists() else "It was started in a terminal."
    unfinished = run.read_state()["status"] in ("stopped", "interrupted", "failed")
    tuned = run.can_answer and not alive
    shown = (gr.Button(visible=visible) for visible in (alive, unfinished, tuned, tuned))
    # A value only where it is another one: what Start has just put there must stay.
    choice = gr.Dropdown(names) if asked == name else gr.Dropdown(names, value=name)
    brief = parts.show_brief(run) if alive else ""
    return choice, now, alive, parts.show_run(run), parts.show_log(log), brief, gr.Button(visible=not alive), *shown


def resume(name: str) -> tuple[()]:
    release_chat()
    launch.launch_resume(find_run(name), detect_device().kind)
    return ()


def end_run(how: Callable[[Run], None], name: str) -> Any:
    how(find_run(name))
    return gr.Column(visible=False)


@functools.lru_cache(maxsize=1)
def load_chat(adapter: str, merged: str | None, stamp: int) -> Any:
    """One loaded model at a time; `stamp` is the adapter file's time, so that a new one is loaded again."""
    return chat.load_chat(Path(adapter), merged=Path(merged) if merged else None)


def release_chat() -> None:
    """Give the chat's memory back, before a run takes the device."""
    load_chat.cache_clear()
    free_memory()


def pick_adapter(name: str | None) -> Any:
    """The adapters that there are, and one chosen: by its folder, by its run's name, or the first."""
    choices = [(label, str(folder)) for label, folder in chat.list_adapters(runs_dir).items()]
    wanted = [folder for label, folder in choices if name in (label, folder)] or [folder for _, folder in choices]
    return gr.Dropdown(choices, value=next(iter(wanted), None))


def open_chat(adapter: str | None) -> Any:
    if not adapter:
        raise RunError("No adapter is chosen. Train one on the tab Train, or open a zip.")
    merged, weights = Path(adapter).parent / "merged", Path(adapter) / "adapter_model.safetensors"
    return load_chat(adapter, str(merged) if merged.is_dir() else None, weights.stat().st_mtime_ns)


def answer(
    prompt: str, left: list[Any], right: list[Any], adapter: str, one: str, two: str, system: str, *sampling: Any
) -> Iterator[tuple[Any, ...]]:
    """Stream the answers of both sides, one after the other: they share one loaded base."""
    before, voices, shown, kept = [left, right], (one, two), 0.0, gr.skip()  # what is typed meanwhile stays
    try:
        if not prompt.strip():
            raise ConfigError("Write a message first, or choose a held-out prompt.")
        given = chat.check_sampling(*sampling)
        sides = [chat.ask(turns, prompt) for turns in before]
        yield parts.show_message("Loading …", "soft"), "", *before, *parts.show_sides(sides, voices)
        asked: Any = [None if who == "off" else who for who in voices]
        for grown in chat.answer_sides(open_chat(adapter), asked, sides, system, **given):
            sides = grown
            if time.monotonic() - shown > 0.05:  # a browser need not draw each token
                shown = time.monotonic()
                yield "", kept, *sides, *parts.show_sides(sides, voices)
        words = "" if len(sides[0]) > len(left) else "No answer; the turn is left out."
        yield parts.show_message(words, "soft"), kept, *sides, *parts.show_sides(sides, voices)
    except Exception as error:
        yield parts.show_problem(error), prompt, *before, *parts.show_sides(before, voices)


def retry(left: list[Any], right: list[Any]) -> tuple[str, list[Any], list[Any]]:
    """Take the last question back, to ask it again."""
    (rest, asked), (other, _) = chat.before_last_question(left), chat.before_last_question(right)
    return asked, rest, other


def list_examples(adapter: str | None) -> Any:
    rows = chat.list_heldout(Path(adapter or "").parent)
    return gr.Dropdown(rows, value=None, visible=bool(rows))


def use_example(index: int, adapter: str) -> tuple[Any, ...]:
    """Put a held-out row into the fields: system prompt, what was said before, question; and what is expected."""
    system, turns, question, expected = chat.split_example(Run(Path(adapter).parent).read_heldout()[index])
    return printable(system), turns, turns, printable(question), parts.show_message(f"Expected: {expected}", "soft")


def open_zip(file: str) -> Any:
    return pick_adapter(str(chat.unpack_adapter(Path(file), launch.uploads_folder(runs_dir))))


def refresh_runs(names: list[str] | None) -> tuple[Any, str]:
    runs = runs_by_name()
    chosen = [name for name in names or [] if name in runs] or list(runs)[:1]
    return gr.Dropdown(list(runs), value=chosen), parts.show_runs(list(runs.values()))


def compare_runs(names: list[str], which: Any) -> tuple[str, str, str, str]:
    """Curves, differences and scores of the chosen runs; answers of the first one."""
    runs = [find_run(name) for name in names or []]
    if not runs:
        return "", "", "", parts.show_message("Choose a run above.", "soft")
    curves = parts.show_losses(runs) + (parts.show_differences(runs) if len(runs) > 1 else "")
    scored = {run.name: read_comparison(run) for run in runs if (run.path / "scores.json").exists()}
    scores = parts.show_scores(scored) if scored else parts.show_message("Not scored yet.", "soft")
    chosen = pick_answers(scored[runs[0].name], which, 5) if runs[0].name in scored else []
    acts = parts.show_message(f"Export, answers, rename and delete: {runs[0].name}", "soft")
    return curves, scores, parts.show_answers(chosen), acts


def first_tuned(names: list[str]) -> Any:
    run = find_run(names[0] if names else None)
    run.require_adapter()
    return open_adapter(run.adapter), run


def export_report(names: list[str]) -> tuple[Any, str]:
    path = write_report(find_run(names[0] if names else None))
    return hand_out(path), parts.show_message(f"{path.name}: one page, with all figures and answers.", "good")


def export_zip(names: list[str]) -> tuple[Any, str]:
    trained, run = first_tuned(names)
    parity = export_adapter(trained, run, path := run.path / f"{run.name}.zip")
    return hand_out(path), parts.show_message(f"{path.name}: unpacked, loaded again; {parity.describe()}.", "good")


def export_merged(names: list[str], into: Any, dtype: Any) -> str:
    trained, run = first_tuned(names)
    parity = merge_adapter(trained, run, run.path / "merged", into, dtype)
    return parts.show_message(f"Merged model: {run.path / 'merged'}; loaded again; {parity.describe()}.", "good")


def rename(names: list[str], name: str) -> tuple[Any, ...]:
    renamed = launch.rename_run(find_run(names[0] if names else None), name.strip())
    return *refresh_runs([renamed.name, *names[1:]]), ""


def delete(names: list[str]) -> tuple[Any, ...]:
    release_chat()
    launch.delete_run(find_run(names[0] if names else None))
    return *refresh_runs(names[1:]), gr.Row(visible=False)


def build() -> Any:
    """The page's four tabs. What several tabs share is made first and placed where it belongs."""
    with gr.Blocks(title="qlora-tune", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        fields = make_fields()
        picked = gr.Textbox(label="Data: file, folder or hub dataset", placeholder=parts.PATH_HINT, render=False)
        adapter = gr.Dropdown([], label="Adapter", render=False)
        chosen = gr.Dropdown([], multiselect=True, label="Runs; the first is looked at and exported", render=False)
        part("<h1>qlora-tune</h1>")
        with gr.Tabs() as tabs:
            with gr.Tab("Data", id="data"):
                build_data(fields, picked, tabs)
            with gr.Tab("Train", id="train"):
                build_train(page, fields, adapter, chosen, tabs)
            with gr.Tab("Chat", id="chat") as chat_tab:
                build_chat(chat_tab, adapter)
            with gr.Tab("Runs and export", id="runs") as runs_tab:
                build_runs(runs_tab, chosen)
    return page


def build_data(fields: dict[str, Any], picked: Any, tabs: Any) -> None:
    values, report = list(fields.values()), gr.State(None)
    with gr.Row(elem_classes="bar"):
        picked.render()
        upload = gr.UploadButton("Upload a file", scale=0, min_width=150)
        example = gr.Button("Use the built-in example", variant="primary", scale=0, min_width=260)
    say = part(parts.show_message(parts.WELCOME))
    with gr.Column(visible=False) as found:
        with gr.Row(elem_classes="bar"):
            file = gr.Dropdown([], label="File", visible=False)
            line = gr.Number(1, label="Line", precision=0)
            back = gr.Button("Previous row", scale=0, min_width=140)
            forth = gr.Button("Next row", scale=0, min_width=120)
            go = gr.Button("Train on this data", variant="primary", scale=0, min_width=190)
        with gr.Row(elem_classes="split"):
            row = part(elem_classes="pane")
            with gr.Column():
                mend = gr.Button("Repair: write a mended copy, and a log of every change")
                mended, copied = part(), gr.State("")
                use = gr.Button("Use the mended copy", variant="primary", visible=False)
                copy, log = (gr.DownloadButton(visible=False) for _ in range(2))
                checked = part()
    check: Any = {"show_progress": "hidden", "api_visibility": "private", "fn": check_data}
    check |= {"inputs": [picked, *values], "outputs": [say, report, checked, row, file, line, found]}
    both, same = [picked, fields["data"]], lambda value: (value, value)
    on(upload.upload, take_upload, [upload], say, both).then(**check)
    on(example.click, lambda: (SAMPLE, SAMPLE), None, say, both).then(**check)
    on(picked.submit, lambda value: (value, value or SAMPLE), [picked], say, both).then(**check)
    on(fields["data"].input, same, [fields["data"]], say, both).then(**check)
    look: Any = {"fn": show_row, "inputs": [file, line, *values], "say": say, "outputs": [row]}
    on([line.submit, file.input], **look)
    on(on(back.click, lambda at: max(1, (at or 2) - 1), [line], say, [line]).then, **look)
    on(on(forth.click, lambda at: (at or 0) + 1, [line], say, [line]).then, **look)
    on(mend.click, repair, [report, *values], say, [copy, log, mended, copied, use], busy="Mending …")
    on(use.click, same, [copied], say, both).then(**check)
    on(go.click, lambda: gr.Tabs(selected="train"), None, say, [tabs])


def build_train(page: Any, fields: dict[str, Any], adapter: Any, chosen: Any, tabs: Any) -> None:
    values, seen, alive = list(fields.values()), gr.State(None), gr.State(False)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3):
            place_fields(fields)
        with gr.Column(scale=2, elem_classes="card"):
            card, say, brief = part(parts.show_message("Reading the settings …", "soft")), part(), part()
            begin = gr.Button("Start", variant="primary")
            stop = gr.Button("Stop …", visible=False)
            with gr.Column(visible=False) as asked:
                part(parts.show_message(parts.STOP_WORDS))
                save = gr.Button("Save and stop", variant="primary")
                drop = gr.Button("Discard the run", variant="stop")
                keep = gr.Button("Keep training")
            command = gr.Code(
                label="In a terminal", buttons=["copy"], interactive=False, wrap_lines=True, lines=1, max_lines=6
            )
    with gr.Row(elem_classes="bar"):
        name = gr.Dropdown([], label="Run shown below")
        again = gr.Button("Resume", variant="primary", visible=False, scale=0, min_width=120)
        talk = gr.Button("Compare base and tuned", variant="primary", visible=False, scale=0, min_width=250)
        out = gr.Button("Scores and export", visible=False, scale=0, min_width=190)
    say_run, say_watch, live = part(), part(), part(elem_classes="pane")
    with gr.Accordion("Log", open=False):
        log = part()
    on([page.load, fields["preset"].input], fill_fields, [fields["preset"]], say, values)
    shown: Any = {"trigger_mode": "always_last", "show_progress": "hidden"}
    changes = [page.load, alive.change, *(field.change for field in values)]
    on(changes, show_card, values, say, [card, command, begin], **shown)
    watched = [name, seen, alive, live, log, brief, begin, stop, again, talk, out]
    ticks = [page.load, gr.Timer(1.0).tick, name.input]
    on(ticks, watch, [name, seen], say_watch, watched, show_progress="hidden", concurrency_limit=None)
    on(begin.click, start, values, say, [name], busy="Starting …")
    on(again.click, resume, [name], say_run, [])
    reveal(stop.click, asked, say_run, True)
    reveal(keep.click, asked, say_run, False)
    on(save.click, functools.partial(end_run, launch.request_stop), [name], say_run, [asked])
    on(drop.click, functools.partial(end_run, launch.discard_run), [name], say_run, [asked])
    on(talk.click, lambda run: (gr.Tabs(selected="chat"), pick_adapter(run)), [name], say_run, [tabs, adapter])
    on(out.click, lambda run: (gr.Tabs(selected="runs"), [run]), [name], say_run, [tabs, chosen])


def place_fields(fields: dict[str, Any]) -> None:
    """Eight fields in sight, the rest under one accordion, a tab a group."""

    def place(names: list[str]) -> None:
        for at in range(0, len(names), 2):
            with gr.Row():
                for name in names[at : at + 2]:
                    fields[name].render()

    place(MAIN)
    with gr.Accordion("All other settings", open=False), gr.Tabs():
        for group in dict.fromkeys(map(group_of, TRAIN_FLAGS)):
            with gr.Tab(group):
                place([name for name in NAMES if group_of(name) == group and name not in MAIN])


def build_chat(tab: Any, adapter: Any) -> None:
    left, right = gr.State([]), gr.State([])
    with gr.Row(elem_classes="bar"):
        adapter.render()
        one = gr.Dropdown(["base", "tuned", "merged"], value="base", label="Left side")
        two = gr.Dropdown(["tuned", "base", "merged", "off"], value="tuned", label="Right side")
        upload = gr.UploadButton("Open an adapter (.zip)", file_types=[".zip"], scale=0, min_width=240)
    with gr.Row():
        panes = [part(parts.show_conversation([], who), elem_classes="pane") for who in ("base", "tuned")]
    say = part()
    example = gr.Dropdown([], label="Held-out prompts: rows that were not trained on")
    expected = part()
    with gr.Row(elem_classes="bar"):
        prompt = gr.Textbox(label="Your message", lines=1, placeholder="Enter sends")
        send = gr.Button("Send", variant="primary", scale=0, min_width=90)
        halt = gr.Button("Stop", scale=0, min_width=90)
        redo = gr.Button("Retry", scale=0, min_width=90)
        clear = gr.Button("Clear", scale=0, min_width=90)
    with gr.Row():
        system = gr.Textbox(label="System prompt", lines=1)
        temperature = gr.Number(0, label="Temperature (0: likeliest token)", step=0.1)
        top_p = gr.Number(1, label="Top-p (share to sample from)", step=0.05)
        longest = gr.Number(256, label="Max new tokens", precision=0)
    sampling = [temperature, top_p, longest]
    stream: Any = {"fn": answer, "inputs": [prompt, left, right, adapter, one, two, system, *sampling]}
    stream |= {"outputs": [say, prompt, left, right, *panes], "show_progress": "hidden", "concurrency_id": "model"}
    stream["api_visibility"] = "private"
    again = on(redo.click, retry, [left, right], say, [prompt, left, right]).then(**stream)
    streams = [prompt.submit(**stream), send.click(**stream), again]
    halt.click(None, cancels=streams, api_visibility="private")
    talk, empty = [left, right, *panes, expected], ([], [], *parts.show_sides(([], []), ("base", "tuned")), "")
    on(clear.click, lambda: empty, None, say, talk, cancels=streams)
    on([tab.select, adapter.focus], pick_adapter, [adapter], say, [adapter])
    on(adapter.change, lambda name: (list_examples(name), "", *empty), [adapter], say, [example, system, *talk])
    on(example.input, use_example, [example, adapter], say, [system, left, right, prompt, expected])
    on(upload.upload, open_zip, [upload], say, [adapter])


def build_runs(tab: Any, chosen: Any) -> None:
    table, say = part(), part()
    chosen.render()
    with gr.Row(elem_classes="split"):
        curves, scores = part(), part()
    with gr.Row(elem_classes="bar"):
        pack = gr.Button("Export the adapter (zip)", variant="primary", scale=0, min_width=260)
        tell = gr.Button("Report (HTML)", scale=0, min_width=160)
        into = gr.Dropdown(["quantized", "original"], label="Merge into (quantized: as trained)")
        dtype = gr.Dropdown(["bfloat16", "float32"], label="Number format (float32 is exact)")
        merge = gr.Button("Export the merged model", scale=0, min_width=260)
    say_out, done, packed, acts = part(), part(), gr.DownloadButton(visible=False), part()
    which = gr.Radio(["best", "worst", "random"], value="worst", label="Answers")
    answers = part()
    with gr.Row(elem_classes="bar"):
        name = gr.Textbox(label="New name")
        change = gr.Button("Rename", scale=0, min_width=110)
        doom = gr.Button("Delete …", variant="stop", scale=0, min_width=110)
    say_down = part()
    with gr.Row(visible=False) as asked:
        sure = gr.Button("Delete it, with its adapter and uploaded data", variant="stop")
        keep = gr.Button("Keep it")
    on(tab.select, refresh_runs, [chosen], say, [chosen, table])
    on([chosen.change, which.input, tab.select], compare_runs, [chosen, which], say, [curves, scores, answers, acts])
    heavy: Any = {"busy": "Exporting: writing, loading it again, comparing …", "concurrency_id": "model"}
    on(pack.click, export_zip, [chosen], say_out, [packed, done], **heavy)
    on(tell.click, export_report, [chosen], say_out, [packed, done])
    on(merge.click, export_merged, [chosen, into, dtype], say_out, [done], **heavy)
    on(change.click, rename, [chosen, name], say_down, [chosen, table, name])
    reveal(doom.click, asked, say_down, True)
    reveal(keep.click, asked, say_down, False)
    on(sure.click, delete, [chosen], say_down, [chosen, table, asked])


cli = App(name="app.py", help="The page of qlora-tune, for a browser on this machine.")


@cli.default
def serve(
    *,
    host: Annotated[str, Parameter(help="Address to listen on; others than 127.0.0.1 need --user.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on.")] = 7860,
    user: Annotated[str, Parameter(help="Ask for this name and a password: $QLORA_TUNE_PASSWORD, or typed.")] = "",
    share: Annotated[bool, Parameter(help="Publish through Gradio's tunnel; needs --user.")] = False,
    folder: Annotated[str, Parameter(name="--runs-dir", help="Folder that holds all runs.")] = "runs",
) -> None:
    """Serve the page until Ctrl-C. Runs go on without it."""
    global runs_dir
    runs_dir, public = folder, share or host not in page_guard.LOOPBACK
    options: Any = {"server_name": host, "server_port": port, "auth": page_guard.ask_password(user, public)}
    options |= {"share": share, "ssr_mode": False, "footer_links": [], "quiet": True, "prevent_thread_lock": True}
    launch.remove_old_uploads(runs_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and clears the cache
    build().launch(
        app_kwargs=page_guard.app_options(public, MAX_UPLOAD_BYTES),
        max_file_size=MAX_UPLOAD_BYTES,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # local
        css=parts.STYLE,
        **options,
    )
    print(f"qlora-tune: http://{host}:{port}   (Ctrl-C ends the page; a run goes on)", flush=True)
    threading.Timer(3.0, pick_here).start()  # imports torch, but not while the first page is being built
    threading.Event().wait()


def main() -> int:
    try:
        cli(exit_on_error=False, print_error=False)
    except (CycloptsError, TuneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
