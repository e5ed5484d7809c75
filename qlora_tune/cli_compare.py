"""The terminal face of comparing: answers side by side, votes on them, and what the votes say."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.box import HORIZONTALS
from rich.table import Column, Table
from rich.text import Text

from qlora_tune import terminal
from qlora_tune.answer_files import LETTERS, Answers, count_exact, write_answers
from qlora_tune.cli_train import RunsDir
from qlora_tune.errors import ConfigError
from qlora_tune.row_files import refuse_overwriting
from qlora_tune.terminal import console, say
from qlora_tune.terminal_progress import scoring_progress
from qlora_tune.text_signs import printable
from qlora_tune.votes import NONE, TIE, Tally, Vote, append_vote, count_votes, read_votes, same_answerers

if TYPE_CHECKING:
    from qlora_tune.export import Trained
    from qlora_tune.scores import Interval
    from qlora_tune.side_by_side import Panel

DATA_HELP = "Rows to answer instead of the first run's held-out ones; may repeat."
OUTPUT_HELP = "JSON lines file for all answers; FILE#ANSWERER names them in a later comparison."
REWARD_HELP = "Run of a reward model, which scores every answer."
VOTES_HELP = "File that votes are added to; votes.jsonl of the first run by itself."
_AT_LEAST_1 = Number(gte=1)
_NO_WINNER = {"T": TIE, "N": NONE}
_Shown = tuple[int, dict[str, str]]  # a row's number, and its answerers by letter


def compare(
    *answerers: str,
    data: Annotated[tuple[str, ...], Parameter(help=DATA_HELP, negative=(), show_default=False)] = (),
    rows: Annotated[int, Parameter(help="How many rows, drawn by seed.", validator=_AT_LEAST_1)] = 20,
    blind: Annotated[
        bool, Parameter(help="Shuffle the letters row by row; names come at the end.", negative=())
    ] = False,
    vote: Annotated[bool, Parameter(help="Ask after each row which answer is best.", negative=())] = False,
    votes: Annotated[Path | None, Parameter(help=VOTES_HELP, show_default=False)] = None,
    reward: Annotated[Path | None, Parameter(help=REWARD_HELP, show_default=False)] = None,
    seed: Annotated[int, Parameter(help="Draws the rows, and the letters of --blind.")] = 42,
    output: Annotated[Path | None, Parameter(help=OUTPUT_HELP, show_default=False)] = None,
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    runs_dir: RunsDir = "runs",
    max_new_tokens: Annotated[int, Parameter(help="Longest answer [tokens].", validator=_AT_LEAST_1)] = 256,
    batch_size: Annotated[int, Parameter(help="Prompts answered at once.", validator=_AT_LEAST_1)] = 16,
) -> None:
    """Put ANSWERERS side by side on the same prompts: runs, adapters, exported zips, base, files of answers."""
    from qlora_tune.pair_scores import share
    from qlora_tune.reward_model import compare_means, open_reward_model
    from qlora_tune.side_by_side import answer_questions, find_questions, open_panel

    with tempfile.TemporaryDirectory() as scratch:
        if votes and not vote:
            raise ConfigError("--votes says where --vote keeps the votes. Give both.")
        panel = open_panel(answerers, runs_dir, model_name_or_path, Path(scratch))
        judge = open_reward_model(reward, runs_dir, model_name_or_path) if reward else None
        votes_file = _find_votes_file(panel, votes) if vote else None
        before = same_answerers(read_votes(votes_file), panel.fingerprints) if votes_file else []
        inputs = [*answerers, *(name.rpartition("#")[0] for name in answerers if "#" in name), *data]
        refuse_overwriting([votes_file] if votes_file else [], inputs)
        refuse_overwriting([output] if output else [], [*inputs, *([votes_file] if votes_file else [])])
        questions, report = find_questions(panel, data)
        if report.problems:
            say(f"{report.rejected} of {report.rows_in} rows left out:")
            terminal.show_problems(report)
        if unknown := [each.name for each in panel.answerers if not each.run and (each.trained or each.recorded)]:
            say(f"not known what was trained on for {', '.join(unknown)}: the rows may not be new to them")
        with scoring_progress() as progress:
            answers = answer_questions(
                panel,
                questions,
                rows=rows,
                seed=seed,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_note=say,
                on_progress=progress,
            )
    if output:
        write_answers(output, answers)
        say(f"all answers: {output}")
    if votes_file:
        shown = _ask_votes(votes_file, panel, answers, {each.key for each in before}, seed, blind)
    rewards, agreed = _judge(judge, panel, answers, votes_file, batch_size) if judge else ([], [])
    if not votes_file:
        shown = [
            _show_row(row, number, answers, seed if blind else None, rewards[number] if rewards else {})
            for number, row in enumerate(answers)
        ]
    if blind and shown:
        _show_key(shown)
    _show_totals(panel, answers, votes_file, compare_means(rewards))
    if agreed:
        mean, low, high = share(agreed)
        say(
            f"the reward prefers the voted answer to another in {sum(agreed)} of {len(agreed)} cases: "
            f"{mean:.1%} ({low:.1%} to {high:.1%})"
        )


def _judge(
    judge: Trained, panel: Panel, answers: Sequence[Answers], votes_file: Path | None, batch_size: int
) -> tuple[list[dict[str, float | None]], list[bool]]:
    """The reward of every answer, and whether it agrees with the votes on these answerers, where there are any.

    Not shown to who votes: it would sway the votes.
    """
    from qlora_tune.reward_model import agree_with_votes, load_reward_model, score_answers

    model = load_reward_model(judge)
    if seen := sum(row.question.key in model.seen for row in answers):
        say(f"{seen} of {len(answers)} rows are prompts that the reward model was trained on")
    kept = votes_file or (panel.run.path / "votes.jsonl" if panel.run else None)
    votes = same_answerers(read_votes(kept), panel.fingerprints) if kept else []
    return score_answers(model, answers, batch_size), agree_with_votes(model, votes, batch_size)


def _find_votes_file(panel: Panel, named: Path | None) -> Path:
    """Where votes go. Raises ConfigError where no run is there to keep them, or the folder is missing."""
    path = named or (panel.run.path / "votes.jsonl" if panel.run else None)
    if path is None:
        raise ConfigError("--vote: there is no run here whose folder could keep the votes. Name a file with --votes.")
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"{path}: expected a file in a folder that exists, to keep votes in. Name one with --votes.")
    return path


def _ask_votes(
    path: Path, panel: Panel, answers: Sequence[Answers], voted: set[str], seed: int, blind: bool
) -> list[_Shown]:
    """Show each row that has no vote yet, and keep what is voted on it at once; returns what was shown."""
    if done := sum(row.question.key in voted for row in answers):
        say(f"{done} of {len(answers)} rows are voted on already, and not asked again")
    shown = []
    for number, row in enumerate(answers):
        question = row.question
        if question.key in voted:
            continue
        shown.append(_show_row(row, number, answers, seed if blind else None, {}))
        winner = _ask_vote(shown[-1][1])
        if winner is None:
            break
        if winner:
            voted.add(question.key)  # the same prompt may stand in two rows
            append_vote(
                path,
                Vote(
                    prompt=question.prompt,
                    tools=question.tools,
                    task=question.task,
                    source=question.source,
                    answers=row.answers,
                    winner=winner,
                    blind=blind,
                    seed=seed,
                    time=time.time(),
                    fingerprints=panel.fingerprints,
                    base=panel.base,
                ),
            )
    return shown


def _ask_vote(letters: dict[str, str]) -> str | None:
    """The winner's name, "tie" or "none"; empty for a row that is skipped, None for the end."""
    while True:
        try:
            line = console.input(f"best: {', '.join(letters)}, t tie, n none is good, Enter skips, q stops: ")
        except (EOFError, KeyboardInterrupt):
            say("")
            return None
        choice = line.strip().upper()
        if choice in ("", "Q"):
            return None if choice else ""
        if choice in letters or choice in _NO_WINNER:
            return letters.get(choice) or _NO_WINNER[choice]
        say(f'"{line.strip()}" is none of these')


def _show_row(
    row: Answers, number: int, answers: Sequence[Answers], seed: int | None, rewards: Mapping[str, float | None]
) -> _Shown:
    """One row: prompt, reference, and the answers under letters, with names unless a seed shuffles them."""
    question, letters = row.question, row.letter(seed)
    about = " · ".join(filter(None, [f"row {number + 1} of {len(answers)}", question.task, question.source]))
    console.rule(Text(printable(" ".join(about.split()))), align="left")
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for turn in question.prompt:
        calls = [f"{call['name']}({call['arguments']})" for call in turn.get("tool_calls", [])]
        table.add_row(
            Text(turn["role"], style="dim"), Text(printable("\n".join(filter(None, [turn["content"], *calls]))))
        )
    if question.reference is not None:
        table.add_row(Text("reference", style="dim"), Text(printable(question.reference), style="green"))
    for letter, name in letters.items():
        head = letter if seed is not None else f"{letter}  {printable(name)}"
        reward = rewards.get(name)
        head += f"  {reward:+.2f}" if reward is not None else ""
        table.add_row(Text(head, style="bold"), Text(printable(row.answers[name])))
    console.print(table)
    return number + 1, letters


def _show_key(shown: Sequence[_Shown]) -> None:
    """Who was who, row by row."""
    table = Table("row", *LETTERS[: len(shown[0][1])], title="the letters", title_justify="left", box=HORIZONTALS)
    for number, letters in shown:
        table.add_row(str(number), *(Text(printable(name)) for name in letters.values()))
    console.print(table)


def _show_totals(
    panel: Panel, answers: Sequence[Answers], votes_file: Path | None, means: Mapping[str, tuple[float, Interval]]
) -> None:
    """Exact match, mean reward and votes by answerer; the votes are all that the file holds on these answerers."""
    tally = count_votes(read_votes(votes_file), panel.fingerprints) if votes_file else None
    heads = ["answerer", "exact match", *(["reward", "against the first (95 %)"] if means else [])]
    heads += ["wins", "share of decided (95 %)"] if tally else []
    table = Table(*(Column(head, justify="right" if at else "left") for at, head in enumerate(heads)), box=HORIZONTALS)
    for name in panel.fingerprints:
        right, of = count_exact(answers, name)
        cells = [f"{right} of {of} ({right / of:.1%})" if of else "no references"]
        if means:
            mean, (change, low, high) = means[name]
            cells += [f"{mean:+.2f}", f"{change:+.2f} ({low:+.2f} to {high:+.2f})"]
        if tally:
            cells += [str(tally.wins[name]), _write_share(tally, name)]
        table.add_row(Text(printable(name)), *cells)
    console.print(table)
    if tally:
        say(f"{tally.decided} decided, {tally.ties} ties, {tally.none} with no good answer; all votes: {votes_file}")


def _write_share(tally: Tally, name: str) -> str:
    if not tally.decided:
        return ""
    share, low, high = tally.share(name)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"
