"""Training in several processes of one machine, a GPU each, as `accelerate launch` and torchrun start them.

The first process leads: it alone reads the command, makes the run's folder, writes, prints and scores. The others
wait for its run and train along. Who is who stands in the environment that the launcher made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from qlora_tune.errors import ConfigError

_SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
_LONGEST_WAIT = timedelta(hours=1)  # for the main process to read its data, or to write a checkpoint
_told = False  # whether the main process has told the others what to do
_GRACE_S = 20.0  # the launcher ends the others soon after one has failed


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this is; 0 is the main one."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def together(command: Sequence[str]) -> Iterator[None]:
    """Run a command, or in another than the main process the training along with it, as one of several processes.

    Where the main process ends without having trained, the others are dismissed. What goes wrong is said by the main
    process: another one waits for its end to take it along, and raises only where that doesn't come. Raises
    ConfigError for what can't be done in several processes.
    """
    if count() == 1:
        yield
        return
    try:
        _refuse(command)
        _take_gpu()
        try:
            yield
        finally:
            if index() == 0 and not _told:
                share(None)
    except Exception:
        if index():
            time.sleep(_GRACE_S)
        raise


def share(what: Any) -> Any:
    """What the main process has to tell the others, in each of them; they wait for it. None dismisses them."""
    if count() == 1:
        return what
    global _told
    _told = True
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine only
    PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    return broadcast_object_list([what])[0]


def sum_up(tensor: Any) -> Any:
    """Add up a tensor over all processes, in place."""
    if count() > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def any_of(flag: bool, device: Any) -> bool:
    """Whether something holds in one of the processes."""
    if count() == 1:
        return flag
    import torch

    return bool(sum_up(torch.tensor(int(flag), device=device)))


def sum_gradients(model: Any) -> None:
    """Add up the gradients of what is trained; a process that had no row adds nothing."""
    import torch

    for parameter in model.parameters():
        if count() > 1 and parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sum_up(parameter.grad)


def deal_micro_batches(accumulation: int) -> int:
    """Micro-batches of a step in each process. Raises ConfigError where the step can't be dealt evenly."""
    if accumulation % count():
        raise ConfigError(
            f"gradient_accumulation_steps is {accumulation}, which {count()} processes can't share evenly without the "
            "fast path. Choose a multiple of their number, and --per-device-train-batch-size so that the product is "
            "the effective batch that you want."
        )
    return accumulation // count()


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def part() -> None:
    """End what the processes have in common: from here on each goes its own way."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def _refuse(command: Sequence[str]) -> None:
    launcher = f"accelerate launch started {count()} processes"
    if command[:1] != ["train"]:
        raise ConfigError(f"{launcher}, and only `train` can use several. Start this with: python -m qlora_tune")
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        raise ConfigError(f"{launcher} on several machines. Expected one machine; drop --num_machines.")
    for variable, name in _SPLITTING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ConfigError(
                f"{launcher} with {name}, which splits the weights between GPUs. Here every GPU holds the whole 4-bit "
                "base (data parallel). Use: accelerate launch --multi_gpu"
            )


def _take_gpu() -> None:
    """Show this process no GPU but its own, which is then its first one, as in training on a single GPU."""
    import torch

    found = torch.cuda.device_count()
    if found and found < count():
        raise ConfigError(
            f"accelerate launch started {count()} processes, and {found} GPUs are usable here. Each needs one of its "
            f"own: --num_processes {found}, or without `accelerate launch` where that is 1."
        )
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    if found:
        os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[index()]
        os.environ["LOCAL_RANK"] = "0"
