"""The page's tab Chat: two voices of one loaded base on the same prompts, votes on them, training on the votes."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_tune import ballots, chat, launch
from qlora_tune import page_parts as parts
from qlora_tune.config import describe_setting
from qlora_tune.errors import ConfigError, RunError, TuneError
from qlora_tune.model import free_memory
from qlora_tune.page_widgets import CACHE, gr, hand_out, on, part
from qlora_tune.prefer import make_settings
from qlora_tune.preferences import read_pairs, write_pairs
from qlora_tune.runs import Run, list_runs
from qlora_tune.text_signs import printable
from qlora_tune.votes import NONE, TIE

CHOICES = {"A": "A is better", "B": "B is better", TIE: "Tie", NONE: "Both bad"}
# Settings of training on votes, with steps of their fields; all others are as `prefer` has them.
ASKED = {"beta": 0.05, "learning_rate": 1e-6, "num_train_epochs": 1.0}


@functools.lru_cache(maxsize=1)
def load_chat(adapter: str, merged: str | None, stamp: int) -> Any:
    """One loaded model at a time; `stamp` is the adapter file's time, so that a new one is loaded again."""
    return chat.load_chat(Path(adapter), merged=Path(merged) if merged else None)


def release_chat() -> None:
    """Give the chat's memory back, before a run takes the device."""
    load_chat.cache_clear()
    free_memory()


def pick_adapter(runs_dir: str, name: str | None) -> Any:
    """The adapters that there are, and one chosen: by its folder, by its run's name, or the first."""
    choices = [(label, str(folder)) for label, folder in chat.list_adapters(runs_dir).items()]
    places = {Path(folder).resolve(): folder for _, folder in choices}
    wanted = dict(choices).get(name or "") or places.get(Path(name or "").resolve())
    return gr.Dropdown(choices, value=wanted or next(iter(places.values()), None))


def open_chat(adapter: str | None) -> Any:
    if not adapter:
        raise RunError("No adapter is chosen. Train one on the tab Train, or open a zip.")
    merged, weights = Path(adapter).parent / "merged", Path(adapter) / "adapter_model.safetensors"
    return load_chat(adapter, str(merged) if merged.is_dir() else None, weights.stat().st_mtime_ns)


def name_sides(voices: Any) -> list[str]:
    return [f"{letter} ({voice})" for letter, voice in zip("AB", voices, strict=True)]


def answer(
    prompt: str,
    left: list[Any],
    right: list[Any],
    adapter: str,
    one: str,
    two: str,
    system: str,
    blind: bool,
    *sampling: Any,
) -> Iterator[tuple[Any, ...]]:
    """Stream the answers of both sides, one after the other: they share one loaded base. Then votes are taken."""
    before, voices, shown, kept = [left, right], [one, two], 0.0, gr.skip()  # what is typed meanwhile stays
    names, silent, unchanged = name_sides(voices), (None, gr.Row(visible=False), ""), (gr.skip(),) * 3
    try:
        if not prompt.strip():
            raise ConfigError("Write a message first, or choose a held-out prompt.")
        given = chat.check_sampling(*sampling)
        sides = [chat.ask(turns, prompt) for turns in before]
        yield parts.show_message("Loading …", "soft"), "", *before, *parts.show_sides(sides, names), *silent
        model, run = open_chat(adapter), chat.find_own_run(Path(adapter))
        why = ballots.why_no_vote(run, voices, before)
        ballot: ballots.Ballot | None = None
        arrange: Callable[[Any], list[Any]] = list
        if run and not why:
            heard = model.fit(chat.add_system(system, sides[0]), given["max_new_tokens"])
            ballot = ballots.draw_ballot(run, voices, heard, blind)
            arrange, names = ballot.arrange, ["A", "B"] if blind else names
        asked: Any = [None if who == "off" else who for who in arrange(voices)]
        for grown in chat.answer_sides(model, asked, arrange(sides), system, **given):
            sides = arrange(grown)
            if time.monotonic() - shown > 0.05:  # a browser need not draw each token
                shown = time.monotonic()
                yield "", kept, *sides, *parts.show_sides(grown, names), *unchanged
        answered = [len(side) > len(turns) for side, turns in zip(sides, before, strict=True)]
        mute = [who for who, said in zip(voices, answered, strict=True) if not said]
        words = f"No answer of {' and '.join(mute)}; the turn is left out." if mute else ""
        kept = kept if any(answered) else prompt
        offered: Any = (None, gr.Row(visible=False), parts.show_message(why, "soft"))
        if ballot and run and all(answered):
            ballot = ballot.fill([side[-1]["content"] for side in sides])
            offered = ((ballot, arrange(voices), grown), gr.Row(visible=True), show_count(run))
        else:
            names = name_sides(arrange(voices))
        yield parts.show_message(words, "soft"), kept, *sides, *parts.show_sides(arrange(sides), names), *offered
    except Exception as error:
        yield parts.show_problem(error), prompt, *before, *parts.show_sides(before, name_sides(voices)), *silent


def require_run(adapter: str | None) -> Run:
    """The run whose adapter is talked to. Raises RunError."""
    if not (run := chat.find_own_run(Path(adapter or ""))):
        raise RunError("No run is chosen. Choose one as the adapter above.")
    return run


def show_count(run: Run) -> str:
    votes, decided = ballots.count_votes(run)
    return parts.show_message(f"Votes of this run: {votes}; {decided} say which answer is better.", "soft")


def vote(choice: str, offered: Any, adapter: str) -> tuple[Any, ...]:
    """Keep a vote and show who was who. A second click finds nothing to vote on."""
    if not offered:
        return (gr.skip(),) * 5
    ballot, voices, sides = offered
    said = "" if ballot.cast(choice) else parts.show_message("These answers have a vote already; it stands.", "soft")
    count = show_count(require_run(adapter))
    return None, gr.Row(visible=False), said + count, *parts.show_sides(sides, name_sides(voices))


def show_votes(adapter: str | None) -> tuple[Any, ...]:
    """The count of an adapter's votes, and the usual settings of training on them."""
    run, usual = chat.find_own_run(Path(adapter or "")), [gr.skip()] * len(ASKED)
    if not run:
        note = parts.show_message(ballots.why_no_vote(None, (), ()), "soft") if adapter else ""
        return note, gr.Accordion(visible=False), *usual, gr.DownloadButton(visible=False), ""
    said = ""
    try:
        config = make_settings(ballots.find_beginning(run)[0], [], {})
        usual = [getattr(config, name) for name in ASKED]
    except TuneError as error:  # votes can be cast and exported all the same
        said = parts.show_problem(error)
    return show_count(run), gr.Accordion(visible=True), *usual, gr.DownloadButton(visible=False), said


def export_votes(adapter: str) -> tuple[Any, str]:
    run = require_run(adapter)
    with tempfile.TemporaryDirectory(dir=CACHE.name) as scratch:
        pairs, report = read_pairs([ballots.votes_file(run)])
        write_pairs(path := Path(scratch) / f"{run.name}-pairs.jsonl", pairs)
        words = [f"{len(pairs)} pairs of {report.rows_in} votes."]
        words += [f"{count} left out: {first.reason}." for count, first in report.group_problems()]
        return hand_out(path), parts.show_message("\n".join(words), "good")


def train_on_votes(runs_dir: str, adapter: str, *values: Any) -> tuple[Any, Any]:
    given = {name: value for name, value in zip(ASKED, values, strict=True) if value is not None}
    release_chat()
    run = ballots.launch_on_votes(require_run(adapter), {**given, "runs_dir": runs_dir})
    names = [each.name for each in reversed(list_runs(runs_dir))]
    return gr.Tabs(selected="train"), gr.Dropdown(names, value=run.name)


def retry(typed: str, left: list[Any], right: list[Any]) -> tuple[str, list[Any], list[Any]]:
    """Take the last question back, to ask it again; where there is none, what is typed is asked.

    A side that gave no answer to it has left it out already, and goes back no further.
    """
    ends = [(side, *chat.before_last_question(side)) for side in (left, right)]
    asked = max(ends, key=lambda end: len(end[0]))[2]
    rests = [rest if last == asked else side for side, rest, last in ends]
    return asked or typed, rests[0], rests[1]


def list_examples(adapter: str | None) -> Any:
    run = chat.find_own_run(Path(adapter or ""))
    rows = chat.list_heldout(run) if run else []
    return gr.Dropdown(rows, value=None, visible=bool(rows))


def use_example(index: int, adapter: str) -> tuple[Any, ...]:
    """Put a held-out row into the fields: system prompt, what was said before, question; and what is expected."""
    system, turns, question, expected = chat.split_example(Run(Path(adapter).parent).read_heldout()[index])
    return printable(system), turns, turns, printable(question), parts.show_message(f"Expected: {expected}", "soft")


def open_zip(runs_dir: str, file: str) -> Any:
    return pick_adapter(runs_dir, str(chat.unpack_adapter(Path(file), launch.uploads_folder(runs_dir))))


def build_chat(tab: Any, adapter: Any, tabs: Any, watched: Any, runs_dir: str) -> None:
    """The tab; `watched` is the run that the tab Train shows, `runs_dir` the folder of all runs."""
    left, right, offered = gr.State([]), gr.State([]), gr.State(None)
    with gr.Row(elem_classes="bar"):
        adapter.render()
        one = gr.Dropdown(["base", "tuned", "merged"], value="base", label="Left side")
        two = gr.Dropdown(["tuned", "base", "merged", "off"], value="tuned", label="Right side")
        upload = gr.UploadButton("Open an adapter (.zip)", file_types=[".zip"], scale=0, min_width=240)
    with gr.Row():
        panes = [part(parts.show_conversation([], who), elem_classes="pane") for who in ("base", "tuned")]
    say = part()
    with gr.Row(visible=False) as ask:
        choices = {choice: gr.Button(words) for choice, words in CHOICES.items()}
    with gr.Row():
        blind = gr.Checkbox(False, label="Blind: hide and draw the sides until you have voted", container=False)
        note = part()
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
    with gr.Accordion("Train on the votes", open=False, visible=False) as votes:
        with gr.Row():
            asked = [
                gr.Number(label=name, info=describe_setting(name).replace("`", ""), step=step)
                for name, step in ASKED.items()
            ]
        with gr.Row(elem_classes="bar"):
            learn = gr.Button("Train on these votes", variant="primary")
            pack = gr.Button("Export the votes as pairs")
            packed = gr.DownloadButton(visible=False)
        say_votes, done = part(), part()
    sampling, poll = [temperature, top_p, longest], [offered, ask, note]
    stream: Any = {"fn": answer, "inputs": [prompt, left, right, adapter, one, two, system, blind, *sampling]}
    stream |= {"outputs": [say, prompt, left, right, *panes, *poll], "concurrency_id": "model"}
    stream |= {"show_progress": "hidden", "api_visibility": "private"}
    again = on(redo.click, retry, [prompt, left, right], say, [prompt, left, right]).then(**stream)
    streams = [prompt.submit(**stream), send.click(**stream), again]
    halt.click(None, cancels=streams, api_visibility="private")
    for choice, vote_button in choices.items():
        on(vote_button.click, functools.partial(vote, choice), [offered, adapter], say, [*poll, *panes])
    talk = [left, right, *panes, expected, offered, ask]
    empty = ([], [], *parts.show_sides(([], []), ("base", "tuned")), "", None, gr.Row(visible=False))
    on(clear.click, lambda: empty, None, say, talk, cancels=streams)
    on([tab.select, adapter.focus], functools.partial(pick_adapter, runs_dir), [adapter], say, [adapter])
    changed = on(adapter.change, lambda: ("", *empty), None, say, [system, *talk])
    on(changed.then, list_examples, [adapter], say, [example])
    on(example.input, use_example, [example, adapter], say, [system, left, right, prompt, expected])
    on(adapter.change, show_votes, [adapter], say_votes, [note, votes, *asked, packed, done])
    on(upload.upload, functools.partial(open_zip, runs_dir), [upload], say, [adapter])
    on(pack.click, export_votes, [adapter], say_votes, [packed, done])
    start = functools.partial(train_on_votes, runs_dir)
    on(learn.click, start, [adapter, *asked], say_votes, [tabs, watched], busy="Starting …")
