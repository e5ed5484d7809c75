"""The terminal face of growing data: ask for new tasks, and decide on each of them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Column, Table
from rich.text import Text

from qlora_tune import terminal
from qlora_tune.cli_train import RunsDir
from qlora_tune.config import BUILTIN, read_toml
from qlora_tune.disk import hash_file
from qlora_tune.endpoint import Endpoint, is_loopback
from qlora_tune.errors import ConfigError, DataError, TuneError
from qlora_tune.grow import (
    Pool,
    Source,
    decide,
    edit,
    grow_pool,
    open_endpoint,
    open_model,
    read_pool,
    texts_of,
    to_seeds,
    write_accepted,
)
from qlora_tune.row_files import refuse_overwriting
from qlora_tune.runs import latest_run
from qlora_tune.self_instruct import Proposal
from qlora_tune.terminal import console, say
from qlora_tune.terminal_progress import scoring_progress
from qlora_tune.text_signs import printable

POOL_HELP = "Pool of proposals to write or go on with; no rows to train on."
MODEL_HELP = (
    "Run, adapter, or whole model that proposes: its folder, a downloaded base's id, or builtin; else the newest run."
)
ACCEPTED_HELP = "Write the accepted and edited tasks as rows to train on."


def grow(
    *seeds: Annotated[str, Parameter(help="Files of seed tasks, in any shape that train reads.")],
    output: Annotated[Path, Parameter(help=POOL_HELP)],
    model: Annotated[Path | None, Parameter(help=MODEL_HELP, show_default=False)] = None,
    endpoint: Annotated[str | None, Parameter(help="Ask this OpenAI-compatible endpoint instead.")] = None,
    endpoint_model: Annotated[str | None, Parameter(help="The model that the endpoint is asked for.")] = None,
    api_key_env: Annotated[str, Parameter(help="Environment variable that holds the endpoint's key.")] = "",
    number: Annotated[int, Parameter(help="Proposals that the pool shall hold.", validator=Number(gte=1))] = 50,
    seed: Annotated[int, Parameter(help="Draws the tasks that are shown, and a model's answers.")] = 42,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token each time.")] = 0.8,
    max_new_tokens: Annotated[int, Parameter(help="Longest answer of a model here [tokens].")] = 1024,
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
    runs_dir: RunsDir = "runs",
) -> None:
    """Let a model propose new tasks like those of SEEDS; `review` then decides which of them become data."""
    from qlora_tune.chat import check_sampling
    from qlora_tune.data import find_data, load_examples

    if not seeds:
        raise ConfigError("Name the files of seed tasks.")
    if bool(endpoint) != bool(endpoint_model) or (endpoint and model):
        raise ConfigError("Give --endpoint URL together with --endpoint-model NAME, or --model RUN, or neither.")
    refuse_overwriting([output], seeds)
    sampling = check_sampling(temperature, 1.0, max_new_tokens)
    examples, report = load_examples(find_data(seeds))
    terminal.show_report(report)
    tasks, begun = to_seeds(examples), read_pool(output)
    if others := len(examples) - len(tasks):
        say(f"{others} rows are more than one question and its answer, and not used as seeds")
    if begun.proposals:
        say(f"{output} holds {len(begun.proposals)} proposals; going on there")
    with tempfile.TemporaryDirectory() as scratch, scoring_progress() as progress:
        if endpoint and endpoint_model:
            opened = _open_endpoint(Endpoint(endpoint, endpoint_model, api_key_env), temperature, output)
        else:
            opened = _open_model(model, runs_dir, Path(scratch), model_name_or_path, seed, sampling)
        with opened as source:
            pool = grow_pool(
                output,
                source,
                tasks,
                number,
                seed=seed,
                on_progress=lambda pool: progress("proposals", len(pool.proposals), number),
            )
    _show_pool(output, pool)
    if len(pool.proposals) < number:
        say("the last requests brought nothing new: give more seeds, a better model, or a higher --temperature")
    if pool.having("pending"):
        say(f"decide on them:  python -m qlora_tune review {output} --accepted accepted.jsonl")


def review(
    pool: Annotated[Path, Parameter(help="The pool that `grow` wrote.")],
    *,
    accepted: Annotated[Path | None, Parameter(help=ACCEPTED_HELP, show_default=False)] = None,
) -> None:
    """Accept, edit or reject each pending proposal of a POOL; only what was accepted can be written as rows."""
    if not pool.is_file():
        raise DataError(f"{pool}: no such file. Expected a pool that `grow` wrote.")
    refuse_overwriting([accepted] if accepted else [], [pool])
    waiting = read_pool(pool).having("pending")
    for number, (id, proposal) in enumerate(waiting, start=1):
        _show_proposal(proposal, f"{number} of {len(waiting)} · {id}")
        if not _ask_decision(pool, id, proposal):
            break
    _show_pool(pool, read_pool(pool))
    if accepted:
        say(f"{write_accepted(pool, accepted)} rows to train on: {accepted}")


@contextmanager
def _open_endpoint(endpoint: Endpoint, temperature: float, output: Path) -> Iterator[Source]:
    import httpx

    with open_endpoint(endpoint, temperature, f"What came before stands in {output}.") as source:
        host = httpx.URL(endpoint.url).host
        if not is_loopback(host):
            say(f"seed rows are sent to {host}")
        yield source


@contextmanager
def _open_model(
    model: Path | None,
    runs_dir: str,
    scratch: Path,
    model_name_or_path: str | None,
    seed: int,
    sampling: dict[str, float],
) -> Iterator[Source]:
    """The adapter or whole model that a name stands for, named with its fingerprint."""
    from qlora_tune.base import find_base, is_downloaded
    from qlora_tune.chat import find_adapter
    from qlora_tune.hub_models import is_repository
    from qlora_tune.outsiders import is_model

    name = model or latest_run(runs_dir).path
    if str(name) == BUILTIN or is_model(name) or (is_repository(name) and is_downloaded(str(name))):
        base = find_base(str(name))
        place, label, fingerprint = base.path, base.label, base.fingerprint
    else:
        place, run = find_adapter(name, runs_dir, scratch)
        label, fingerprint = run.name if run else name.name, hash_file(place / "adapter_model.safetensors")
    yield open_model(f"{label} {fingerprint[:12]}", place, model_name_or_path, seed, **sampling)


def _show_proposal(proposal: Proposal, about: str) -> None:
    console.rule(Text(printable(f"{about} · {proposal.source}")), align="left")
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for name, text in texts_of(proposal).items():
        table.add_row(Text(name, style="dim"), Text(printable(text)))
    console.print(table)


def _ask_decision(pool: Path, id: str, proposal: Proposal) -> bool:
    """Ask until a decision is recorded, or the proposal is skipped. Returns whether to go on."""
    while True:
        try:
            choice = console.input("a accept, e edit, r reject, Enter skips, q stops: ").strip().lower()
            if choice in ("", "q"):
                return not choice
            if choice in ("a", "e", "r"):
                decide(pool, id, None if choice == "r" else _edit(proposal) if choice == "e" else proposal)
                return True
            say(f'"{choice}" is none of these')
        except (EOFError, KeyboardInterrupt):
            say("")
            return False
        except TuneError as error:
            say(str(error))


def _edit(proposal: Proposal) -> Proposal:
    """The proposal as a person changed it: in $EDITOR on a terminal, else line by line."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if editor and sys.stdin.isatty():
        return edit_in(editor, proposal)
    typed = {name: console.input(f"{name} (Enter keeps it): ") for name in texts_of(proposal)}
    return edit(proposal, **{name: text for name, text in typed.items() if text.strip()})


def edit_in(editor: str, proposal: Proposal) -> Proposal:
    """Let an editor change a proposal's texts in a TOML file. Raises ConfigError where it fails or the file is none."""
    import tomli_w

    before = texts_of(proposal)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "proposal.toml"
        file.write_text(tomli_w.dumps(before, multiline_strings=True), encoding="utf-8")
        try:
            code = subprocess.run([*shlex.split(editor), str(file)]).returncode
        except OSError as error:
            raise ConfigError(f"{editor}: can't be started: {error.strerror}. Set EDITOR to one that can.") from None
        texts = read_toml(file)
    if code or texts.keys() != before.keys() or not all(isinstance(text, str) for text in texts.values()):
        raise ConfigError(f"Not taken: expected {', '.join(before)} as text, and an editor that ends without an error.")
    return edit(proposal, **texts)


def _show_pool(path: Path, pool: Pool) -> None:
    """What became of every proposal: how many of each status, and why others were dropped."""
    kept, dropped = len(pool.proposals), len(pool.dropped)
    say(f"{pool.requests} requests: {kept + dropped} proposed = {kept} in {path} + {dropped} dropped")
    found = Counter(line.status for line in pool.proposals.values())
    say(", ".join(f"{count} {status}" for status, count in found.most_common()) or "none to decide on")
    # Reasons that differ in figures or what stands behind a colon are one.
    reasons = Counter(re.sub(r"\d[\d.]*", "…", refused.reason.partition(":")[0]) for refused in pool.dropped)
    for reason, count in reasons.most_common():
        say(f"  dropped {count}: {reason.replace('… with', 'too high with another instruction')}")
