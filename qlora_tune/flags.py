"""One flag per setting, built from the settings' one declaration."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from cyclopts import Group, Parameter

from qlora_tune.config import TrainConfig, describe_limits, describe_value


def _settings_type() -> type:
    """A dataclass with one optional flag per setting; values stay text, so that validation sees all at once."""
    fields: list[Any] = []
    for name, field in TrainConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        flag = name.replace("_", "-")
        limits = describe_limits(field)
        is_switch = field.annotation is bool
        parameter = Parameter(
            name=f"--{flag}",
            group=Group(extra["group"]),
            help=f"{field.description}{f' [{limits}]' if limits else ''} (default: {describe_value(field.default)})",
            show_default=False,
            negative=(f"--no-{flag}",) if is_switch else (),
            consume_multiple=False,
        )
        kind: Any = bool if is_switch else list[str] if "list" in str(field.annotation) else str
        fields.append((name, Annotated[kind | None, parameter], dataclasses.field(default=None)))
    return dataclasses.make_dataclass("Settings", fields, frozen=True, namespace={"__module__": __name__})


Settings = _settings_type()
AnySettings = Annotated[Settings | None, Parameter(name="*")]  # type: ignore[valid-type]


def given_flags(settings: Any) -> dict[str, Any]:
    """The settings that were given as flags, and nothing else."""
    if settings is None:
        return {}
    return {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
