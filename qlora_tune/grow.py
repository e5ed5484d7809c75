"""Growing data: from seed tasks a model proposes new ones, filters refuse poor ones, a person decides on the rest.

Self-Instruct (Wang et al., arXiv 2212.10560), as Alpaca used it. A pool's file is only ever added to: what was
proposed, what was dropped and why, what a person decided. Its lines are no rows to train on; write_accepted alone
makes those.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from qlora_tune.duplicates import SIMILAR, jaccard, shingles
from qlora_tune.endpoint import Endpoint, ask, check_endpoint, connect, read_content
from qlora_tune.errors import DataError
from qlora_tune.generate import ANSWER_SHARE, stream_reply
from qlora_tune.outsiders import open_outsider
from qlora_tune.quality import DEFECTS, find_defects
from qlora_tune.row_files import append_rows, write_rows
from qlora_tune.self_instruct import (
    NO_PAIR,
    SURPLUS,
    Filters,
    Proposal,
    Refused,
    as_it_came,
    read_proposals,
    refuse_proposal,
    to_proposal,
)
from qlora_tune.shapes import Example
from qlora_tune.turns import Message, RowError, check_turns

PROMPT = """\
Tasks with answers, one JSON object a line:
{examples}

Write {count} new tasks in this form, unlike these in topic and wording; "input" may be empty. Only JSON lines."""
SHOWN, SHOWN_PROPOSED = 8, 2  # tasks in a prompt, and how many of them were proposed before; both as in the paper
PER_REQUEST = 4
FRUITLESS_REQUESTS = 10  # so many in a row that brought nothing end the work
_HEAD = b'{"status": "'  # how each line begins

Status = Literal["pending", "accepted", "edited", "rejected", "dropped"]


@dataclass(frozen=True)
class Line:
    """One line of a pool: a proposal that waits for a decision, one that was dropped, or a decision on one.

    `time` is Unix time [s]; `request` counts from 1; `seeds` are the tasks shown, by file and line or by id. A
    decision has the proposal's id, and the proposal where a person edited it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    status: Status
    time: float
    request: int = 0
    seeds: tuple[str, ...] = ()
    id: str = ""
    proposal: Proposal | None = None
    refused: Refused | None = None


@dataclass(frozen=True)
class Source:
    """Who proposes: its name, what asks it (with the prompt goes the request's number), and which prompts fit."""

    name: str
    ask: Callable[[str, int], str]
    fits: Callable[[str], bool] = lambda prompt: True


@dataclass
class Pool:
    """What a pool's file says: proposals by id, each with its last status; what was dropped; how many requests."""

    proposals: dict[str, Line] = field(default_factory=dict)
    dropped: list[Refused] = field(default_factory=list)
    requests: int = 0

    def having(self, *statuses: Status) -> list[tuple[str, Proposal]]:
        """The proposals of these statuses, each with its id."""
        lines = self.proposals.values()
        return [(line.id, line.proposal) for line in lines if line.status in statuses and line.proposal]

    def take(self, line: Line) -> None:
        """Add one line. Raises ValueError where it makes no sense behind those before."""
        self.requests = max(self.requests, line.request)
        if line.status == "dropped" and line.refused:
            self.dropped.append(line.refused)
        elif line.status == "pending" and line.proposal:
            self.proposals[line.id] = line
        elif line.id in self.proposals and (line.proposal is None) == (line.status in ("accepted", "rejected")):
            before = self.proposals[line.id]
            self.proposals[line.id] = replace(before, status=line.status, proposal=line.proposal or before.proposal)
        else:
            raise ValueError(line.status)


def to_seeds(examples: Sequence[Example]) -> list[Proposal]:
    """The examples that can be shown as tasks: one question and its answer. Raises DataError where none is one."""
    seeds = []
    for example in examples:
        if [turn["role"] for turn in example.messages] == ["user", "assistant"] and not example.tools:
            instruction, _, given = example.prompt.partition("\n\n")
            seeds.append(Proposal(example.source, instruction, given, example.answer))
    if not seeds:
        raise DataError("None of the seed rows is one question and its answer, without system prompt and tools.")
    return seeds


def grow_pool(
    path: Path,
    source: Source,
    seeds: Sequence[Proposal],
    wanted: int,
    *,
    seed: int,
    on_progress: Callable[[Pool], None] = lambda pool: None,
) -> Pool:
    """Ask for new tasks until the pool holds so many that the filters let through, whatever was decided on them.

    Each answer is on disk before the next request: the same call goes on there. Ends with fewer when nothing new comes
    any more. Raises DataError where the file is no pool, or a prompt with a single task is too long for the model.
    """
    pool, fruitless = read_pool(path), 0
    known = [*seeds, *(line.proposal for line in pool.proposals.values() if line.proposal)]
    while (missing := wanted - len(pool.proposals)) > 0 and fruitless < FRUITLESS_REQUESTS:
        number = pool.requests + 1
        names, prompt = _draw_prompt(seeds, pool, source, min(PER_REQUEST, missing), random.Random(f"{seed}:{number}"))
        said = source.ask(prompt, number)
        made = Line("pending", time.time(), number, names)
        lines = [_to_line(made, found) for found in _judge(said, source.name, known, missing)]
        _append(path, lines)
        for line in lines:
            pool.take(line)
        fruitless = 0 if any(line.proposal for line in lines) else fruitless + 1
        on_progress(pool)
    return pool


def refuse_task(proposal: Proposal, known: Sequence[Proposal]) -> str | None:
    """Why a proposed task is not kept beside those known; None when it is.

    Self-Instruct's filters on the instruction, the errors and warnings of `check` on the row, and near copies of what
    is asked: under new words a model likes to ask about an input that it was shown.
    """
    if reason := refuse_proposal(proposal, [other.instruction for other in known], Filters()):
        return reason
    for kind, seen in find_defects(proposal.to_example()):
        if DEFECTS[kind].severity != "note":
            return f"{kind}: {seen}"
    own = _shingles(proposal)
    near = next((other for other in known if jaccard(own, _shingles(other)) >= SIMILAR), None)
    return f"near duplicate: {near.instruction[:80]}" if near else None


def read_pool(path: Path) -> Pool:
    """A pool as its file says; an empty one where there is no file. A torn last line is passed over.

    Raises DataError with the line's number for anything that is no line of a pool.
    """
    pool = Pool()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, content in enumerate(lines, start=1):
        try:
            if content.strip():
                pool.take(_read_line(content))
        except ValueError:
            torn = number == len(lines) and _HEAD[: len(content)] == content[: len(_HEAD)]
            if not torn:
                raise DataError(
                    f"{path}:{number}: is no line of a pool. Expected a file that `grow` wrote; a damaged line can be "
                    "deleted."
                ) from None
    return pool


def decide(path: Path, id: str, decided: Proposal | None) -> None:
    """Record what a person decided on a pending proposal: None rejects it, other words than its own edit it.

    Raises DataError where it is not pending, or what was edited can't be trained on; nothing is recorded then.
    """
    line = read_pool(path).proposals.get(id)
    if line is None or line.status != "pending":
        raise DataError(f"{path}: proposal {id} is none that waits for a decision. It may have been decided elsewhere.")
    if decided is None:
        _append(path, [Line("rejected", time.time(), id=id)])
        return
    try:
        check_turns([*decided.to_example().messages])
    except RowError as error:
        raise DataError(f"Not accepted: {error}. Expected an instruction and an output.") from None
    edited = decided != line.proposal
    _append(path, [Line("edited" if edited else "accepted", time.time(), id=id, proposal=decided if edited else None)])


def texts_of(task: Proposal) -> dict[str, str]:
    """The texts of a task by name, as they are shown, edited and written."""
    return {"instruction": task.instruction, "input": task.input, "output": task.output}


def edit(proposal: Proposal, **texts: str) -> Proposal:
    """A proposal with other texts, without white space around them; a line ends in LF, whatever a browser sends."""
    return replace(proposal, **{name: text.replace("\r\n", "\n").strip() for name, text in texts.items()})


def write_accepted(path: Path, output: Path) -> int:
    """Write what a person accepted, as it is or edited, as rows to train on; returns how many. Raises DataError."""
    lines = [line for line in read_pool(path).proposals.values() if line.status in ("accepted", "edited")]
    rows = [
        {**texts_of(line.proposal), "source": line.proposal.source, "edited": line.status == "edited"}
        for line in lines
        if line.proposal
    ]
    if not rows:
        raise DataError(f"{path}: nobody has accepted a proposal yet, so there is nothing to write.")
    write_rows({output: rows})
    return len(rows)


@contextmanager
def open_endpoint(endpoint: Endpoint, temperature: float, standing: str) -> Iterator[Source]:
    """An endpoint that proposes; `standing` tells what a failure leaves. Raises ConfigError where it can't be used."""
    import httpx

    key = check_endpoint(endpoint)
    with connect(endpoint, key) as client:

        def propose(prompt: str, number: int) -> str:
            body = ask(client, endpoint, key, prompt, standing, temperature=temperature)
            content = read_content(body)
            return body if content is None else content

        yield Source(f"{endpoint.model} at {httpx.URL(endpoint.url).host}", propose)


def open_model(name: str, place: Path, model_name_or_path: str | None, seed: int, **sampling: Any) -> Source:
    """An adapter's or a whole model's folder as one that proposes; the same seed gives the same answers.

    `sampling` is max_new_tokens and temperature of stream_reply. Raises ModelError where neither is in the folder.
    """
    import torch

    opened = open_outsider(place, model_name_or_path, load_in_4bit=False)

    def propose(prompt: str, number: int) -> str:
        torch.manual_seed(seed + number)
        return "".join(stream_reply(opened.model, opened.chat, [Message(role="user", content=prompt)], **sampling))

    def fits(prompt: str) -> bool:
        length = len(opened.chat.encode_prompt([Message(role="user", content=prompt)]))
        return bool(length + min(sampling["max_new_tokens"], opened.context // ANSWER_SHARE) <= opened.context)

    return Source(name, propose, fits)


def _draw_prompt(
    seeds: Sequence[Proposal], pool: Pool, source: Source, count: int, draw: random.Random
) -> tuple[tuple[str, ...], str]:
    """The tasks to show, by name, and the prompt; without the longest ones where they don't fit."""
    before = pool.having("pending", "accepted", "edited")
    shown = draw.sample(before, min(SHOWN_PROPOSED, len(before)))
    shown += [(task.source, task) for task in draw.sample(seeds, min(SHOWN - len(shown), len(seeds)))]
    draw.shuffle(shown)
    while shown:
        prompt = PROMPT.format(count=count, examples="\n".join(_write_task(task) for _, task in shown))
        if source.fits(prompt):
            return tuple(name for name, _ in shown), prompt
        shown.remove(max(shown, key=lambda each: len(_write_task(each[1]))))
    raise DataError(f"{source.name}: a prompt with a single task leaves no room in its context. Give shorter seeds.")


def _write_task(task: Proposal) -> str:
    return json.dumps(texts_of(task), ensure_ascii=False)


def _judge(said: str, name: str, known: list[Proposal], missing: int) -> Iterator[Proposal | Refused]:
    """Every proposal of an answer, kept or refused; those kept join the known ones."""
    for item in read_proposals(said):
        proposal = to_proposal(item, name)
        reason = NO_PAIR if proposal is None else refuse_task(proposal, known)
        if proposal and not reason and missing:
            known.append(proposal)
            missing -= 1
            yield proposal
        else:
            yield Refused(name, reason or SURPLUS, as_it_came(item))


def _to_line(made: Line, found: Proposal | Refused) -> Line:
    if isinstance(found, Refused):
        return replace(made, status="dropped", refused=found)
    return replace(made, id=hashlib.sha256(_write_task(found).encode()).hexdigest()[:16], proposal=found)


def _append(path: Path, lines: Sequence[Line]) -> None:
    rows = [{name: value for name, value in asdict(line).items() if value} for line in lines]
    append_rows(path, rows, _is_line)


def _is_line(content: bytes) -> bool:
    try:
        return bool(_read_line(content))
    except ValueError:
        return False


def _read_line(content: bytes) -> Line:
    return _lines().validate_json(content)


@functools.cache
def _lines() -> TypeAdapter[Line]:
    return TypeAdapter(Line)


@functools.cache
def _shingles(proposal: Proposal) -> set[str]:
    return shingles(proposal.to_example().prompt)
