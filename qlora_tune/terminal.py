"""What the terminal shows: reports, progress, coloured tokens, score tables, chat. It decides nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qlora_tune.comparison import HEADLINE, Comparison, TaskScore, write_values
from qlora_tune.config import Preset, ResolvedConfig, TrainConfig, describe_limits, describe_setting, describe_value
from qlora_tune.data import DataReport
from qlora_tune.errors import MAX_LISTED, ModelError, TemplateError
from qlora_tune.preview import mark_tokens
from qlora_tune.runs import Run
from qlora_tune.scores import METRICS, is_exact_match
from qlora_tune.text_signs import printable
from qlora_tune.turns import Message


class _Console(Console):
    """A console whose reader may go away (`… | head`) without ending what is running."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, emoji=False)
errors = Console(highlight=False, emoji=False, stderr=True)
_ACTIONS = {"rejected": "red", "changed": "yellow", "skipped": "dim"}
SCORE_HEADS = ("task", "rows", "base", "tuned", "change (95 %)")
CHAT_HELP = "/base  /tuned  /system TEXT  /clear  /quit   (Ctrl-C stops an answer)"


def say(text: str) -> None:
    """Print text as it is: no markup, no line breaks that would tear a path or a command apart."""
    console.print(printable(text), markup=False, soft_wrap=True)


def show_report(report: DataReport) -> None:
    """Rows in, kept and rejected, by shape and task, with the first problems."""
    shapes = ", ".join(f"{count} {shape}" for shape, count in report.shapes.most_common()) or "none"
    console.print(
        f"[bold]{report.rows_in}[/] rows = [green]{report.kept} kept[/] + [red]{report.rejected} rejected[/]"
        f" ({report.changed} of the kept were changed)   shapes: {shapes}",
        soft_wrap=True,
    )
    if len(report.tasks) > 1:
        tasks = ", ".join(f"{escape(printable(task))} {count}" for task, count in sorted(report.tasks.items()))
        console.print(f"tasks: {tasks}", style="dim", soft_wrap=True)
    show_problems(report)


def show_problems(report: DataReport) -> None:
    """Each reason once, with how many rows it met and the first of them."""
    groups = report.group_problems()
    for count, first in groups[:MAX_LISTED]:
        word = f"[{_ACTIONS[first.action]}]{first.action}[/]"
        more = f" (and {count - 1} more for such a reason)" if count > 1 else ""
        console.print(f"  {word} {escape(printable(str(first)))}{more}", soft_wrap=True)
    if len(groups) > MAX_LISTED:
        console.print(f"  … and {len(groups) - MAX_LISTED} more reasons")


def show_data_summary(summary: dict[str, Any]) -> None:
    """What will be trained on, in one line of figures."""
    share = summary["learned_tokens"] / max(summary["train_tokens"], 1)
    unseen = f"; {summary['rows_unseen']} rows of tasks kept out of training" if summary["rows_unseen"] else ""
    say(
        f"training on {summary['train_sequences']} sequences, {summary['train_tokens']:,} tokens, of which "
        f"{summary['learned_tokens']:,} (the answers) are learned ({share:.0%}); "
        f"longest {summary['longest_sequence']} tokens; {summary['rows_heldout']} rows held out{unseen}"
    )


def show_tokens(tokenizer: Any, ids: list[int], labels: list[int]) -> Text:
    """One sequence's tokens, those that are learned on green, control tokens in bold, every other one dim.

    Where there are no colours, ⟦ and ⟧ stand around what is learned.
    """
    text = Text()
    tokens = mark_tokens(tokenizer, ids, labels)
    for position, token in enumerate(tokens):
        piece = printable(token.text).replace("\n", "⏎\n")
        style = "black on green" if token.learned else ("dim" if position % 2 else "")
        opens = token.learned and not (position and tokens[position - 1].learned)
        closes = token.learned and not (position + 1 < len(tokens) and tokens[position + 1].learned)
        if not console.is_terminal:
            piece = f"{'⟦' if opens else ''}{piece}{'⟧' if closes else ''}"
        text.append(piece, style=f"bold {style}" if token.control else style)
    return text


def show_presets(presets: Iterable[Preset]) -> None:
    """The presets with the device and memory they are meant for, and their base."""
    table = Table(
        Column("preset", no_wrap=True),
        "device",
        Column("from", no_wrap=True),
        Column("base model", overflow="fold"),
        "what it is",
        box=None,
    )
    for preset in presets:
        base = str(preset.settings.get("model_name_or_path", "builtin"))
        row = (preset.name, preset.device, f"{preset.min_memory_gb:g} GB", base, preset.description)
        table.add_row(*map(escape, row))
    console.print(table)


def show_config(resolved: ResolvedConfig) -> None:
    """Every setting with its value, where the value came from, and what it is."""
    wide = console.width >= 110  # below it the meaning, the widest text, would get the narrowest column
    table = Table(Column("setting", no_wrap=True), Column("value", overflow="fold"), "from", box=None)
    if wide:
        table.add_column("meaning")
    for name in TrainConfig.model_fields:
        meaning = describe_setting(name)
        shown = describe_value(getattr(resolved.config, name))
        changed = resolved.origins[name] != "default"
        cells = [name, escape(shown), escape(resolved.origins[name]), *([escape(meaning)] if wide else [])]
        table.add_row(*cells, style="bold" if changed else None)
    console.print(table)
    if not wide:
        say("What each means: docs/settings.md, or a wider window.")
    say(f"preset: {resolved.config.preset} ({resolved.preset_reason})")


def settings_markdown() -> str:
    """All settings as markdown tables, one per group, from their declaration."""
    lines = ["# Settings", "", "Written by `python -m qlora_tune config --markdown`."]
    group = None
    for name, field in TrainConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        if extra["group"] != group:
            group = extra["group"]
            lines += ["", f"## {group}", "", "| setting | default | limits | meaning |", "| --- | --- | --- | --- |"]
        limits = describe_limits(field)
        lines.append(f"| `{name}` | {describe_value(field.default)} | {limits} | {field.description} |")
    return "\n".join(lines) + "\n"


def show_runs(runs: Iterable[Run]) -> None:
    """All runs with state, base, preset, steps, losses and score."""
    heads = ["run", "state", "preset", "steps", "held-out", "score"]
    table = Table(*(Column(head, no_wrap=True) for head in heads), Column("base model", overflow="fold"), box=None)
    for run in runs:
        state = run.read_state()
        loss = state.get("eval_loss")
        score = state.get("score_tuned")
        table.add_row(
            escape(run.name),
            state["status"],
            escape(state.get("preset", "?")),
            f"{state.get('steps', 0)}/{state.get('total_steps', '?')}",
            "" if loss is None else f"{loss:.4f}",
            "" if score is None else f"{state['score_base']:.0%} → {score:.0%}",
            escape(Path(state.get("base_model", "?")).name),
        )
    console.print(table if table.row_count else "No runs yet. Start one: python -m qlora_tune")


def show_comparison(comparison: Comparison, examples: int = 8) -> None:
    """Some answers side by side, then the score tables."""
    console.print(_side_by_side(comparison, examples))
    table = Table(
        *(Column(head, justify="right" if at else "left") for at, head in enumerate(SCORE_HEADS)),
        title="exact match on held-out rows",
        title_justify="left",
        box=HORIZONTALS,
    )
    total = comparison.total()
    for score in [*comparison.by_task(), total]:
        if score is total:
            table.add_section()
        cells = (escape(printable(score.task)), str(score.rows), *write_values(score, HEADLINE))
        table.add_row(*cells, style="bold" if score is total else None)
    console.print(table)
    console.print(_all_measures(total))
    if comparison.forgetting:
        say(comparison.forgetting.describe())


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of words and figures; the first column is a name."""
    name, *figures = heads
    table = Table(Column(name, no_wrap=True), *(Column(head, justify="right") for head in figures), box=HORIZONTALS)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)


def show_finding(what: str, found: str, advice: str, fatal: bool) -> None:
    """Print a line of what was examined, and under it what to do."""
    colour = "red" if fatal else "yellow" if advice else "green"
    console.print(f"[{colour}]{escape(what):<14}[/] {escape(printable(found))}", soft_wrap=True)
    if advice:
        console.print(f"{'':<14} {escape(printable(advice))}", soft_wrap=True)


def _all_measures(total: TaskScore) -> Table:
    heads = ("measure", *SCORE_HEADS[2:])
    table = Table(
        *(Column(head, justify="right" if at else "left") for at, head in enumerate(heads)),
        title="all measures, all rows",
        title_justify="left",
        box=HORIZONTALS,
    )
    for metric in METRICS:
        if metric.name in total.tuned:
            table.add_row(metric.label, *write_values(total, metric.name))
    return table


def _side_by_side(comparison: Comparison, count: int) -> Table:
    table = Table(
        "prompt",
        "expected",
        "base",
        "tuned",
        "",
        title="answers side by side",
        title_justify="left",
        show_lines=True,
        box=HORIZONTALS,
    )
    step = max(1, len(comparison.answers) // max(count, 1))
    for answer in comparison.answers[::step][:count]:
        right = is_exact_match(answer.tuned, answer.reference)
        turns = [f"{turn['role']}: {turn['content']}" for turn in answer.prompt]
        prompt = "\n".join(turns) if len(turns) > 1 else answer.prompt[0]["content"]
        cells = [prompt, answer.reference, answer.base or "", answer.tuned]
        table.add_row(*(Text(_clip(cell)) for cell in cells), "[green]✓[/]" if right else "[red]✗[/]")
    return table


def _clip(text: str, longest: int = 160) -> str:
    return printable(text if len(text) <= longest else text[:longest] + " …")


Reply = Callable[[list[Message], bool], Iterator[str]]


def chat_loop(reply: Reply, fit: Callable[[list[Message]], list[Message]]) -> None:
    """Talk in the terminal. `reply(messages, tuned)` streams the answer of the tuned or the base model.

    `fit(messages)` leaves out the oldest turns that no longer fit the model's context.
    """
    messages: list[Message] = []
    tuned, told = True, False
    say(f"Chatting with the tuned model. {CHAT_HELP}")
    while True:
        try:
            line = console.input("[bold]you:[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit", "quit", "exit") and not rest:
            return
        if command in ("/base", "/tuned"):
            tuned = command == "/tuned"
            console.print(f"now {command[1:]}", style="dim")
        elif command == "/clear":
            messages, told = [turn for turn in messages if turn["role"] == "system"], False
            console.print("conversation cleared", style="dim")
        elif command == "/system":
            messages, told = [Message(role="system", content=rest.strip())] if rest.strip() else [], False
            console.print("system prompt set, conversation cleared" if messages else "no system prompt", style="dim")
        elif command == "/help":
            say(CHAT_HELP)
        elif command.startswith("/"):
            say(f"unknown command {command}. {CHAT_HELP}")
        elif line:
            asked = [*messages, Message(role="user", content=line)]
            try:
                fitting = fit(asked)
            except (ModelError, TemplateError) as error:
                say(str(error))
                continue
            if len(fitting) < len(asked) and not told:
                console.print(
                    "(the oldest turns no longer fit the model's context and are left out from now on)", style="dim"
                )
                told = True
            answer = _stream(reply(fitting, tuned), "tuned" if tuned else "base")
            # An empty answer can't stand in the history: templates would render a turn that never was learned.
            if answer:
                messages = [*fitting, Message(role="assistant", content=answer)]
            else:
                say("(no answer; this turn is left out of the conversation)")


def _stream(pieces: Iterator[str], who: str) -> str:
    console.print(f"[bold]{who}:[/] ", end="")
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            answer += piece
            console.print(printable(piece), end="", markup=False, soft_wrap=True)
    console.print()
    return answer.strip()
