"""Datasets of the model hub: downloaded once through the datasets library, then read like any other file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from qlora_tune.errors import DataError

_DATASET_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.\[\]%:+-]+))?")


def is_dataset_id(name: str) -> bool:
    """Whether a name that is no path may be a dataset of the hub: owner/name, owner/name@configuration:split."""
    return bool(_DATASET_ID.fullmatch(name)) and not name.startswith(("./", "../"))


def fetch_dataset(name: str) -> Path:
    """Download a split of a dataset (owner/name@configuration:split; train by itself) and return it as a Parquet file.

    Downloaded once: the copy in the cache is used until it is deleted, so that a run can be resumed on the same rows.
    Raises DataError where there is no network, no such dataset, or one that would run code.
    """
    found = _DATASET_ID.fullmatch(name)
    identifier, configuration, split = found.groups() if found else (name, None, None)
    # Quoted, not simplified: "train[:10%]" and "train[-10:]" are different rows.
    parts = (identifier.replace("/", "--"), configuration, split or "train")
    kept = _cache_folder() / f"{'--'.join(quote(part, safe='') for part in parts if part)}.parquet"
    if kept.exists():
        return kept
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(identifier, configuration, split=split or "train")
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".unfinished")
        rows.to_parquet(str(unfinished))
        unfinished.replace(kept)
    except Exception as error:  # the library raises many kinds, down to those of its network layers
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(
            f"{name}: no such file or folder here, and no dataset of the hub that can be had: {reason} "
            "Check the path, or the network (HF_HUB_OFFLINE forbids it)."
        ) from None
    return kept


def _cache_folder() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "qlora_tune"
