"""Mixtures: several sources become one training file, with rows and whole tasks held out of it.

Between the examples and the tokenizer in a row's journey: files -> rows -> Example -> split -> mix -> templates ->
tokenize -> train. Rows are held out before they are mixed and worded, so that no copy of one crosses to training.
Sources: FLAN, arXiv 2109.01652, and the Flan Collection, arXiv 2301.13688.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qlora_tune.config import read_toml, suggest
from qlora_tune.containers import list_files
from qlora_tune.data import DataReport, drop_seen, duplicate_key, label_files, load_examples, split_heldout
from qlora_tune.errors import ConfigError, DataError, join_problems
from qlora_tune.instruction_templates import (
    EVERY_TASK,
    InstructionTemplate,
    MixedExample,
    expand_templates,
    load_templates,
    parse_tables,
)
from qlora_tune.row_files import to_row, write_rows
from qlora_tune.shapes import FIELDS, NO_TASK, DataProblem, Example, parse_source


class Source(BaseModel):
    """One [[source]] of a recipe: a file or folder, and how its rows are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str = Field(min_length=1, description="A data file, or a folder of them; relative to the recipe.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description='Its share, with mixing = "weights".')
    task: str | None = Field(None, min_length=1, description="The task of rows that carry none.")
    columns: dict[str, str] = Field({}, alias="map", description="Which column is which field.")

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [f'"{name}"' for name in columns if name not in FIELDS]
        if unknown:
            raise ValueError(f"no field is called {', '.join(unknown)}; expected some of {', '.join(FIELDS)}")
        return columns


class MixtureConfig(BaseModel):
    """What a recipe says. Every limit counts rows, before templates make copies of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = 42
    heldout_share: float = Field(0.1, ge=0, le=0.5, description="Share of each task's rows that is held out.")
    mixing: Literal["proportional", "weights"] = "proportional"
    max_rows: int | None = Field(None, ge=1, description="Rows of the whole training mixture.")
    max_rows_per_source: int | None = Field(None, ge=1)
    max_rows_per_task: int | None = Field(None, ge=1, description="Rows without a task count as one task.")
    holdout_tasks: list[str] = Field([], description="Whole tasks that are kept out of training.")
    templates: str | None = Field(None, description="A file of instruction templates; relative to the recipe.")
    templates_per_row: int = Field(1, ge=1, le=100, description="Copies of each row, each in another template.")
    source: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> MixtureConfig:
        weighted = [number for number, one in enumerate(self.source, start=1) if "weight" in one.model_fields_set]
        if weighted and self.mixing != "weights":
            raise ValueError(f'source {weighted[0]} has a weight, which needs mixing = "weights"')
        if self.templates_per_row > 1 and not self.templates:
            raise ValueError("templates_per_row needs templates")
        return self


@dataclass(frozen=True)
class Recipe:
    """A recipe as read from its file, with its templates."""

    path: Path
    config: MixtureConfig
    templates: tuple[InstructionTemplate, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """What became of one source's or task's examples: examples == train + heldout + unseen + dropped + capped.

    A row read is rejected or gives one example (self-instruct's rows may give several), so that otherwise
    rows_in == rejected + examples. Of a task rows_in counts examples: a rejected row has no known task.
    """

    name: str  # the source's path as the recipe has it, or the task
    rows_in: int
    rejected: int
    examples: int
    heldout: int
    unseen: int
    dropped: int  # kept out of training, then left out because their prompt is trained on
    capped: int  # left out by a limit or a weight
    train: int
    written: int  # training rows with the copies that templates make
    share: float  # of all training rows written
    templates: int  # different templates among them
    reversed: int  # rows among them that ask for the prompt
    unworded: int  # rows among them that stand as they were in their file


@dataclass(frozen=True)
class Mixture:
    """Training rows, held-out rows and rows of unseen tasks, and the account of every row read."""

    train: tuple[MixedExample, ...]
    heldout: tuple[MixedExample, ...]
    unseen: tuple[MixedExample, ...]
    by_source: tuple[Coverage, ...]  # in the recipe's order
    by_task: tuple[Coverage, ...]
    reports: tuple[DataReport, ...]  # one a source
    dropped: tuple[DataProblem, ...]  # held-out and unseen rows whose prompt is trained on
    notes: tuple[str, ...]
    inputs: tuple[Path, ...]  # every file that was read


@dataclass(frozen=True)
class _Loaded:
    """All sources' examples, and which source each file's label belongs to."""

    examples: list[Example]
    owners: dict[str, int]
    reports: tuple[DataReport, ...]
    files: tuple[Path, ...]

    def owner(self, example: Example) -> int:
        return self.owners[parse_source(example.source)[0]]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML, with its templates. Raises ConfigError listing every problem."""
    config = parse_tables(MixtureConfig, read_toml(path), path)
    return Recipe(path, config, load_templates(path.parent / config.templates) if config.templates else ())


def mix_examples(recipe: Recipe) -> Mixture:
    """Read a recipe's sources and mix them; the same recipe and files give the same mixture.

    With weights the largest mixture is taken that needs no row twice. Raises ConfigError or DataError.
    """
    config = recipe.config
    loaded = _load_sources(recipe)
    unseen = [example for example in loaded.examples if example.task in config.holdout_tasks]
    rest = [example for example in loaded.examples if example.task not in config.holdout_tasks]
    rest, heldout = split_heldout(rest, config.heldout_share, config.seed) if config.heldout_share else (rest, [])
    if not rest:
        raise DataError(f"{recipe.path}: every row is of a task that holdout_tasks names; none is left to train on.")
    train, notes = _draw_mixture(rest, loaded.owner, config)
    worded = expand_templates(train, recipe.templates, config.seed, config.templates_per_row)
    random.Random(f"{config.seed}:order").shuffle(worded)  # after the templates, so that copies are no neighbours
    seen = {duplicate_key(example) for example in worded}
    kept_out, problems = [], []
    for apart in (heldout, unseen):
        clean, early = drop_seen(train, apart)
        asked = expand_templates(clean, recipe.templates, config.seed, config.templates_per_row, seen)
        # A reversed template of a task with few answers may still make a prompt that is trained on.
        kept_out.append([example for example in asked if duplicate_key(example) not in seen])
        problems += [*early, *drop_seen(worded, asked)[1]]
    fates = _trace(loaded.examples, [*heldout, *unseen], worded, kept_out)
    by_source = _cover(loaded.examples, worded, fates, loaded.owner, recipe.templates)
    by_task = _cover(loaded.examples, worded, fates, lambda row: row.task or NO_TASK, recipe.templates)
    return Mixture(
        train=tuple(worded),
        heldout=tuple(kept_out[0]),
        unseen=tuple(kept_out[1]),
        by_source=tuple(
            replace(by_source[n], name=config.source[n].path, rows_in=report.rows_in, rejected=report.rejected)
            for n, report in enumerate(loaded.reports)
        ),
        by_task=tuple(by_task[task] for task in sorted(by_task)),
        reports=loaded.reports,
        dropped=tuple(problems),
        notes=(*notes, *_find_unused(recipe, loaded.examples)),
        inputs=(recipe.path, *([recipe.path.parent / config.templates] if config.templates else []), *loaded.files),
    )


def write_mixture(mixture: Mixture, output: Path) -> list[Path]:
    """Write NAME.jsonl, NAME_heldout.jsonl and NAME_unseen.jsonl, those that have rows; all of them or none.

    Read back they give the same messages and tasks. Raises ConfigError rather than write over a file that was
    mixed, or leave an older part beside a mixture that has none.
    """
    parts = {
        output: mixture.train,
        output.with_name(f"{output.stem}_heldout.jsonl"): mixture.heldout,
        output.with_name(f"{output.stem}_unseen.jsonl"): mixture.unseen,
    }
    _check_targets(parts, mixture.inputs)
    filled = {path: rows for path, rows in parts.items() if rows}
    write_rows({path: [{**to_row(row), "template": row.template} for row in rows] for path, rows in filled.items()})
    return list(filled)


def _load_sources(recipe: Recipe) -> _Loaded:
    sources = recipe.config.source
    files = _find_files(recipe)
    labels = label_files([file for found in files for file in found])
    owners = {labels[str(file)]: number for number, found in enumerate(files) for file in found}
    examples: list[Example] = []
    reports: list[DataReport] = []
    problems: list[str] = []
    for source, found in zip(sources, files, strict=True):
        try:
            rows, report = load_examples(found, labels, source.columns)
        except DataError as error:
            problems.append(str(error))
            continue
        examples += [replace(row, task=row.task or source.task) for row in rows]
        reports.append(report)
    if problems:
        raise DataError(join_problems(f"{recipe.path}: these sources can't be read:", problems))
    _check_holdout(recipe, {row.task for row in examples if row.task})
    return _Loaded(examples, owners, tuple(reports), tuple(file for found in files for file in found))


def _find_files(recipe: Recipe) -> list[list[Path]]:
    """Each source's files. Raises ConfigError where two sources share one: its rows would count twice."""
    found = [
        [file.resolve() for file in list_files(recipe.path.parent / source.path)] for source in recipe.config.source
    ]
    times = Counter(file for files in found for file in files)
    twice = [f"{file} is read by more than one [[source]]" for file, count in times.items() if count > 1]
    if twice:
        raise ConfigError(join_problems(f"{recipe.path}: name each file once; a weight says how much of it:", twice))
    return found


def _check_holdout(recipe: Recipe, tasks: set[str]) -> None:
    known = sorted(tasks)
    unknown = [
        f'no row is of the task "{task}".{suggest(task, known)}'
        for task in recipe.config.holdout_tasks
        if task not in tasks
    ]
    if unknown:
        unknown.append(f"the rows' tasks: {', '.join(known) or 'none'}")
        raise ConfigError(join_problems(f"{recipe.path}: holdout_tasks would hold out nothing:", unknown))


def _draw_mixture(
    rows: list[Example], owner: Callable[[Example], int], config: MixtureConfig
) -> tuple[list[Example], list[str]]:
    """Apply the limits and the weights; also says what they led to."""
    draw = random.Random(f"{config.seed}:mix")
    if config.max_rows_per_task:
        rows = _thin(
            rows, lambda row: row.task, dict.fromkeys((row.task for row in rows), config.max_rows_per_task), draw
        )
    if config.max_rows_per_source:
        rows = _thin(rows, owner, dict.fromkeys(range(len(config.source)), config.max_rows_per_source), draw)
    available = Counter(map(owner, rows))
    weights = {
        number: Fraction(str(config.source[number].weight)) if config.mixing == "weights" else Fraction(count)
        for number, count in available.items()
    }
    quotas = _share_out(available, weights, config.max_rows)
    notes = [f"{s.path}: no row is left to train on" for n, s in enumerate(config.source) if n not in available]
    if config.mixing == "weights" and sum(quotas.values()) < min(sum(available.values()), config.max_rows or len(rows)):
        notes += [
            f"{config.source[number].path} sets the size of the mixture: its weight takes all of its {count} rows"
            for number, count in sorted(available.items())
            if quotas[number] == count
        ]
    return _thin(rows, owner, quotas, draw), notes


def _share_out(available: Mapping[int, int], weights: Mapping[int, Fraction], max_rows: int | None) -> dict[int, int]:
    """How many rows each source gives: in proportion to the weights, none twice, by largest remainders."""
    whole = sum(weights.values())
    total = min(int(count * whole / weights[number]) for number, count in available.items())
    total = min(total, max_rows or total)
    exact = {number: total * weight / whole for number, weight in weights.items()}
    quotas = {number: int(rows) for number, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda number: (quotas[number] - exact[number], number))
    for number in by_remainder[: total - sum(quotas.values())]:
        quotas[number] += 1
    return quotas


def _thin(
    rows: Sequence[Example], name: Callable[[Example], Any], limits: Mapping[Any, int], draw: random.Random
) -> list[Example]:
    """Draw at most so many rows of each name; what stays keeps its order."""
    kept = {
        row.source
        for key, members in _group(rows, name).items()
        for row in draw.sample(members, min(limits[key], len(members)))
    }
    return [row for row in rows if row.source in kept]


def _group(rows: Sequence[Any], name: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def _trace(
    examples: Sequence[Example],
    apart: Sequence[Example],
    train: Sequence[Example],
    kept_out: Sequence[Sequence[Example]],
) -> dict[str, str]:
    """What became of each example, by its source."""
    fates = dict.fromkeys((example.source for example in examples), "capped")
    for fate, rows in {"dropped": apart, "train": train, "heldout": kept_out[0], "unseen": kept_out[1]}.items():
        fates.update(dict.fromkeys((row.source for row in rows), fate))
    return fates


def _cover(
    examples: Sequence[Example],
    train: Sequence[MixedExample],
    fates: Mapping[str, str],
    name: Callable[[Example], Any],
    templates: Sequence[InstructionTemplate],
) -> dict[Any, Coverage]:
    """Count what became of the examples that share a name."""
    written = _group(train, name)
    backwards = {number for number, template in enumerate(templates, start=1) if template.is_reversed}
    covered = {}
    for key, members in _group(examples, name).items():
        numbers = [row.template for row in written.get(key, [])]
        counts = Counter(fates[example.source] for example in members)
        covered[key] = Coverage(
            name=key,
            rows_in=len(members),
            rejected=0,
            examples=len(members),
            **{fate: counts[fate] for fate in ("heldout", "unseen", "dropped", "capped", "train")},
            written=len(numbers),
            share=len(numbers) / len(train),
            templates=len({number for number in numbers if number}),
            reversed=sum(number in backwards for number in numbers),
            unworded=numbers.count(None),
        )
    return covered


def _find_unused(recipe: Recipe, examples: Sequence[Example]) -> list[str]:
    tasks = {example.task for example in examples if example.task}
    return [
        f'template {number} is for the task "{template.task}", which no row has.{suggest(template.task, tasks)}'
        for number, template in enumerate(recipe.templates, start=1)
        if template.task not in (*tasks, EVERY_TASK)
    ]


def _check_targets(parts: Mapping[Path, Sequence[MixedExample]], inputs: Sequence[Path]) -> None:
    problems = []
    for path, rows in parts.items():
        if path.suffix != ".jsonl":
            problems.append(f"{path}: a mixture is written as JSON Lines; name it {path.with_suffix('.jsonl').name}")
        elif path.is_dir():
            problems.append(f"{path}: is a folder, expected a file")
        elif path.exists() and any(path.samefile(one) for one in inputs if one.exists()):
            problems.append(f"{path}: was read for this mixture; choose another name")
        elif path.exists() and not rows:
            problems.append(f"{path}: is of an earlier mixture, this one has no such rows; move it away")
    if problems:
        raise ConfigError(join_problems("The mixture can't be written:", problems))
