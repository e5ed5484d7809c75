"""Every setting, declared once, and the layers that decide its value: defaults < preset < config file < flags.

The declaration feeds the command line, validation, `qlora_tune config`, the README's table and the record that
each run keeps. Names are those of Transformers, PEFT and TRL wherever they have one.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from qlora_tune.errors import ConfigError, join_problems

BUILTIN = "builtin"
AUTO = "auto"
UPLOADS = "uploads"  # folder beside the runs; private to this user
PREFERENCES = "Preferences"  # the group of settings that `train` does not take


def setting(default: Any, group: str, help: str, unit: str = "", **limits: Any) -> Any:
    """Declare one setting: its default, the group it is shown in, its help, its unit and its limits."""
    return Field(
        default=default,
        description=help,
        json_schema_extra={"group": group, "unit": unit},
        validate_default=True,
        **limits,
    )


class TrainConfig(BaseModel):
    """All settings of a run. Flat; validated as a whole, so that every problem is reported at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    preset: str = setting(
        "auto", "Model", "Preset to start from: a name, a TOML file, `auto` (by device and memory) or `none`."
    )
    model_name_or_path: str = setting(
        BUILTIN, "Model", "Base model: `builtin`, a folder, or the id of a model hub repository."
    )
    model_revision: str | None = setting(None, "Model", "Branch, tag or commit of the base model on the hub.")
    load_in_4bit: bool = setting(True, "Model", "Quantize the base to 4 bits; off trains plain LoRA.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "Model", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = setting(
        True, "Model", "Quantize the quantization constants too; saves 0.37 bit per parameter (arXiv 2305.14314)."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Model", "Compute precision; `auto` takes bfloat16 where the device really has it."
    )

    chat_template: Literal["auto", "chatml", "plain"] = setting(
        "auto",
        "Data",
        "`auto`: the tokenizer's own, else ChatML, else `plain` roles ended by the base's end-of-text token.",
    )
    data: list[str] = setting(
        [], "Data", "Files or folders of instruction-response pairs, or a hub dataset's id; may repeat."
    )
    heldout_data: list[str] = setting(
        [], "Data", "Files held out of training and used to score; replaces heldout_share. The sample has its own."
    )
    map: list[str] = setting(
        [], "Data", "Which column is which field, as FIELD=COLUMN (instruction=question); may repeat."
    )
    encoding: str = setting("auto", "Data", "Encoding of the files; `auto`: UTF-8, UTF-16 by its mark, else cp1252.")
    heldout_share: float = setting(
        0.1, "Data", "Share of the rows held out of training, whole duplicate groups at a time.", ge=0, le=0.5
    )
    holdout_tasks: list[str] = setting(
        [], "Data", "Whole tasks kept out of training and scored as unseen; `auto`: clusters of them, one run each."
    )
    holdout_clusters: int = setting(
        4, "Data", "Clusters of similar tasks that holdout_tasks `auto` holds out in turn.", ge=2, le=100
    )
    max_length: int = setting(
        1024, "Data", "Longest sequence; rows that are longer are left out and counted.", "tokens", ge=16, le=1_000_000
    )
    long_chats: Literal["cut", "split"] = setting(
        "cut", "Data", "A chat beyond max_length: `cut` after the last turn that fits, or `split` into several chats."
    )

    peft_type: Literal["LORA", "PROMPT_TUNING", "PREFIX_TUNING"] = setting(
        "LORA", "LoRA", "LoRA, or virtual tokens before each row (docs/adapters.md), which train the plain way."
    )
    num_virtual_tokens: int = setting(20, "LoRA", "Virtual tokens; they take of the context.", "tokens", ge=1, le=1024)
    lora_r: int = setting(16, "LoRA", "Rank of the adapter.", ge=1, le=1024)
    lora_alpha: float = setting(32, "LoRA", "Scaling: the update is multiplied by lora_alpha / lora_r.", gt=0, le=4096)
    lora_dropout: float = setting(
        0.0, "LoRA", "Dropout before the adapter; above 0 costs about 30 % of the speed.", ge=0, lt=1
    )
    lora_target_modules: list[str] = setting(
        ["all-linear"], "LoRA", "Layers that get an adapter: `all-linear`, or names such as q_proj,v_proj."
    )
    use_rslora: bool = setting(False, "LoRA", "Scale by lora_alpha / sqrt(lora_r) instead (arXiv 2312.03732).")
    use_dora: bool = setting(False, "LoRA", "Learn magnitude and direction apart (DoRA, arXiv 2402.09353); slower.")
    init_lora_weights: Literal["default", "gaussian", "loftq", "olora", "pissa", "pissa_niter_16"] = setting(
        "default", "LoRA", "What LoRA begins with (docs/adapters.md); olora and pissa need an unquantized base."
    )

    num_train_epochs: float = setting(3.0, "Training", "Passes over the training rows.", "epochs", gt=0, le=1000)
    max_steps: int = setting(-1, "Training", "Stop after this many optimizer steps; -1 for no limit.", "steps", ge=-1)
    per_device_train_batch_size: int = setting(4, "Training", "Rows per micro-batch.", "rows", ge=1, le=4096)
    gradient_accumulation_steps: int = setting(
        4, "Training", "Micro-batches per optimizer step; effective batch = this x batch size.", ge=1, le=4096
    )
    learning_rate: float = setting(2e-4, "Training", "Peak learning rate.", gt=0, le=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "Training", "How the learning rate falls after warmup."
    )
    warmup_ratio: float = setting(0.03, "Training", "Share of the steps that warm the rate up.", ge=0, lt=1)
    weight_decay: float = setting(0.0, "Training", "Decoupled weight decay of the adapter.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, "Training", "Gradients above this norm are scaled down.", gt=0)
    optim: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"
    ] = setting(
        "auto", "Training", "Optimizer, by Transformers' name; `auto`: paged_adamw_8bit on CUDA, else adamw_torch."
    )
    neftune_noise_alpha: float | None = setting(
        None, "Training", "Noise on the embeddings in training (NEFTune, arXiv 2310.05914); 5 is usual.", gt=0, le=1000
    )
    activation_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto", "Training", "Recompute activations in the backward pass: slower, far less memory; `auto`: where needed."
    )
    fast: bool = setting(
        True,
        "Training",
        "Train in fewer passes with the same mathematics; off: TRL's plain way. Where a base needs it, off by itself.",
    )
    seed: int = setting(42, "Training", "Seed of the split, the order, the adapter and the noise.", ge=0, lt=2**32)

    eval_steps: float = setting(
        0.25, "Evaluation", "Held-out loss and checkpoint every so many steps; below 1 a share of the run.", gt=0
    )
    load_best_model_at_end: bool = setting(
        True, "Evaluation", "Keep the adapter of the lowest held-out loss instead of the last one."
    )
    early_stopping_patience: int = setting(
        0, "Evaluation", "Stop after this many evaluations without a better held-out loss; 0 never.", ge=0
    )
    per_device_eval_batch_size: int = setting(16, "Evaluation", "Rows per batch when scoring.", "rows", ge=1, le=4096)
    score_rows: int = setting(
        200, "Evaluation", "Held-out rows that base and tuned model answer; 0 skips scoring.", "rows", ge=0
    )
    max_new_tokens: int = setting(256, "Evaluation", "Longest answer when scoring.", "tokens", ge=1, le=100_000)
    contracts: str | None = setting(
        None, "Evaluation", "TOML file of what the answers of each task must hold: labels, regex, JSON schema, length."
    )
    plain_text: str | None = setting(
        "auto", "Evaluation", "Text file whose loss before and after shows what was forgotten; `auto`: a shipped page."
    )

    preference_data: list[str] = setting(
        [], PREFERENCES, "Files of preference pairs or votes, which `prefer` trains on (its --data); may repeat."
    )
    beta: float = setting(0.1, PREFERENCES, "How closely answers keep to the adapter begun with.", gt=0, le=100)
    loss_type: Literal["sigmoid", "ipo"] = setting(
        "sigmoid", PREFERENCES, "`sigmoid`: DPO (arXiv 2305.18290); `ipo` (arXiv 2310.12036) ends at a set margin."
    )
    reward_model: bool = setting(
        False, PREFERENCES, "Train a model that scores answers on the pairs, which `reward` does, instead of answering."
    )

    runs_dir: str = setting("runs", "Run", "Folder that holds all runs.")
    run_name: str | None = setting(None, "Run", "Name of the run; otherwise the time and the base model.")

    @field_validator(
        "data", "heldout_data", "map", "holdout_tasks", "lora_target_modules", "preference_data", mode="before"
    )
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("holdout_tasks", "lora_target_modules", mode="after")
    @classmethod
    def _split_commas(cls, value: list[str], info: ValidationInfo) -> list[str]:
        names = [name.strip() for entry in value for name in entry.split(",") if name.strip()]
        return names or (["all-linear"] if info.field_name == "lora_target_modules" else [])

    @field_validator("holdout_tasks", mode="after")
    @classmethod
    def _auto_alone(cls, value: list[str]) -> list[str]:
        if AUTO in value and value != [AUTO]:
            raise ValueError("should be `auto` alone, or names of tasks")
        return value

    @field_validator("eval_steps")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if not math.isfinite(value) or (value >= 1 and value != int(value)):
            raise ValueError("should be a whole number of steps, or a share below 1")
        return value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be at least 1, or -1 for no limit")
        return value

    @model_validator(mode="after")
    def _best_needs_loading(self) -> TrainConfig:
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience keeps the best adapter, so it needs load_best_model_at_end")
        return self

    @field_validator("fast")
    @classmethod
    def _virtual_tokens_go_the_plain_way(cls, value: bool, info: ValidationInfo) -> bool:
        return value and info.data.get("peft_type", "LORA") == "LORA"

    @field_validator("run_name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value[0] in ".-" or any(c in '/\\:*?"<>|\0' for c in value)):
            raise ValueError("should be a plain folder name")
        if value == UPLOADS:
            raise ValueError("is the name of the folder of uploaded files")
        return value


@dataclass(frozen=True)
class Preset:
    """A named set of changes to the defaults, for one kind of device."""

    name: str
    description: str
    device: str  # "cpu" or "cuda"
    min_memory_gb: float  # smallest device memory [GB] it is meant for
    settings: dict[str, Any]


@dataclass(frozen=True)
class ResolvedConfig:
    """The settings of a run, and for each one the layer that decided it."""

    config: TrainConfig
    origins: dict[str, str]
    preset_reason: str


def shipped_path(name: str) -> Path:
    """Find a file or folder that ships with the package: in a wheel beside the code, in a checkout above it."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def load_preset(name: str) -> Preset:
    """Load a preset by name or from a TOML file. Raises ConfigError with the names that exist."""
    path = Path(name) if name.endswith(".toml") else shipped_path("presets") / f"{name}.toml"
    if not path.is_file():
        known = [preset.name for preset in list_presets()]
        raise ConfigError(f'Unknown preset "{name}".{suggest(name, known)} Presets: {", ".join(known)}.')
    content = read_toml(path)
    missing = [key for key in ("description", "device", "min_memory_gb", "settings") if key not in content]
    if missing:
        raise ConfigError(f"{path}: a preset needs {', '.join(missing)}. See presets/builtin.toml for the form.")
    fields = {key: content[key] for key in ("description", "device", "min_memory_gb", "settings")}
    if not isinstance(fields["settings"], dict) or not isinstance(fields["min_memory_gb"], int | float):
        raise ConfigError(f"{path}: [settings] must be a table and min_memory_gb a number. See presets/builtin.toml.")
    return Preset(name=path.stem, **fields)


def list_presets() -> list[Preset]:
    """All shipped presets, CPU first, then by the memory they ask for."""
    presets = [load_preset(str(path)) for path in shipped_path("presets").glob("*.toml")]
    return sorted(presets, key=lambda preset: (preset.device != "cpu", preset.min_memory_gb, preset.name))


def pick_preset(device: str, memory_gb: float, available: Callable[[str], bool]) -> tuple[str, str]:
    """Choose a preset for a device; returns its name and the reason in words.

    A GPU's memory is taken with 6 % of slack, because a card sold as 8 GB reports 7.6 to 8.0. On a CPU nothing
    is downloaded unasked: `available(model)` says whether a base model is already on this machine.
    """
    fitting = [p for p in list_presets() if p.device == device and p.min_memory_gb <= memory_gb * 1.06]
    if device == "cuda":
        if fitting:
            best = fitting[-1]
            return best.name, f"the largest preset that a GPU of {memory_gb:.0f} GB holds"
        return BUILTIN, f"a GPU of {memory_gb:.1f} GB is below the smallest GPU preset"
    for preset in reversed(fitting):
        if preset.name != BUILTIN and available(preset.settings["model_name_or_path"]):
            return preset.name, "no CUDA GPU, and its base model is already on this machine"
    return BUILTIN, "no CUDA GPU; --preset cpu-small downloads a real small base model (270 MB)"


def resolve_config(
    flags: Mapping[str, Any],
    config_file: Path | None = None,
    pick_auto: Callable[[], tuple[str, str]] = lambda: (BUILTIN, "the default"),
) -> ResolvedConfig:
    """Lay defaults, preset, config file and flags over each other and validate the whole.

    `flags` holds only what was given. `pick_auto` is called when the preset is `auto`, and returns a name and a
    reason. Raises ConfigError listing every unknown key and every bad value with the layer it came from.
    """
    file_values = read_toml(config_file) if config_file else {}
    asked, reason = flags.get("preset") or file_values.get("preset"), "as asked"
    if asked is None and {**file_values, **flags}.get("model_name_or_path"):
        asked, reason = "none", "a base model was named, so its settings are the defaults"
    asked = asked or "auto"
    name, reason = pick_auto() if asked == "auto" else (str(asked), reason)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if name != "none":
        layers.append((f"preset {name}", load_preset(name).settings))
    if config_file:
        layers.append((str(config_file), file_values))
    layers.append(("flag", flags))

    values: dict[str, Any] = {}
    origins = dict.fromkeys(TrainConfig.model_fields, "default")
    for origin, layer in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    values["preset"], origins["preset"] = name, origins["preset"] if asked == name else "auto"
    return ResolvedConfig(_validate(values, origins), origins, reason)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Expected a TOML file of settings.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}.") from None


def describe_limits(field: FieldInfo) -> str:
    """Say in words a setting's unit and what it accepts, such as `tokens, >= 16`; empty when there is nothing."""
    extra: Any = field.json_schema_extra
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [(sign, getattr(rule, key, None)) for rule in field.metadata for key, sign in signs.items()]
    limits = [f"{sign} {value:,}" for sign, value in found if value is not None]
    return ", ".join([extra["unit"], *limits] if extra["unit"] else limits)


def describe_setting(name: str) -> str:
    """A setting's help with its unit and limits."""
    field = TrainConfig.model_fields[name]
    limits = describe_limits(field)
    return f"{field.description}{f' [{limits}]' if limits else ''}"


def describe_value(value: Any) -> str:
    """A setting's value as a person writes it: true, 0.0002, q_proj, v_proj; `none` where it is absent or empty."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if value is None or value == []:
        return "none"
    return ", ".join(value) if isinstance(value, list) else str(value)


def validate_settings(values: Mapping[str, Any], origin: str) -> TrainConfig:
    """Validate settings that all come from one place. Raises ConfigError naming every problem."""
    return _validate(dict(values), dict.fromkeys(values, origin))


def _validate(values: dict[str, Any], origins: dict[str, str]) -> TrainConfig:
    known = list(TrainConfig.model_fields)
    problems = [f"{key} ({origins[key]}): no such setting.{suggest(key, known)}" for key in values if key not in known]
    # TOML and flags have no null: the word none stands for it where a setting may be absent.
    clean = {k: None if v == "none" and k != "preset" else v for k, v in values.items() if k in known}
    try:
        config = TrainConfig.model_validate(clean)
    except ValidationError as error:
        problems += [_explain(dict(item), origins) for item in error.errors()]
    if problems:
        raise ConfigError(join_problems("These settings can't be used:", problems))
    return config


def _explain(item: dict[str, Any], origins: dict[str, str]) -> str:
    if not item["loc"]:  # a problem of two settings together
        return str(item["msg"]).removeprefix("Value error, ")
    name = str(item["loc"][0])
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    about = TrainConfig.model_fields[name].description
    return f"{name} = {item['input']!r} ({origins.get(name, 'default')}): {message}. {about}"


def suggest(word: str, known: Collection[str]) -> str:
    """Name the closest of the known words, if one is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f' Did you mean "{close[0]}"?' if close else ""
