"""Adapters on the model hub: what leaves is shown, a token is asked for, and what comes is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import settings
from hub_server import Hub, serve_hub

from qlora_tune.cli import main
from qlora_tune.errors import ExportError
from qlora_tune.hub_models import check_repository, is_repository, list_leaving
from qlora_tune.prepare import prepare
from qlora_tune.runs import Run, new_run
from qlora_tune.train import train

TOKEN = "hf_a-token-that-must-never-be-shown"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("shared")
    rows = [{"instruction": f"Say {n}", "output": f"I say {n}."} for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = settings(
        data=[str(folder / "rows.jsonl")], runs_dir=str(folder / "runs"), max_steps="1", score_rows="0", run_name="one"
    )
    run = new_run(config)
    train(config, run, prepare(config))
    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


def command(hub: Hub, folder: Path, *arguments: str, token: str = "", talk: str = "") -> tuple[int, str]:
    """Run a command of its own process, which is the only way to give the library another hub."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_tune", *arguments],
        capture_output=True, text=True, input=talk, cwd=folder, env=environment, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_an_upload_makes_a_private_repository_and_anybody_it_is_shown_to_can_chat_with_it(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    code, said = command(hub, tmp_path, "export", str(run.path), "--push-to-hub", "me/mine", token=TOKEN)
    assert code == 0, said
    assert f"uploaded: {hub.address}/me/mine" in said
    assert hub.private == {"me/mine": True}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in said
    for name, content in hub.files["me/mine"].items():
        assert name in said
        assert hashlib.sha256(content).hexdigest() in said
        assert TOKEN.encode() not in content
    weights = hub.files["me/mine"]["adapter_model.safetensors"]
    assert weights == (run.adapter / "adapter_model.safetensors").read_bytes()

    hub.files["me/mine"] |= {"evil.py": b"boom", "pytorch_model.bin": b"boom"}
    code, said = command(hub, tmp_path, "chat", "me/mine", "--max-new-tokens", "4", talk="Hello\n/quit\n")
    assert code == 0, said
    assert "adapter me/mine" in said
    assert "tuned:" in said
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil.py", "pytorch_model.bin")]

    code, said = command(hub, tmp_path, "chat", "me/other")
    assert code == 2
    assert "me/other: no such run or folder here, and no repository of the hub that can be had" in said

    code, said = command(hub, tmp_path, "export", str(run.path), "--push-to-hub", "me/mine", "--public", token=TOKEN)
    assert code == 2
    assert "me/mine is there already and private. Nothing was uploaded." in " ".join(said.split())


def test_a_download_for_another_base_is_refused(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.private["me/odd"] = False
    hub.files["me/odd"] = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
    record = json.loads(hub.files["me/odd"]["qlora_tune.json"])
    hub.files["me/odd"]["qlora_tune.json"] = json.dumps(record | {"base_fingerprint": "0" * 32}).encode()
    code, said = command(hub, tmp_path, "chat", "me/odd")
    assert code == 2
    assert "was trained on builtin" in said
    del hub.files["me/odd"]["qlora_tune.json"]
    shutil.rmtree(tmp_path / "hf")
    assert "no adapter made by qlora-tune (qlora_tune.json missing)" in command(hub, tmp_path, "chat", "me/odd")[1]


def test_a_dry_run_shows_every_file_and_asks_for_no_token(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    merged = tmp_path / "merged"
    asked = ["export", str(run.path), "--merged", "--output", str(merged), "--push-to-hub", "me/mine", "--public"]
    assert main(asked) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err
    assert not merged.exists(), "it is refused before any work"
    assert main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "me/mine, public" in said
    assert "dry run: nothing was uploaded" in said
    leaving = list_leaving(merged)
    assert {file.name for file in leaving} == {path.name for path in merged.iterdir()} >= {"README.md", "recipe.toml"}
    for file in leaving:
        content = (merged / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert f"{file.name} " in said
        assert f"{file.size:,}" in said
    for alone in ("--dry-run", "--public", "--dtype=float32", "--into=original"):
        assert main(["export", str(run.path), alone]) == 2
        assert f"{alone.partition('=')[0]} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine", "a/b/c", "a/", "/b", "../b", "a b/c", "-a/b", "a/b?c", "https://x/y"])
def test_what_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match="Expected OWNER/NAME"):
        check_repository(name)


def test_what_lies_here_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository(Path("runs/mine"))
    (tmp_path / "runs").mkdir()
    assert not is_repository(Path("runs/mine")), "a misspelt run"
    assert not is_repository(Path("mine"))
    assert not is_repository(tmp_path / "a" / "b")
