"""Adapters and merged models on the model hub: what would leave, the upload, and an adapter fetched from there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_tune.disk import hash_file
from qlora_tune.errors import ExportError, ModelError
from qlora_tune.export import ADAPTER_FILES, PACKED_FILES, open_adapter

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Leaving:
    """A file that would be uploaded: its name, its size [bytes] and its sha256."""

    name: str
    size: int
    sha256: str


def check_repository(name: str) -> str:
    """A name as OWNER/NAME. Raises ExportError for anything else."""
    if not _REPOSITORY.fullmatch(name):
        raise ExportError(f"{name}: no name of a repository on the hub. Expected OWNER/NAME, such as anna/my-adapter.")
    return name


def require_token() -> str:
    """The hub's token, from HF_TOKEN in the environment and from nowhere else. Raises ExportError without one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ExportError(
            "HF_TOKEN is not set in the environment, so nothing can be uploaded. Make a token with write access in the "
            "hub's settings and set HF_TOKEN to it, or look at what would leave with --dry-run."
        )
    return token


@contextmanager
def open_export(exported: Path) -> Iterator[Path]:
    """The folder that would be uploaded: a merged model's own, or what a zip holds."""
    if exported.is_dir():
        yield exported
        return
    with tempfile.TemporaryDirectory(dir=exported.parent) as scratch, zipfile.ZipFile(exported) as archive:
        archive.extractall(scratch)
        yield Path(scratch) / exported.stem


def list_leaving(folder: Path) -> list[Leaving]:
    """Every file of a folder, as it would be uploaded. Reads each once."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [Leaving(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path)) for path in files]


def push_folder(folder: Path, repository: str, private: bool, token: str) -> str:
    """Upload a folder's files in one commit, into a repository that is made where there is none; returns its address.

    Raises ExportError where the hub refuses, and, before a file has left, where a private upload would land in a
    repository that is public, or the other way round.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        is_private = bool(hub.model_info(repository).private)
        if is_private != private:
            kind, flag = ("private", "--private") if is_private else ("public", "--public")
            raise ExportError(f"{repository} is there already and {kind}. Nothing was uploaded. Add {flag} to use it.")
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload what qlora-tune exported"
        )
    except ExportError:
        raise
    except Exception as error:  # each transport has errors of its own; none may show a header with the token
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(token, "HF_TOKEN")[:300]
        raise ExportError(f"{repository}: the hub did not take it: {reason}") from None
    return str(commit.commit_url).partition("/commit/")[0]


def is_repository(name: Path) -> bool:
    """Whether the name of an adapter is one on the hub: OWNER/NAME, and nothing of that name or owner lies here."""
    return bool(_REPOSITORY.fullmatch(name.as_posix())) and not name.exists() and not name.parent.exists()


def fetch_adapter(repository: str, folder: Path) -> Path:
    """Download an adapter from the hub into a folder of its own under `folder`; returns that.

    Only the files that an export holds are asked for, and they are checked as those of a zip are: nothing of it is
    run, and another base is refused. Raises ModelError where the hub has no such adapter or can't be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repository, allow_patterns=sorted(PACKED_FILES)))
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"{repository}: no such run or folder here, and no repository of the hub that can be had: {reason} Check "
            "the name, or the network (HF_HUB_OFFLINE forbids it)."
        ) from None
    missing = [name for name in (*ADAPTER_FILES, "adapter_config.json") if not (found / name).is_file()]
    if missing:
        raise ModelError(f"{repository}: no adapter made by qlora-tune ({', '.join(missing)} missing).")
    target = Path(tempfile.mkdtemp(prefix=f"{repository.partition('/')[2][:40]}-", dir=folder))
    for name in PACKED_FILES:
        if (found / name).is_file():
            shutil.copyfile(found / name, target / name)
    open_adapter(target)  # refuses another base before anything is loaded
    return target
