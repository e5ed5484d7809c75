"""What the terminal says while a run trains."""

from __future__ import annotations

import pytest

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
