"""The page's part that decides on proposals: shows one after another, and records accept, edit and reject.

Thin over `grow`: what a button does is what `review` does in a terminal. gradio is imported inside, after the page has
set what gradio reads from the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlora_tune import page_parts as parts
from qlora_tune.errors import ConfigError
from qlora_tune.grow import decide, edit, read_pool, texts_of, write_accepted

Shown = tuple[str, ...]  # what is said, the proposal's id, its instruction, input and output
Choice = Literal["accept", "edit", "reject"]


def show_next(pool: str, said: str = "") -> Shown:
    """The first proposal of a pool that waits for a decision, and how many do; `said` stands before that."""
    path = _find_pool(pool)
    found = read_pool(path)
    waiting = found.having("pending")
    words = f"{said} {len(waiting)} of {len(found.proposals)} wait for a decision.".strip()
    if not waiting:
        return parts.show_message(words, "good"), "", "", "", ""
    id, proposal = waiting[0]
    return parts.show_message(f"{words} This one is by {proposal.source}."), id, *texts_of(proposal).values()


def decide_shown(choice: Choice, pool: str, id: str, instruction: str, given: str, output: str) -> Shown:
    """Accept the proposal that is shown as it came or with the texts of the fields, or reject it; show the next."""
    path = _find_pool(pool)
    proposal = dict(read_pool(path).having("pending")).get(id)
    if proposal is None:
        raise ConfigError("No proposal is shown, or it was decided on elsewhere. Press Show what waits.")
    edited = edit(proposal, instruction=instruction, input=given, output=output)
    decide(path, id, {"accept": proposal, "edit": edited, "reject": None}[choice])
    return show_next(pool, f"The last one: {choice}.")


def write(pool: str) -> Shown:
    """Write what was accepted beside the pool."""
    path = _find_pool(pool)
    output = path.with_name(f"{path.stem}_accepted.jsonl")
    return (parts.show_message(f"{write_accepted(path, output)} rows to train on: {output}", "good"),)


def build_review() -> None:
    """Place the fields and buttons into the page that is being built."""
    import gradio as gr

    with gr.Row(elem_classes="bar"):
        pool = gr.Textbox(label="Pool: the file that grow wrote", placeholder="Type a path and press Enter")
        load = gr.Button("Show what waits", scale=0, min_width=170)
        out = gr.Button("Write the accepted rows", scale=0, min_width=210)
    say = gr.Markdown(sanitize_html=False, latex_delimiters=[], container=False)  # as page_parts escapes it
    id = gr.State("")
    instruction = gr.Textbox(label="Instruction", lines=2)
    given = gr.Textbox(label="Input (may be empty)", lines=2)
    output = gr.Textbox(label="Output", lines=6)
    with gr.Row(elem_classes="bar"):
        accept = gr.Button("Accept as proposed", variant="primary")
        change = gr.Button("Accept as edited above")
        reject = gr.Button("Reject", variant="stop")
    shown = [say, id, instruction, given, output]
    quiet: Any = {"api_visibility": "private", "show_progress": "minimal"}
    gr.on([load.click, pool.submit], _told(show_next, len(shown)), [pool], shown, **quiet)
    choices: dict[Choice, Any] = {"accept": accept, "edit": change, "reject": reject}
    for choice, button in choices.items():
        button.click(_told(partial(decide_shown, choice), len(shown)), [pool, *shown[1:]], shown, **quiet)
    out.click(_told(write, 1), [pool], [say], **quiet)


def _find_pool(pool: str) -> Path:
    if not pool.strip() or not Path(pool.strip()).is_file():
        raise ConfigError(f"{pool or 'No file is named'}: expected the path of a pool that `grow` wrote.")
    return Path(pool.strip())


def _told(handler: Callable[..., Shown], outputs: int) -> Callable[..., tuple[Any, ...]]:
    """A handler whose problems are said in the first output; the others stay as they are."""
    import gradio as gr

    def call(*values: Any) -> tuple[Any, ...]:
        try:
            return handler(*values)
        except Exception as error:
            return parts.show_problem(error), *(gr.skip(),) * (outputs - 1)

    return call
