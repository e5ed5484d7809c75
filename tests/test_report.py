"""The report of a run: whole by itself, true to the scores, and harmless whatever the data say."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from screenshots import CHROMIUM, CHROMIUM_FLAGS

from qlora_tune.comparison import Answered, Comparison, read_comparison, write_comparison
from qlora_tune.report import render_report, write_report
from qlora_tune.runs import UNSEEN, Run

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt;\x00\u202e"


class Tags(HTMLParser):
    """Every tag of a page with its attributes; whether each that was opened is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    return tags


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Run:
    shutil.copytree(finished[0].path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def test_the_page_needs_nothing_else_and_runs_nothing(run: Run) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    tags = parse(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a"})
    assert not [name for _, attributes in tags.found for name in attributes if name in ("src", "href", "onload")]
    assert any("default-src 'none'" in str(attributes.get("content")) for _, attributes in tags.found)


def test_the_figures_are_those_of_the_scores(run: Run) -> None:
    html = render_report(run)
    comparison = read_comparison(run)
    total = comparison.total()
    after = f"{100 * total.tuned['exact_match']:.1f} %"
    assert re.search(rf"Exact match on 50 held-out rows: .* → <b>{after}</b>", html)
    table = html.split("<h2>Scores by task</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr")[2:]]
    assert [row[0] for row in rows] == [*(score.task for score in comparison.by_task()), "all"]
    assert [int(row[1]) for row in rows] == [*(score.rows for score in comparison.by_task()), 50]
    assert [row[3] for row in rows] == [
        f"{100 * score.tuned['exact_match']:.1f} %" for score in [*comparison.by_task(), total]
    ]
    assert f"{total.tuned['loss']:.3g}" in html.split("<h2>All measures")[1]
    assert [html.count(f"<h2>{kind} answers</h2>") for kind in ("Best", "Worst", "Random")] == [1, 1, 1]
    assert html.count("<polyline") == 2  # training and held-out loss


def test_text_of_data_and_models_is_shown_and_can_not_act(run: Run) -> None:
    row = Answered(HOSTILE, HOSTILE, ({"role": "user", "content": HOSTILE},), HOSTILE, HOSTILE, HOSTILE)
    write_comparison(run, Comparison([row]))
    html = render_report(run)
    assert "script" not in {tag for tag, _ in parse(html).found}
    assert "&lt;script&gt;alert(1)" in html
    assert "\x00" not in html
    assert "\u202e" not in html


def test_no_place_of_this_machine_stands_in_it(run: Run) -> None:
    html = render_report(run)
    for private in (str(Path.home()), str(Path.cwd()), str(run.path), str(run.path.parent), run.read_config().runs_dir):
        assert private not in html


def test_tasks_that_were_kept_out_of_training_have_a_table_of_their_own(run: Run) -> None:
    assert "Task types it never saw" not in render_report(run)
    rows = [
        Answered(f"x.jsonl:{n}", task, ({"role": "user", "content": "?"},), "yes", "no", tuned)
        for n, (task, tuned) in enumerate([("new one", "yes"), ("new one", "no"), ("new two", "yes")])
    ]
    write_comparison(run, Comparison(rows), UNSEEN)
    html = render_report(run)
    parse(html)
    table = html.split("<h2>Task types it never saw</h2>")[1].split("</table>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr")[2:]]
    assert [(row[0], row[1], row[3]) for row in cells] == [
        ("new one", "2", "50.0 %"), ("new two", "1", "100.0 %"), ("all", "3", "66.7 %"),
    ]  # fmt: skip
    assert "new one" not in html.split("<h2>Scores by task</h2>")[1].split("</table>")[0]
    (run.path / "scores.json").unlink()
    assert "Task types it never saw" in render_report(run)


def test_a_run_that_was_not_scored_has_a_report_that_says_so(run: Run) -> None:
    (run.path / "scores.json").unlink()
    html = render_report(run)
    parse(html)
    assert "Not scored." in html
    assert "Scores by task" not in html
    assert "<polyline" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (.ci/run installs it)")
def test_it_opens_in_a_browser_without_a_complaint(run: Run) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(write_report(run).as_uri())
        assert page.get_by_role("heading", name="Scores by task").is_visible()
        assert page.locator(".of-tuned").last.bounding_box()["width"] > 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert len(asked) == 1
    assert not said
