"""Preference pairs: read from votes and from the usual preference files, split by prompt, as tokens, written again.

Station between data files and preference training. Every row becomes one or more pairs, or a DataProblem that names
file, line and reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_tune.chat_format import ChatFormat
from qlora_tune.containers import read_rows
from qlora_tune.data import AS_EXAMPLES, DataReport, find_data, label_files, require_memory, split_heldout
from qlora_tune.errors import DataError, TemplateError, join_problems
from qlora_tune.row_files import to_turn, write_rows
from qlora_tune.shapes import NO_TASK, DataProblem, Example, Row, reject_example, to_examples
from qlora_tune.turns import Message, RowError, check_turns, type_name
from qlora_tune.votes import NONE, TIE, to_vote

PAIR_FORM = (
    '"chosen" and "rejected" beside a prompt ("prompt", "instruction", "question", "messages" or "conversations"), or '
    "votes of compare --vote"
)
# At the usual 2e-4 of instruction tuning this gives 5e-6, the rate of Zephyr's recipe for DPO with QLoRA
# (alignment-handbook).
RATE_SHARE = 1 / 40
# Settings that are another matter in this stage; one pass, because pairs are soon known by heart.
STAGE: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "warmup_ratio": 0.1,
    "heldout_share": 0.1,
    "early_stopping_patience": 0,
    "neftune_noise_alpha": None,
    "run_name": None,
}
# The better answer's column, then the worse one's: TRL and LLaMA-Factory, StackExchange paired, OpenAI.
_SIDES = (("chosen", "rejected"), ("response_j", "response_k"), ("preferred_output", "non_preferred_output"))
KEPT = ("pairs.jsonl", "pairs-heldout.jsonl")  # in a run's folder
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ANSWERS = {"instruction": "output", "prompt": "completion", "question": "answer"}  # a prompt's column, its answer's
_NO_WINNER = {TIE: "is a tie: no answer is better", NONE: "says that no answer is good: none is better"}


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, of which people or a judge chose one."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str  # "votes.jsonl:3"; "votes.jsonl:3#2" for the second pair of one vote
    task: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def to_example(self) -> Example:
        """The prompt with the chosen answer."""
        return Example((*self.prompt, _answer(self.chosen)), self.task, self.source, self.tools)

    def to_row(self) -> dict[str, Any]:
        """The pair in the usual form of preference files, prompt and answers as turns."""
        row = {
            "prompt": [to_turn(turn) for turn in self.prompt],
            "chosen": [Message(role="assistant", content=self.chosen)],
            "rejected": [Message(role="assistant", content=self.rejected)],
            "task": self.task,
            "source": self.source,
        }
        return {**row, "tools": list(self.tools)} if self.tools else row


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids: the prompt, and each answer through its end of turn."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def __len__(self) -> int:
        """Tokens of the longer of both conversations."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def read_pairs(paths: Sequence[str | Path]) -> tuple[list[PreferencePair], DataReport]:
    """Read preference files, votes files and folders of them: the pairs, and what became of every row.

    Raises DataError when no row at all gives a pair, and MemoryLimitError when they can't be held.
    """
    files = find_data(paths)
    require_memory(files, AS_EXAMPLES)
    labels = label_files(files)
    pairs: list[PreferencePair] = []
    report = DataReport()
    for file in files:
        for row in read_rows(Path(file), notes=report.notes.setdefault(file, [])):
            counts = not (isinstance(row, DataProblem) and row.action == "skipped")
            report.rows_in += counts
            report.rows_by_file[file] += counts
            if isinstance(row, DataProblem):
                report.problems.append(row)
                continue
            try:
                found, shape, changes = _to_pairs(row, labels[file])
            except RowError as error:
                report.problems.append(DataProblem(row.file, row.line, str(error), original=row.fields))
                continue
            pairs += found
            report.shapes[shape] += 1
            report.tasks[found[0].task or NO_TASK] += 1
            report.problems += [DataProblem(row.file, row.line, c, "changed", row.fields) for c in changes]
    if not pairs:
        reasons = [str(problem) for _, problem in report.group_problems()] or ["the files have no rows"]
        raise DataError(join_problems(f"No preference pair in {', '.join(files)}. Expected {PAIR_FORM}.", reasons))
    return pairs, report


def split_pairs(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Hold out about `share` of the pairs as data.split_heldout does: no prompt, nor a near copy, on both sides."""
    _, heldout = split_heldout([pair.to_example() for pair in pairs], share, seed)
    sources = {example.source for example in heldout}
    return [p for p in pairs if p.source not in sources], [p for p in pairs if p.source in sources]


def tokenize_pairs(
    chat: ChatFormat, pairs: Sequence[PreferencePair], max_length: int
) -> tuple[list[tuple[PreferencePair, TokenizedPair]], list[DataProblem]]:
    """Encode pairs with the tokens of instruction tuning; one beyond max_length [tokens] is left out whole."""
    found: list[tuple[PreferencePair, TokenizedPair]] = []
    problems: list[DataProblem] = []
    for pair in pairs:
        try:
            answers = [
                chat.encode_answer([*pair.prompt, _answer(text)], pair.tools) for text in (pair.chosen, pair.rejected)
            ]
            tokens = TokenizedPair(chat.encode_prompt(pair.prompt, pair.tools), *answers)
            if len(tokens) > max_length:
                raise TemplateError(f"is {len(tokens)} tokens long, max_length is {max_length}")
            found.append((pair, tokens))
        except TemplateError as error:
            problems.append(_leave_out(pair, str(error)))
    return found, problems


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """Write pairs as JSON Lines, one a line, that read_pairs and other trainers read. Raises DataError."""
    write_rows({path: (pair.to_row() for pair in pairs)})


def keep_pairs(folder: Path, train: Sequence[PreferencePair], heldout: Sequence[PreferencePair]) -> None:
    """Keep the pairs of a run in its folder: what was trained on must not depend on the files of that day."""
    for name, pairs in zip(KEPT, (train, heldout), strict=True):
        write_pairs(folder / name, pairs)


def read_kept_pairs(folder: Path) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs that a run was trained on and those it held out; none where it is no preference training."""
    found = [folder / name for name in KEPT]
    train, heldout = (read_pairs([path])[0] if path.exists() and path.stat().st_size else [] for path in found)
    return train, heldout


def _leave_out(pair: PreferencePair, reason: str) -> DataProblem:
    """Report a pair that is left out; its row may have others."""
    action: Literal["rejected", "changed"] = "changed" if "#" in pair.source else "rejected"
    return replace(reject_example(pair.to_example(), reason, action), original=pair.to_row())


def _to_pairs(row: Row, label: str) -> tuple[list[PreferencePair], str, list[str]]:
    """The pairs of one row, the shape it has, and what was changed on the way. Raises RowError."""
    source = f"{label}:{row.line}"
    if "winner" in row.fields and "answers" in row.fields:
        pairs, changes = _read_vote(row.fields, source)
        return pairs, "vote", changes
    good, bad = next((names for names in _SIDES if all(row.fields.get(name) for name in names)), ("", ""))
    if not good:
        given = ", ".join(f'"{name}"' for name in list(row.fields)[:8]) or "none"
        raise RowError(f"its columns ({given}) hold no two answers; expected {PAIR_FORM}")
    chosen, changes = _read_side(row, label, good)
    rejected, more = _read_side(row, label, bad)
    changes += [change for change in more if change not in changes]
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise RowError(f'"{good}" and "{bad}" answer different conversations')
    return [_make_pair(chosen, rejected.answer, source)], "preference", changes


def _read_vote(fields: Mapping[str, Any], source: str) -> tuple[list[PreferencePair], list[str]]:
    """The winner against every other answer of a vote."""
    vote = to_vote(fields)
    if vote.winner in _NO_WINNER:
        raise RowError(_NO_WINNER[vote.winner])
    won = Example((*vote.prompt, _answer(vote.answers[vote.winner])), vote.task, source, vote.tools)
    pairs, reasons = [], []
    losers = [(name, text) for name, text in vote.answers.items() if name != vote.winner]
    for number, (name, text) in enumerate(losers, start=1):
        try:
            pairs.append(_make_pair(won, text, source if len(losers) == 1 else f"{source}#{number}"))
        except RowError as error:
            reasons.append(f"the answer of {name} was left out: {error}")
    if not pairs:
        raise RowError("; ".join(reasons) or "has one answer alone")
    return pairs, reasons


def _make_pair(chosen: Example, rejected: str, source: str) -> PreferencePair:
    """Check both conversations as every row of training is. Raises RowError."""
    if chosen.messages[-1].get("tool_calls"):
        raise RowError("an answer calls functions; pairs are of text")
    prompt = chosen.messages[:-1]
    for text in (chosen.answer, rejected):
        check_turns([*prompt, _answer(text)])
    if chosen.answer.strip() == rejected.strip():
        raise RowError("both answers are the same")
    return PreferencePair(prompt, chosen.answer, rejected, source, chosen.task, chosen.tools)


def _read_side(row: Row, label: str, name: str) -> tuple[Example, list[str]]:
    """One answer behind its prompt, read as the pair for instruction tuning that it would make."""
    side = row.fields[name]
    turns = [side] if isinstance(side, dict) else side
    if not isinstance(turns, str | list) or not turns:
        raise RowError(f'"{name}" is {type_name(side)}, expected text or turns')
    conversion = to_examples(row._replace(fields=_with_answer(_prompt_fields(row.fields), turns, name)), label)
    (example,) = conversion.examples
    if example.messages[-1].get("tool_calls"):
        raise RowError(f'"{name}" calls functions; pairs are of text')
    return example, list(conversion.changes)


def _prompt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its answers; OpenAI's rows hold their messages and tools under "input"."""
    answers = {name for names in _SIDES for name in names}
    rest = {name: value for name, value in fields.items() if name not in answers and value is not None}
    inner = rest.get("input")
    return {**rest, **inner, "input": ""} if isinstance(inner, dict) else rest


def _with_answer(fields: dict[str, Any], answer: str | list[Any], name: str) -> dict[str, Any]:
    """A row of a shape that training knows: the prompt, and this answer as what is learned."""
    turns = [_answer(answer)] if isinstance(answer, str) else answer
    if any(isinstance(turn, dict) and _speaker(turn) in ("user", "human") for turn in turns):
        return {key: value for key, value in fields.items() if key not in (*_ANSWERS, *_CONVERSATIONS)} | {
            "messages": turns  # the whole conversation, its prompt in it
        }
    for key in _CONVERSATIONS:
        if isinstance(fields.get(key), list) and fields[key]:
            return {**fields, key: [*fields[key], *turns]}
    key = next((key for key in _ANSWERS if fields.get(key)), "")
    if not key:
        raise RowError(f'has no prompt before "{name}"; expected {PAIR_FORM}')
    if isinstance(fields[key], list):
        return {**fields, _ANSWERS[key]: turns}
    if len(turns) != 1 or not isinstance(turns[0], dict):
        raise RowError(f'"{name}" holds {len(turns)} turns behind a prompt that is text; expected one answer')
    text = turns[0].get("value", turns[0].get("content"))
    return {**fields, _ANSWERS[key]: text}


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role", turn.get("from", ""))).lower()


def _answer(text: str) -> Message:
    return Message(role="assistant", content=text)
