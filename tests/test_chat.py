"""Talking to an adapter: each voice is what it says it is, and a zip from anywhere can't do harm."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tune import chat as chats
from qlora_tune.chat import (
    ChatModel,
    answer_sides,
    before_last_question,
    list_adapters,
    load_chat,
    split_example,
    unpack_adapter,
)
from qlora_tune.errors import ModelError, TuneError
from qlora_tune.export import KL_LIMIT, export_adapter, merge_adapter, open_adapter
from qlora_tune.generate import generate_answers
from qlora_tune.launch import uploads_folder
from qlora_tune.model import load_base
from qlora_tune.runs import Run

QUESTIONS = ["What is the capital of France?", "Write the plural of mouse.", "Say hello."]
LIMIT = 24


def asked(question: str, system: str = "") -> list[Any]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def run(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the finished run."""
    folder = tmp_path_factory.mktemp("chat") / "short"
    shutil.copytree(finished[0].path, folder)
    Run(folder).update_state(pid=None)
    return Run(folder)


@pytest.fixture(scope="module")
def talk(run: Run) -> ChatModel:
    return load_chat(run.adapter)


@pytest.fixture(scope="module")
def zipped(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "mine.zip"
    export_adapter(open_adapter(run.adapter), run, target)
    return target


@pytest.fixture(scope="module")
def plain_base(builtin: Any, run: Run) -> Any:
    """The base as it is loaded where there never was an adapter."""
    trained = open_adapter(run.adapter)
    return load_base(builtin[0], trained.device, trained.precision, trained.quantization).eval()


def say(talk: ChatModel, voice: Any, question: str, system: str = "") -> str:
    return "".join(talk.reply(voice, asked(question, system), max_new_tokens=LIMIT)).strip()


def test_the_base_voice_is_the_base_and_the_tuned_voice_is_not(talk: ChatModel, plain_base: Any) -> None:
    expected = generate_answers(
        plain_base, talk.chat, [asked(q) for q in QUESTIONS], max_new_tokens=LIMIT, batch_size=1
    )
    assert [say(talk, "base", question) for question in QUESTIONS] == expected
    assert [say(talk, "tuned", question) for question in QUESTIONS] != expected


def test_the_base_voice_computes_what_the_disabled_adapter_computes(talk: ChatModel, plain_base: Any) -> None:
    ids = torch.tensor([talk.chat.encode_prompt(asked(QUESTIONS[0]))])
    with torch.inference_mode():
        with talk.model.disable_adapter():
            disabled = talk.model(ids).logits
        assert torch.equal(disabled, plain_base(ids).logits)
        assert not torch.equal(disabled, talk.model(ids).logits)


def test_after_an_answer_of_the_base_the_adapter_is_back_even_where_it_was_broken_off(talk: ChatModel) -> None:
    before = say(talk, "tuned", QUESTIONS[0])
    reply = talk.reply("base", asked(QUESTIONS[0]), max_new_tokens=LIMIT)
    next(reply)
    reply.close()  # type: ignore[attr-defined]
    assert say(talk, "tuned", QUESTIONS[0]) == before


def last_of(sides: Iterator[Any]) -> Any:
    *_, last = sides
    return last


def test_both_sides_answer_as_scoring_does(talk: ChatModel) -> None:
    for question, system in zip(QUESTIONS, ("", "Be brief.", ""), strict=True):
        sides: Any = last_of(
            answer_sides(talk, ["base", "tuned"], [asked(question)] * 2, f" {system} ", max_new_tokens=LIMIT)
        )
        options: Any = {"max_new_tokens": LIMIT, "batch_size": 1}
        with talk.model.disable_adapter():
            base = generate_answers(talk.model, talk.chat, [asked(question, system)], **options)
        tuned = generate_answers(talk.model, talk.chat, [asked(question, system)], **options)
        assert [turns[-1]["content"].strip() for turns in sides] == base + tuned
        assert [turns[:-1] for turns in sides] == [asked(question)] * 2  # without the system prompt


def test_sides_grow_piece_by_piece_and_each_keeps_its_own_history(talk: ChatModel) -> None:
    left, right = asked("One."), [*asked("One."), {"role": "assistant", "content": "No."}, *asked("Two.")]
    grown = list(answer_sides(talk, ["tuned", "base"], [left, right], "", max_new_tokens=8))
    lengths = [len(side[0][-1]["content"]) for side in grown if len(side[0]) == 2]
    assert lengths == sorted(lengths)
    assert len(grown) > 3
    assert grown[-1][1][:3] == right
    assert (left, len(right)) == (asked("One."), 3)  # what was handed in is not changed


def test_a_side_that_is_off_stays_as_it_is(talk: ChatModel) -> None:
    sides = last_of(answer_sides(talk, [None, "tuned"], [asked("a"), asked("b")], "", max_new_tokens=4))
    assert sides[0] == asked("a")
    assert len(sides[1]) == 2


def test_an_empty_answer_takes_its_question_along() -> None:
    class Silent:
        def fit(self, messages: Any, max_new_tokens: int) -> Any:
            return messages

        def reply(self, voice: str, messages: Any, **_: Any) -> Iterator[str]:
            yield " \n"

    history: Any = [*asked("a"), {"role": "assistant", "content": "b"}, *asked("c")]
    silent: Any = Silent()
    assert last_of(answer_sides(silent, ["base"], [history], "", max_new_tokens=4)) == [history[:2]]


def test_a_voice_without_its_model_is_refused(talk: ChatModel) -> None:
    assert talk.voices == ["base", "tuned"]
    with pytest.raises(ModelError, match="no merged model of this run. Export one first"):
        say(talk, "merged", "Hello")
    with pytest.raises(ModelError, match="no merged model"):
        last_of(answer_sides(talk, ["merged"], [asked("a")], "", max_new_tokens=4))


def test_the_merged_voice_is_the_merged_model(run: Run, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_adapter(open_adapter(run.adapter), run, merged, dtype="float32")
    talk = load_chat(run.adapter, merged=merged)
    assert talk.voices == ["base", "tuned", "merged"]
    options: Any = {"max_new_tokens": LIMIT, "batch_size": 1}
    expected = generate_answers(talk.merged, talk.chat, [asked(q) for q in QUESTIONS], **options)
    assert [say(talk, "merged", question) for question in QUESTIONS] == expected
    ids = torch.tensor([talk.chat.encode_prompt(asked(question)) for question in QUESTIONS[:1]])
    with torch.inference_mode():
        one, two = (model(ids).logits.float().log_softmax(-1) for model in (talk.merged, talk.model))
    assert (one.exp() * (one - two)).sum(-1).mean() < KL_LIMIT


def test_a_question_is_taken_back_with_what_followed() -> None:
    history: Any = [
        *asked("a"),
        {"role": "assistant", "content": "b"},
        *asked("c"),
        {"role": "assistant", "content": "d"},
    ]
    assert before_last_question(history) == (history[:2], "c")
    assert before_last_question(history[:3]) == (history[:2], "c")
    assert before_last_question([]) == ([], "")


def test_a_held_out_row_is_taken_up_as_a_chat(run: Run) -> None:
    rows = run.read_heldout()
    row = next(row for row in rows if any(turn["role"] == "system" for turn in row.messages))
    system, turns, question, expected = split_example(row)
    assert system == row.messages[0]["content"]
    assert [*turns, question, expected] == [
        *row.messages[1:-2],
        row.messages[-2]["content"],
        row.messages[-1]["content"],
    ]


def uploads(tmp_path: Path) -> Path:
    return uploads_folder(tmp_path / "runs")


def test_an_opened_zip_answers_as_the_run_and_is_listed(
    talk: ChatModel, zipped: Path, run: Run, tmp_path: Path
) -> None:
    adapter = unpack_adapter(zipped, uploads(tmp_path))
    assert adapter.parent == tmp_path / "runs" / "uploads"
    opened = load_chat(adapter)
    for voice in ("base", "tuned"):
        assert [say(opened, voice, q) for q in QUESTIONS] == [say(talk, voice, q) for q in QUESTIONS]
    assert list(list_adapters(tmp_path / "runs").values()) == [adapter]
    assert list_adapters(run.path.parent) == {"short": run.adapter}


def test_the_same_zip_can_be_opened_twice(zipped: Path, tmp_path: Path) -> None:
    first, second = (unpack_adapter(zipped, uploads(tmp_path)) for _ in range(2))
    assert first != second
    assert len(list_adapters(tmp_path / "runs")) == 2


def repack(source: Path, target: Path, rename: Callable[[str], str], changes: dict[str, bytes | None]) -> Path:
    """A zip like another one, with other names, and some files changed or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = changes.get(Path(name).name, old.read(name))
            if content is not None:
                new.writestr(rename(name), content)
    return target


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "front",
    [
        "../../",
        "/tmp/",
        "..\\..\\",
        "a/../../b/",
        "C:\\",
        "./",
        "/",
        "//",
        "~/",
        "../" * 9,
        "....//",
        "..%2f..%2f",
        "\\\\server\\share\\",
        "file:///tmp/",
    ],
)
def test_names_that_lead_elsewhere_write_nothing_elsewhere(front: str, zipped: Path, tmp_path: Path) -> None:
    evil = repack(zipped, tmp_path / "evil.zip", lambda name: front + Path(name).name, {})
    folder = uploads(tmp_path)
    before = everything(tmp_path)
    try:
        adapter = unpack_adapter(evil, folder)
        assert adapter.parent == folder
        written = everything(tmp_path) - before
        assert {Path(name).parts[:3] for name in written} == {("runs", "uploads", adapter.name)}
    except ModelError:
        assert everything(tmp_path) == before
    assert not Path("/tmp/adapter_config.json").exists()


def test_files_that_no_export_writes_are_not_taken(zipped: Path, tmp_path: Path) -> None:
    packed = repack(zipped, tmp_path / "more.zip", lambda name: name, {})
    with zipfile.ZipFile(packed, "a") as archive:
        for name in ("x/evil.py", "x/pytorch_model.bin", "x/.env", "x/training_args.bin", "../../evil.sh"):
            archive.writestr(name, "evil")
        link = zipfile.ZipInfo("x/vocab.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    adapter = unpack_adapter(packed, uploads(tmp_path))
    assert not {"evil.py", "pytorch_model.bin", ".env", "training_args.bin"} & {p.name for p in adapter.iterdir()}
    assert not [path for path in adapter.iterdir() if path.is_symlink()]
    assert not (tmp_path / "evil.sh").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "qlora_tune.json", "mine"])
def test_links_in_a_zip_are_never_followed(name: str, zipped: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / name).write_text("secret")
    packed = repack(zipped, tmp_path / "links.zip", lambda old: old, {name: None})
    with zipfile.ZipFile(packed, "a") as archive:
        link = zipfile.ZipInfo("mine" if name == "mine" else f"mine/{name}")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(outside if name == "mine" else outside / name))
    before = everything(outside)
    try:
        adapter = unpack_adapter(packed, uploads(tmp_path))
        assert name == "mine"
        assert not [path for path in adapter.rglob("*") if path.is_symlink() or path.read_bytes() == b"secret"]
    except TuneError:
        assert name != "mine"
        assert list(uploads(tmp_path).iterdir()) == []
    assert everything(outside) == before
    assert (outside / name).read_text() == "secret"


def test_of_a_crowded_zip_only_what_an_export_writes_is_unpacked(zipped: Path, tmp_path: Path) -> None:
    packed = repack(zipped, tmp_path / "crowd.zip", lambda name: name, {})
    with zipfile.ZipFile(packed) as archive:
        config = archive.read("mine/adapter_config.json")
    nested = packed.read_bytes()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(packed, "a") as archive:
        for number in range(20_000):
            archive.writestr(f"mine/{number}/{number}.txt", "")
        for _ in range(500):
            archive.writestr("mine/adapter_config.json", config)
        archive.writestr("mine/nested.zip", nested)
    adapter = unpack_adapter(packed, uploads(tmp_path))
    with zipfile.ZipFile(zipped) as archive:
        assert {path.name for path in adapter.iterdir()} <= {Path(name).name for name in archive.namelist()}
    assert len(everything(uploads(tmp_path))) < 20


def write_zip(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def refused(packed: Path, tmp_path: Path, message: str) -> None:
    folder = uploads(tmp_path)
    with pytest.raises(ModelError, match=message):
        unpack_adapter(packed, folder)
    assert list(folder.iterdir()) == []


def test_a_zip_without_an_adapter_is_refused(zipped: Path, tmp_path: Path) -> None:
    refused(write_zip(tmp_path / "a.zip", **{"notes.txt": b"x"}), tmp_path, "a.zip: no adapter made by qlora-tune")
    refused(write_zip(tmp_path / "b.zip"), tmp_path, "no adapter made by qlora-tune")
    for missing in ("adapter_model.safetensors", "adapter_config.json", "qlora_tune.json"):
        packed = repack(zipped, tmp_path / f"{missing}.zip", lambda name: name, {missing: None})
        refused(packed, tmp_path, "no adapter made by qlora-tune")


@pytest.mark.parametrize("content", [b"", b"just text\n", b"PK\x03\x04 cut off", b"PK\x05\x06" + bytes(18) + b"tail"])
def test_a_file_that_is_no_zip_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip", tmp_path, "a.zip: no")


def test_a_cut_off_zip_is_refused(zipped: Path, tmp_path: Path) -> None:
    content = zipped.read_bytes()
    (tmp_path / "a.zip").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a.zip", tmp_path, "a.zip: no zip that can be read")


def damage(packed: Path, target: Path, name: str) -> Path:
    """Flip bytes in the middle of one stored file of a zip."""
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as archive:
        entry = next(entry for entry in archive.infolist() if Path(entry.filename).name == name)
    middle = entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    target.write_bytes(bytes(content))
    return target


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_damaged_file_in_a_zip_is_refused(name: str, zipped: Path, tmp_path: Path) -> None:
    refused(damage(zipped, tmp_path / "a.zip", name), tmp_path, "a.zip: ")


def test_no_flipped_bit_of_a_zip_ends_in_a_traceback(zipped: Path, tmp_path: Path) -> None:
    whole, draw = zipped.read_bytes(), random.Random(0)
    names = [whole.find(name) for name in (b"qlora_tune.json", b"adapter_config.json")]
    for place in [*names, *(draw.randrange(len(whole)) for _ in range(60))]:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        (tmp_path / "a.zip").write_bytes(content)
        with contextlib.suppress(TuneError):  # or it is whole: the bit is of a file's date, or of one that isn't taken
            unpack_adapter(tmp_path / "a.zip", uploads(tmp_path))


def test_a_zip_with_a_password_is_refused(zipped: Path, tmp_path: Path) -> None:
    content = bytearray(zipped.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 4)
    (tmp_path / "a.zip").write_bytes(bytes(content))
    refused(tmp_path / "a.zip", tmp_path, "a.zip: no zip that can be read")


def test_a_zip_bomb_is_refused_by_its_unpacked_size(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = repack(zipped, tmp_path / "b.zip", lambda name: name, {"adapter_model.safetensors": bytes(64 << 20)})
    assert bomb.stat().st_size < 4 << 20
    monkeypatch.setattr(chats, "MAX_ADAPTER_BYTES", 32 << 20)
    refused(bomb, tmp_path, "larger than")


def test_a_zip_that_lies_about_its_size_is_refused_and_never_unpacked_beyond_it(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = repack(zipped, tmp_path / "b.zip", lambda name: name, {"adapter_model.safetensors": bytes(64 << 20)})
    content = bytearray(bomb.read_bytes())
    at = content.find(b"PK\x01\x02")
    while b"adapter_model" not in content[at + 46 : at + 46 + 80].split(b"PK")[0]:
        at = content.find(b"PK\x01\x02", at + 4)
    content[at + 24 : at + 28] = (1000).to_bytes(4, "little")  # its size in the list of contents
    bomb.write_bytes(bytes(content))
    monkeypatch.setattr(chats, "MAX_ADAPTER_BYTES", 32 << 20)
    refused(bomb, tmp_path, "b.zip: ")


def test_an_adapter_of_another_base_is_refused(zipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        record = json.loads(archive.read("mine/qlora_tune.json"))
    other = json.dumps({**record, "base_fingerprint": "0" * 32}).encode()
    refused(repack(zipped, tmp_path / "a.zip", lambda n: n, {"qlora_tune.json": other}), tmp_path, "base")
    gone = json.dumps({**record, "base_model": "./no/such"}).encode()
    refused(repack(zipped, tmp_path / "b.zip", lambda n: n, {"qlora_tune.json": gone}), tmp_path, "no such folder")


@pytest.mark.parametrize("record", [b"{", b"[]", b"{}", b'{"base_model": 7}', b'{"base_model": "builtin"}', b"\xff"])
def test_a_damaged_record_of_the_base_is_refused(record: bytes, zipped: Path, tmp_path: Path) -> None:
    packed = repack(zipped, tmp_path / "a.zip", lambda name: name, {"qlora_tune.json": record})
    refused(packed, tmp_path, ".")
