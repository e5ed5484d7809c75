"""Files on the disk: their hashes, and a full disk foreseen, told apart from other failures and said in words."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from pathlib import Path

from qlora_tune.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left, or none for this user
_PROBE = b"\0" * (1 << 20)


def hash_file(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException) -> bool:
    """Whether a failure says that a disk is full: the system by a number, safetensors and NumPy in a sentence."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    said = str(error)
    return "requested and" in said or any(f"os error {number}" in said for number in _FULL)


def takes_nothing(folder: Path) -> bool:
    """Whether a folder's disk is full. Asked where a failure says nothing: torch.save's is "unexpected pos"."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return (file.write(_PROBE) or 0) < len(_PROBE)
    except OSError as error:
        return is_full(error)


def describe(error: Exception) -> str:
    """What the system refused, in a line."""
    place = getattr(error, "filename", None)
    if is_full(error):
        return (
            f"The disk is full{f' ({place})' if place else ''}. What was finished before is kept: free some space, "
            "and run the same command again."
        )
    return f"{place or 'this machine'}: {getattr(error, 'strerror', None) or error}"


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise RunError where fewer bytes than needed are free for a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: {what} take up to {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB left. "
            "Free some space, or choose another disk with --runs-dir."
        )
