"""The terminal face of data: check and repair it, mix it, select from it, make pairs of documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from qlora_tune import terminal, terminal_report
from qlora_tune.config import TrainConfig, resolve_config, shipped_path
from qlora_tune.errors import MAX_LISTED, ConfigError, DataError, join_problems
from qlora_tune.flags import AnySettings, given_flags
from qlora_tune.quality import DEFECTS
from qlora_tune.row_files import refuse_overwriting
from qlora_tune.shapes import KNOWN_SHAPES
from qlora_tune.terminal import say
from qlora_tune.terminal_progress import counting, scoring_progress

if TYPE_CHECKING:
    from qlora_tune.shapes import Example

FILES_HELP = (
    "Files or folders of rows (.jsonl, .json, .csv, .tsv, .parquet, ChatML .txt, each also .gz), or a hub dataset's "
    "id; without any, the sample that ships with it."
)
DataFiles = Annotated[str, Parameter(help=FILES_HELP)]
Output = Annotated[Path, Parameter(help="File to write.")]


def check(
    *files: DataFiles,
    tokens: Annotated[
        bool, Parameter(help="Count tokens with the base's tokenizer, and what max_length cuts.")
    ] = False,
    near_duplicates: Annotated[
        bool | None, Parameter(help="Search near duplicates; by itself up to some 100,000 rows.", show_default=False)
    ] = None,
    json_report: Annotated[Path | None, Parameter(name="--json", help="Write the report as JSON.")] = None,
    html_report: Annotated[Path | None, Parameter(name="--html", help="Write the report as a page.")] = None,
    fix: Annotated[
        Path | None, Parameter(help="Write a repaired copy (JSON Lines), with a log of every change.")
    ] = None,
    drop: Annotated[list[str] | None, Parameter(help="With --fix, drop rows of this kind of defect too.")] = None,
    settings: AnySettings = None,
) -> None:
    """Report what is in FILES and what is wrong with which line; leaks with --heldout-data; repair with --fix."""
    from qlora_tune.check import check_files
    from qlora_tune.check_page import write_check_page
    from qlora_tune.data import find_data, parse_columns
    from qlora_tune.repair import repair_files

    config = _settings(settings)
    columns, also_drop = parse_columns(config.map), _kinds(drop or [], fix)
    paths = [*files, *config.data] or [str(shipped_path("sample.jsonl"))]
    refuse_overwriting(filter(None, (json_report, html_report, fix)), [*paths, *config.heldout_data])
    say(f"reading {', '.join(paths)}")
    if tokens:
        say(f"tokens of base {config.model_name_or_path}; max_length {config.max_length} (preset {config.preset})")
    with counting("rows read") as on_row:
        report = check_files(
            find_data(paths),
            find_data(config.heldout_data),
            columns=columns,
            encoding=config.encoding,
            near=near_duplicates,
            heldout_share=config.heldout_share,
            measure=_token_counter(config) if tokens else None,
            max_length=config.max_length,
            on_row=on_row,
        )
    refused = [file.refused for file in report.files if file.refused]
    if refused and len(report.files) == 1:
        raise DataError(refused[0])
    terminal_report.show_check(report)
    if json_report:
        json_report.parent.mkdir(parents=True, exist_ok=True)
        json_report.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        say(f"report: {json_report}")
    if html_report:
        write_check_page(report, html_report)
        say(f"report: {html_report}")
    if fix:
        terminal_report.show_repair(
            repair_files(report, fix, columns=columns, encoding=config.encoding, also_drop=also_drop)
        )
    if not tokens:
        say("Lengths in tokens need the base's tokenizer: --tokens. What is learned: python -m qlora_tune preview FILE")
    if refused:
        raise DataError(join_problems("Not all files can be read:", refused))
    if not report.kept:
        found = "no row can be used" if report.rows_in else "the file has no rows"
        raise DataError(f"No usable row in {', '.join(paths)}: {found}. Expected {KNOWN_SHAPES}.")


def mix(
    recipe: Annotated[Path, Parameter(help="TOML file: sources, weights, caps, templates.")], output: Output
) -> None:
    """Mix several sources by a RECIPE into OUTPUT, with held-out rows and unseen task types beside it."""
    from qlora_tune.mixture import load_recipe, mix_examples, write_mixture

    mixture = mix_examples(load_recipe(recipe))
    terminal_report.show_coverage("source", mixture.by_source)
    terminal_report.show_coverage("task", mixture.by_task)
    for note in mixture.notes:
        say(note)
    written = write_mixture(mixture, output)
    say("written: " + ", ".join(map(str, written)))


def select(
    *files: DataFiles,
    rows: Annotated[int, Parameter(help="How many examples to choose.", validator=Number(gte=1))],
    output: Output,
    by: Annotated[
        Literal["ifd", "length", "diversity", "reward"],
        Parameter(
            help="ifd: how much each prompt helps its answer; length: the longest; diversity: the most unlike; reward: "
            "what a reward model prefers."
        ),
    ] = "ifd",
    run: Annotated[Path | None, Parameter(help="Score with this run's adapter instead of the bare base.")] = None,
    reward: Annotated[Path | None, Parameter(help="Run of the reward model, with --by reward.")] = None,
    per_task: Annotated[bool, Parameter(help="Choose of each task in proportion to its rows.")] = True,
    settings: AnySettings = None,
) -> None:
    """Choose the best rows of FILES for training; the others are written beside them, with score and reason."""
    from qlora_tune.data import find_data, load_examples, parse_columns
    from qlora_tune.selection import name_left_out, select_examples, write_selection

    config = _settings(settings)
    if (by == "reward") != (reward is not None):
        raise ConfigError("--by reward takes the scores of a reward model, --reward RUN. Give both.")
    if run and by != "ifd":
        raise ConfigError(f"--run says whose model tells how difficult a row is, --by ifd. By {by} it says nothing.")
    paths = [*files, *config.data] or [str(shipped_path("sample.jsonl"))]
    refuse_overwriting((output, name_left_out(output)), paths)
    examples, report = load_examples(find_data(paths), None, parse_columns(config.map), config.encoding)
    terminal.show_report(report)
    scores = _score_difficulty(config, examples, run) if by == "ifd" else None
    if reward:
        scores = _score_rewards(config, examples, reward)
    with scoring_progress() as progress:
        selection = select_examples(
            examples, by, rows, scores, config.seed, per_task, lambda done, total: progress(f"by {by}", done, total)
        )
    left_out = write_selection(selection, examples, output)
    chosen = selection.count_tasks(examples)
    if len(chosen) > 1:
        say("chosen: " + ", ".join(f"{task} {kept} of {count}" for task, (count, kept) in chosen.items()))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in selection.count_reasons().most_common())
    say(f"{len(selection.kept):,} of {len(examples):,} examples: {output}\nleft out: {left_out} ({reasons or 'none'})")


def pairs(
    *documents: Annotated[Path, Parameter(help="Documents: .txt, .md, or .csv with a document a row.")],
    output: Output,
    recipe: Annotated[Path | None, Parameter(help="TOML of tasks; without: titles, openings, sections.")] = None,
    endpoint: Annotated[str | None, Parameter(help="Ask this OpenAI-compatible endpoint for pairs instead.")] = None,
    model: Annotated[str | None, Parameter(help="The model that the endpoint is asked for.")] = None,
    api_key_env: Annotated[str, Parameter(help="Environment variable that holds the endpoint's key.")] = "",
    rows: Annotated[
        int | None, Parameter(help="How many pairs to ask for; 100 by itself.", validator=Number(gte=1))
    ] = None,
    seeds: Annotated[Path | None, Parameter(help="Rows whose instructions show what is wanted.")] = None,
    seed: Annotated[int | None, Parameter(help="Decides which pieces are asked about; 42 by itself.")] = None,
) -> None:
    """Make pairs of DOCUMENTS, by the rules of a recipe, or through an endpoint that you name."""
    from qlora_tune import documents as rules

    if not documents:
        raise ConfigError("Name the documents to make pairs of: .txt, .md or .csv files.")
    if bool(endpoint) != bool(model) or (endpoint and recipe):
        raise ConfigError("Give --endpoint URL together with --model NAME, or --recipe TOML, or neither.")
    asked = {"--rows": rows, "--seeds": seeds, "--seed": seed, "--api-key-env": api_key_env or None}
    if not endpoint and (ignored := [flag for flag, value in asked.items() if value is not None]):
        raise ConfigError(
            f"{', '.join(ignored)}: only an endpoint is asked that. Give --endpoint URL and --model NAME."
        )
    refuse_overwriting([output], [*documents, *([seeds] if seeds else []), *([recipe] if recipe else [])])
    if endpoint and model:
        how_many, drawn_by = rows or 100, 42 if seed is None else seed
        _ask_for_pairs(documents, output, endpoint, model, api_key_env, how_many, seeds, drawn_by)
        return
    report = rules.make_pairs(documents, rules.load_recipe(recipe) if recipe else rules.DEFAULT_RECIPE)
    for skipped in report.skipped[:MAX_LISTED]:
        say(f"skipped {skipped}")
    if len(report.skipped) > MAX_LISTED:
        say(f"… and {len(report.skipped) - MAX_LISTED} more skipped")
    if not report.examples:
        raise DataError("No pair came of these documents; the reasons stand above. Give --recipe with tasks that fit.")
    rules.write_pairs(report, output)
    counts = ", ".join(f"{task} {count}" for task, count in report.counts.items())
    say(f"{len(report.examples):,} pairs ({counts}): {output}\nlook at them:  python -m qlora_tune check {output}")


def _ask_for_pairs(
    documents: tuple[Path, ...],
    output: Path,
    endpoint: str,
    model: str,
    api_key_env: str,
    rows: int,
    seeds: Path | None,
    seed: int,
) -> None:
    from qlora_tune.data import load_examples
    from qlora_tune.endpoint import Endpoint
    from qlora_tune.self_instruct import generate_pairs

    shown = load_examples([seeds])[0] if seeds else []
    with scoring_progress() as progress:
        report = generate_pairs(
            documents,
            Endpoint(endpoint, model, api_key_env),
            shown,
            rows,
            output,
            seed=seed,
            on_progress=lambda so_far: progress("pairs kept", len(so_far.kept), rows),
        )
    say(
        f"{len(report.kept)} pairs from {report.requests} requests: {output}\n"
        f"{len(report.refused)} refused: {output.with_name(output.stem + '.refused.jsonl')}"
    )


def _score_difficulty(config: TrainConfig, examples: list[Example], run: Path | None) -> list[float | None]:
    """IFD of each example by the base that the settings name, or by a run's tuned model."""
    from qlora_tune import model as models
    from qlora_tune.base import find_base
    from qlora_tune.export import open_adapter
    from qlora_tune.launch import refuse_busy_gpu
    from qlora_tune.prepare import precision_of, quantization_of
    from qlora_tune.runs import open_run
    from qlora_tune.selection import score_ifd

    if run is not None:
        trained = open_adapter(open_run(run, config.runs_dir).adapter)
        refuse_busy_gpu(trained.device)
        model, chat = trained.load(), trained.chat
    else:
        base, device = find_base(config.model_name_or_path, config.model_revision), models.detect_device()
        chat = models.load_tokenizer(base.path, config.chat_template)[1]
        model = models.load_base(base, device, precision_of(config, device), quantization_of(config))
        say("scored by the bare base: one that does not know the chat template tells little. --run takes a tuned one")
    with scoring_progress() as progress:
        found = score_ifd(
            model,
            chat,
            examples,
            config.max_length,
            config.per_device_eval_batch_size,
            lambda done, total: progress("difficulty", done, total),
        )
    return [difficulty.ifd for difficulty in found]


def _score_rewards(config: TrainConfig, examples: list[Example], reward: Path) -> list[float | None]:
    """The reward of each example's last learned answer."""
    from qlora_tune.evaluate import through_learned
    from qlora_tune.reward_model import load_reward_model, open_reward_model

    model = load_reward_model(open_reward_model(reward, config.runs_dir))
    with scoring_progress() as progress:
        return model.score(
            [(through_learned(example), example.tools) for example in examples],
            config.per_device_eval_batch_size,
            lambda done, total: progress("rewards", done, total),
        )


def _settings(settings: Any) -> TrainConfig:
    """The settings that were given, over those of the preset that was named, or the built-in base's."""
    flags = given_flags(settings)
    return resolve_config({"preset": "none" if flags.get("model_name_or_path") else "builtin", **flags}).config


def _kinds(names: list[str], fix: Path | None) -> list[str]:
    wanted = [name.replace("-", " ").replace("_", " ") for name in names]
    known = {kind.replace("-", " "): kind for kind in DEFECTS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f'--drop "{unknown[0]}": no such defect. Expected one of: {", ".join(DEFECTS)}.')
    if wanted and not fix:
        raise ConfigError("--drop needs --fix FILE, the repaired copy that leaves such rows out.")
    return [known[name] for name in wanted]


def _token_counter(config: TrainConfig) -> Callable[[Example], int]:
    """Counts the tokens of an example as it is trained on, by the base's own tokenizer and chat template."""
    from qlora_tune.base import find_base
    from qlora_tune.model import load_tokenizer
    from qlora_tune.prepare import count_tokens

    _, chat = load_tokenizer(find_base(config.model_name_or_path, config.model_revision).path, config.chat_template)
    return lambda example: count_tokens(chat, example.messages, example.tools)
