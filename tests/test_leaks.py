"""What must not leave: each kind of find is refused wherever it stands, and what is public is not one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settings

from qlora_tune import export as exports
from qlora_tune.errors import ExportError, MemoryLimitError
from qlora_tune.export import export_adapter, export_gguf, merge_adapter, open_adapter
from qlora_tune.leaks import Private, find_private, has_its_data, refuse_private
from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, new_run
from qlora_tune.train import train

CANARY = "CANARY-7f3a91: the secret text of one single row, told to nobody"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
PRIVATE = Private(frozenset({"/srv/work-of/anna"}), frozenset({"annabel", "merged"}), (CANARY, TEMPLATE, "too short"))
SECRETS = {
    "hugging face": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "openai": "sk-proj-abcdefghijklmnopqrstuv",
    "github": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github, fine-grained": "github_pat_11ABCDEFG0abcdefghijkl",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "gitlab": "glpat-abcdefghij0123456789",
    "slack": "xoxb-123456789012-abcdef",
    "google": "AIzaSyA-abcdefghijklmnopqrstuvwxyz01234",
    "a key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a password": "https://anna:pa55word@example.org/data",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def leaving(tmp_path: Path) -> Path:
    """A folder of every kind of file, with nothing private in it."""
    from safetensors.numpy import save_file

    folder = tmp_path / "leaving"
    folder.mkdir()
    (folder / "README.md").write_text(
        "A merged model of much use, made by Anna at /usr/bin. See https://example.org:80/a@b"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": {"/home/x": 1}}}))
    save_file({}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def refuse(folder: Path, base: Path) -> str:
    with pytest.raises(ExportError, match="must not leave this machine") as caught:
        refuse_private(folder, PRIVATE, base, ["how to use a merged model"])
    return str(caught.value)


def test_what_is_public_may_leave(leaving: Path, base: Path) -> None:
    refuse_private(leaving, PRIVATE, base, ["how to use a merged model"])
    (base / "chat_template.jinja").unlink()
    assert "a text of the run's own data" in refuse(leaving, base)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_key_of_every_service_is_refused(kind: str, leaving: Path, base: Path) -> None:
    (leaving / "README.md").write_text(f"made with ({SECRETS[kind]})")
    assert "README.md holds" in refuse(leaving, base)


@pytest.mark.parametrize(
    "text",
    [
        "from /home/someone/data.jsonl",
        r"from C:\Users\someone",
        "in /srv/work-of/anna/runs",
        "by Annabel.",
        "annabel_rows",
        CANARY,
        f"he said {CANARY[5:52]}",
        CANARY[7:47],
        CANARY.upper().replace(" ", "\n  "),
    ],
)
@pytest.mark.parametrize("place", ["README.md", "recipe.toml", "tokenizer_config.json", "an added token", "header"])
def test_a_path_a_name_or_a_row_is_refused_wherever_it_stands(text: str, place: str, leaving: Path, base: Path) -> None:
    from safetensors.numpy import save_file

    if place == "header":
        save_file({}, leaving / "adapter_model.safetensors", metadata={"note": text})
    elif place == "an added token":
        content = json.loads((leaving / "tokenizer.json").read_text())
        (leaving / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": [{"content": text}]}))
    else:
        (leaving / place).write_text(json.dumps({"é": [text]}) if place.endswith(".json") else text)
    refuse(leaving, base)


def test_names_of_files_are_searched_too(leaving: Path, base: Path) -> None:
    (leaving / "rows of annabel.txt").write_text("")
    assert "'annabel' (a name of this user or machine: rename" in refuse(leaving, base)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"])
def test_a_vocabulary_may_hold_names_and_paths_but_no_rows_keys_or_own_paths(
    file: str, leaving: Path, base: Path
) -> None:
    def write(entry: str) -> None:
        vocabulary = {entry: 1, "annabel": 2, "/home/x/y": 3}
        model = {"model": {"vocab": vocabulary, "merges": []}}
        content = json.dumps(model if file == "tokenizer.json" else vocabulary)
        (leaving / file).write_text(content if file.endswith(".json") else "\x01".join(vocabulary))

    write("an entry")
    refuse_private(leaving, PRIVATE, base, ["how to use a merged model"])
    for entry in (CANARY, SECRETS["hugging face"], "/srv/work-of/anna"):
        write(entry)
        assert f"{file} holds" in refuse(leaving, base)


def test_pieces_of_two_strings_are_no_copy(leaving: Path, base: Path) -> None:
    (leaving / "config.json").write_text(json.dumps([CANARY[:30], CANARY[30:]]))
    refuse_private(leaving, PRIVATE, base, ["how to use a merged model"])


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run with a planted text in training, held-out and rejected rows."""
    folder = tmp_path_factory.mktemp("secretive")
    rows = [{"instruction": f"Say {n}", "output": f"I say {n}."} for n in range(20)]
    planted = {"instruction": f"Tell {CANARY}", "output": "No."}
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows, planted, {"weird": f"{CANARY}, too"}])))
    heldout = [{"instruction": "What is told?", "output": f"held out {CANARY}"}]
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, heldout)))
    data = {"data": [str(folder / "t.jsonl")], "heldout_data": [str(folder / "h.jsonl")]}
    config = settings(**data, runs_dir=str(folder / "runs"), max_steps="1", score_rows="0", run_name="one")
    run = new_run(config)
    train(config, run, prepare(config))
    return run


def test_logins_and_hosts_are_looked_for_unless_they_are_anybodys(
    secretive: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOGNAME", "Annabel")
    monkeypatch.setenv("HOME", "/srv/people/ubuntu")
    monkeypatch.setattr("socket.gethostname", lambda: "beekeeper.example.org")
    private = find_private(secretive, tmp_path)
    assert private.names == {"annabel", "beekeeper.example.org", "beekeeper"}
    assert {"/srv/people/ubuntu", str(secretive.path.resolve())} <= private.places


def test_no_row_is_in_anything_that_is_exported(secretive: Run, tmp_path: Path) -> None:
    trained = open_adapter(secretive.adapter)
    export_adapter(trained, secretive, tmp_path / "x.zip")
    merge_adapter(trained, secretive, tmp_path / "merged")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        leaving = [archive.read(name) for name in archive.namelist()]
    export_gguf(trained, secretive, tmp_path / "gguf")
    leaving += [path.read_bytes() for folder in ("merged", "gguf") for path in (tmp_path / folder).iterdir()]
    assert len(leaving) > 19
    assert not [content for content in leaving if b"CANARY" in content or b"secret text" in content]


def test_a_card_that_quotes_a_row_keeps_the_export_from_leaving(secretive: Run, tmp_path: Path) -> None:
    trained = open_adapter(secretive.adapter)
    assert has_its_data(secretive)
    texts = find_private(secretive, trained.base.path).texts
    assert [text for text in texts if CANARY in text] == [f"held out {CANARY}", f"Tell {CANARY}", f"{CANARY}, too"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "write_model_card", lambda *_: f"It learned to say: {CANARY}.")
        with pytest.raises(ExportError, match="README.md holds '.*canary-7f3a91.*', a text of the run's own data"):
            export_adapter(trained, secretive, tmp_path / "x.zip")
        with pytest.raises(ExportError, match="a text of the run's own data"):
            merge_adapter(trained, secretive, tmp_path / "merged")
        with pytest.raises(ExportError, match="a text of the run's own data"):
            export_gguf(trained, secretive, tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_files_are_gone_says_so(secretive: Run, tmp_path: Path) -> None:
    file = Path(secretive.read_config().data[0])
    moved = file.rename(tmp_path / "moved.jsonl")
    try:
        assert not has_its_data(secretive)
        assert next(text for text in find_private(secretive, tmp_path).texts if CANARY in text).startswith("held out")
    finally:
        moved.rename(file)


def test_rows_that_memory_does_not_hold_are_not_left_unsearched(
    tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished[0]
    assert has_its_data(run)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(MemoryLimitError, match="GB are free"):
        find_private(run, tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"])
def test_a_ruler_in_a_bases_vocabulary_is_no_text_of_the_data(leaving: Path, base: Path, file: str) -> None:
    ruler = "-" * 64
    words = {"tokenizer.json": json.dumps({"model": {"vocab": {ruler: 1}}}), "vocab.json": json.dumps({ruler: 1})}
    private = Private(frozenset(), frozenset(), (f"Total\n{'-' * 41}\n12",))
    (leaving / file).write_text(words.get(file, f"#version\n{ruler}\n"))
    with pytest.raises(ExportError, match="holds '-{40}', a text of the run's own data"):
        refuse_private(leaving, private, base)
    (base / file).write_text(words.get(file, f"#version\n{ruler}\n"))
    refuse_private(leaving, private, base)
