"""A trained adapter to talk to: one loaded base that answers as itself or tuned, and the merged model beside it."""

from __future__ import annotations

import contextlib
import lzma
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_tune import disk
from qlora_tune.chat_format import ChatFormat
from qlora_tune.config import UPLOADS
from qlora_tune.errors import ConfigError, ModelError
from qlora_tune.export import ADAPTER_FILES, PACKED_FILES, Trained, open_adapter
from qlora_tune.generate import answer_prompts, fit_context, room_for, stream_reply
from qlora_tune.hub_models import fetch_adapter, is_repository
from qlora_tune.launch import refuse_busy_gpu
from qlora_tune.reward_model import RewardModel, conversation, load_reward_model
from qlora_tune.runs import Run, list_runs, open_run
from qlora_tune.shapes import Example
from qlora_tune.text_signs import printable
from qlora_tune.turns import Message

Voice = Literal["base", "tuned", "merged"]
LISTED = 300  # held-out prompts to choose from
MAX_ADAPTER_BYTES = 8 << 30  # unpacked; a rank-512 adapter of a 14B base has 4 GB


@dataclass(frozen=True)
class ChatModel:
    """A base with an adapter, the merged model where one was exported, and a reward model where one is to choose."""

    model: Any
    chat: ChatFormat
    merged: Any | None = None
    judge: RewardModel | None = None

    @property
    def voices(self) -> list[Voice]:
        """What can answer here."""
        return ["base", "tuned", *(["merged"] if self.merged is not None else [])]  # type: ignore[list-item]

    def fit(self, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
        """The conversation without the oldest turns that no longer fit the context, as fit_context leaves them out."""
        return fit_context(self.model, self.chat, messages, max_new_tokens)

    def reply(self, voice: Voice, messages: Sequence[Message], **sampling: Any) -> Iterator[str]:
        """Stream one answer; `sampling` is max_new_tokens, temperature and top_p of stream_reply."""
        if voice not in self.voices:
            raise ModelError("There is no merged model of this run. Export one first: on the page, or export --merged.")
        model = self.merged if voice == "merged" else self.model
        # With its adapter disabled the model is the base, to the last bit.
        with self.model.disable_adapter() if voice == "base" else contextlib.nullcontext():
            yield from stream_reply(model, self.chat, messages, **sampling)

    def draw_best(
        self,
        count: int,
        tuned: bool,
        messages: Sequence[Message],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[tuple[float | None, str]]:
        """Draw several answers of the tuned model or the base; each with its reward, the highest first.

        Answers without a reward, as empty ones are, come last.
        """
        if self.judge is None:
            raise ModelError("No reward model is loaded that could choose the best answer.")
        prompt = self.chat.encode_prompt(messages)
        with contextlib.nullcontext() if tuned else self.model.disable_adapter():
            drawn = answer_prompts(
                self.model,
                self.chat,
                [prompt] * count,
                max_new_tokens=room_for(self.model, prompt, max_new_tokens),
                batch_size=count,
                temperature=temperature,
                top_p=top_p,
            )
        texts = [text for text, _ in drawn]
        rewards = self.judge.score([conversation(messages, (), text) for text in texts], count)
        return sorted(zip(rewards, texts, strict=True), key=lambda pair: math.inf if pair[0] is None else -pair[0])


def answer_sides(
    model: ChatModel,
    voices: Sequence[Voice | None],
    histories: Sequence[list[Message]],
    system: str,
    **sampling: Any,
) -> Iterator[list[list[Message]]]:
    """Let several voices answer, one after the other, each its own history; yields all histories as they grow.

    A history ends with the question. A side whose voice is None is passed over. An empty answer can't stand in a
    history, because templates would render a turn that never was learned: then the last question goes too.
    """
    sides = [list(history) for history in histories]
    for number, voice in enumerate(voices):
        if voice is None:
            continue
        asked, said = sides[number], ""
        for piece in model.reply(voice, model.fit(add_system(system, asked), sampling["max_new_tokens"]), **sampling):
            said += piece
            if said.strip():
                sides[number] = [*asked, Message(role="assistant", content=said)]
                yield list(sides)
        sides[number] = sides[number] if said.strip() else asked[:-1]
    yield sides


def add_system(system: str, history: Sequence[Message]) -> list[Message]:
    """A history behind its system prompt, where that says anything."""
    return [*([Message(role="system", content=system.strip())] if system.strip() else []), *history]


def check_sampling(temperature: float | None, top_p: float | None, max_new_tokens: float | None) -> dict[str, Any]:
    """How to draw an answer, as stream_reply takes it. Raises ConfigError for what no sampling can do."""
    if (
        temperature is None
        or top_p is None
        or max_new_tokens is None
        or not (0 <= temperature < 100 and 0 < top_p <= 1 and max_new_tokens >= 1)
    ):
        raise ConfigError("Expected a temperature from 0 to 100, top-p above 0 and at most 1, max new tokens >= 1.")
    return {"temperature": float(temperature), "top_p": float(top_p), "max_new_tokens": int(max_new_tokens)}


def ask(history: Sequence[Message], question: str) -> list[Message]:
    """A history with one more question. One that nobody answered, because the chat was stopped, is left out."""
    answered = before_last_question(history)[0] if history and history[-1]["role"] == "user" else list(history)
    return [*answered, Message(role="user", content=question.strip())]


def before_last_question(history: Sequence[Message]) -> tuple[list[Message], str]:
    """A history without its last question and what followed, and that question, to ask it again."""
    places = [index for index, turn in enumerate(history) if turn["role"] == "user"]
    return (list(history[: places[-1]]), history[places[-1]]["content"]) if places else ([], "")


def list_heldout(run: Run) -> list[tuple[str, int]]:
    """The held-out prompts of a run, as they are shown in a list, with their places."""
    rows = run.read_heldout()[:LISTED] if (run.path / "heldout.jsonl").exists() else []
    labels = [printable(f"{row.task or 'row'}: {row.messages[-2]['content'][:80]}") for row in rows]
    return [(label, place) for place, label in enumerate(labels)]


def split_example(example: Example) -> tuple[str, list[Message], str, str]:
    """A row as a chat takes it up: system prompt, the turns before the last question, that question, its answer."""
    *before, question, answer = example.messages
    system = "".join(turn["content"] for turn in before if turn["role"] == "system")
    return system, [turn for turn in before if turn["role"] != "system"], question["content"], answer["content"]


def load_chat(
    adapter: Path,
    model_name_or_path: str | None = None,
    merged: Path | None = None,
    judge: Trained | None = None,
) -> ChatModel:
    """Load an adapter's folder on its base, and a merged model's folder or a reward model if one is given.

    Raises ModelError when the folder holds no adapter, or the base is missing or is another one; RunError when a run
    holds the GPU, whose memory would not do for both.
    """
    trained = open_adapter(adapter, model_name_or_path)
    refuse_busy_gpu(trained.device)
    model = trained.load()
    rewards = load_reward_model(judge, (trained, model)) if judge else None
    return ChatModel(model, trained.chat, trained.load_merged(merged) if merged else None, rewards)


def list_adapters(runs_dir: str | Path) -> dict[str, Path]:
    """The adapters that can be talked to, by name: of runs, newest first, then those opened from a zip."""
    tuned = {run.name: run.adapter for run in reversed(list_runs(runs_dir)) if run.can_answer}
    opened = sorted((Path(runs_dir) / UPLOADS).glob("*/adapter_config.json"))
    return tuned | {f"{path.parent.name} (opened)": path.parent for path in opened}


def find_adapter(name: Path, runs_dir: str | Path, scratch: Path) -> tuple[Path, Run | None]:
    """The folder of an adapter, and its run where it comes with one.

    A name is a run's, an adapter's folder, an exported zip or OWNER/NAME on the hub; the last two are unpacked under
    `scratch`. Raises RunError or ModelError for what is none of these.
    """
    if name.suffix == ".zip":
        return unpack_adapter(name, scratch), None
    if is_repository(name):
        return fetch_adapter(name.as_posix(), scratch), None
    if (name / "adapter_config.json").is_file():
        return name, find_own_run(name)
    run = open_run(name, runs_dir)
    run.require_adapter()
    return run.adapter, run


def find_own_run(adapter: Path) -> Run | None:
    """The run that an adapter's folder belongs to; None for one that came without."""
    run = Run(adapter.resolve().parent)
    return run if adapter.resolve() == run.adapter and (run.path / "state.json").is_file() else None


def unpack_adapter(packed: Path, folder: Path) -> Path:
    """Unpack an exported adapter into a folder of its own under `folder`; returns the adapter's folder.

    Only the files that an export writes are taken, by name and without their folders, so that nothing lands
    elsewhere. Raises ModelError where the file is no such zip, or is larger than MAX_ADAPTER_BYTES unpacked.
    """
    try:
        with zipfile.ZipFile(packed) as archive:
            members = {Path(entry.filename).name: entry for entry in archive.infolist() if not entry.is_dir()}
            chosen = {name: entry for name, entry in members.items() if name in PACKED_FILES}
            if not chosen.keys() >= {*ADAPTER_FILES, "adapter_config.json"}:
                raise ModelError(
                    f"{packed.name}: no adapter made by qlora-tune. Expected the zip that `export` writes, with "
                    f"{', '.join((*ADAPTER_FILES, 'adapter_config.json'))}."
                )
            size = sum(entry.file_size for entry in chosen.values())
            if size > MAX_ADAPTER_BYTES:
                raise ModelError(f"{packed.name}: is larger than {MAX_ADAPTER_BYTES >> 30} GiB unpacked, so it is not.")
            disk.require_room(folder, size, "its files")
            target = Path(tempfile.mkdtemp(prefix=f"{packed.stem[:40]}-", dir=folder))
            try:
                for name, entry in chosen.items():
                    with archive.open(entry) as source, (target / name).open("wb") as copy:
                        shutil.copyfileobj(source, copy)
                open_adapter(target)  # refuses another base before anything is loaded
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
        raise ModelError(f"{packed.name}: no zip that can be read ({error}).") from None
    return target
