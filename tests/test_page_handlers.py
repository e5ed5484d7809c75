"""What the page's handlers answer, called as gradio calls them: fields to settings, runs that change, adapters."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, settings

from qlora_tune.config import resolve_config
from qlora_tune.errors import RunError
from qlora_tune.flags import as_field
from qlora_tune.launch import uploads_folder
from qlora_tune.runs import Run, new_run

OTHER_BASE = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture(scope="module")
def app() -> Iterator[ModuleType]:
    """The page's module, which lies beside the package."""
    spec = importlib.util.spec_from_file_location("page_under_test", ROOT / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def here(app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page serves the folder `runs`, as it does by itself, of an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "runs_dir", "runs")
    monkeypatch.setattr(app, "pick_here", lambda: ("builtin", "this test"))
    return tmp_path / "runs"


def begin(name: str) -> Run:
    run = new_run(settings(runs_dir="runs", run_name=name))
    run.update_state(status="finished", pid=None)
    return run


def with_adapter(run: Run, kind: str = "LORA") -> Run:
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    return run


def values_of(app: ModuleType, config: Any) -> list[Any]:
    shown = {name: as_field(getattr(config, name)) for name in app.NAMES}
    return list({**shown, "preset": "auto", "data": app.SAMPLE}.values())


@pytest.mark.parametrize("model", ["builtin", OTHER_BASE])
@pytest.mark.parametrize("auto", ["builtin", "cpu-small"])
def test_a_run_takes_the_settings_that_the_fields_show(
    app: ModuleType, here: Path, monkeypatch: pytest.MonkeyPatch, auto: str, model: str
) -> None:
    monkeypatch.setattr(app, "pick_here", lambda: (auto, "this test"))
    shown = resolve_config({"preset": "builtin"}).config.model_copy(update={"model_name_or_path": model})
    found = app.read_config(values_of(app, shown))
    names = [name for name in app.NAMES if name not in ("preset", "data")]
    assert {name: getattr(found, name) for name in names} == {name: getattr(shown, name) for name in names}


def test_a_base_of_ones_own_fills_the_fields_as_the_command_line_would(app: ModuleType, here: Path) -> None:
    filled = app.fill_for_base("auto", OTHER_BASE)
    usual = resolve_config({"model_name_or_path": OTHER_BASE}).config
    pairs = [(value, name) for value, name in zip(filled, app.NAMES, strict=True) if name not in app.KEPT]
    assert [value for value, _ in pairs] == [as_field(getattr(usual, name)) for _, name in pairs]
    assert app.read_fields(values_of(app, usual)) == {"model_name_or_path": OTHER_BASE}
    skipped = app.fill_for_base("builtin", OTHER_BASE)
    assert {type(value) for value in skipped} == {type(app.gr.skip())}, "a preset that was named stays"


def test_what_is_asked_before_a_stop_goes_with_the_run_that_it_was_asked_of(
    app: ModuleType, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        begin(name)
    living = {"one", "two"}
    monkeypatch.setattr(Run, "is_alive", lambda run: run.name in living)
    shown = app.watch("one", None)
    seen, asked = shown[1], shown[-1]
    assert asked.visible is False
    assert shown[7].visible is True, "Stop is offered"
    begin("three")
    assert getattr(app.watch("one", seen)[-1], "visible", "as it is") == "as it is", "another run changes nothing"
    assert app.watch("two", seen)[-1].visible is False
    living.remove("one")
    assert app.watch("one", seen)[-1].visible is False


def test_a_run_that_does_not_run_is_not_discarded(app: ModuleType, here: Path) -> None:
    run = begin("done")
    with pytest.raises(RunError, match="done is not running any more. Nothing was deleted"):
        app.end_run(app.launch.discard_run, "done")
    assert run.path.is_dir()


def test_an_opened_adapter_is_chosen_by_its_absolute_folder_too(app: ModuleType, here: Path) -> None:
    with_adapter(begin("tuned"))
    opened = uploads_folder("runs") / "friend-x"
    opened.mkdir()
    (opened / "adapter_config.json").write_text("{}")
    for name in (str(opened), str(opened.resolve())):
        assert app.pick_adapter("runs", name).value == "runs/uploads/friend-x"
    for name in ("tuned", "runs/tuned/adapter", str(here / "tuned" / "adapter"), None, "gone"):
        assert app.pick_adapter("runs", name).value == "runs/tuned/adapter"


def test_an_adapter_that_no_votes_can_train_shows_its_own_votes_and_why(app: ModuleType, here: Path) -> None:
    from qlora_tune.page_chat import show_votes

    run = with_adapter(begin("virtual"), "PROMPT_TUNING")
    note, votes, *_, said = show_votes(str(run.adapter))
    assert "Votes of this run: 0" in note
    assert votes.visible is True
    assert "preferences are learned by LoRA adapters" in said


def test_an_opened_adapter_lists_no_held_out_rows_of_an_upload_that_is_called_so(app: ModuleType, here: Path) -> None:
    from qlora_tune.page_chat import list_examples

    opened = uploads_folder("runs") / "friend-x"
    opened.mkdir()
    (opened / "adapter_config.json").write_text("{}")
    (opened.parent / "heldout.jsonl").write_text("somebody's rows\n")
    assert (list_examples(str(opened)).choices, list_examples(None).choices) == ([], [])


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text, role in zip(said, ("user", "assistant") * len(said))]  # noqa: B905


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (turns("q", "a"), turns("q", "b"), ("q", [], [])),
        (turns("q", "a"), turns("q", "a", "r", "b"), ("r", turns("q", "a"), turns("q", "a"))),
        (turns("q", "a", "r", "b"), turns("q", "a"), ("r", turns("q", "a"), turns("q", "a"))),
        (
            turns("q", "a", "s", "c"),
            turns("q", "a", "r", "b", "s", "c"),
            ("s", turns("q", "a"), turns("q", "a", "r", "b")),
        ),
        ([], [], ("typed", [], [])),
    ],
    ids=["both", "left gave none", "right gave none", "earlier", "nothing yet"],
)
def test_retry_asks_the_last_question_and_takes_nothing_else_back(left: Any, right: Any, expected: Any) -> None:
    from qlora_tune.page_chat import retry

    assert retry("typed", left, right) == expected


def test_a_mended_copy_is_offered_for_the_data_that_it_was_made_of(app: ModuleType, here: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(ROOT / "sample.jsonl", rows)
    values = values_of(app, resolve_config({"preset": "builtin"}).config)
    for copied, expected in (("", False), (str(tmp_path / "other.jsonl"), False), (str(rows), True)):
        first, *_, last = app.check_data(str(rows), copied, *values)
        assert (getattr(first[-1], "visible", True), getattr(last[-1], "visible", True)) == (expected, True)
        assert len(first) == len(last) == 12


def test_buttons_go_from_row_to_row_where_a_row_has_several_lines(app: ModuleType, here: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    file.write_text(json.dumps(rows, indent=1))
    values = values_of(app, resolve_config({"preset": "builtin"}).config)
    _, first = app.show_row(str(file), 1, *values)
    _, second = app.show_next_row(str(file), first, *values)
    shown, third = app.show_next_row(str(file), second, *values)
    assert "Say three." in shown
    assert app.show_row(str(file), third, *values, above=True)[1] == second
    assert app.show_row(str(file), second, *values, above=True)[1] == first
    assert app.show_row(str(file), first, *values, above=True)[1] == first
    assert app.show_row(str(file), None, *values)[1] == first
