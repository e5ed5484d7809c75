"""The page's part that decides on proposals: shows one after another, and records accept, edit and reject.

Thin over `grow`: what a button does is what `review` does in a terminal.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlora_tune import page_parts as parts
from qlora_tune.errors import ConfigError
from qlora_tune.grow import decide, edit, read_pool, texts_of, write_accepted
from qlora_tune.page_widgets import gr, on, part

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
    with gr.Row(elem_classes="bar"):
        pool = gr.Textbox(label="Pool: the file that grow wrote", placeholder="Type a path and press Enter")
        load = gr.Button("Show what waits", scale=0, min_width=170)
        out = gr.Button("Write the accepted rows", scale=0, min_width=250)
    say, told, id = part(), part(), gr.State("")
    instruction = gr.Textbox(label="Instruction", lines=2)
    given = gr.Textbox(label="Input (may be empty)", lines=2)
    output = gr.Textbox(label="Output", lines=6)
    with gr.Row(elem_classes="bar"):
        accept = gr.Button("Accept as proposed", variant="primary")
        change = gr.Button("Accept as edited above")
        reject = gr.Button("Reject", variant="stop")
    fields = [id, instruction, given, output]
    on([load.click, pool.submit], show_next, [pool], say, [told, *fields])
    choices: dict[Choice, Any] = {"accept": accept, "edit": change, "reject": reject}
    for choice, button in choices.items():
        on(button.click, partial(decide_shown, choice), [pool, *fields], say, [told, *fields])
    on(out.click, write, [pool], say, [told])


def _find_pool(pool: str) -> Path:
    if not pool.strip() or not Path(pool.strip()).is_file():
        raise ConfigError(f"{pool or 'No file is named'}: expected the path of a pool that `grow` wrote.")
    return Path(pool.strip())
