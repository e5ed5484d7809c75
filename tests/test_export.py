"""What leaves: nothing private in it, and it answers as the trained model did."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_part

from qlora_tune import export as exports
from qlora_tune.adapters import load_adapter
from qlora_tune.errors import ExportError, ModelError, RunError
from qlora_tune.export import export_adapter, merge_adapter, open_adapter
from qlora_tune.generate import generate_answers
from qlora_tune.model import load_base
from qlora_tune.parity import Parity


@pytest.fixture(scope="module")
def run(finished: Any) -> Any:
    return finished[0]


@contextmanager
def on_all_prompts() -> Iterator[None]:
    """Compare what is exported on a hundred prompts, as outside the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tune.parity.ROWS", 100)
        yield


@pytest.fixture(scope="module")
def trained(run: Any) -> Any:
    return open_adapter(run.adapter)


@pytest.fixture(scope="module")
def zipped(trained: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Path(tmp_path_factory.mktemp("out") / "mine.zip")
    with on_all_prompts():
        parity = export_adapter(trained, run, target)
    assert (parity.prompts, parity.same) == (100, 100)
    assert 0 <= parity.mean_kl <= parity.max_kl < 1e-6
    return target


@pytest.fixture(scope="module")
def merged(trained: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parity]:
    target = tmp_path_factory.mktemp("out") / "merged"
    with on_all_prompts():
        return target, merge_adapter(trained, run, target)


def test_the_zip_holds_exactly_what_may_leave(zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "qlora_tune.json",
        "recipe.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_file_in_the_zip_holds_an_absolute_path(zipped: Path, run: Any) -> None:
    with zipfile.ZipFile(zipped) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not name.startswith("/")
            for private in (str(Path.home()), str(Path.cwd()), str(run.path), str(run.path.parent)):
                assert private.encode() not in content, name
            if not name.endswith((".safetensors", "tokenizer.json")):
                assert not re.search(r"(?<![\w:/.])/(home|root|tmp|usr|var|work|Users)/", content.decode()), name


def test_generation_stops_at_the_end_of_turn_by_the_exported_config(zipped: Path, trained: Any, run: Any) -> None:
    with zipfile.ZipFile(zipped) as archive:
        config = json.loads(archive.read("mine/generation_config.json"))
        card = archive.read("mine/README.md").decode()
    assert trained.chat.end_of_turn_id in config["eos_token_id"]
    scores = json.loads((run.path / "scores.json").read_text())
    base, tuned = (100 * scores["all"][side]["exact_match"] for side in ("base", "tuned"))
    assert f"| all | 50 | {base:.1f} % | {tuned:.1f} % | {tuned - base:+.1f} (" in card
    assert "| perplexity |" in card
    assert "## Parity" in card
    assert "compared with the trained model: 100 of 100 greedy answers equal; KL divergence of next tokens " in card


def test_the_unpacked_adapter_loads_by_peft_alone(zipped: Path, trained: Any, run: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path)
    base = load_base(trained.base, trained.device, trained.precision, trained.quantization)
    model = PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    ids = torch.tensor([trained.chat.encode_prompt([{"role": "user", "content": "Hello"}])])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, trained.load().eval()(ids).logits)


def test_an_export_needs_the_name_of_a_zip(trained: Any, run: Any, tmp_path: Path) -> None:
    for target in (tmp_path / "folder", tmp_path):
        with pytest.raises(ExportError, match="name of a .zip file"):
            export_adapter(trained, run, target)


def test_a_private_path_or_a_token_keeps_the_export_from_leaving(trained: Any, run: Any, tmp_path: Path) -> None:
    for text in (f"see {Path.home()}/notes", "key hf_abcdefghijklmnopqrstuvwxyz0123", "from /home/someone/data.jsonl"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exports, "write_model_card", lambda *_, text=text, **__: text)
            with pytest.raises(ExportError, match="must not leave this machine"):
                export_adapter(trained, run, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []


def scale_a_tensor(folder: Path, file: str, part: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / file)
    name = next(name for name in sorted(weights) if part in name)
    save_file({**weights, name: weights[name] * 1.1}, folder / file, metadata={"format": "pt"})


def change_the_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("Hello! " + path.read_text())


def lose_a_stop_token(folder: Path) -> None:
    path = folder / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "eos_token_id": content["eos_token_id"][1:]}))


BREAKS = {
    "a tensor": (lambda folder: scale_a_tensor(folder, "adapter_model.safetensors", "lora_B"), "answers otherwise"),
    "the template": (change_the_template, "chat template make other tokens of the prompt of sample_heldout.jsonl:1 "),
    "a stop token": (lose_a_stop_token, "does not end answers at '"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_adapter_is_not_kept(what: str, trained: Any, run: Any, tmp_path: Path) -> None:
    damage, message = BREAKS[what]
    write = exports._write_adapter_files

    def broken(trained: Any, run: Any, folder: Path) -> None:
        write(trained, run, folder)
        damage(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "_write_adapter_files", broken)
        with pytest.raises(ExportError, match=message):
            export_adapter(trained, run, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_merged_model_is_not_kept(what: str, trained: Any, run: Any, tmp_path: Path) -> None:
    damage, message = BREAKS[what]
    if what == "a tensor":
        message = "the merged weight is .* away from base and adapter together"

    def broken(path: Path) -> None:  # the last thing that is written before the checks
        if what == "a tensor":
            scale_a_tensor(path.parent, "model.safetensors", "q_proj")
        else:
            damage(path.parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "_clean_config", broken)
        with pytest.raises(ExportError, match=message):
            merge_adapter(trained, run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_merged_wrong_is_not_kept(trained: Any, run: Any, tmp_path: Path) -> None:
    merge = exports._merge

    def wrong(trained: Any, dtype: str) -> Any:
        model = merge(trained, dtype)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "_merge", wrong)
        with pytest.raises(ExportError, match=r"layers.1.mlp.down_proj: the merged weight is 10.0% away"):
            merge_adapter(trained, run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_the_merged_models_greedy_answers_equal_the_adapters_on_50_held_out_rows(
    trained: Any, run: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    answers = json.loads((run.path / "scores.json").read_text())["answers"]
    prompts = [answer["prompt"] for answer in answers]
    assert len(prompts) == 50
    # Both in float32: in bfloat16 each rounds its own way, which turns near ties (1 or 2 of 50 here).
    merge_adapter(trained, run, tmp_path / "merged", dtype="float32")
    base = load_base(trained.base, trained.device, trained.precision, trained.quantization).dequantize().float()
    adapter = load_adapter(base, trained.adapter, trained.base)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ask = {"max_new_tokens": 48, "batch_size": 25}
    expected = generate_answers(adapter, trained.chat, prompts, **ask)
    found = generate_answers(plain, trained.chat, prompts, **ask)
    assert len(set(expected)) > 10
    assert found == expected


def test_the_merged_model_is_plain_16_bit_and_close_to_the_adapter(merged: tuple[Path, Parity]) -> None:
    from safetensors.torch import load_file

    folder, parity = merged
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in weights)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert parity.mean_kl < 2e-3
    assert parity.same >= 95  # near ties of bfloat16 turn
    assert f"{parity.same} of 100 greedy answers equal" in (folder / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} >= {"chat_template.jinja", "generation_config.json", "README.md"}


def test_merging_into_the_original_base_is_close_but_not_the_same(
    trained: Any, run: Any, tmp_path: Path, merged: Any
) -> None:
    parity = merge_adapter(trained, run, tmp_path / "original", into="original")
    assert 5 * merged[1].mean_kl < parity.mean_kl < 0.2


def test_a_merged_model_beyond_the_limit_is_not_kept(trained: Any, run: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "KL_LIMIT", 1e-12)
        with pytest.raises(ExportError, match="answers otherwise than the adapter: .*a mean KL of at most 1e-12"):
            merge_adapter(trained, run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_not_opened_with_another_base(run: Any, tmp_path: Path) -> None:
    from test_model import changed_base

    with pytest.raises(ModelError, match="was trained on builtin"):
        open_adapter(run.adapter, str(changed_base(tmp_path).path))


def test_a_run_without_an_adapter_says_how_to_go_on(tmp_path: Path) -> None:
    from conftest import settings

    from qlora_tune.runs import new_run

    with pytest.raises(RunError, match="--resume"):
        new_run(settings(runs_dir=str(tmp_path))).require_adapter()


def test_a_run_on_a_base_in_a_local_folder_exports_without_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import settings
    from test_model import copied_base

    from qlora_tune.prepare import prepare
    from qlora_tune.runs import new_run
    from qlora_tune.train import train

    folder = copied_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_part(tmp_path / "rows.jsonl", "sample.jsonl", slice(20))
    changes = {"model_name_or_path": "base", "max_steps": "2", "runs_dir": str(tmp_path / "runs")}
    config = settings(data=["rows.jsonl"], score_rows="0", heldout_share="0", **changes)
    run = new_run(config)
    train(config, run, prepare(config))
    target = tmp_path / "out" / "x.zip"
    export_adapter(open_adapter(run.adapter), run, target)
    with zipfile.ZipFile(target) as archive:
        assert all(str(tmp_path).encode() not in archive.read(name) for name in archive.namelist())
        assert json.loads(archive.read("x/qlora_tune.json"))["base_model"] == "base"
        archive.extractall(tmp_path / "received")
    monkeypatch.chdir(tmp_path / "received")
    with pytest.raises(ModelError, match="no such folder.*--model-name-or-path"):
        open_adapter(tmp_path / "received" / "x")
    assert open_adapter(tmp_path / "received" / "x", str(folder)).base.name == str(folder)


def test_an_adapter_is_opened_with_the_revision_it_was_trained_on(run: Any, tmp_path: Path) -> None:
    import shutil

    from qlora_tune import base as bases
    from qlora_tune.config import shipped_path

    folder = tmp_path / "adapter"
    shutil.copytree(run.adapter, folder)
    record = json.loads((folder / "qlora_tune.json").read_text())
    changed = {**record, "base_model": "someone/base", "base_revision": "abc123"}
    (folder / "qlora_tune.json").write_text(json.dumps(changed))
    asked = []

    def download(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return shipped_path("builtin")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "_download", download)
        open_adapter(folder)
    assert asked == [("someone/base", "abc123")]
