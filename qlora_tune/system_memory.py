"""The memory of this machine, or of the container that this process runs in, and what of it is free.

A container, a Slurm job or a systemd service may hold less than the machine has. The kernel doesn't refuse it more, it
kills it; so the limits of its control groups count (Linux: cgroup v2's memory.max, v1's memory.limit_in_bytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMBERSHIP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Kind:
    """How a version of control groups names what it knows of memory."""

    limit: str
    used: str
    cache: str  # in memory.stat: pages of files that nobody has asked for lately, which the kernel gives up first


_V1 = _Kind("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Kind("memory.max", "memory.current", "inactive_file")


def total_bytes() -> int:
    """What this process and its like may hold in all."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """What can be taken without swapping, or being killed."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each group that this process is in, up to the machine's; none where there are no groups."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        kind, root = (_V1, _MOUNT / "memory") if controllers else (_V2, _MOUNT)
        group = Path(path.lstrip("/"))
        # A container may see its own group as the root, under the name that it has outside.
        for folder in (root / group, *(root / parent for parent in group.parents)):
            if (found := _read_group(folder, kind)) is not None:
                yield found


def _read_group(folder: Path, kind: _Kind) -> tuple[int, int] | None:
    """Limit and use of a group, or None where it has no limit or can't be read."""
    try:
        limit = (folder / kind.limit).read_text().strip()
        used = int((folder / kind.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if limit == "max" else (int(limit), used - int(stat.get(kind.cache, 0)))
    except (OSError, ValueError):
        return None
