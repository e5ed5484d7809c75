"""How long the page takes: from its command to a page that can be used, and from Enter to the first token.

Usage: python benchmarks/page.py RUNS_DIR [REPEATS]. RUNS_DIR holds a finished run on the built-in base, which is loaded
before it is timed. Needs Chromium. Prints medians and spreads in seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from screenshots import CHROMIUM, CHROMIUM_FLAGS, serve_page

QUESTION = "What is the capital of Japan?"


def time_ready(browser: Any, runs_dir: Path, port: int) -> tuple[float, float, float]:
    """Seconds from the command to an answer, to a page whose first button can be pressed; and Enter to first token."""
    began = time.perf_counter()
    server = serve_page(runs_dir, port)
    try:
        answers = time.perf_counter() - began
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_role("button", name="Use the built-in example").click(trial=True)
        ready = time.perf_counter() - began
        page.get_by_role("tab", name="Chat").click()
        page.wait_for_function("() => document.querySelector('input[aria-label=Adapter]').value")
        _ask(page, 1)
        first = _ask(page, 2)
        page.close()
    finally:
        server.kill()
        server.wait()
    return answers, ready, first


def _ask(page: Any, number: int) -> float:
    """Ask for the number-th time; seconds from Enter to the first token on the left."""
    box = page.get_by_label("Your message")
    box.fill(QUESTION)
    began = time.perf_counter()
    box.press("Enter")
    left = page.locator(".pane").filter(has=page.locator(".turn", has_text="base")).first
    left.locator(".turn.assistant").nth(number - 1).wait_for(timeout=60_000)
    seconds = time.perf_counter() - began
    page.locator(".turn.assistant", has_text="tuned").nth(number - 1).wait_for(timeout=60_000)
    time.sleep(2)
    return seconds


def main() -> None:
    runs_dir, repeats = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        taken = [time_ready(browser, runs_dir, 7960 + number) for number in range(repeats)]
        browser.close()
    for name, values in zip(("server answers", "page ready", "first token"), zip(*taken, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
