"""Adapters of every kind: put on a base fresh, kept beside their base's fingerprint, and loaded again.

Station between the loaded base and training, scoring and chat. LoRA changes linear layers; prompt and prefix tuning put
virtual tokens before every sequence, as embeddings or as keys and values of every layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_tune import processes
from qlora_tune.adapter_record import read_adapter_record, refuse_other_base
from qlora_tune.base import BaseModel
from qlora_tune.chat_format import IGNORED
from qlora_tune.config import TrainConfig
from qlora_tune.errors import ConfigError, ModelError, RunError, join_problems
from qlora_tune.model import one_at_a_time

REWARD_HEAD = "base_model.model.score.weight"  # beside a reward model's LoRA weights, in the same file
REPLACING = ("olora", "pissa", "pissa_niter_16")  # they take what the adapter begins with out of the base's weights
PLAIN_STARTS = ("default", "gaussian")  # they change nothing at first, and look at no weight of the base
ERROR_PASSES = 16  # of svd_lowrank over a weight's rounding error


def refuse_untrainable(config: TrainConfig) -> None:
    """Raise ConfigError naming every setting of the adapter that can't be trained so, why, and what to use instead."""
    start, virtual = config.init_lora_weights, virtual_tokens_of(config)
    problems = []
    if start in REPLACING and config.load_in_4bit:
        problems.append(
            f"init_lora_weights {start} takes the adapter's beginning out of the base's weights, and a 4-bit base, "
            "rounded anew, is no longer the one that the adapter is put on later. Use loftq, or --no-load-in-4bit."
        )
    if start in REPLACING and processes.count() > 1:
        problems.append(f"init_lora_weights {start} changes the base, which one process alone can write down.")
    if start == "loftq" and not config.load_in_4bit:
        problems.append(
            "init_lora_weights loftq makes up for the rounding to 4 bits, and this base is not rounded. Use default."
        )
    if config.use_dora and start not in PLAIN_STARTS:
        problems.append(
            f"use_dora takes its magnitudes from the base alone, without what init_lora_weights {start} begins with. "
            "Use default or gaussian, or leave out use_dora."
        )
    if virtual and (config.use_dora or config.use_rslora or start != "default"):
        problems.append(
            f"peft_type {config.peft_type} has virtual tokens and no LoRA. Leave out use_dora, use_rslora and "
            "init_lora_weights."
        )
    if config.peft_type == "PREFIX_TUNING" and config.activation_checkpointing == "on":
        problems.append(
            "peft_type PREFIX_TUNING can't be trained with recomputed activations: a second forward pass would add its "
            "keys and values twice. Use --activation-checkpointing off, or PROMPT_TUNING."
        )
    if problems:
        raise ConfigError(join_problems("This adapter can't be trained:", problems))


def virtual_tokens_of(config: TrainConfig) -> int:
    """How many positions of the context an adapter of these settings takes for itself [tokens]."""
    return 0 if config.peft_type == "LORA" else config.num_virtual_tokens


def saved_rank(config: TrainConfig) -> int:
    """The rank of the LoRA matrices that a run leaves."""
    return config.lora_r * (2 if config.init_lora_weights in REPLACING else 1)


def describe_adapter(config: TrainConfig) -> str:
    """The kind of adapter in words, for the card beside Start and the terminal."""
    if virtual := virtual_tokens_of(config):
        return f"{config.peft_type.lower().replace('_', ' ')} with {virtual} virtual tokens, the plain way"
    start = "" if config.init_lora_weights == "default" else f" from {config.init_lora_weights}"
    return f"{'DoRA' if config.use_dora else 'rsLoRA' if config.use_rslora else 'LoRA'} r {config.lora_r}{start}"


def attach(model: Any, config: TrainConfig, base: BaseModel, start: Path) -> Any:
    """Put the fresh adapter of a run's settings on its base model.

    `start` is a folder for what save_adapter_files needs of an initialisation that changes the base.
    """
    if virtual_tokens_of(config):
        return _attach_virtual_tokens(model, config)
    if config.init_lora_weights not in PLAIN_STARTS:
        _refuse_rank(model, config.lora_r)
    tuned = attach_lora(model, config)
    if config.init_lora_weights == "loftq":
        _begin_with_rounding_error(tuned, base)
    if config.init_lora_weights in REPLACING:
        tuned.save_pretrained(start)
        changed = json.loads((start / "adapter_config.json").read_text()) | {"init_lora_weights": True}
        (start / "adapter_config.json").write_text(json.dumps(changed))  # loading it must not change the base again
    return tuned


def attach_lora(model: Any, config: TrainConfig, task_type: str = "CAUSAL_LM") -> Any:
    """Put a fresh LoRA adapter of these settings on a base model. Raises ModelError for unknown layer names."""
    return attach_adapter(
        model,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        seed=config.seed,
        task_type=task_type,
    )


def attach_adapter(
    model: Any,
    *,
    lora_r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str],
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = "default",
    seed: int = 42,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """Put a fresh LoRA adapter (arXiv 2106.09685) on a base model. Raises ModelError for unknown layer names."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    if targets != "all-linear":
        _check_targets(model, target_modules)
    config = LoraConfig(
        task_type=task_type,
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights if init_lora_weights in ("gaussian", *REPLACING) else True,
        bias="none",
    )
    return get_peft_model(model, config)


def _attach_virtual_tokens(model: Any, config: TrainConfig) -> Any:
    """Put virtual tokens before what a model reads: arXiv 2104.08691 as embeddings, 2101.00190 as keys and values."""
    import torch
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    torch.manual_seed(config.seed)
    shared: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": config.num_virtual_tokens}
    if config.peft_type == "PREFIX_TUNING":
        return get_peft_model(model, PrefixTuningConfig(**shared))
    return get_peft_model(model, PromptTuningConfig(**shared, prompt_tuning_init="SAMPLE_VOCAB"))


def _begin_with_rounding_error(tuned: Any, base: BaseModel) -> None:
    """Let the adapter begin as the best approximation of what the base lost in 4 bits: LoftQ (arXiv 2310.08659).

    One pass of it, as the base stays as it is. PEFT's own leaves out the adapter's scaling and needs a GPU. Raises
    ModelError where a layer's weight is not in the base's files under its name.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(base.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    for name, layer in tuned.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if f"{name}.weight" not in files:
            raise ModelError(f"{base.path}: no {name}.weight, which loftq needs. Use --init-lora-weights default.")
        with safe_open(files[f"{name}.weight"], framework="pt") as file:
            whole = file.get_tensor(f"{name}.weight")
        rounded = dequantize_module_weight(layer.get_base_layer()).float()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, s, v = torch.svd_lowrank(whole.to(rounded) - rounded, len(a), ERROR_PASSES)
        size = (s / layer.scaling["default"]).sqrt()
        a.data, b.data = (v * size).T.contiguous().to(a.dtype), (u * size).to(b.dtype)


def _refuse_rank(model: Any, lora_r: int) -> None:
    """Raise ModelError where a weight has not so many directions to begin with."""
    layers = [part for part in model.modules() if hasattr(part, "in_features")]
    if lora_r > (most := min(min(layer.in_features, layer.out_features) for layer in layers)):
        raise ModelError(
            f"lora_r is {lora_r}, but this base has a layer with a side of {most}. Use --lora-r {most} or less, or "
            "--init-lora-weights default."
        )


def _check_targets(model: Any, target_modules: Sequence[str]) -> None:
    """Every name must mean a linear layer: PEFT passes over unknown ones, and TRL's loss over an adapted head."""
    head = model.get_output_embeddings()
    linear = {name for name, part in model.named_modules() if "Linear" in type(part).__name__ and part is not head}
    if unknown := unknown_names(target_modules, linear):
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"lora_target_modules: {', '.join(unknown)} is no linear layer of this model. Expected all-linear, or some "
            f"of {', '.join(known)}."
        )


def is_named(layer: str, target: str) -> bool:
    """Whether a target means a layer, by PEFT's rule: its whole name, or the last parts of it."""
    return layer == target or layer.endswith(f".{target}")


def unknown_names(targets: Sequence[str], layers: Collection[str]) -> list[str]:
    """Those of the targets that mean none of the layers."""
    return [target for target in targets if not any(is_named(layer, target) for layer in layers)]


def keep_adapter_in_fp32(model: Any) -> None:
    """Cast everything that is trained to float32.

    TRL casts QLoRA adapters to bfloat16, where small steps round to nothing: at a learning rate of 2e-5 only 13 %
    of lora_A had moved after 10 steps, against 100 % in float32 (docs/log.md).
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def refuse_non_finite(model: Any, optimizer: Any = None) -> None:
    """Raise RunError where a trained weight, or what an optimizer remembers of its gradients, is no finite number."""
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        remembered = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        kept = {"": parameter, **{f" ({key} of the optimizer)": value for key, value in remembered.items()}}
        for of, values in kept.items():
            if torch.is_tensor(values) and not torch.isfinite(values).all():
                raise RunError(
                    f"{name}{of} holds values that are not finite numbers, so training was stopped before anything was "
                    "saved from it. Lower --learning-rate, or use --dtype float32."
                )


@contextmanager
def only_learned(model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs with which the output head scores only the positions whose next token is learned.

    The loss ignores all others. TRL drops them itself where Triton runs; elsewhere they took a fifth of a step.
    """
    from torch.nn.functional import pad

    targets = pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    learned = targets != IGNORED

    def select(module: Any, arguments: Any, output: Any) -> Any:
        states = output.last_hidden_state[:, -learned.shape[1] :]  # without those of virtual tokens
        output.last_hidden_state = states[learned].unsqueeze(0)
        return output

    kept = {name: value for name, value in inputs.items() if name != "labels"}
    hook = model.get_base_model().base_model.register_forward_hook(select)
    try:
        yield kept | {"shift_labels": targets[learned].unsqueeze(0)}
    finally:
        hook.remove()


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens a model has before each sequence: 0 without such an adapter, or while it is disabled."""
    if not getattr(model, "has_active_enabled_adapter", False):
        return 0
    return getattr(model.active_peft_config, "num_virtual_tokens", 0)


def virtual_cache(model: Any, rows: int) -> Any:
    """The keys and values of a model's virtual tokens, for a batch of so many rows to be read behind them.

    PEFT's own generate puts padding between prompt tuning's tokens and a row's, which moves the row's positions.
    """
    prompt = model.get_prompt(rows)
    if model.active_peft_config.peft_type == "PREFIX_TUNING":
        return prompt
    base = model.get_base_model()
    return base(inputs_embeds=prompt.to(base.dtype), use_cache=True, logits_to_keep=1).past_key_values


def save_adapter_files(model: Any, folder: Path, start: Path) -> None:
    """Write an adapter as PEFT does, for the unchanged base.

    Where its initialisation changed the base, `start` holds what was taken out of it, and what is written is plain
    LoRA of twice the rank; `start` is then removed.
    """
    replaced = start if start.exists() else None
    model.save_pretrained(folder, safe_serialization=True, path_initial_model_for_weight_conversion=replaced)
    shutil.rmtree(start, ignore_errors=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; export writes the real card


@one_at_a_time
def load_adapter(model: Any, folder: Path, base: BaseModel, name: str = "default") -> Any:
    """Put an adapter on its base, also beside others. Raises ModelError for another base or for other tensors."""
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    record = read_adapter_record(folder)
    if record["base_fingerprint"] != base.fingerprint:
        refuse_other_base(folder, record, base)
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, name)
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter is damaged: {error}") from None
    expected = {
        parameter.replace(f".{name}.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        for parameter, _ in model.named_parameters()
        if "lora_" in parameter and f".{name}." in parameter
    }
    expected = expected or {"prompt_embeddings"}  # PEFT's name of virtual tokens
    if stored - {REWARD_HEAD} != expected:
        raise ModelError(
            f"{folder}: the adapter file has {len(stored)} tensors, the model expects {len(expected)}, and "
            f"{len(stored ^ expected)} names differ. The file is incomplete or was changed."
        )
    broken = sum(not torch.isfinite(values).all() for part, values in model.named_parameters() if f".{name}." in part)
    if broken:
        raise ModelError(f"{folder}: {broken} tensors hold values that are not finite numbers. The file is damaged.")
    return model
