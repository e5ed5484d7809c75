"""Any number of answerers on the same prompts: adapters on one loaded base, that base, and files of answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tune import model as models
from qlora_tune.adapters import load_adapter
from qlora_tune.answer_files import LETTERS, Answers, Question, read_answers
from qlora_tune.chat import find_adapter
from qlora_tune.chat_format import ChatFormat
from qlora_tune.config import TrainConfig
from qlora_tune.data import DataReport, find_data, label_files
from qlora_tune.disk import hash_file
from qlora_tune.errors import ConfigError, DataError, ModelError, TemplateError, join_problems
from qlora_tune.evaluate import draw, through_learned, write_reference
from qlora_tune.export import Trained, open_adapter
from qlora_tune.generate import ANSWER_SHARE, answer_prompts
from qlora_tune.launch import refuse_busy_gpu
from qlora_tune.prepare import leave_out_seen, load_others
from qlora_tune.runs import Run
from qlora_tune.shapes import Example
from qlora_tune.votes import NONE, TIE

BASE = "base"  # the word for the bare base of the adapters
APART = (
    f"To compare these, let each answer beside its own {BASE} into a file (--output FILE.jsonl), and compare "
    "FILE.jsonl#NAME of both."
)


@dataclass(frozen=True)
class Answerer:
    """An adapter, the base of the adapters (neither `trained` nor `recorded`), or the answers of a file by question.

    `run` is the adapter's own; None where it came without one, so that nobody knows what it was trained on.
    """

    name: str
    fingerprint: str
    trained: Trained | None = None
    run: Run | None = None
    recorded: Mapping[str, tuple[Question, str]] | None = None


@dataclass(frozen=True)
class Panel:
    """The answerers that are put side by side."""

    answerers: tuple[Answerer, ...]

    @property
    def adapters(self) -> list[tuple[str, Trained]]:
        """The adapters by their answerers' names. All are of one base."""
        return [(each.name, each.trained) for each in self.answerers if each.trained]

    @property
    def base(self) -> str | None:
        """The fingerprint of the adapters' base; None without adapters."""
        return self.adapters[0][1].base.fingerprint if self.adapters else None

    @property
    def run(self) -> Run | None:
        """The first run."""
        return next((each.run for each in self.answerers if each.run), None)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells the answerers apart, by name (votes.Vote)."""
        return {each.name: each.fingerprint for each in self.answerers}


def open_panel(names: Sequence[str], runs_dir: str, model_name_or_path: str | None, scratch: Path) -> Panel:
    """Open answerers: runs, adapters' folders, exported zips, "base", and files of answers (FILE.jsonl#ANSWERER).

    Zips are unpacked under `scratch`, and must stay there until the panel has answered. Raises ConfigError for fewer
    than two or for one given twice, ModelError where the adapters are not of one base.
    """
    if not 2 <= len(names) <= len(LETTERS):
        raise ConfigError(
            f"Expected 2 to {len(LETTERS)} answerers to compare, given {len(names)}. For example: "
            f"python -m qlora_tune compare RUN {BASE}"
        )
    found = [_open(name, runs_dir, model_name_or_path, scratch) for name in names]
    adapters = [(name, each.trained) for name, (_, each) in zip(names, found, strict=True) if each.trained]
    for other in adapters[1:]:
        _refuse_other_base(adapters[0], other)
    if BASE in names and not adapters:
        raise ConfigError(f'"{BASE}" is the base of the adapters beside it, and none is given. Name a run or adapter.')
    labels = label_files([place for place, _ in found])
    opened: dict[str, Answerer] = {}
    for place, each in found:
        fingerprint = adapters[0][1].base.fingerprint if place == BASE else each.fingerprint
        named = replace(each, name=f"{labels[place]}{each.name}", fingerprint=fingerprint)
        if fingerprint in opened:
            raise ConfigError(f"{opened[fingerprint].name} and {named.name} are the same answerer. Name each once.")
        if named.name in (TIE, NONE):
            raise ConfigError(f'{place}: "{named.name}" is what a vote says when nobody wins. Give it another name.')
        opened[fingerprint] = named
    return Panel(tuple(opened.values()))


def find_questions(panel: Panel, files: Sequence[str]) -> tuple[list[Question], DataReport]:
    """What the answerers can be asked, and what became of the other rows.

    The rows of `files`, else the held-out ones of the first run, else the prompts of the first file of answers. Left
    out is what any of the runs was trained on. Raises DataError when nothing is left.
    """
    names = find_data(files)
    if files:
        examples, report = load_others(panel.run.read_config() if panel.run else TrainConfig(), names)
    elif panel.run:
        examples = panel.run.read_heldout()
        report = DataReport(rows_in=len(examples))
    else:
        recorded = next((each.recorded for each in panel.answerers if each.recorded), {})
        if not recorded:
            raise DataError("None of these adapters comes with held-out rows. Name rows to answer with --data FILE.")
        return [question for question, _ in recorded.values()], DataReport(rows_in=len(recorded))
    for each in panel.answerers:
        if each.run and each.trained:
            examples, problems = leave_out_seen(each.run, examples, each.trained.chat, names)
            report.problems += [replace(problem, reason=f"{problem.reason} ({each.name})") for problem in problems]
    if not examples:
        reasons = [str(problem) for problem in report.problems] or ["the run holds no rows out: use --data FILE"]
        raise DataError(join_problems("No row is left to answer.", reasons))
    chat = panel.adapters[0][1].chat if panel.adapters else None
    return [_to_question(example, chat) for example in examples], report


def answer_questions(
    panel: Panel,
    questions: Sequence[Question],
    *,
    rows: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[str, int, int], None] = lambda who, done, total: None,
) -> list[Answers]:
    """Let every answerer answer the same questions: models greedily, files by the prompt's content.

    At most `rows` of them, drawn by seed. Each adapter gives the answers that it gives alone on the base. Left out are
    questions that a file doesn't answer, and of those drawn the ones that leave no room for an answer in the base's
    context; `on_note` is told how many, `on_progress` who has answered how many of how many. Raises DataError when
    none is left.
    """
    left = list(questions)
    for each in panel.answerers:
        if each.recorded is not None:
            answered = [question for question in left if question.key in each.recorded]
            if missing := len(left) - len(answered):
                on_note(f"{missing} of {len(left)} rows left out: {each.name} has no answer to them")
            left = answered
    drawn = draw(left, rows, seed)
    limit = _longest_answer(panel, max_new_tokens)
    fitting = [(question, tokens) for question in drawn if (tokens := _encode(panel, question, limit)) is not None]
    if missing := len(drawn) - len(fitting):
        on_note(
            f"{missing} of {len(drawn)} rows left out: with {limit} tokens for the answer they are longer than the "
            "base's context, or a chat template can't write them"
        )
    if not fitting:
        raise DataError("No row is left that every answerer can answer. Name others with --data FILE.")
    if limit < max_new_tokens:
        on_note(f"answers end at {limit} tokens, one part in {ANSWER_SHARE} of the base's context")
    prompts = {name: [tokens[name] for _, tokens in fitting] for name in fitting[0][1]}
    said = _ask_models(panel, prompts, limit, batch_size, on_progress) if prompts else {}
    models.free_memory()  # people read and vote for longer than models answer
    for each in panel.answerers:
        if each.recorded is not None:
            said[each.name] = [each.recorded[question.key][1] for question, _ in fitting]
    names = [each.name for each in panel.answerers]
    return [Answers(question, {name: said[name][at] for name in names}) for at, (question, _) in enumerate(fitting)]


def _open(name: str, runs_dir: str, model_name_or_path: str | None, scratch: Path) -> tuple[str, Answerer]:
    """One answerer and its place, which names it; its name so far is what stands behind that."""
    if name == BASE:
        return BASE, Answerer("", "")
    file, mark, who = name.rpartition("#")
    if not mark or Path(name).is_file():
        file, mark, who = name, "", ""
    if file.endswith(".jsonl"):
        recorded = read_answers(Path(file), who)
        return str(Path(file).resolve()), Answerer(mark + who, hash_file(Path(file)) + mark + who, recorded=recorded)
    adapter, run = find_adapter(Path(name), runs_dir, scratch)
    place = str(run.path.resolve()) if run else name
    trained = open_adapter(adapter, model_name_or_path)
    return place, Answerer("", hash_file(adapter / "adapter_model.safetensors"), trained, run)


def _refuse_other_base(*pair: tuple[str, Trained]) -> None:
    """Raise ModelError unless two adapters can stand on one loaded base."""
    if len({each.virtual_tokens > 0 for _, each in pair}) > 1:
        raise ModelError(
            f"{' and '.join(name for name, _ in pair)}: PEFT puts LoRA and virtual tokens on no base together. {APART}"
        )
    if len({(each.base.fingerprint, each.quantization, each.precision) for _, each in pair}) > 1:
        words = (
            f"{name} was trained on {each.base.name} (weights {each.base.fingerprint[:12]}, {each.precision}, "
            f"{each.quantization})"
            for name, each in pair
        )
        raise ModelError(f"{'; '.join(words)}. Expected adapters of one base, held in one way. {APART}")


def _to_question(example: Example, chat: ChatFormat | None) -> Question:
    turns = through_learned(example)
    reference = replace(example, messages=turns).answer
    if chat and turns[-1].get("tool_calls"):
        reference = write_reference(chat, turns, chat.encode_answer(turns, example.tools))
    return Question(turns[:-1], example.tools, reference, example.task, example.source)


def _longest_answer(panel: Panel, max_new_tokens: int) -> int:
    """As in a chat, at most one part in ANSWER_SHARE of the context is kept free for the answer [tokens]."""
    context = panel.adapters[0][1].base.context_length() if panel.adapters else None
    return min(max_new_tokens, context // ANSWER_SHARE) if context else max_new_tokens


def _encode(panel: Panel, question: Question, limit: int) -> dict[str, list[int]] | None:
    """A question as each model gets it, by answerer; None where one of them has no room for an answer, or no words."""
    encoded = {}
    for each in panel.answerers:
        if each.recorded is not None:
            continue
        trained = each.trained or panel.adapters[0][1]
        try:
            tokens = trained.chat.encode_prompt(question.prompt, question.tools)
        except TemplateError:
            return None
        if len(tokens) + limit > trained.context_length():
            return None
        encoded[each.name] = tokens
    return encoded


def _ask_models(
    panel: Panel,
    prompts: Mapping[str, Sequence[list[int]]],
    limit: int,
    batch_size: int,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, list[str]]:
    """The answers of the adapters and the base, from one loaded base that all adapters are put on."""
    first = panel.adapters[0][1]
    refuse_busy_gpu(first.device)
    model = models.load_base(first.base, first.device, first.precision, first.quantization)
    chats, places = {}, {}
    for number, (name, trained) in enumerate(panel.adapters):
        chats[name], places[name] = trained.chat, f"adapter{number}"  # PEFT takes no dots in names
        model = load_adapter(model, trained.adapter, trained.base, places[name])

    def ask(name: str, own: Sequence[list[int]]) -> list[str]:
        if name in places:
            model.set_adapter(places[name])
        # With its adapters disabled the model is the base, to the last bit.
        with contextlib.nullcontext() if name in places else model.disable_adapter():
            found = answer_prompts(
                model,
                chats.get(name, first.chat),
                own,
                max_new_tokens=limit,
                batch_size=batch_size,
                on_progress=lambda done: on_progress(name, done, len(own)),
            )
        return [text for text, _ in found]

    return {name: ask(name, own) for name, own in prompts.items()}
