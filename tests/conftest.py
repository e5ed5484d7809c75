"""Shared pieces: the built-in base, a short finished run, the real data files where they are present."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.model import quiet_stack

quiet_stack()
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
# Locks of their own: a run of the user's must not refuse those of the tests, nor they it.
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="qlora-tune-tests-")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


LONG = {"test_page.py", "test_train.py", "test_adapters.py", "test_launch.py", "test_memory.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first: begun last, one would keep a single process busy for minutes at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _compare_exports_on_few_prompts() -> Iterator[None]:
    """Twenty prompts tell a broken export too; test_export.py compares its own on all hundred."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tune.parity.ROWS", 20)
        yield


@pytest.fixture(autouse=True, scope="module")
def _spare_the_garbage_collector() -> None:
    """Leave out of later collections what is there when a test file begins: a million objects of the libraries.

    Each training asks for several collections, which took a quarter of a short one.
    """
    if "trl" in sys.modules:
        gc.collect()
        gc.freeze()


@pytest.fixture
def shared_data() -> Path:
    """Real instruction data, which the project doesn't ship: its licences differ."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data files are not present ({SHARED_DATA.name}/ beside the checkout)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def builtin() -> tuple[Any, Any, Any]:
    """The built-in base with its tokenizer and chat format."""
    from qlora_tune.base import find_base
    from qlora_tune.model import load_tokenizer

    base = find_base("builtin")
    return base, *load_tokenizer(base.path)


def settings(**changes: Any) -> Any:
    """Settings of the builtin preset with some changes, and evaluations that a short run reaches."""
    from qlora_tune.config import resolve_config

    return resolve_config({"preset": "builtin", "eval_steps": "0.25", **changes}).config


def write_part(path: Path, shipped: str, rows: slice) -> str:
    """Write some rows of a shipped file into one of their own; returns its path."""
    path.write_text("".join((ROOT / shipped).read_text().splitlines(keepends=True)[rows]))
    return str(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One short run on sample.jsonl, trained and scored on some held-out rows: (run, config, result)."""
    from qlora_tune import evaluate
    from qlora_tune.comparison import write_comparison
    from qlora_tune.prepare import find_plain_text, prepare
    from qlora_tune.runs import new_run
    from qlora_tune.train import train

    runs_dir = tmp_path_factory.mktemp("runs")
    name = "sample_heldout.jsonl"
    heldout = write_part(tmp_path_factory.mktemp("rows") / name, name, slice(None, None, 3))
    config = settings(runs_dir=str(runs_dir), max_steps="24", run_name="short", score_rows="50", heldout_data=[heldout])
    setup = prepare(config)
    run = new_run(config)
    result = train(config, run, setup)
    comparison = evaluate.compare(
        result.model,
        setup.chat,
        setup.data.heldout_examples,
        score_rows=50,
        max_new_tokens=config.max_new_tokens,
        batch_size=25,
        seed=config.seed,
        plain_text=find_plain_text(config),
    )
    write_comparison(run, comparison)
    return run, config, result
