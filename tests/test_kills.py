"""A run that is killed goes on to the same losses and the same adapter, wherever the kill fell.

An ordinary run of the tests kills a few times, the reliability tier two hundred times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from boundaries import at_each_write, check_goes_on, in_process, train_here

from qlora_tune.runs import Run, open_run


def train_until(folder: Path, name: str, boundary: int) -> None:
    """Train in this process and kill it at so many writes into the run's folder (-1: never, and note their number)."""
    last = -1

    def act(number: int) -> None:
        nonlocal last
        last = number
        if number == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_write(name, act)
    train_here(folder, name)
    (folder / "boundaries").write_text(str(last + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int, float]:
    """A run that nobody killed, how many writes it makes, and how long it takes [s]."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert in_process(train_until, folder, "a", -1) == 0
    run = open_run("a", folder / "runs")
    return run, int((folder / "boundaries").read_text()), time.monotonic() - begin


@pytest.mark.parametrize("share", [26, pytest.param(1, marks=pytest.mark.reliability)], ids=["some", "all"])
@pytest.mark.timeout(7200)
def test_a_run_killed_at_any_write_goes_on_to_the_same_adapter(
    whole: tuple[Run, int, float], tmp_path: Path, share: int
) -> None:
    run, boundaries, _ = whole
    assert boundaries > 20
    resumed = 0
    for boundary in range(share // 2, boundaries, share):
        name = f"at-{boundary}"
        assert in_process(train_until, tmp_path, name, boundary) == -signal.SIGKILL
        resumed += check_goes_on(run, tmp_path, name)
    assert resumed


@pytest.mark.parametrize("kills", [1, pytest.param(125, marks=pytest.mark.reliability)])
@pytest.mark.timeout(7200)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_adapter(
    whole: tuple[Run, int, float], tmp_path: Path, kills: int
) -> None:
    run, _, lasts_s = whole
    moments = random.Random(0)
    for number in range(kills):
        in_process(train_until, tmp_path, f"random-{number}", -1, kill_after_s=moments.uniform(0.2, 1) * lasts_s)
        check_goes_on(run, tmp_path, f"random-{number}")
