"""Everything decided before training: the device, the base, its tokenizer, and the rows as tokens.

What this module returns is what the preview shows and what the trainer gets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_tune import data as rows
from qlora_tune import model as models
from qlora_tune import processes
from qlora_tune.adapters import refuse_untrainable, virtual_tokens_of
from qlora_tune.base import BaseModel, find_base
from qlora_tune.chat_format import ChatFormat, TokenizedExample, tokenize_examples
from qlora_tune.config import AUTO, BUILTIN, TrainConfig, load_preset, shipped_path
from qlora_tune.contracts import read_contracts
from qlora_tune.data import DataReport
from qlora_tune.errors import ConfigError, DataError, ModelError, TemplateError, join_problems
from qlora_tune.long_chats import split_long
from qlora_tune.model import Device, Precision, Quantization
from qlora_tune.preferences import read_kept_pairs
from qlora_tune.runs import Run, fingerprint_files
from qlora_tune.shapes import DataProblem, Example
from qlora_tune.turns import Message
from qlora_tune.unseen import part_tasks

# Up to this length [tokens] plain attention trains 1.5 times as fast on a CPU as sdpa; beyond it, its memory grows
# with the square of the length (docs/log.md).
SHORT_ROWS = 256
# A CPU's batches are padded to a multiple of this [tokens]: oneDNN compiles and keeps kernels for every new length,
# 0.5 GB more after 30 steps without rounding up.
PAD_TO = 16
AS_TOKENS = 22  # bytes of memory for each of a data file's: short rows as text, as sketches of copies and as tokens
LARGEST_TEXT = 1 << 20  # of plain text [bytes]: more takes long and says no more


@dataclass(frozen=True)
class PreparedData:
    """What is trained on and what is scored on, with the report of what became of every row."""

    train: list[TokenizedExample]
    heldout: list[TokenizedExample]
    heldout_examples: list[Example]
    report: DataReport
    unseen_examples: list[Example] = field(default_factory=list)  # of tasks that are not trained on

    def lengths(self) -> list[int]:
        """Lengths of the training sequences [tokens]."""
        return [len(sequence.input_ids) for sequence in self.train]

    def learned_share(self) -> float:
        """Share of the training tokens that are learned."""
        return sum(sequence.learned for sequence in self.train) / sum(self.lengths())

    def summary(self) -> dict[str, Any]:
        """Totals for the run's record; tokens are counted on the training sequences."""
        lengths = self.lengths()
        return {
            "rows_in": self.report.rows_in,
            "rows_kept": self.report.kept,
            "rows_rejected": self.report.rejected,
            "rows_changed": self.report.changed,
            "rows_heldout": len(self.heldout_examples),
            "rows_unseen": len(self.unseen_examples),
            "shapes": dict(self.report.shapes),
            "tasks": dict(self.report.tasks),
            "train_sequences": len(self.train),
            "train_tokens": sum(lengths),
            "learned_tokens": sum(sequence.learned for sequence in self.train),
            "longest_sequence": max(lengths),
        }


@dataclass(frozen=True)
class Setup:
    """Everything decided before training: where it runs, on which base, with which rows."""

    device: Device
    precision: Precision
    base: BaseModel
    tokenizer: Any
    chat: ChatFormat
    data: PreparedData

    def total_steps(self, config: TrainConfig) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(config, len(self.data.train))


def count_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run over so many rows, counted as Transformers' Trainer counts them."""
    batches = math.ceil(rows / config.per_device_train_batch_size)
    an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return config.max_steps if config.max_steps > 0 else math.ceil(an_epoch * config.num_train_epochs)


def prepare(config: TrainConfig) -> Setup:
    """Find the base, load its tokenizer, read, split and tokenize the rows. Loads no weights."""
    device = models.detect_device()
    if config.preference_data:
        raise ConfigError("preference_data holds pairs, not rows. Train on them with: python -m qlora_tune prefer")
    refuse_untrainable(config)
    refuse_rotation(config)
    if not config.fast:
        processes.deal_micro_batches(config.gradient_accumulation_steps)
    refuse_other_device(config.preset, device)
    base = find_base(config.model_name_or_path, config.model_revision)
    refuse_longer_than_context(config.max_length, base, virtual_tokens_of(config))
    if config.contracts:
        read_contracts(Path(config.contracts))  # a faulty one is told now, not once the training is done
    find_plain_text(config)
    tokenizer, chat = models.load_tokenizer(base.path, config.chat_template)
    precision = precision_of(config, device)
    if precision == "float16" and device.kind == "cpu":
        raise ModelError("dtype float16 does not train on a CPU. Use auto, bfloat16 or float32.")
    return Setup(device, precision, base, tokenizer, chat, prepare_data(config, chat))


def refuse_other_device(preset: str, device: Device) -> None:
    """Raise ConfigError when a GPU's preset meets a machine without one, before gigabytes are downloaded for it."""
    if preset == "none" or device.kind == "cuda":
        return
    wanted = load_preset(preset)
    if wanted.device != device.kind:
        raise ConfigError(
            f"Preset {preset} is for a CUDA GPU with {wanted.min_memory_gb:g} GB, and none is usable here. "
            "Use --preset cpu-small or builtin, or name its base with --model-name-or-path to try it on the CPU."
        )


def refuse_rotation(config: TrainConfig) -> None:
    """Raise ConfigError where one run is asked to hold out clusters of tasks in turn, which takes several."""
    if config.holdout_tasks == [AUTO]:
        raise ConfigError(
            "holdout_tasks auto trains several runs, each without one cluster of tasks, which only this command does: "
            "python -m qlora_tune train FILE --holdout-tasks auto. For a single run, name the tasks to hold out."
        )


def refuse_longer_than_context(max_length: int, base: BaseModel, virtual: int = 0) -> None:
    """Raise ConfigError where rows, behind virtual tokens, could reach positions that the base never was trained on."""
    context = base.context_length()
    if context and max_length + virtual > context:
        behind = f" behind {virtual} virtual ones" if virtual else ""
        raise ConfigError(
            f"max_length is {max_length} tokens{behind}, and base {base.label} has a context of {context}: it has "
            f"never seen later positions. Use --max-length {context - virtual} or less; longer rows are then left out "
            "and counted."
        )


def prepare_data(config: TrainConfig, chat: ChatFormat) -> PreparedData:
    """Read, split and tokenize the rows. Raises DataError when nothing is left to train on."""
    training, held_out = training_files(config), heldout_files(config)
    _refuse_twice([*training, *held_out])
    rows.require_memory([*training, *held_out], AS_TOKENS * processes.count())
    labels = rows.label_files([*training, *held_out])
    examples, report = load_files(config, training, labels)
    candidates: list[Example] = []
    if held_out:
        candidates, more = load_files(config, held_out, labels)
        report.add(more)
    parted = part_tasks(examples, candidates, config.holdout_tasks)
    report.problems += parted.problems
    if held_out:
        train_examples = parted.train
        heldout_examples, leaks = rows.drop_seen(train_examples, parted.heldout)
        report.problems += leaks
        if leaks and not heldout_examples:
            raise DataError(join_problems("Every held-out row is also trained on.", [str(leak) for leak in leaks]))
    else:
        train_examples, heldout_examples = rows.split_heldout(parted.train, config.heldout_share, config.seed)
    unseen_examples, leaks = rows.drop_seen(train_examples, parted.unseen)
    report.problems += leaks
    if config.long_chats == "split":
        train_examples, split = split_long_chats(chat, train_examples, config.max_length)
        report.problems += split
    train, train_problems = tokenize_examples(chat, train_examples, config.max_length)
    heldout, heldout_problems = tokenize_examples(chat, heldout_examples, config.max_length)
    unseen_examples, unseen_problems = leave_out_long(chat, unseen_examples, config.max_length)
    report.problems += train_problems + heldout_problems + unseen_problems
    if not train:
        reasons = [str(problem) for problem in report.problems]
        raise DataError(join_problems("No row is left to train on.", reasons))
    kept = _as_learned(chat, heldout_examples, heldout)
    return PreparedData(train, heldout, kept, report, unseen_examples)


def count_tokens(chat: ChatFormat, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> int:
    """Length of a conversation as it is trained on [tokens]; of its longest sequence where a template makes several.

    0 where the template can't render it: tokenizing says why.
    """
    try:
        return max(len(sequence.input_ids) for sequence in chat.tokenize_example(messages, tools=tuple(tools)))
    except TemplateError:
        return 0


def split_long_chats(
    chat: ChatFormat, examples: Sequence[Example], max_length: int
) -> tuple[list[Example], list[DataProblem]]:
    """Split chats beyond max_length [tokens] at turn boundaries; what can't be split is left to the tokenizing."""
    pieces: list[Example] = []
    problems: list[DataProblem] = []
    for example in examples:
        answers = sum(turn["role"] == "assistant" for turn in example.messages)
        if answers < 2:
            pieces.append(example)
            continue

        def fits(messages: Sequence[Message], tools: Any = example.tools) -> bool:
            return count_tokens(chat, messages, tools) <= max_length

        split = split_long(example, fits)
        pieces += split.pieces or (example,)
        if split.pieces and split.problem:
            problems.append(split.problem)
    return pieces, problems


def _refuse_twice(files: Sequence[str]) -> None:
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(f"{', '.join(twice)}: given twice. Name each file once; --num-train-epochs repeats rows.")


def other_examples(run: Run, files: Sequence[str], chat: ChatFormat) -> tuple[list[Example], DataReport]:
    """Rows of other files to score a run on, and what became of the rest.

    Left out is what leave_out_seen leaves out. Raises DataError as that does, and when nothing is left.
    """
    config, names = run.read_config(), rows.find_data(files)
    candidates, report = load_others(config, names)
    kept, problems = leave_out_seen(run, candidates, chat, names)
    report.problems += problems
    if not kept:
        raise DataError(join_problems("No row of these files is left to score.", [str(p) for p in report.problems]))
    return kept, report


def load_others(config: TrainConfig, files: Sequence[str]) -> tuple[list[Example], DataReport]:
    """Read files that a run of these settings was not given; their names are told from those of its training files."""
    _refuse_twice(files)
    return load_files(config, files, rows.label_files([*files, *training_files(config)]))


def leave_out_seen(
    run: Run, examples: Sequence[Example], chat: ChatFormat, files: Sequence[str] = ()
) -> tuple[list[Example], list[DataProblem]]:
    """Leave out examples whose prompt a run was trained on, and those longer than its max_length; and say which.

    `files` are those that the examples are from. Raises DataError when the run's own files have changed, so that
    nobody can tell what it was trained on. Rows that it held out need no look at them.
    """
    config = run.read_config()
    heldout = {rows.duplicate_key(example) for example in (*run.read_heldout(), *run.read_unseen())}
    clean, leaks = list(examples), list[DataProblem]()
    if not {rows.duplicate_key(example) for example in examples} <= heldout:
        training = training_files(config)
        _refuse_changed(run, [*training, *heldout_files(config)])
        trained_on = load_files(config, training, rows.label_files([*files, *training]))[0] if training else []
        trained_on += [pair.to_example() for pair in read_kept_pairs(run.path)[0]]
        clean, leaks = rows.drop_seen([e for e in trained_on if rows.duplicate_key(e) not in heldout], examples)
    kept, too_long = leave_out_long(chat, clean, config.max_length)
    return kept, leaks + too_long


def leave_out_long(
    chat: ChatFormat, examples: Sequence[Example], max_length: int
) -> tuple[list[Example], list[DataProblem]]:
    """Leave out examples that the template can't write within max_length [tokens], and say which; cut long chats."""
    sequences, problems = tokenize_examples(chat, examples, max_length)
    return _as_learned(chat, examples, sequences), problems


def _as_learned(chat: ChatFormat, examples: Sequence[Example], sequences: Sequence[TokenizedExample]) -> list[Example]:
    """The examples that have sequences, and of chats that were cut the part that these hold.

    Scoring asks for the last answer, which is then the last that the held-out loss counts.
    """
    learned: Counter[str] = Counter()
    for sequence in sequences:
        learned[sequence.source] += sequence.labels.count(chat.end_of_turn_id)
    kept = []
    for example in examples:
        turns, count = example.messages, learned[example.source]
        ends = [n for n, turn in enumerate(turns, 1) if turn["role"] == "assistant" and turn.get("learn", True)]
        if count:
            kept.append(example if count >= len(ends) else replace(example, messages=turns[: ends[count - 1]]))
    return kept


def _refuse_changed(run: Run, files: Sequence[str]) -> None:
    if any(not Path(file).exists() for file in files) or (
        fingerprint_files(files) != run.read_state()["data_fingerprint"]
    ):
        raise DataError(
            f"The files that {run.name} was trained on are gone or have changed, so which rows are new to it can't be "
            f"told. Put them back: {', '.join(files)}"
        )


def load_files(
    config: TrainConfig, files: Sequence[str], labels: Mapping[str, str]
) -> tuple[list[Example], DataReport]:
    """Read files as the settings say: which column is which field, and in which encoding."""
    return rows.load_examples(files, labels, rows.parse_columns(config.map), config.encoding)


def precision_of(config: TrainConfig, device: Device) -> Precision:
    """What the settings say to compute in; by itself what the device really has."""
    return device.precision if config.dtype == "auto" else config.dtype


def optimizer_of(config: TrainConfig, device: Device) -> str:
    """The optimizer that training takes, by Transformers' name."""
    if config.optim != "auto":
        return config.optim
    return "paged_adamw_8bit" if device.kind == "cuda" else "adamw_torch"


def quantization_of(config: TrainConfig) -> Quantization:
    """How the settings say the base is held."""
    return Quantization(config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)


def find_plain_text(config: TrainConfig) -> Path | None:
    """The text on which forgetting is measured: a shipped page, the built-in base's in its own small language.

    Raises ConfigError where the user's own can't be read as text, before hours are spent on training.
    """
    if config.plain_text is None:
        return None
    page = "builtin/plain_text.txt" if config.model_name_or_path == BUILTIN else "plain_text.txt"
    path = shipped_path(page) if config.plain_text == "auto" else Path(config.plain_text)
    try:
        size, text = path.stat().st_size, path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plain_text: {path} can't be read: {error.strerror}. Name a text file, or none.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"plain_text: {path} is no text in UTF-8. Name a text file, or none.") from None
    if size > LARGEST_TEXT or not text.strip():
        raise ConfigError(f"plain_text: {path} has {size:,} bytes; expected some text of at most {LARGEST_TEXT:,}.")
    return path


def training_files(config: TrainConfig) -> list[str]:
    """The files of training rows; sample.jsonl where none is named.

    Preference training names those of the adapter that it began with; where it knows none, there are none.
    """
    return rows.find_data(config.data) or [str(shipped_path("sample.jsonl"))] * (not config.preference_data)


def heldout_files(config: TrainConfig) -> list[str]:
    """The files of rows that are held out; none where a share of the training files is.

    The sample comes with held-out rows of its own, about other entities than its pairs.
    """
    if config.data or config.heldout_data or config.preference_data:
        return rows.find_data(config.heldout_data)
    return [str(shipped_path("sample_heldout.jsonl"))]


def data_files(config: TrainConfig) -> list[str]:
    """All files that a run reads, training rows first."""
    return [*training_files(config), *heldout_files(config)]
