"""The page's part that decides on proposals: its own buttons, driven through the functions that gradio calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_grow import FRESH, grown, write

from qlora_tune.grow import read_pool
from qlora_tune.page_review import build_review

Press = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def press() -> Press:
    """Press a button by its words, with these values in the fields; returns what the page then shows."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as page:
        build_review()
    words = {id: block.value for id, block in page.blocks.items() if isinstance(block, gr.Button)}
    handlers = {words[id]: f for f in page.fns.values() for id, _ in f.targets if id in words}

    def call(button: str, *values: Any) -> list[Any]:
        handler = handlers[button]
        assert len(values) == len(handler.inputs)
        *_, shown = handler.fn(*values)
        assert len(shown) == len(handler.outputs)
        problem, told, *fields = shown
        return [problem or told, *fields]

    return call


def test_proposals_are_accepted_edited_and_rejected_one_after_another(press: Press, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    grown(pool, write(FRESH[:4]), wanted=4)
    say, *fields = press("Show what waits", str(pool))
    assert "4 of 4 wait" in say
    assert fields[1:] == list(FRESH[0])
    say, *fields = press("Accept as proposed", str(pool), *fields[:3], "typed, but not meant")
    assert "3 of 4 wait" in say
    assert fields[1:] == list(FRESH[1])
    say, *fields = press("Accept as edited above", str(pool), *fields[:3], "Das Brot\r\n")
    say, *fields = press("Reject", str(pool), *fields)
    assert "1 of 4 wait" in say
    say, *_ = press("Accept as edited above", str(pool), *fields[:3], " ")
    assert "Not accepted" in say
    (say,) = press("Write the accepted rows", f" {pool} ")
    assert "2 rows to train on" in say
    rows = [json.loads(line) for line in (tmp_path / "pool_accepted.jsonl").read_text().splitlines()]
    assert [(row["output"], row["edited"]) for row in rows] == [(FRESH[0][2], False), ("Das Brot", True)]
    say, *fields = press("Reject", str(pool), *fields)
    assert "0 of 4 wait" in say
    assert fields == ["", "", "", ""]
    assert [line.status for line in read_pool(pool).proposals.values()] == [
        "accepted",
        "edited",
        "rejected",
        "rejected",
    ]


def test_what_can_not_be_done_is_said_and_changes_nothing(press: Press, tmp_path: Path) -> None:
    pool, other = tmp_path / "pool.jsonl", tmp_path / "rows.jsonl"
    (id,) = grown(pool, write(FRESH[:1]), wanted=1).proposals
    other.write_text(write(FRESH))
    before = pool.read_bytes()
    for path in ("", str(tmp_path), str(tmp_path / "nowhere.jsonl")):
        assert "expected the path of a pool" in press("Show what waits", path)[0]
    assert "is no line of a pool" in press("Reject", str(other), id, "a", "", "b")[0]
    assert "No proposal is shown" in press("Reject", str(pool), "", "a", "", "b")[0]
    assert "nobody has accepted" in press("Write the accepted rows", str(pool))[0]
    assert pool.read_bytes() == before
    assert other.read_text() == write(FRESH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool.jsonl", "rows.jsonl"]


def test_a_name_from_a_file_can_not_act_on_the_page(press: Press, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    grown(pool, write(FRESH[:1]), wanted=1)
    pool.write_text(pool.read_text().replace("teacher", "<img src=x onerror=alert(1)>"))
    assert "<img" not in press("Show what waits", str(pool))[0]
