"""The page over a long time: reloads, closed tabs and killed servers don't touch a run; fifty runs leave nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_page import CHROMIUM, Page, button, chromium, serve, tab, wait_for_step  # noqa: F401 - fixtures

from qlora_tune.runs import Run, list_runs

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (.ci/run installs it)"),
]


RUNS = 50


def set_up_run(page: Page, tab: Any, **values: str) -> None:  # noqa: F811
    """Choose the sample and set what a run will take, by the page's own controls."""
    tab.goto(page.url)
    button(tab, "Use the built-in example").click()
    button(tab, "Train on this data").click()
    for name, value in values.items():
        if name == "score_rows":
            tab.get_by_role("button", name="All other settings").click()
            tab.get_by_role("tab", name="Evaluation").click()
        tab.get_by_label(name).fill(value)


def start_run(page: Page, tab: Any) -> Run:  # noqa: F811
    """Press Start."""
    known = set(list_runs(page.runs_dir))
    button(tab, "Start").click()
    end = time.monotonic() + 600
    while not (new := set(list_runs(page.runs_dir)) - known):
        assert time.monotonic() < end, "no run was started"
        time.sleep(0.2)
    return new.pop()


def test_a_run_is_untouched_by_reloads_closed_tabs_and_killed_servers(
    serve: Callable[[int], Page],  # noqa: F811
    tab: Any,  # noqa: F811
    chromium: Any,  # noqa: F811
) -> None:
    page = serve(7951)
    set_up_run(page, tab, num_train_epochs="500")
    run = start_run(page, tab)
    wait_for_step(tab, 2, seconds=600)
    pid = run.read_state()["pid"]
    for _ in range(20):
        tab.reload()
        tab.get_by_role("tab", name="Train").click()
        assert run.is_alive()
    for number in range(20):
        other = chromium.new_page()
        other.goto(page.url)
        if number % 2:
            other.get_by_role("tab", name="Train").click()
        other.close()
        assert run.is_alive()
    tab.goto("about:blank")
    for _ in range(10):
        page.kill()
        assert run.is_alive()
        page.start()
    tab.problems.clear()  # Gradio's own words about connections that a reload or a killed server broke off
    tab.goto(page.url)
    tab.get_by_role("tab", name="Train").click()
    wait_for_step(tab, run.read_metrics()[-1]["step"] + 1, seconds=600)
    assert run.read_state()["pid"] == pid
    steps = [entry["step"] for entry in run.read_metrics() if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))
    button(tab, "Stop …").click()
    button(tab, "Save and stop").click()
    button(tab, "Resume").wait_for()
    assert run.read_state()["status"] == "stopped"
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_fifty_runs_in_one_server_leave_no_memory_handles_or_files_behind(
    serve: Callable[[int], Page],  # noqa: F811
    tab: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    page = serve(7952)
    assert page._server is not None
    server = psutil.Process(page._server.pid)
    measured = []
    for number in range(RUNS):
        if number % 10 == 0:
            set_up_run(page, tab, num_train_epochs="0.003", per_device_train_batch_size="8", score_rows="0")
        run = start_run(page, tab)
        end = time.monotonic() + 900
        while run.is_alive():
            assert time.monotonic() < end, run.read_state()
            time.sleep(0.2)
        assert run.read_state()["status"] == "finished", (number, run.read_state())
        psutil.wait_procs(server.children(), timeout=60)  # it still takes a moment to end
        files = sum(path.is_file() for path in scratch.rglob("*"))
        measured.append((server.memory_info().rss, server.num_fds(), len(server.children()), files))
    tab.problems.clear()  # Gradio's own words about a stream that the next visit broke off
    first, last = measured[9], measured[-1]
    print(first, last)
    assert last[0] < 1.1 * first[0], measured
    assert last[1] <= first[1] + 5, measured
    assert last[2] == 0, measured
    assert last[3] <= first[3] + 5, measured
