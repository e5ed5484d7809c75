"""One flag per setting, built from the settings' one declaration."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from cyclopts import Group, Parameter

from qlora_tune.config import PREFERENCES, TrainConfig, describe_setting, describe_value
from qlora_tune.preferences import RATE_SHARE, STAGE


def group_of(name: str) -> str:
    """The group that a setting is shown in."""
    extra: Any = TrainConfig.model_fields[name].json_schema_extra
    return str(extra["group"])


TRAIN_FLAGS = [name for name in TrainConfig.model_fields if group_of(name) != PREFERENCES]
# What `prefer` takes; base, adapter and form of the prompt are those that the adapter was trained with.
PREFER_FLAGS = [
    name
    for name in TrainConfig.model_fields
    if (
        group_of(name) in ("Training", "Evaluation", "Run", PREFERENCES)
        or name in ("heldout_share", "max_length", "model_name_or_path")
    )
    and name not in ("neftune_noise_alpha", "preference_data", "reward_model")
]
# What `reward` takes: it has a loss of its own, and writes no answers that could be scored.
REWARD_FLAGS = [
    name
    for name in PREFER_FLAGS
    if name not in ("fast", "beta", "loss_type", "score_rows", "max_new_tokens", "contracts", "plain_text")
]


def is_list(name: str) -> bool:
    return "list" in str(TrainConfig.model_fields[name].annotation)


def _settings_type(names: Collection[str], default: Callable[[str], str]) -> type:
    """A dataclass with one optional flag per setting; values stay text, so that validation sees all at once."""
    fields: list[Any] = []
    for name in names:
        field = TrainConfig.model_fields[name]
        flag = name.replace("_", "-")
        is_switch = field.annotation is bool
        parameter = Parameter(
            name=f"--{flag}",
            group=Group(group_of(name)),
            help=f"{describe_setting(name)} (default: {default(name)})",
            show_default=False,
            negative=(f"--no-{flag}",) if is_switch else (),
            consume_multiple=False,
        )
        kind: Any = bool if is_switch else list[str] if is_list(name) else str
        fields.append((name, Annotated[kind | None, parameter], dataclasses.field(default=None)))
    return dataclasses.make_dataclass("Settings", fields, frozen=True, namespace={"__module__": __name__})


def _declared(name: str) -> str:
    return describe_value(TrainConfig.model_fields[name].default)


def _of_stage(name: str) -> str:
    """A default of `prefer`, which takes the settings of the run that it begins with."""
    words = {
        "learning_rate": f"the run's x {RATE_SHARE:g}",
        "per_device_train_batch_size": "half the run's, in pairs",
        "gradient_accumulation_steps": "twice the run's",
    }
    if name in words:
        return words[name]
    if name in STAGE:
        return describe_value(STAGE[name])
    return _declared(name) if group_of(name) == PREFERENCES else "as in the run"


def _of_reward(name: str) -> str:
    """A default of `reward`."""
    return "as in the run" if name == "learning_rate" else _of_stage(name)


Settings, PreferSettings = _settings_type(TRAIN_FLAGS, _declared), _settings_type(PREFER_FLAGS, _of_stage)
RewardSettings = _settings_type(REWARD_FLAGS, _of_reward)
AnySettings = Annotated[Settings | None, Parameter(name="*")]  # type: ignore[valid-type]
AnyPreferSettings = Annotated[PreferSettings | None, Parameter(name="*")]  # type: ignore[valid-type]
AnyRewardSettings = Annotated[RewardSettings | None, Parameter(name="*")]  # type: ignore[valid-type]


def given_flags(settings: Any) -> dict[str, Any]:
    """The settings that were given as flags, and nothing else."""
    if settings is None:
        return {}
    return {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}


def command_line(flags: Mapping[str, Any]) -> str:
    """The command that does the same in a terminal."""
    data = [f"--data={file}" if file.startswith("-") else file for file in flags.get("data", [])]
    words = ["python", "-m", "qlora_tune", "train", *data]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "data":
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for entry in value if isinstance(value, list) else [value]:
            said = "none" if entry is None else describe_value(entry)
            words += [f"{flag}={said}"] if said.startswith("-") else [flag, said]
    return shlex.join(words)


def flags_of_fields(given: Mapping[str, Any], usual: TrainConfig) -> dict[str, Any]:
    """What a form's fields say otherwise than the usual settings, as flags. Lists are text, a line an entry."""
    flags: dict[str, Any] = {}
    for name, value in given.items():
        if value == as_field(getattr(usual, name)):
            continue
        if is_list(name):
            flags[name] = [line.strip() for line in str(value or "").splitlines() if line.strip()]
        elif value not in (None, ""):
            flags[name] = value
        elif "None" in str(TrainConfig.model_fields[name].annotation) and getattr(usual, name) is not None:
            flags[name] = "none"  # a field that is left empty elsewhere says nothing
    return flags


def as_field(value: Any) -> Any:
    """A setting's value as the field of a form holds it."""
    return "\n".join(value) if isinstance(value, list) else value


def with_dashes(token: str) -> str:
    """A flag as it is declared: Transformers and TRL write --learning_rate, we --learning-rate."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def suggest_command(tokens: list[str], commands: list[str]) -> str:
    """What to say of a first word that is no command; empty where it is one, or a flag."""
    names = [name for name in commands if not name.startswith("-")]
    if not tokens or tokens[0] in names or tokens[0].startswith("-"):
        return ""
    close = difflib.get_close_matches(tokens[0], names, n=1)
    hint = f'Did you mean "{close[0]}"?' if close else f"Commands: {', '.join(names)}."
    return f'There is no command "{tokens[0]}". {hint}'
