"""The page in a real browser, on the built-in base: the whole journey, what can go wrong, and what must not run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT
from screenshots import CHROMIUM, CHROMIUM_FLAGS

from qlora_tune.preferences import read_kept_pairs
from qlora_tune.runs import Run, list_runs, open_run
from qlora_tune.votes import read_votes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (.ci/run installs it)")

TABS = ("Data", "Train", "Chat", "Runs and export", "Review")
INJECTIONS = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "<svg onload=window.pwned=3>",
    "<svg><script>window.pwned=4</script></svg>",
    "\"><img src=x onerror='window.pwned=5'>",
    "'><svg/onload=window.pwned=6>",
    "<iframe srcdoc='<script>parent.pwned=7</script>'></iframe>",
    "<a href='javascript:window.pwned=8'>x</a>",
    "[x](javascript:window.pwned=9)",
    "![x](x' onerror='window.pwned=10)",
    "\n\n<details open ontoggle=window.pwned=11>\n\n",
    "</pre></div><body onpageshow=window.pwned=12>",
    "<style>@import 'http://attacker.invalid/x.css'</style><link rel=stylesheet href=http://attacker.invalid/y.css>",
    "${window.pwned=14} {{constructor.constructor('window.pwned=14')()}}",
    "<math><mtext><style></mtext><img src=x onerror=window.pwned=15></math> $$\\href{javascript:1}{x}$$",
]


class Page:
    """A page's server and its folder of runs."""

    def __init__(self, runs_dir: Path, port: int) -> None:
        self.runs_dir, self.port, self.url = runs_dir, port, f"http://127.0.0.1:{port}"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(self.port), "--runs-dir", str(self.runs_dir)]
        self._server = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert self._server.stdout is not None
        assert b"http://" in self._server.stdout.readline()

    def kill(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[int], Page]]:
    """Start pages on a folder of runs; end them, and whatever they launched, afterwards."""
    started: list[Page] = []

    def start(port: int) -> Page:
        page = Page(tmp_path / "runs", port)
        page.start()
        started.append(page)
        return page

    yield start
    for page in started:
        page.kill()
        for run in list_runs(page.runs_dir):
            if run.is_alive() and run.read_state()["pid"] != os.getpid():
                os.kill(run.read_state()["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def empty_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page whose folder has no run, for tests that start none."""
    page = Page(tmp_path_factory.mktemp("empty") / "runs", 7933)
    page.start()
    yield page
    page.kill()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A browser tab that fails the test when a script of the page fails."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(180_000)  # an export answers a hundred prompts
    problems: list[str] = []
    page.problems = problems
    # What a killed server leaves behind, and Gradio's words for what a reload breaks off, which come when they come.
    broken_off = ("net::ERR", "signal is aborted without reason", "Connection errored out")

    def note(text: str) -> None:
        if not any(words in text for words in broken_off):
            problems.append(text)

    page.on("pageerror", lambda error: note(str(error)))
    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not problems


def button(tab: Any, name: str) -> Any:
    return tab.get_by_role("button", name=name, exact=True)


def step_shown(tab: Any) -> int:
    bar = tab.get_by_role("progressbar", name="steps")
    return int(bar.get_attribute("aria-valuenow")) if bar.count() else 0


def wait_for_step(tab: Any, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if step_shown(tab) >= step:
            return
        time.sleep(0.5)
    pytest.fail(f"step {step} was not reached in {seconds} s; shown is {step_shown(tab)}")


def plot_points(tab: Any) -> int:
    return len(tab.locator("polyline.curve").first.get_attribute("points").split())


def test_the_whole_journey_from_the_sample_to_an_exported_adapter_that_is_opened_again(
    serve: Callable[[int], Page], tab: Any, tmp_path: Path
) -> None:
    page = serve(7931)
    tab.goto(page.url)
    with tab.expect_file_chooser() as chooser:
        button(tab, "Upload a file").click()
    chooser.value.set_files(ROOT / "sample.jsonl")
    button(tab, "Train on this data").wait_for()
    first = json.loads((ROOT / "sample.jsonl").read_text().splitlines()[0])
    learned = tab.locator(".tokens .l")
    assert "".join(learned.all_text_contents()).removesuffix("<|im_end|>") == first["output"]
    assert "rgba(0, 0, 0, 0)" not in learned.first.evaluate("e => getComputedStyle(e).backgroundColor")

    button(tab, "Train on this data").click()
    tab.get_by_label("num_train_epochs").fill("0.4")
    tab.get_by_role("button", name="All other settings").click()
    tab.get_by_role("tab", name="Evaluation").click()
    tab.get_by_label("score_rows").fill("20")
    tab.get_by_label("per_device_train_batch_size").fill("8")
    tab.locator(".card", has_text="of 8 × 1 = 8 rows").wait_for()
    assert "--num-train-epochs 0.4" in tab.locator(".card .cm-content").inner_text()
    button(tab, "Start").click()
    wait_for_step(tab, 3)
    points = plot_points(tab)
    wait_for_step(tab, step_shown(tab) + 3)
    assert plot_points(tab) > points

    tab.reload()
    tab.get_by_role("tab", name="Train").click()
    seen = max(step_shown(tab), 6)
    wait_for_step(tab, seen + 1)
    known = len(tab.problems)
    page.kill()
    time.sleep(2)
    tab.goto("about:blank")  # once the server is back, the old page would visit it by itself and abort our visit
    del tab.problems[known:]  # that the server is gone
    page.start()
    tab.goto(page.url)
    tab.get_by_role("tab", name="Train").click()
    wait_for_step(tab, seen + 3)

    button(tab, "Stop …").click()
    button(tab, "Save and stop").click()
    button(tab, "Resume").wait_for()
    (run,) = list_runs(page.runs_dir)
    stopped_at = run.read_metrics()[-1]["step"]
    assert run.read_state()["status"] == "stopped"
    button(tab, "Resume").click()
    button(tab, "Compare base and tuned").wait_for(timeout=240_000)
    assert run.read_state()["status"] == "finished"
    steps = [entry["step"] for entry in run.read_metrics() if "loss" in entry]
    assert steps == list(range(1, run.read_state()["total_steps"] + 1))
    assert steps[-1] > stopped_at

    button(tab, "Compare base and tuned").click()
    held_out = tab.get_by_label("Held-out prompts")
    held_out.click()
    tab.get_by_role("option").first.click()
    tab.get_by_text("Expected: ").wait_for()
    question = tab.get_by_label("Your message").input_value()
    assert question in run.read_heldout()[0].messages[-2]["content"]
    button(tab, "Send").click()
    base, tuned = (tab.locator(".pane .turn.assistant b", has_text=who) for who in ("base", "tuned"))
    base.first.wait_for()
    tuned.first.wait_for()

    tab.get_by_role("tab", name="Runs and export").click()
    tab.get_by_text("exact match on held-out rows").wait_for()
    button(tab, "Report (HTML)").click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download report.html").click()
    assert "Scores by task" in download.value.path().read_text(encoding="utf-8")
    button(tab, "Export the adapter (zip)").click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name=".zip").filter(has_text="Download").click()
    packed = tmp_path / "adapter.zip"
    download.value.save_as(packed)
    tab.get_by_role("tab", name="Chat").click()
    tuned_before = tab.locator(".pane .turn.assistant").last.inner_text()
    with tab.expect_file_chooser() as chooser:
        button(tab, "Open an adapter (.zip)").click()
    chooser.value.set_files(packed)
    tab.wait_for_function("() => document.querySelector('input[aria-label=Adapter]').value.includes('(opened)')")
    tab.get_by_text("this adapter came as a zip").wait_for()
    tab.locator(".pane .turn").first.wait_for(state="detached")  # another adapter, another talk
    tab.get_by_label("Your message").fill(question)
    tab.get_by_label("Your message").press("Enter")
    tuned.first.wait_for()
    time.sleep(2)
    assert tab.locator(".pane .turn.assistant").last.inner_text() == tuned_before


def count_controls(tab: Any) -> int:
    """How many controls are in sight; each must have a name."""
    names = tab.locator(
        "button:not([role=tab], [tabindex='-1']):visible, input:visible, textarea:visible"
    ).evaluate_all(
        "all => all.map(e => [(e.ariaLabel || e.innerText || e.title"
        " || [...(e.labels || [])].map(l => l.innerText).join('')).trim(), e.outerHTML.slice(0, 200)])"
    )
    assert not [markup for name, markup in names if not name]
    return len(names)


def ask_held_out(tab: Any, number: int) -> None:
    """Send a held-out prompt, and wait until both sides have answered."""
    from playwright.sync_api import expect

    tab.get_by_label("Held-out prompts").click()
    tab.get_by_role("option").nth(number).click()
    expect(tab.get_by_label("Your message")).not_to_have_value("")
    button(tab, "Send").click()
    button(tab, "Both bad").wait_for()


def last_answers(tab: Any) -> list[Any]:
    return [pane.locator(".turn.assistant").last for pane in tab.locator(".pane .part:visible").all()]


def test_the_loop_chat_vote_export_train_on_the_votes_and_chat_again(
    serve: Callable[[int], Page], tab: Any, finished: Any
) -> None:
    page = serve(7937)
    before = Run(shutil.copytree(finished[0].path, page.runs_dir / "short"))
    before.update_state(pid=None)
    config = before.path / "config.toml"
    config.write_text(re.sub(r"score_rows = \d+", "score_rows = 8", config.read_text()))
    tab.set_viewport_size({"width": 800, "height": 900})
    tab.goto(page.url)
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_text("Votes of this run: 0;").wait_for()
    for number, choice in enumerate(["A is better", "B is better", "Tie", "Both bad", "A is better"]):
        tab.get_by_label("Max new tokens").fill("24")
        tab.get_by_label("Blind").check()
        ask_held_out(tab, number)
        assert [turn.locator("b").inner_text() for turn in last_answers(tab)] == ["A", "B"]
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        button(tab, choice).dblclick()
        button(tab, choice).wait_for(state="hidden")
        tab.get_by_text(f"Votes of this run: {number + 1};").wait_for()
        *_, vote = read_votes(before.path / "votes.jsonl")
        texts = [turn.inner_text() for turn in last_answers(tab)]
        answerers = ["base" if "(base)" in text else "short" for text in texts]
        assert [text[:3] for text in texts] == ["A (", "B ("]
        assert all(text.endswith(vote.answers[name]) for text, name in zip(texts, answerers, strict=True))
        places = {"A is better": answerers[0], "B is better": answerers[1], "Tie": "tie", "Both bad": "none"}
        assert (vote.winner, vote.blind) == (places[choice], True)

    tab.reload()
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_text("Votes of this run: 5; 3 say").wait_for()
    for number in range(5, 10):
        tab.get_by_label("Max new tokens").fill("24")
        ask_held_out(tab, number)
        button(tab, "B is better").click()
        tab.get_by_text(f"Votes of this run: {number + 1};").wait_for()
    ask_held_out(tab, 5)
    button(tab, "A is better").click()
    tab.get_by_text("These answers have a vote already; it stands.").wait_for()
    votes = read_votes(before.path / "votes.jsonl")
    assert [(vote.blind, vote.winner == "short") for vote in votes[5:]] == [(False, True)] * 5
    asked = [row.messages[:-1] for row in before.read_heldout()[:10]]
    assert [vote.prompt for vote in votes] == asked

    tab.get_by_role("button", name="Train on the votes").click()
    button(tab, "Export the votes as pairs").click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download short-pairs.jsonl").click()
    assert count_controls(tab) <= 30
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    pairs = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert len(pairs) == sum(vote.winner in vote.answers for vote in votes) == 8
    assert [pair["chosen"][0]["content"] for pair in pairs[-5:]] == [vote.answers["short"] for vote in votes[5:]]

    tab.get_by_label("num_train_epochs").last.fill("2")
    button(tab, "Train on these votes").click()
    tab.get_by_text("preparing: reading the rows").or_(tab.get_by_role("progressbar", name="steps")).first.wait_for()
    (run,) = (found for found in list_runs(page.runs_dir) if found.name != "short")
    tab.locator(".pane p", has_text=re.compile(rf"^{run.name}: finished$")).wait_for(timeout=240_000)
    assert (run.read_config().num_train_epochs, run.stage) == (2, "prefer")
    assert len(read_kept_pairs(run.path)[0]) + len(read_kept_pairs(run.path)[1]) == 8
    button(tab, "Compare base and tuned").click()
    tab.wait_for_function("at => document.querySelector('input[aria-label=Adapter]').value == at", arg=run.name)
    ask_held_out(tab, 0)
    tab.get_by_role("tab", name="Train").click()
    button(tab, "Scores and export").click()
    table = tab.get_by_role("region", name="run", exact=True)
    table.get_by_text(run.name, exact=True).wait_for()
    assert table.get_by_text("short", exact=True).count() == 1
    tab.get_by_label("Runs; the first is looked at and exported").click()
    tab.get_by_role("option", name="short").click()
    tab.get_by_text("settings that differ").wait_for()
    tab.get_by_text("exact match on held-out rows").wait_for()


def test_injected_scripts_run_nowhere(
    serve: Callable[[int], Page], chromium: Any, finished: Any, tmp_path: Path
) -> None:
    rows = [{"instruction": text, "output": text, "task": text, text: "x", "note": text} for text in INJECTIONS] + [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in INJECTIONS
    ]
    rows.append({"instruction": "half a character: \ud800", "output": "\udfff"})
    data = tmp_path / "<img src=x onerror=window.pwned=20>.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n{broken <img src=x onerror=window.pwned=21>")
    page = serve(7932)
    copy = page.runs_dir / "<img src=x onerror=window.pwned=22>"
    shutil.copytree(finished[0].path, copy)
    run = open_run(copy)
    scores = json.loads((copy / "scores.json").read_text())
    for answer, text in zip(scores["answers"], INJECTIONS, strict=False):
        answer.update(
            base=text, tuned=text, reference=text, task=text, source=text, prompt=[{"role": text, "content": text}]
        )
    (copy / "scores.json").write_text(json.dumps(scores))
    lines = [
        json.dumps({"messages": row["messages"], "task": row["messages"][0]["content"], "source": "x:1"})
        for row in rows[15:30]
    ]
    (copy / "heldout.jsonl").write_text("\n".join(lines))
    (copy / "output.txt").write_text("\n".join(INJECTIONS))
    run.update_state(
        status="failed", reason=" ".join(INJECTIONS), pid=None, preset=INJECTIONS[1], base_model=INJECTIONS[1]
    )

    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(30_000)
    asked: list[str] = []
    blocked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("dialog", lambda dialog: asked.append(f"dialog {dialog.message}"))
    tab.on(
        "console", lambda message: blocked.append(message.text) if "Content Security Policy" in message.text else None
    )

    def nothing_ran() -> None:
        assert tab.evaluate("window.pwned") is None
        assert all(url.startswith((page.url, "data:", "blob:")) for url in asked), asked
        assert not blocked, "not even tried"

    tab.goto(page.url)
    picked = tab.get_by_label("Data: file, folder or hub dataset")
    picked.fill(str(data))
    picked.press("Enter")
    button(tab, "Next row").wait_for()
    for _ in range(len(rows)):
        at = tab.get_by_label("Line").input_value()
        button(tab, "Next row").click()
        tab.wait_for_function("at => document.querySelector('input[aria-label=Line]').value != at", arg=at)
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    nothing_ran()
    tab.get_by_role("tab", name="Train").click()
    tab.locator(".card", has_text="rows").wait_for()
    tab.get_by_role("button", name="Log").click()
    nothing_ran()
    tab.get_by_role("tab", name="Runs and export").click()
    tab.get_by_text("exact match on held-out rows").wait_for()
    for which in ("best", "random", "worst"):
        tab.get_by_label(which).click()
        time.sleep(1)
    nothing_ran()
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_label("Held-out prompts").click()
    tab.get_by_role("option").first.click()
    for text in INJECTIONS:
        tab.get_by_label("Your message").fill(text)
        tab.get_by_label("System prompt").fill(text)
        tab.get_by_label("Max new tokens").fill("2")
        button(tab, "Send").click()
        time.sleep(0.7)
    button(tab, "Clear").click()
    tab.get_by_label("Your message").fill(INJECTIONS[0])
    button(tab, "Send").click()
    button(tab, "A is better").click()
    tab.get_by_text("Votes of this run: 1;").wait_for()
    tab.get_by_role("button", name="Train on the votes").click()
    button(tab, "Export the votes as pairs").click()
    tab.get_by_role("button", name="-pairs.jsonl").or_(tab.get_by_role("alert")).first.wait_for()
    nothing_ran()
    tab.close()


def test_at_most_thirty_controls_are_in_sight_and_each_has_a_name(empty_page: Page, tab: Any) -> None:
    tab.goto(empty_page.url)
    button(tab, "Use the built-in example").click()
    button(tab, "Train on this data").wait_for()
    counted = {}
    for name in TABS:
        tab.get_by_role("tab", name=name, exact=True).click()
        time.sleep(1)
        groups = [""]
        if name == "Train":
            tab.get_by_role("button", name="All other settings").click()
            groups = ["Model", "Data", "LoRA", "Training", "Evaluation", "Run"]
        for group in groups:
            if group:
                tab.get_by_role("tab", name=group, exact=True).last.click()
                time.sleep(0.5)
            counted[name + group] = count_controls(tab)
    print(counted)
    assert max(counted.values()) <= 30, counted
    assert len((ROOT / "app.py").read_text().splitlines()) <= 600


def test_nothing_is_wider_than_the_window(empty_page: Page, tab: Any) -> None:
    tab.goto(empty_page.url)
    button(tab, "Use the built-in example").click()
    button(tab, "Train on this data").wait_for()
    for name, width in itertools.product(TABS, (1280, 800)):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.get_by_role("tab", name=name, exact=True).click()
        time.sleep(0.5)
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (name, width)
        clipped = tab.evaluate(
            "[...document.querySelectorAll('button:not(.label-wrap), label > span')]"
            ".filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)"
            ".filter(e => getComputedStyle(e).display != 'inline').map(e => e.innerText)"
        )
        assert not clipped, (name, width)


def test_problems_are_said_in_place_and_in_words(empty_page: Page, tab: Any, tmp_path: Path) -> None:
    tab.goto(empty_page.url)
    picked = tab.get_by_label("Data: file, folder or hub dataset")
    picked.fill(str(tmp_path / "nowhere.jsonl"))
    picked.press("Enter")
    tab.get_by_role("alert").filter(has_text="nowhere.jsonl").wait_for()
    tab.get_by_role("tab", name="Train").click()
    tab.locator(".card", has_text="Not ready").wait_for()
    tab.get_by_label("learning_rate").fill("7")
    tab.locator(".card", has_text=re.compile("learning_rate.*less than or equal to 1")).wait_for()
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_label("Your message").fill("Hello")
    button(tab, "Send").click()
    tab.get_by_role("alert").filter(has_text="No adapter is chosen").wait_for()
    tab.get_by_label("Max new tokens").fill("0")
    button(tab, "Send").click()
    tab.get_by_role("alert").filter(has_text="max new tokens >= 1").wait_for()
    tab.get_by_role("tab", name="Runs and export").click()
    tab.get_by_text("No runs yet").wait_for()


def test_other_hosts_origins_and_files_are_refused(empty_page: Page) -> None:
    page = empty_page
    assert httpx.get(page.url, headers={"Host": "evil.example"}).status_code == 421
    join = f"{page.url}/gradio_api/queue/join"
    assert httpx.post(join, json={}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.post(f"{page.url}/gradio_api/upload", headers={"Origin": "null"}).status_code == 403
    assert httpx.get(f"{page.url}/gradio_api/file={ROOT / 'pyproject.toml'}").status_code in (403, 404)
    assert httpx.get(f"{page.url}/gradio_api/file=/etc/passwd").status_code in (403, 404)
    policy = httpx.get(page.url).headers["content-security-policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is not None
    assert "unsafe" not in scripts.group(1)


def test_an_address_for_others_needs_a_password() -> None:
    command = [sys.executable, str(ROOT / "app.py"), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert "--user" in done.stderr
    assert "Traceback" not in done.stderr
