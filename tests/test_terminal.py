"""What the terminal says while a run trains."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_tune import terminal
from qlora_tune.errors import TemplateError
from qlora_tune.terminal_progress import TrainProgress


def test_each_held_out_loss_is_printed_once_where_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    step = {"loss": 1.0, "left_s": 9, "memory_bytes": 1, "total_steps": 40}
    with TrainProgress() as progress:
        for number in range(1, 41):
            progress.update({**step, "step": number})
            if number in (6, 20):
                progress.update({"step": number, "eval_loss": number / 100})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("held-out ")[1].split()[0] for line in lines if "held-out" in line] == ["0.060", "0.200"]


def test_a_chat_outlives_a_system_prompt_that_the_template_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/system Be brief", "hello", "/clear", "/system", "hello", "/quit"])
    monkeypatch.setattr(terminal.console, "input", lambda _: next(lines))

    def fit(messages: list[Any]) -> list[Any]:
        if messages[0]["role"] == "system":
            raise TemplateError("System role not supported")
        return messages

    terminal.chat_loop(lambda messages, tuned: iter(["Hi."]), fit)
    shown = capsys.readouterr().out
    assert shown.count("System role not supported") == 1
    assert shown.count("Hi.") == 1
