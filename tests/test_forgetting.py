"""What tuning cost elsewhere: loss on plain text, with the adapter and without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings

from qlora_tune.comparison import Comparison, read_comparison, to_markdown
from qlora_tune.errors import ConfigError
from qlora_tune.export import open_adapter
from qlora_tune.forgetting import WINDOW, measure_forgetting
from qlora_tune.prepare import find_plain_text


@pytest.fixture(scope="module")
def trained(finished: Any) -> Any:
    return open_adapter(finished[0].adapter)


@pytest.fixture(scope="module")
def model(trained: Any) -> Any:
    return trained.load()


def test_losses_are_those_of_a_plain_forward_pass_over_windows(model: Any, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Anna forgot the coin on Sunday. The colour of a bean is green.\n" * 20)
    found = measure_forgetting(model, trained.tokenizer, path, 4)
    ids = trained.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]

    def loss() -> float:
        total = tokens = 0
        for start in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])
            with torch.inference_mode():
                logits = model(window).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            tokens += window.shape[1] - 1
        assert tokens == found.tokens
        return total / tokens

    assert found.tuned == pytest.approx(loss(), abs=2e-2)  # bfloat16, other batches
    with model.disable_adapter():
        assert found.base == pytest.approx(loss(), abs=2e-2)
    assert found.change.mean == pytest.approx(found.tuned - found.base, abs=1e-6)
    assert found.change.low <= found.change.mean <= found.change.high


def test_an_adapter_that_does_nothing_has_forgotten_nothing(model: Any, trained: Any) -> None:
    path = find_plain_text(settings())
    assert path is not None
    silent = trained.load()
    with torch.no_grad():
        for name, parameter in silent.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = measure_forgetting(silent, trained.tokenizer, path, 16)
    assert found.tokens > 2000
    assert 0.3 < found.base < 2.0  # nats: text of the kind that it was trained on
    assert found.change.mean == found.change.low == found.change.high == 0
    damaged = trained.load()
    with torch.no_grad():
        for name, parameter in damaged.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    assert measure_forgetting(damaged, trained.tokenizer, path, 16).change.low > 0.1


def test_a_scored_run_keeps_it_and_shows_it(finished: Any) -> None:
    run = finished[0]
    comparison: Comparison = read_comparison(run)
    kept = json.loads((run.path / "scores.json").read_text())["forgetting"]
    assert comparison.forgetting is not None
    assert kept["base"] == comparison.forgetting.base
    assert math.isfinite(comparison.forgetting.tuned)
    said = comparison.forgetting.describe()
    assert said.startswith("loss on plain text (plain_text.txt, ")
    assert said.capitalize() in to_markdown(comparison)


def test_a_text_that_can_t_be_read_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "empty").write_text(" \n")
    for name, reason in (("none.txt", "can't be read"), ("picture", "no text in UTF-8"), ("empty", "has 2 bytes")):
        with pytest.raises(ConfigError, match=reason):
            find_plain_text(settings(plain_text=str(tmp_path / name)))
    assert find_plain_text(settings(plain_text="none")) is None


def test_each_base_is_measured_on_a_page_it_can_read() -> None:
    own, other = find_plain_text(settings()), find_plain_text(settings(model_name_or_path="someone/base"))
    assert own is not None
    assert other is not None
    assert own.parent.name == "builtin"
    assert "moving_average" in other.read_text()


def test_a_text_of_one_token_foretells_nothing(model: Any, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("a")
    assert len(trained.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]) == 1
    assert measure_forgetting(model, trained.tokenizer, path, 4) is None
