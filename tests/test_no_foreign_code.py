"""What comes from others runs no code here: pickles are not opened, and modules beside a model are not imported."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import copied_base

from qlora_tune.chat import unpack_adapter
from qlora_tune.check import check_files
from qlora_tune.cli import main
from qlora_tune.export import open_adapter
from qlora_tune.launch import uploads_folder
from qlora_tune.runs import Run, seal_checkpoint


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that appears when foreign code runs."""
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()
    proof.unlink()
    return tmp_path / "pwned"


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Run:
    """A copy of the short run that can be resumed."""
    shutil.copytree(finished[0].path, tmp_path / "runs" / "short")
    run = Run(tmp_path / "runs" / "short")
    run.update_state(status="stopped", pid=None)
    return run


def train_on(base: Path) -> int:
    return main(["train", "--model-name-or-path", str(base), "--preset", "none", "--max-steps", "1"])


def pickled_base(mark: Path, run: Run) -> int:
    folder = copied_base(mark.parent)
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    return train_on(folder)


def pickled_adapter(mark: Path, run: Run) -> int:
    (run.adapter / "adapter_model.safetensors").unlink()
    torch.save(Payload(mark), run.adapter / "adapter_model.bin")
    return main(["evaluate", str(run.adapter), "--data", str(run.path / "heldout.jsonl")])


def pickled_zip(mark: Path, run: Run) -> int:
    packed = mark.parent / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in run.adapter.iterdir():
            if path.name != "adapter_model.safetensors":
                archive.write(path, path.name)
        archive.writestr("adapter_model.bin", pickle.dumps(Payload(mark)))
    return main(["compare", str(packed), "base", "--data", str(run.path / "heldout.jsonl")])


def in_checkpoints(name: str) -> Callable[[Path, Run], int]:
    def resume(mark: Path, run: Run) -> int:
        for checkpoint in run.checkpoints.iterdir():
            torch.save(Payload(mark), checkpoint / name)
            seal_checkpoint(checkpoint)
        return main(["train", "--resume", str(run.path)])

    return resume


PICKLES: dict[str, Callable[[Path, Run], int]] = {
    "base": pickled_base,
    "adapter": pickled_adapter,
    "zip": pickled_zip,
    **{name: in_checkpoints(name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")},
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_never_opened(name: str, mark: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    ended = PICKLES[name](mark, run)
    assert not mark.exists()
    unread = ("training_args.bin", "rng_state.pth")  # nothing reads the one, and a run at its end not the other
    assert ended == (0 if name in unread else 2)
    assert "Traceback" not in capfd.readouterr().err


def write_module(folder: Path, name: str, mark: Path) -> None:
    (folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def model_with_code(mark: Path, run: Run) -> None:
    evil = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    folder = copied_base(mark.parent, auto_map=evil, model_type="evil")
    write_module(folder, "modeling_evil", mark)
    assert train_on(folder) == 2


def tokenizer_with_code(mark: Path, run: Run) -> None:
    folder = copied_base(mark.parent)
    write_module(folder, "tokenization_evil", mark)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )
    train_on(folder)


def adapter_with_code(mark: Path, run: Run) -> None:
    write_module(run.adapter, "evil", mark)
    evil = {"base_model_class": "Evil", "parent_library": "evil"}
    edit(run.adapter / "adapter_config.json", auto_mapping=evil)
    edit(run.adapter / "qlora_tune.json", sha256={})  # by their hashes it would be refused before
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(run.adapter))
        open_adapter(run.adapter).load()


def data_with_code(mark: Path, run: Run) -> None:
    folder = mark.parent / "data"
    folder.mkdir()
    write_module(folder, "data", mark)
    assert main(["check", str(folder)]) == 2
    assert check_files([folder / "data.py"]).kept == 0


@pytest.mark.parametrize("code", [model_with_code, tokenizer_with_code, adapter_with_code, data_with_code])
def test_a_module_beside_a_model_or_data_is_never_imported(
    code: Callable[[Path, Run], None], mark: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code(mark, run)
    assert not mark.exists()


def test_a_zip_with_modules_leaves_them_out(mark: Path, run: Run, tmp_path: Path) -> None:
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in run.adapter.iterdir():
            archive.write(path, path.name)
        archive.writestr("modeling_evil.py", f"open({str(mark)!r}, 'w')")
    adapter = unpack_adapter(packed, uploads_folder(tmp_path / "runs"))
    assert not list(adapter.glob("*.py"))
    open_adapter(adapter).load()
    assert not mark.exists()
