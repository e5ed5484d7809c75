"""The command line: quick where it can be, clear where something is wrong, quiet where the libraries aren't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_part

from qlora_tune.cli import main

SAMPLE = str(ROOT / "sample.jsonl")
HEAVY = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_tune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["check", SAMPLE], ["presets"], ["runs"], ["train", "--help"]])
def test_quick_commands_answer_without_importing_the_heavy_libraries(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from qlora_tune.cli import main; code = main(sys.argv[1:]);"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert len(done.stdout.splitlines()) > 1


def test_check_reports_rows_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SAMPLE]) == 0
    rows = len(Path(SAMPLE).read_text().splitlines())
    assert f"{rows:,} rows = {rows:,} kept + 0 rejected" in capsys.readouterr().out


def test_config_prints_every_setting_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_tune.config import TrainConfig

    assert main(["config", "--preset", "builtin", "--lora-r", "4", "--use_dora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line.split() for line in lines if line.split() and line.split()[0] in set(words(lines))}
    assert set(TrainConfig.model_fields) <= set(words(lines))
    assert shown["lora_r"][1:3] == ["4", "flag"]
    assert shown["use_dora"][1:3] == ["true", "flag"]
    assert shown["learning_rate"][1:4] == ["0.002", "preset", "builtin"]
    assert shown["seed"][1:3] == ["42", "default"]


def words(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines if line.split()]


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with exit code 2 and a message, and return the message."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["check", "{empty}"], "the file has no rows"),
        (["check", "{useless}"], "No usable row"),
        (["train", "nowhere.jsonl", "--preset", "builtin"], "no such file"),
        (["train", "{empty}", "--preset", "builtin"], "the file has no rows"),
        (["train", "{useless}", "--preset", "builtin"], "No usable row"),
        (["train", SAMPLE, "--preset", "gpu-8bg"], 'Did you mean "gpu-8gb"'),
        (["train", SAMPLE, "--learning-rate", "fast"], "learning_rate = 'fast' (flag)"),
        (["train", SAMPLE, "--lora-r", "0", "--seed=-1"], "lora_r = '0' (flag)"),
        (["train", SAMPLE, "--learning-rat", "1"], "--learning-rate"),
        (["train", SAMPLE, "--preset", "cpu-small"], "not on this machine and the hub can't be reached"),
        (["train", SAMPLE, "--model-name-or-path", "./no/base"], "no such folder"),
        (["train", SAMPLE, "--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["train", "--resume", "nowhere"], "nowhere: no such run"),
        (["train", "--resume", "nowhere", "--seed", "1"], "can't be changed"),
        (["chat", "nowhere"], "nowhere: no such run"),
        (["export"], "no run with an adapter"),
        (["trian"], 'There is no command "trian". Did you mean "train"?'),
        (["train", SAMPLE, "--max_steps", "0"], "should be at least 1, or -1 for no limit"),
        (["train", SAMPLE, "--preset", "gpu-8gb"], "is for a CUDA GPU with 8 GB, and none is usable here"),
        (["train", "{rows}", "--preset", "builtin", "--heldout-data", "{copy}"], "held-out row is also trained on"),
        (["train", SAMPLE, "--preset", "builtin", "--data", SAMPLE], "given twice"),
        (["train", SAMPLE, "--early-stopping-patience", "2", "--no-load-best-model-at-end"], "needs load_best"),
        (["train", SAMPLE, "--eval-steps", "inf"], "eval_steps = 'inf' (flag)"),
        (["train", SAMPLE, "--preset", "builtin", "--lora-target-modules", "q_proj,typo"], "typo is no linear layer"),
        (["train", SAMPLE, "--preset", "builtin", "--max-length", "257"], "Use --max-length 256 or less"),
        (["train", SAMPLE, "--preset", "builtin", "--holdout-tasks", "bulets"], 'Did you mean "bullets"?'),
        (["preview", SAMPLE, "--rows", "-2"], "--rows"),
        (["chat", "some.zip"], "No such file or directory"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback_and_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "useless.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    for name in ("rows", "copy"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "Say hi", "completion": "hi"}\n' * 3)
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("rows", "copy")}
    places |= {"empty": str(tmp_path / "empty.jsonl"), "useless": str(tmp_path / "useless.jsonl")}
    assert message in fail(capsys, *(argument.format(**places) for argument in arguments)).replace("\n", " ")
    assert not list(tmp_path.glob("runs/*/adapter"))


def test_the_wrong_base_for_an_adapter_exits_with_2(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_model import changed_base

    other = str(changed_base(tmp_path).path)
    for command in ("chat", "export"):
        assert "was trained on builtin" in fail(capsys, command, str(finished[0].path), "--model-name-or-path", other)


def few_rows(folder: Path) -> str:
    """A file with some rows of the sample."""
    return write_part(folder / "few.jsonl", "sample.jsonl", slice(60))


def test_a_training_run_is_quiet_complete_and_chats(tmp_path: Path) -> None:
    data = few_rows(tmp_path)
    done = run("train", data, "--preset=builtin", "--max-steps=3", "--score-rows=4", "--run-name=a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Warning" not in done.stdout
    assert "exact match on held-out rows" in done.stdout
    folder = tmp_path / "runs" / "a"
    expected = {"config.toml", "state.json", "metrics.jsonl", "log.txt", "data.json", "problems.jsonl", "checkpoints"}
    assert {path.name for path in folder.iterdir()} >= {*expected, "adapter", "scores.json", "comparison.md"}
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"

    talk = "/system Be brief.\nHello\n/base\nHello\n/tuned\n/clear\n/what\n/quit\n"
    chat = run("chat", "a", "--max-new-tokens", "8", cwd=tmp_path, input=talk)
    assert (chat.returncode, chat.stderr) == (0, "")
    assert "system prompt set" in chat.stdout
    assert "tuned:" in chat.stdout
    assert "base:" in chat.stdout
    assert "conversation cleared" in chat.stdout

    listed = run("runs", cwd=tmp_path)
    assert "finished" in listed.stdout
    assert "3/3" in listed.stdout


def test_preview_shows_the_tokens_and_counts_the_end_of_turns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", SAMPLE, "--preset", "builtin", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("tokens, ") >= 2
    assert "<|im_start|>user" in out
    assert main(["preview", SAMPLE, "--preset", "builtin", "--line", "7"]) == 0
    assert "sample.jsonl:7 " in capsys.readouterr().out
    assert "Line 9999 holds no row" in fail(capsys, "preview", SAMPLE, "--preset", "builtin", "--line", "9999")
    learned = next(line for line in out.splitlines() if line.startswith("end-of-turn"))
    count, total = (int(word) for word in learned.split() if word.isdigit())
    assert count == total > 1000


@pytest.mark.parametrize(("colours", "expected"), [(True, "b<|im_end|>"), (False, "⟦b<|im_end|>⟧")])
def test_learned_tokens_are_coloured_or_bracketed_and_others_are_not(
    builtin: Any, monkeypatch: pytest.MonkeyPatch, colours: bool, expected: str
) -> None:
    from rich.console import Console

    from qlora_tune import terminal
    from qlora_tune.terminal import show_tokens

    monkeypatch.setattr(terminal, "console", Console(force_terminal=colours))

    chat = builtin[2]
    (example,) = chat.tokenize_example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    text = show_tokens(chat.tokenizer, example.input_ids, example.labels)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == expected


def test_a_reader_that_goes_away_does_not_end_training(tmp_path: Path) -> None:
    options = "--preset builtin --max-steps 4 --score-rows 0 --run-name a"
    command = f"{sys.executable} -m qlora_tune train {few_rows(tmp_path)} {options}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "runs" / "a" / "state.json").read_text())["status"] == "finished"


def test_control_characters_and_markup_in_data_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "x", "output": "y", "task": "\x1b[2J[bold]:fire:[/]"}, {"\x1b]0;title\x07": "[/red]"}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "a", "completion": "b", "task": "t"}]))
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "␛[2J[bold]:fire:[/]" in out


def test_a_finished_run_is_scored_again_on_the_rows_it_kept_whatever_became_of_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(few_rows(tmp_path))
    options = ["--preset", "builtin", "--max-steps", "2", "--run-name", "a", "--runs-dir", str(tmp_path / "runs")]
    assert main(["train", str(data), *options]) == 0
    scores = tmp_path / "runs" / "a" / "scores.json"
    before = json.loads(scores.read_text())
    data.unlink()
    scores.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "runs" / "a")]) == 0
    assert [a["source"] for a in json.loads(scores.read_text())["answers"]] == [a["source"] for a in before["answers"]]
    assert "nothing to go on with" in fail(capsys, "train", "--resume", str(tmp_path / "runs" / "a"))
