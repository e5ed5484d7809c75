"""Everything works on a machine without any route: in a network namespace of its own, which needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ISOLATED = ["unshare", "--net"]


def isolated(folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a namespace without a network, with an empty cache and not told to stay offline."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [*ISOLATED, sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=600)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reach = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    try:
        tried = isolated(tmp_path, "-c", reach)
    except FileNotFoundError:
        pytest.skip("unshare is not installed here")
    if "unshare" in tried.stderr:
        pytest.skip("a network namespace can't be made here: that needs root")
    assert "Network is unreachable" in tried.stderr or "Cannot assign" in tried.stderr, tried.stderr
    return tmp_path


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_check_train_evaluate_chat_and_export_need_no_network(folder: Path) -> None:
    def command(*arguments: str, text: str = "") -> str:
        done = isolated(folder, "-m", "qlora_tune", *arguments, text=text)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    assert "rows" in command("check", str(ROOT / "sample.jsonl"))
    limits = ["--preset", "builtin", "--max-steps", "6", "--score-rows", "10", "--run-name", "a"]
    assert "exact match" in command("train", str(ROOT / "sample.jsonl"), *limits)
    assert "exact match" in command("evaluate", "a")
    assert command("chat", "a", text="What is the capital of France?\n")
    for more, what in (["adapter", "a.zip"], ["merged", "m"], ["gguf", "g"]):
        options = [] if more == "adapter" else [f"--{more}"]
        assert "loaded again" in command("export", "a", *options, "--output", what)
        assert (folder / what).exists()


@pytest.mark.reliability
def test_what_is_on_the_hub_is_refused_in_words_without_a_network(folder: Path) -> None:
    done = isolated(folder, "-m", "qlora_tune", "train", "owner/dataset", "--max-steps", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "owner/dataset" in done.stderr
    done = isolated(folder, "-m", "qlora_tune", "train", "--model-name-or-path", "owner/model", "--max-steps", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "owner/model" in done.stderr
