"""Photograph the page for docs/: each tab, light and dark, at 1280 and 800 pixels width; and the newest run's report.

Usage: python scripts/screenshots.py RUNS_DIR [FOLDER]. RUNS_DIR holds the runs that are shown; the newest must be
finished and scored. Needs Chromium.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from qlora_tune.report import write_report
from qlora_tune.runs import list_runs

ROOT = Path(__file__).parent.parent
# Chromium as root, in a container, and without its own traffic.
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def serve_page(runs_dir: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the page and wait until it answers."""
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--runs-dir", runs_dir.name]
    # From the folder above, so that no picture shows where it lies.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=runs_dir.resolve().parent, env=dict(os.environ))
    assert server.stdout is not None
    if b"http" not in server.stdout.readline():
        raise RuntimeError("the page did not start")
    return server


def open_tabs(page: Any) -> Any:
    """Yield each tab's name with something in it to see."""
    page.get_by_role("button", name="Use the built-in example").click()
    page.get_by_role("button", name="Train on this data").wait_for()
    time.sleep(1)
    yield "data"
    page.get_by_role("button", name="Train on this data").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_role("button", name="Compare base and tuned").wait_for()
    time.sleep(1)
    yield "train"
    page.get_by_role("button", name="Compare base and tuned").click()
    for question in ("What is the capital of Japan?", "Sort these words alphabetically: lamp, coat, bike"):
        box = page.get_by_label("Your message")
        box.fill(question)
        box.press("Enter")
        page.locator(".turn.user", has_text=question).nth(1).wait_for()
        time.sleep(6)
    yield "chat"
    page.get_by_role("tab", name="Runs and export").click()
    page.get_by_text("exact match on held-out rows").wait_for()
    time.sleep(1)
    yield "runs"


def photograph(page: Any, picture: Path, full_page: bool = True) -> None:
    """Save what a page shows. Few colours do for it, in a fifth of the bytes."""
    page.screenshot(path=picture, full_page=full_page)
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    runs_dir = Path(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "docs" / "page")
    folder.mkdir(parents=True, exist_ok=True)
    server = serve_page(runs_dir, 7991)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
            for theme in ("light", "dark"):
                for width in (1280, 800):
                    page = browser.new_page(viewport={"width": width, "height": 900})
                    page.set_default_timeout(60_000)
                    page.goto(f"http://127.0.0.1:7991/?__theme={theme}")
                    for tab in open_tabs(page):
                        photograph(page, folder / f"{tab}-{theme}-{width}.png")
                    page.close()
                page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=theme)
                page.goto(write_report(list_runs(runs_dir)[-1]).resolve().as_uri())
                photograph(page, folder / f"report-{theme}-1280.png", full_page=False)
                page.close()
            browser.close()
    finally:
        server.kill()


if __name__ == "__main__":
    main()
