"""Documents to pairs through an endpoint: a model that the user names proposes instructions and answers about a text.

Before the first station of a row's journey: what is written here is read as any file of rows. Self-Instruct's filters
decide what is kept (Wang et al., arXiv 2212.10560); what they refuse is kept beside it with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tune.documents import MAX_DOCUMENT_CHARS, Passage, read_documents
from qlora_tune.endpoint import Endpoint, ask, check_endpoint, connect, read_content
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.row_files import to_row, write_rows
from qlora_tune.scores import measure_rouge_l, split_words
from qlora_tune.shapes import Example
from qlora_tune.turns import Message, RowError, check_turns

PROMPT_VERSION = 1  # raise it with every change of PROMPT: rows carry it
PROMPT = """\
Write {count} different tasks that can be solved with the text below alone, each with its answer.
Each instruction is complete without the text: what is needed of the text stands in "input", which is empty otherwise.
Vary what is asked for and how it is phrased. Answer with JSON only, in this form:
{{"pairs": [{{"instruction": "...", "input": "...", "output": "..."}}]}}

Instructions that exist already, as examples of the style; do not repeat them:
{examples}

Text:
{text}"""
PAIRS_PER_REQUEST = 4
EXAMPLES_PER_REQUEST = 5
FRUITLESS_REQUESTS = 5  # at least so many in a row without a kept pair end the work
_OPENING = re.compile(r"[\[{]")
NO_PAIR = "no pair of instruction and output as text"
SURPLUS = "more than were wanted"
# Tasks that text alone can't solve; the list is Self-Instruct's own.
FORBIDDEN = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "audio", "music", "flowchart", "diagram"),
)


@dataclass(frozen=True)
class Filters:
    """What a proposal must hold to be kept; lengths are of the instruction, in words."""

    min_words: int = 3
    max_words: int = 150
    max_rouge_l: float = 0.7
    forbidden: tuple[str, ...] = FORBIDDEN


@dataclass(frozen=True)
class Proposal:
    """One pair as the model proposed it, about a passage of a document."""

    source: str
    instruction: str
    input: str
    output: str

    def to_example(self) -> Example:
        """The pair as a conversation; the input stands behind the instruction, an empty line between."""
        user = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = (Message(role="user", content=user), Message(role="assistant", content=self.output))
        return Example(turns, "self-instruct", self.source)


@dataclass(frozen=True)
class Refused:
    """A proposal that was not kept, as it came, and why."""

    source: str
    reason: str
    proposal: str


@dataclass
class GenerationReport:
    """What came of the requests so far."""

    requests: int = 0
    kept: list[Proposal] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def generate_pairs(
    paths: Sequence[str | Path],
    endpoint: Endpoint,
    seeds: Sequence[Example],
    wanted: int,
    out: Path,
    *,
    filters: Filters | None = None,
    seed: int = 0,
    max_document_chars: int = MAX_DOCUMENT_CHARS,
    on_progress: Callable[[GenerationReport], None] | None = None,
) -> GenerationReport:
    """Ask the endpoint for pairs about pieces of the documents until `wanted` are kept, and write them to `out`.

    What was refused goes beside it (out.refused.jsonl). Every answer is on disk (out.partial.jsonl) before the next
    request: an interrupted call made again goes on there. Ends with fewer pairs when the endpoint brings nothing new
    any more. The seed decides what is asked about and shown; the same answers then give the same bytes.
    Raises ConfigError where the endpoint refuses or the partial file is another call's, DataError where it stays away.
    """
    filters = filters or Filters()
    key = check_endpoint(endpoint)
    if out.exists():
        raise ConfigError(f"{out}: exists already. Name another file, or move this one away.")
    passages = [p for document in read_documents(paths, max_document_chars) for p in document.passages]
    if not passages:
        raise DataError(f"{', '.join(map(str, paths))}: no text to make pairs from.")
    known = [_first_instruction(example) for example in seeds]
    partial = out.with_name(out.stem + ".partial.jsonl")
    call = _fingerprint(endpoint, filters, seed, known, passages)
    report, fruitless = _resume(partial, call)
    order = random.Random(seed).sample(passages, len(passages))
    with connect(endpoint, key) as client:
        while len(report.kept) < wanted and fruitless < max(len(order), FRUITLESS_REQUESTS):
            passage = order[report.requests % len(order)]
            prompt = _to_prompt(passage, known, report, min(PAIRS_PER_REQUEST, wanted - len(report.kept)), seed)
            answer = ask(client, endpoint, key, prompt, f"{len(report.kept)} pairs stand in {partial}.")
            kept, refused = _judge(answer, passage.source, known, report.kept, filters, wanted)
            _append(partial, {"kept": kept, "refused": refused})
            _count(report, kept, refused)
            fruitless = 0 if kept else fruitless + 1
            if on_progress:
                on_progress(report)
    _finish(report, endpoint, seed, out)
    partial.unlink(missing_ok=True)
    return report


def refuse_proposal(proposal: Proposal, others: Sequence[str], filters: Filters) -> str | None:
    """Why a proposal is not kept beside these instructions; None when it is."""
    instruction, words = proposal.instruction, split_words(proposal.instruction)
    if not filters.min_words <= len(words) <= filters.max_words:
        return f"the instruction has {len(words)} words, expected {filters.min_words} to {filters.max_words}"
    if not re.match(r"\w", instruction):
        return "the instruction does not start with a word"
    plain = f" {' '.join(words)} "
    forbidden = next((word for word in filters.forbidden if f" {' '.join(split_words(word))} " in plain), None)
    if forbidden:
        return f'the instruction says "{forbidden}", which text alone can\'t serve'
    try:
        check_turns([*proposal.to_example().messages])
    except RowError as error:
        return str(error)
    if proposal.output.strip().casefold() in (proposal.input.strip().casefold(), instruction.strip().casefold()):
        return "the answer repeats the question"
    for other in others:
        score = measure_rouge_l(words, split_words(other))
        if score >= filters.max_rouge_l:
            return f"ROUGE-L {score:.2f} with: {other[:80]}"
    return None


def _first_instruction(example: Example) -> str:
    """The first question without what stands behind it, as the filters compare instructions alone."""
    return next(turn["content"] for turn in example.messages if turn["role"] == "user").split("\n\n")[0]


def _to_prompt(passage: Passage, known: Sequence[str], report: GenerationReport, count: int, seed: int) -> str:
    pool = [*known, *(proposal.instruction for proposal in report.kept)]
    # From seed and number, so that a call that goes on asks as one that was never interrupted.
    draw = random.Random(f"{seed}:{report.requests}")
    shown = draw.sample(pool, min(EXAMPLES_PER_REQUEST, len(pool)))
    examples = "\n".join(f"- {instruction}" for instruction in shown) or "(none)"
    return PROMPT.format(count=count, examples=examples, text=passage.text)


def _judge(
    body: str, source: str, known: Sequence[str], before: Sequence[Proposal], filters: Filters, wanted: int
) -> tuple[list[Proposal], list[Refused]]:
    kept: list[Proposal] = []
    refused: list[Refused] = []
    content = read_content(body)
    for item in [body] if content is None else read_proposals(content):
        proposal = to_proposal(item, source)
        if proposal is None:
            refused.append(Refused(source, NO_PAIR, as_it_came(item)))
            continue
        others = [*known, *(other.instruction for other in (*before, *kept))]
        reason = refuse_proposal(proposal, others, filters)
        if reason is None and len(before) + len(kept) >= wanted:
            reason = SURPLUS
        if reason:
            refused.append(Refused(source, reason, as_it_came(item)))
        else:
            kept.append(proposal)
    return kept, refused


def read_proposals(text: str) -> list[Any]:
    """The proposals in what a model said, however they are wrapped: a list, "pairs", or one object after another.

    What is left stands behind them as it is, where nothing was found or an object in it is no JSON.
    """
    text = text.rpartition("</think>")[2]
    found: list[Any] = []
    rest, at = "", 0
    while start := _OPENING.search(text, at):
        opening = start.start()
        rest += text[at:opening]
        try:
            value, at = json.JSONDecoder(strict=False).raw_decode(text, opening)
        except (ValueError, RecursionError):
            rest, at = rest + text[opening], opening + 1
            continue
        inner = value.get("pairs", value) if isinstance(value, dict) else value
        found += inner if isinstance(inner, list) else [inner]
    rest += text[at:]
    return [*found, rest.strip()] if "{" in rest or not found else found


def to_proposal(item: Any, source: str) -> Proposal | None:
    """A pair as it was proposed; None where instruction or output are missing or no text."""
    if not isinstance(item, dict):
        return None
    values = (item.get("instruction"), item.get("input") or "", item.get("output"))
    texts = [value.strip() for value in values if isinstance(value, str)]
    return Proposal(source, *texts) if len(texts) == len(values) else None


def as_it_came(item: Any) -> str:
    """A proposal as text for the record; half characters, which can't be written, as escapes."""
    text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()


def _fingerprint(
    endpoint: Endpoint, filters: Filters, seed: int, known: Sequence[str], passages: Sequence[Passage]
) -> str:
    about = [endpoint.url, endpoint.model, PROMPT_VERSION, dataclasses.asdict(filters), seed, list(known)]
    texts = [(passage.source, passage.text) for passage in passages]
    return hashlib.sha256(json.dumps([about, texts]).encode()).hexdigest()


def _resume(partial: Path, call: str) -> tuple[GenerationReport, int]:
    """Read back what an interrupted call had, and how many requests in a row had brought nothing."""
    report, fruitless = GenerationReport(), 0
    if not partial.exists():
        _append(partial, {"call": call})
        return report, fruitless
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # a line that was cut off while it was written is asked for again
    partial.write_bytes(whole)
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        lines = []
    if not lines or lines[0].get("call") != call:
        message = "begun with other documents, seeds or settings, or damaged. Delete it, or name another output."
        raise ConfigError(f"{partial}: {message}")
    for line in lines[1:]:
        kept = [Proposal(**proposal) for proposal in line["kept"]]
        _count(report, kept, [Refused(**refused) for refused in line["refused"]])
        fruitless = 0 if kept else fruitless + 1
    return report, fruitless


def _append(partial: Path, line: dict[str, Any]) -> None:
    try:
        with partial.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line, default=dataclasses.asdict) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{partial}: can't be written: {error.strerror}.") from None


def _count(report: GenerationReport, kept: list[Proposal], refused: list[Refused]) -> None:
    report.requests += 1
    report.kept += kept
    report.refused += refused


def _finish(report: GenerationReport, endpoint: Endpoint, seed: int, out: Path) -> None:
    import httpx

    url = httpx.URL(endpoint.url)
    made = {"made_by": endpoint.model, "endpoint": url.netloc.decode(), "prompt_version": PROMPT_VERSION, "seed": seed}
    parts = {out: [{**to_row(proposal.to_example()), **made} for proposal in report.kept]}
    if report.refused:
        parts[out.with_name(out.stem + ".refused.jsonl")] = [dataclasses.asdict(refused) for refused in report.refused]
    write_rows(parts)
