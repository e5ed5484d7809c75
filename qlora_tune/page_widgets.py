"""The page's common ground: gradio, set up before it is imported, and what every tab is made of."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_tune import page_parts as parts
from qlora_tune.model import quiet_stack

quiet_stack()
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Uploads and downloads pass through here. Only this user can open it, and it goes when the page ends.
CACHE = tempfile.TemporaryDirectory(prefix="qlora-tune-page-")
os.environ["GRADIO_TEMP_DIR"] = CACHE.name

import gradio as gr  # reads both when it is imported

__all__ = ["CACHE", "gr", "hand_out", "on", "part", "reveal"]


def on(trigger: Any, fn: Any, inputs: Any, say: Any, outputs: Any, busy: str = "", **options: Any) -> Any:
    """Call a function on an event, or any of several. A problem is said in `say`, and the outputs stay as they are."""

    def call(*values: Any) -> Any:
        if busy:
            yield (parts.show_message(busy, "soft"), *(gr.skip(),) * len(outputs))
        try:
            result, said = fn(*values), ""
        except Exception as error:
            result, said = (gr.skip(),) * len(outputs), parts.show_problem(error)
        yield (said, *(result if isinstance(result, tuple) else (result,))) if outputs else said

    listen = functools.partial(gr.on, trigger) if isinstance(trigger, list) else trigger
    return listen(call, inputs, [say, *outputs], **{"api_visibility": "private", "show_progress": "minimal", **options})


def reveal(trigger: Any, component: Any, say: Any, visible: bool) -> None:
    """Show or hide a part of the page on a click."""
    on(trigger, lambda: type(component)(visible=visible), None, say, [component])


def part(text: str = "", **options: Any) -> Any:
    """A place for HTML of page_parts, which escapes what it shows."""
    return gr.Markdown(text, sanitize_html=False, latex_delimiters=[], container=False, **options)


def hand_out(path: Path) -> Any:
    """A button that downloads one file, from a copy in the page's cache: the only place it serves files from."""
    copy = shutil.copy(path, Path(tempfile.mkdtemp(dir=CACHE.name)) / path.name)
    return gr.DownloadButton(f"Download {path.name}", value=str(copy), visible=True)
