"""Settings: layers, origins, and every problem reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tune.config import TrainConfig, describe_limits, list_presets, load_preset, pick_preset, resolve_config
from qlora_tune.errors import ConfigError


def test_layers_override_each_other_and_each_value_names_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('preset = "builtin"\nlora_r = 8\nseed = 7\n')
    resolved = resolve_config({"seed": "9"}, file)
    assert (resolved.config.lora_r, resolved.origins["lora_r"]) == (8, str(file))
    assert (resolved.config.seed, resolved.origins["seed"]) == (9, "flag")
    assert (resolved.config.learning_rate, resolved.origins["learning_rate"]) == (2e-3, "preset builtin")
    assert (resolved.config.weight_decay, resolved.origins["weight_decay"]) == (0.0, "default")


def test_every_problem_is_reported_at_once_with_its_layer() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config({"preset": "builtin", "lora_r": "0", "learning_rate": "fast", "lerning_rate": "1"})
    message = str(caught.value)
    assert "lora_r = '0' (flag): should be greater than or equal to 1" in message
    assert "learning_rate = 'fast' (flag)" in message
    assert 'lerning_rate (flag): no such setting. Did you mean "learning_rate"?' in message


def test_a_run_config_can_be_given_back_as_a_config_file(tmp_path: Path) -> None:
    from qlora_tune.runs import new_run

    config = resolve_config({"preset": "builtin", "runs_dir": str(tmp_path), "neftune_noise_alpha": "5"}).config
    run = new_run(config)
    assert resolve_config({}, run.path / "config.toml").config == config
    assert run.read_config() == config


@pytest.mark.parametrize("preset", [p.name for p in list_presets()])
def test_every_preset_resolves_and_repeats_no_default(preset: str) -> None:
    resolved = resolve_config({"preset": preset})
    for name in load_preset(preset).settings:
        if (preset, name) == ("builtin", "model_name_or_path"):
            continue
        assert getattr(resolved.config, name) != TrainConfig.model_fields[name].default, name


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match='Unknown preset "gpu-8gbb". Did you mean "gpu-8gb"'):
        resolve_config({"preset": "gpu-8gbb"})


def test_a_model_given_without_a_preset_takes_no_preset() -> None:
    resolved = resolve_config({"model_name_or_path": "some/model"})
    assert resolved.config.preset == "none"
    assert resolved.config.lora_r == TrainConfig.model_fields["lora_r"].default


@pytest.mark.parametrize(
    ("device", "memory_gb", "expected"),
    [("cuda", 5.8, "gpu-6gb"), ("cuda", 8.0, "gpu-8gb"), ("cuda", 11.6, "gpu-12gb"), ("cuda", 15.8, "gpu-16gb"),
     ("cuda", 24, "gpu-24gb"), ("cuda", 140, "gpu-24gb"), ("cuda", 2, "builtin"), ("cpu", 16, "builtin")],
)  # fmt: skip
def test_auto_takes_the_largest_preset_that_the_device_holds(device: str, memory_gb: float, expected: str) -> None:
    assert pick_preset(device, memory_gb, lambda model: False)[0] == expected


def test_auto_uses_a_small_real_base_on_a_cpu_only_where_it_is_already_downloaded() -> None:
    assert pick_preset("cpu", 16, lambda model: model == "HuggingFaceTB/SmolLM2-135M")[0] == "cpu-small"


def test_a_share_of_the_steps_and_whole_steps_are_both_accepted_but_nothing_between() -> None:
    assert resolve_config({"eval_steps": "0.5", "preset": "none"}).config.eval_steps == 0.5
    with pytest.raises(ConfigError, match="whole number of steps, or a share below 1"):
        resolve_config({"eval_steps": "1.5", "preset": "none"})


def test_lists_of_names_split_at_commas_and_keep_their_own_defaults() -> None:
    config = resolve_config({"preset": "none", "holdout_tasks": ["topic, yes_no", "job,"]}).config
    assert config.holdout_tasks == ["topic", "yes_no", "job"]
    assert config.lora_target_modules == ["all-linear"]
    assert resolve_config({"preset": "none", "lora_target_modules": "q_proj,v_proj"}).config.holdout_tasks == []


def test_holding_out_clusters_in_turn_is_asked_alone_and_with_two_clusters_at_least() -> None:
    assert resolve_config({"preset": "none", "holdout_tasks": "auto"}).config.holdout_tasks == ["auto"]
    with pytest.raises(ConfigError, match="holdout_tasks = .* should be `auto` alone, or names of tasks"):
        resolve_config({"preset": "none", "holdout_tasks": "auto,topic"})
    with pytest.raises(ConfigError, match="holdout_clusters = '1' .*greater than or equal to 2"):
        resolve_config({"preset": "none", "holdout_clusters": "1"})


def test_none_in_a_file_means_absent(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('preset = "none"\nneftune_noise_alpha = "none"\n')
    assert resolve_config({}, file).config.neftune_noise_alpha is None


def test_broken_toml_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("lora_r = 8\nseed = = 3\n")
    with pytest.raises(ConfigError, match="line 2"):
        resolve_config({}, file)


def test_limits_are_said_in_words() -> None:
    assert describe_limits(TrainConfig.model_fields["lora_r"]) == ">= 1, <= 1,024"
    assert describe_limits(TrainConfig.model_fields["max_length"]) == "tokens, >= 16, <= 1,000,000"


def test_every_setting_has_a_help_and_a_group() -> None:
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        assert field.description, name
        assert isinstance(extra, dict), name
        assert extra["group"] in {"Model", "Data", "LoRA", "Training", "Evaluation", "Preferences", "Run"}, name
