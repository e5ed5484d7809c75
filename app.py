"""The page: look at the data, start and watch a run, chat with base and tuned model, compare runs, export.

Thin over the package: a handler turns fields into arguments, calls one function and shows what it returned.
"""

from __future__ import annotations

import functools
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, CycloptsError, Parameter

from qlora_tune import launch, page_guard
from qlora_tune import page_parts as parts
from qlora_tune.comparison import pick_answers, read_comparison
from qlora_tune.config import TrainConfig, describe_setting, list_presets, resolve_config, shipped_path
from qlora_tune.data import find_data, parse_columns
from qlora_tune.errors import DataError, RunError, TuneError
from qlora_tune.export import export_adapter, export_gguf, merge_adapter, open_adapter
from qlora_tune.flags import TRAIN_FLAGS, as_field, flags_of_fields, group_of, is_list
from qlora_tune.model import detect_device
from qlora_tune.page_chat import build_chat, pick_adapter, release_chat
from qlora_tune.page_review import build_review
from qlora_tune.page_widgets import CACHE, gr, hand_out, on, part, reveal
from qlora_tune.plan import pick_here, plan_run
from qlora_tune.preview import check_as_trained, view_row
from qlora_tune.repair import repair_files
from qlora_tune.report import write_report
from qlora_tune.runs import Run, list_runs

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


def base_flags(preset: str | None, model: str | None) -> dict[str, Any]:
    """The flags that decide what is usual: a preset, or under `auto` a base of one's own, which has the defaults."""
    if (preset or "auto") != "auto":
        return {"preset": preset}
    picked = resolve_config({}, pick_auto=pick_here).config.model_name_or_path
    return {"model_name_or_path": model} if model and model != picked else {}


def read_fields(values: Any) -> dict[str, Any]:
    """What the fields say otherwise than is usual, as flags."""
    given = dict(zip(NAMES, values, strict=True))
    given["data"] = "" if given["data"] in (SAMPLE, None) else given["data"]
    flags = base_flags(given.pop("preset"), given["model_name_or_path"])
    flags |= flags_of_fields(given, resolve_config(flags, pick_auto=pick_here).config)
    return flags if runs_dir == "runs" else {**flags, "runs_dir": runs_dir}


def read_config(values: Any) -> TrainConfig:
    return resolve_config(read_fields(values), pick_auto=pick_here).config


def fill_fields(preset: str | None, model: str | None = None) -> tuple[Any, ...]:
    """What the fields show after a change of preset, or under `auto` of the base model."""
    config = resolve_config(base_flags(preset, model), pick_auto=pick_here).config
    return tuple(gr.skip() if name in KEPT else as_field(getattr(config, name)) for name in NAMES)


def fill_for_base(preset: str | None, model: str | None) -> tuple[Any, ...]:
    """What the fields show after a change of the base model: a preset that is named stays as it was filled in."""
    return fill_fields(preset, model) if (preset or "auto") == "auto" else (gr.skip(),) * len(NAMES)


def runs_by_name() -> dict[str, Run]:
    """All runs, newest first."""
    return {run.name: run for run in reversed(list_runs(runs_dir))}


def find_run(name: str | None) -> Run:
    if not name:
        raise RunError("No run is chosen. Start one on the tab Train.")
    if not (run := runs_by_name().get(name)):
        raise RunError(f"Run {name} is gone.")
    return run


def check_data(data: str, copied: str, *values: Any) -> Any:
    """Report on the chosen data and what the settings would cut of it, with its first row.

    A mended copy of other data is no longer offered.
    """
    seen, same = 0, (gr.skip(),) * len(forget_repair())
    offered = same if copied and data == copied else forget_repair()
    yield parts.show_message("Reading the rows …", "soft"), *(gr.skip(),) * 6, *offered

    def on_row() -> None:
        nonlocal seen
        seen += 1

    try:
        config = read_config(values)
        files = [str(shipped_path("sample.jsonl"))] if data in (SAMPLE, "", None) else find_data([data])
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(check_as_trained, config, files, on_row)
            while wait([job], timeout=0.5).not_done:
                yield parts.show_message(f"Reading the rows … {seen:,}", "soft"), *(gr.skip(),) * 6, *same
        report = job.result()
        if refused := [file.refused for file in report.files if file.refused]:
            raise DataError("\n".join(refused))
        row, line = show_row(files[0], 1, *values)
    except Exception as error:
        yield parts.show_problem(error), None, "", "", gr.skip(), gr.skip(), gr.Column(visible=False), *same
        return
    several = gr.Dropdown(files, value=files[0], visible=len(files) > 1)
    yield "", report, parts.show_check(report), row, several, line, gr.Column(visible=True), *same


def show_row(file: str, line: float | None, *values: Any, above: bool = False) -> tuple[str, int]:
    """The row at a line, or the next one, or the last one above; and the line where it stands."""
    view = view_row(Path(file), int(line or 1), read_config(values), above=above)
    return parts.show_row(view), view.line


def show_next_row(file: str, line: float | None, *values: Any) -> tuple[str, int]:
    return show_row(file, (line or 0) + 1, *values)


def repair(report: Any, *values: Any) -> tuple[Any, ...]:
    config, name = read_config(values), Path(report.files[0].path).name.split(".")[0]
    with tempfile.TemporaryDirectory(dir=CACHE.name) as scratch:
        target = Path(scratch) / f"{name}-repaired.jsonl"
        done = repair_files(report, target, columns=parse_columns(config.map), encoding=config.encoding)
        words = f"{done.rows_in:,} rows: {done.kept:,} kept, {done.repaired:,} mended, {done.dropped:,} dropped."
        kept = str(launch.keep_upload(done.output, runs_dir))
        shown = parts.show_message(words, "good"), kept, gr.Button(visible=True)
        return hand_out(done.output), hand_out(done.log), *shown


def forget_repair() -> tuple[Any, ...]:
    """What stands where repair() says what it did, before it was asked."""
    return gr.DownloadButton(visible=False), gr.DownloadButton(visible=False), "", "", gr.Button(visible=False)


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
        gone = gr.Column(visible=False)
        return gr.Dropdown([], value=None), None, False, empty, "", "", gr.Button(visible=True), *hidden, gone
    run = runs[name]
    alive, output = run.is_alive(), run.path / launch.OUTPUT_FILE
    stamps = [path.stat().st_mtime_ns for path in (*run.path.glob("*.json*"), output) if path.exists()]
    if seen == (now := (name, names, alive, stamps)):
        return (gr.skip(),) * 12
    log = output.read_bytes()[-20_000:].decode(errors="ignore") if output.exists() else "It was started in a terminal."
    unfinished = run.read_state()["status"] in ("stopped", "interrupted", "failed")
    tuned = run.can_answer and not alive
    shown = (gr.Button(visible=visible) for visible in (alive, unfinished, tuned, tuned))
    # A value only where it is another one: what Start has just put there must stay.
    choice = gr.Dropdown(names) if asked == name else gr.Dropdown(names, value=name)
    brief = parts.show_brief(run) if alive else ""
    # What is asked before a run is stopped was asked of that run alone.
    question = gr.skip() if alive and seen and seen[0] == name else gr.Column(visible=False)
    live = parts.show_run(run), parts.show_log(log), brief
    return choice, now, alive, *live, gr.Button(visible=not alive), *shown, question


def resume(name: str) -> tuple[()]:
    release_chat()
    launch.launch_resume(find_run(name), detect_device().kind)
    return ()


def end_run(how: Callable[[Run], None], name: str) -> Any:
    how(find_run(name))
    return gr.Column(visible=False)


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
    trained = open_adapter(run.adapter)
    launch.refuse_busy_gpu(trained.device)
    return trained, run


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


def export_llama_cpp(names: list[str]) -> str:
    trained, run = first_tuned(names)
    parity = export_gguf(trained, run, run.path / "gguf")
    return parts.show_message(f"Adapter and Modelfile: {run.path / 'gguf'}; read back; {parity.describe()}.", "good")


def rename(names: list[str], name: str) -> tuple[Any, ...]:
    renamed = launch.rename_run(find_run(names[0] if names else None), name.strip())
    return *refresh_runs([renamed.name, *names[1:]]), ""


def delete(names: list[str]) -> tuple[Any, ...]:
    release_chat()
    launch.delete_run(find_run(names[0] if names else None))
    return *refresh_runs(names[1:]), gr.Row(visible=False)


def build() -> Any:
    """The page's five tabs. What several tabs share is made first and placed where it belongs."""
    with gr.Blocks(title="qlora-tune", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        fields = make_fields()
        picked = gr.Textbox(label="Data: file, folder or hub dataset", placeholder=parts.PATH_HINT, render=False)
        adapter = gr.Dropdown([], label="Adapter", render=False)
        watched = gr.Dropdown([], label="Run shown below", render=False)
        chosen = gr.Dropdown([], multiselect=True, label="Runs; the first is looked at and exported", render=False)
        part("<h1>qlora-tune</h1>")
        with gr.Tabs() as tabs:
            with gr.Tab("Data", id="data"):
                build_data(fields, picked, tabs)
            with gr.Tab("Train", id="train"):
                build_train(page, fields, watched, adapter, chosen, tabs)
            with gr.Tab("Chat", id="chat") as chat_tab:
                build_chat(chat_tab, adapter, tabs, watched, runs_dir)
            with gr.Tab("Runs and export", id="runs") as runs_tab:
                build_runs(runs_tab, chosen)
            with gr.Tab("Review", id="review"):
                build_review()
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
    repaired = [copy, log, mended, copied, use]
    check |= {"inputs": [picked, copied, *values]}
    check |= {"outputs": [say, report, checked, row, file, line, found, *repaired]}
    both, same = [picked, fields["data"]], lambda value: (value, value)
    on(upload.upload, take_upload, [upload], say, both).then(**check)
    on(example.click, lambda: (SAMPLE, SAMPLE), None, say, both).then(**check)
    on(picked.submit, lambda value: (value, value or SAMPLE), [picked], say, both).then(**check)
    on(fields["data"].input, same, [fields["data"]], say, both).then(**check)
    look: Any = {"inputs": [file, line, *values], "say": say, "outputs": [row, line]}
    on([line.submit, file.input], show_row, **look)
    on(back.click, functools.partial(show_row, above=True), **look)
    on(forth.click, show_next_row, **look)
    on(mend.click, repair, [report, *values], say, repaired, busy="Mending …")
    on(use.click, same, [copied], say, both).then(**check)
    on(go.click, lambda: gr.Tabs(selected="train"), None, say, [tabs])


def build_train(page: Any, fields: dict[str, Any], name: Any, adapter: Any, chosen: Any, tabs: Any) -> None:
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
        name.render()
        again = gr.Button("Resume", variant="primary", visible=False, scale=0, min_width=120)
        talk = gr.Button("Compare base and tuned", variant="primary", visible=False, scale=0, min_width=250)
        out = gr.Button("Scores and export", visible=False, scale=0, min_width=190)
    say_run, say_watch, live = part(), part(), part(elem_classes="pane")
    with gr.Accordion("Log", open=False):
        log = part()
    on([page.load, fields["preset"].input], fill_fields, [fields["preset"]], say, values)
    base = fields["model_name_or_path"]
    on(base.input, fill_for_base, [fields["preset"], base], say, values)
    shown: Any = {"trigger_mode": "always_last", "show_progress": "hidden"}
    changes = [page.load, alive.change, *(field.change for field in values)]
    on(changes, show_card, values, say, [card, command, begin], **shown)
    watched = [name, seen, alive, live, log, brief, begin, stop, again, talk, out, asked]
    ticks = [page.load, gr.Timer(1.0).tick, name.input]
    on(ticks, watch, [name, seen], say_watch, watched, show_progress="hidden", concurrency_limit=None)
    on(begin.click, start, values, say, [name], busy="Starting …")
    on(again.click, resume, [name], say_run, [])
    reveal(stop.click, asked, say_run, True)
    reveal(keep.click, asked, say_run, False)
    on(save.click, functools.partial(end_run, launch.request_stop), [name], say_run, [asked])
    on(drop.click, functools.partial(end_run, launch.discard_run), [name], say_run, [asked])
    # One after the other: a tab that opens asks what is chosen in it, and must not be told what was before.
    chat, export = (functools.partial(gr.Tabs, selected=tab) for tab in ("chat", "runs"))
    alone: Any = {"inputs": None, "outputs": [tabs], "api_visibility": "private"}
    on(talk.click, functools.partial(pick_adapter, runs_dir), [name], say_run, [adapter]).then(chat, **alone)
    on(out.click, lambda run: refresh_runs([run])[0], [name], say_run, [chosen]).then(export, **alone)


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
        gguf = gr.Button("Export for llama.cpp (GGUF)", scale=0, min_width=260)
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
    on(gguf.click, export_llama_cpp, [chosen], say_out, [done], **heavy)
    on(change.click, rename, [chosen, name], say_down, [chosen, table, name])
    reveal(doom.click, asked, say_down, True)
    reveal(keep.click, asked, say_down, False)
    on(sure.click, delete, [chosen], say_down, [chosen, table, asked])
    on(chosen.change, lambda: gr.Row(visible=False), None, say_down, [asked])  # it was asked of another run


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
