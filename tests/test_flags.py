"""Settings as words: a command line that means the same, and a form's fields as flags."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from qlora_tune.cli import app
from qlora_tune.cli_train import resolve_settings
from qlora_tune.config import TrainConfig, resolve_config
from qlora_tune.flags import TRAIN_FLAGS, as_field, command_line, flags_of_fields, is_list, with_dashes

FLAG_SETS: list[Any] = [
    {},
    {"preset": "builtin"},
    {"preset": "none", "learning_rate": 3e-4, "lora_alpha": 12.5, "eval_steps": 0.125},
    pytest.param(
        {"preset": "builtin", "learning_rate": 0.00012345678, "heldout_share": 1 / 3},
    ),
    {"preset": "builtin", "load_in_4bit": False, "use_dora": True, "load_best_model_at_end": False},
    {"preset": "builtin", "data": ["my rows.jsonl", 'it\'s "quoted" $HOME `x` \\.csv', "ünï/字.json"]},
    {"preset": "builtin", "data": ["a.jsonl"], "heldout_data": ["b c.jsonl", "d.jsonl"], "map": ["output=my answer"]},
    {"preset": "builtin", "lora_target_modules": ["q_proj", "v_proj"]},
    {"preset": "builtin", "max_steps": -1, "seed": 0, "score_rows": 0},
    {"preset": "builtin", "neftune_noise_alpha": "none", "run_name": None},
    {"preset": "builtin", "neftune_noise_alpha": 5, "run_name": "a name", "runs_dir": "my runs"},
    pytest.param(
        {"preset": "builtin", "data": ["-rows.jsonl"], "runs_dir": "-runs"},
    ),
    {"model_name_or_path": "./my base", "chat_template": "plain", "model_revision": "v1.0"},
    {"preset": "builtin", "run_name": "it's 5 o'clock; rm -rf *"[:21]},
    {"preset": "builtin", "max_length": 128, "per_device_train_batch_size": 2, "long_chats": "split"},
]


def parse(line: str) -> TrainConfig:
    """What the terminal makes of a command."""
    start, words = ["python", "-m", "qlora_tune", "train"], shlex.split(line)
    assert words[:4] == start
    _, bound, *_ = app.parse_args([with_dashes(word) for word in words[3:]], exit_on_error=False, print_error=False)
    return resolve_settings(bound.args, bound.kwargs.get("config"), bound.kwargs.get("settings")).config


@pytest.mark.parametrize("flags", FLAG_SETS, ids=lambda flags: ",".join(flags) or "nothing")
def test_the_command_shown_gives_the_same_settings_in_a_terminal(flags: dict[str, Any]) -> None:
    from qlora_tune.plan import pick_here

    assert parse(command_line(flags)) == resolve_config(flags, pick_auto=pick_here).config


def test_a_switch_and_an_absent_value_are_written_as_the_terminal_reads_them() -> None:
    line = command_line({"data": ["x.jsonl"], "load_in_4bit": False, "use_dora": True, "run_name": None})
    assert line == "python -m qlora_tune train x.jsonl --no-load-in-4bit --use-dora --run-name none"


def test_no_text_of_a_setting_can_become_a_command_of_its_own() -> None:
    hostile = "x; touch /tmp/p && $(id) `id` | 'a' \"b\" \n next"
    assert shlex.split(command_line({"data": [hostile]}))[4:] == [hostile]
    assert shlex.split(command_line({"runs_dir": hostile}))[4:] == ["--runs-dir", hostile]


def usual() -> TrainConfig:
    return resolve_config({"preset": "builtin"}).config


def test_fields_that_say_what_is_usual_become_no_flags() -> None:
    config = usual()
    shown = {name: as_field(getattr(config, name)) for name in TrainConfig.model_fields}
    assert flags_of_fields(shown, config) == {}


@pytest.mark.parametrize("name", [name for name in TRAIN_FLAGS if is_list(name)])
def test_a_list_is_shown_a_line_an_entry_and_read_back(name: str) -> None:
    assert as_field(["a b", "c"]) == "a b\nc"
    assert flags_of_fields({name: " a b \n\n c\n"}, usual()) == {name: ["a b", "c"]}


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3}),
        ({"lora_r": 32, "seed": 42.0}, {}),  # a number field may give 42.0 for 42
        ({"use_dora": True, "load_in_4bit": False}, {"use_dora": True, "load_in_4bit": False}),
        ({"neftune_noise_alpha": None, "run_name": "", "model_revision": None}, {}),
        ({"neftune_noise_alpha": 5}, {"neftune_noise_alpha": 5}),
        ({"learning_rate": None}, {}),
        ({"data": "", "map": ""}, {}),
        ({"score_rows": 0}, {"score_rows": 0}),
    ],
)
def test_only_fields_that_differ_become_flags(given: dict[str, Any], flags: dict[str, Any]) -> None:
    assert flags_of_fields(given, usual()) == flags


def test_an_absent_value_of_a_preset_can_be_asked_for() -> None:
    noisy = usual().model_copy(update={"neftune_noise_alpha": 5.0})
    assert flags_of_fields({"neftune_noise_alpha": None}, noisy) == {"neftune_noise_alpha": "none"}
