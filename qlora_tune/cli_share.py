"""The terminal face of sharing: what leaves for the hub, and training an adapter again from its recipe."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Column, Table

from qlora_tune.cli_train import RunsDir, Stopped, train_settings
from qlora_tune.config import ResolvedConfig
from qlora_tune.terminal import console, say
from qlora_tune.text_signs import printable

SHOWN_TENSORS = 5


class Differs(Stopped):
    """An adapter that was trained again came out otherwise; the exit code tells the shell."""

    code = 1


def reproduce(
    adapter: Path,
    *,
    data: Annotated[
        tuple[str, ...], Parameter(help="The training files, wherever they lie; may repeat.", negative=())
    ] = (),
    heldout_data: Annotated[
        tuple[str, ...], Parameter(help="The held-out files, where it had some; may repeat.", negative=())
    ] = (),
    run_name: Annotated[str | None, Parameter(help="Name of the new run.", show_default=False)] = None,
    runs_dir: RunsDir = "runs",
    model_name_or_path: Annotated[str | None, Parameter(help="Where the base is now, if it moved.")] = None,
) -> None:
    """Train ADAPTER (a run, an adapter's folder or its zip) again from its recipe, and compare what comes out.

    The exit code is 0 where the weights are identical or the held-out loss is within 0.001 nats, else 1.
    """
    from qlora_tune.reproduce import compare_runs, make_settings, open_origin

    with tempfile.TemporaryDirectory() as scratch:
        origin = open_origin(adapter, runs_dir, Path(scratch))
        config = make_settings(
            origin.recipe,
            data,
            heldout_data,
            run_name=run_name,
            runs_dir=runs_dir,
            model_name_or_path=model_name_or_path,
        )
        run = train_settings(ResolvedConfig(config, {}, f"the recipe of {adapter.name}"))
        found = compare_runs(origin, run)
    table = Table("", Column("before", justify="right"), Column("again", justify="right"), box=None)
    for name, values in (("held-out loss [nats]", found.losses), ("exact match", found.exact_matches)):
        table.add_row(escape(name), *("not known" if value is None else f"{value:.6f}" for value in values))
    console.rule("before and again", align="left")
    console.print(table)
    if found.identical:
        say(f"all {len(found.tensors)} tensors are identical, to the last bit")
        return
    changed = [(name, share) for name, share in found.tensors if share]
    say(f"{len(changed)} of {len(found.tensors)} tensors differ; the most, relative to what they were:")
    for name, share in changed[:SHOWN_TENSORS]:
        say(f"  {share:.1e}  {printable(name)}")
    causes = found.causes or ["nothing that is recorded: another processor or GPU, or other threads"]
    say("what may be the cause: " + printable("; ".join(causes)))
    if not found.agrees:
        raise Differs


def push(exported: Path, repository: str, private: bool, token: str | None) -> None:
    """Show what would leave for the hub, and upload it where there is a token."""
    from qlora_tune.hub_models import list_leaving, open_export, push_folder

    with open_export(exported) as folder:
        table = Table("file", Column("bytes", justify="right"), Column("sha256", overflow="fold"), box=None)
        leaving = list_leaving(folder)
        for file in leaving:
            table.add_row(escape(file.name), f"{file.size:,}", file.sha256)
        console.rule(f"to the hub: {repository}, {'private' if private else 'public'}", align="left")
        console.print(table)
        say(f"{len(leaving)} files, {sum(file.size for file in leaving) / 1e6:.1f} MB")
        if token is None:
            say("dry run: nothing was uploaded")
        else:
            say(f"uploaded: {push_folder(folder, repository, private, token)}")
