"""The order of the modules, and where the heavy libraries may be imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "qlora_tune"
ORDER = [
    "errors",
    "disk",
    "system_memory",
    "config",
    "json_stream",
    "turns",
    "shape_readers",
    "shapes",
    "row_files",
    "long_chats",
    "encoded_files",
    "delimited",
    "containers",
    "hub",
    "duplicates",
    "data",
    "text_signs",
    "quality",
    "lengths",
    "check",
    "check_page",
    "repair",
    "instruction_templates",
    "mixture",
    "documents",
    "scores",
    "votes",
    "answer_files",
    "contracts",
    "clusters",
    "unseen",
    "endpoint",
    "self_instruct",
    "tool_text",
    "chat_format",
    "preferences",
    "base",
    "base_shape",
    "processes",
    "model",
    "adapter_record",
    "adapters",
    "runs",
    "launch",
    "prepare",
    "recipe",
    "lifecycle",
    "layout",
    "memory",
    "pace",
    "preview",
    "arena",
    "fused",
    "attention",
    "layers",
    "recompute",
    "fast",
    "generate",
    "likelihood",
    "forgetting",
    "selection",
    "comparison",
    "evaluate",
    "trainer",
    "pair_trainer",
    "train",
    "pair_scores",
    "parity",
    "gguf_adapter",
    "modelfile",
    "rotation",
    "leaks",
    "card",
    "export",
    "pair_setup",
    "pair_stage",
    "prefer",
    "hub_models",
    "reward_model",
    "chat",
    "side_by_side",
    "outsiders",
    "grow",
    "reward",
    "terminal",
    "terminal_report",
    "terminal_progress",
    "flags",
    "plan",
    "doctor",
    "page_parts",
    "report",
    "page_guard",
    "page_widgets",
    "ballots",
    "page_chat",
    "page_review",
    "cli_data",
    "cli_train",
    "cli_evaluate",
    "cli_prefer",
    "cli_reward",
    "cli_compare",
    "cli_grow",
    "reproduce",
    "cli_share",
    "cli",
    "__main__",
]
MODULES = sorted(PACKAGE.glob("*.py"))
OF_TORCH = {"arena", "fused", "attention", "recompute"}  # functions of torch throughout, imported inside functions
OF_PAGE = {"page_widgets", "page_chat", "page_review"}  # widgets throughout; page_widgets alone imports gradio
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "gradio", "safetensors"}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    return {name for node in nodes for name in imported(node)}


def test_every_module_has_its_place_in_the_order() -> None:
    assert {path.stem for path in MODULES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_those_before_it(path: Path) -> None:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("qlora_tune.") and name.count(".") == 1}
    later = ORDER[ORDER.index(path.stem) :] if path.stem in ORDER else ORDER
    assert not own & set(later)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = imports(path, top_level_only=True)
    with_torch = path.stem in OF_TORCH
    own = {"torch"} if with_torch else {"gradio"} if path.stem == "page_widgets" else set()
    assert not {name.split(".")[0] for name in found} & HEAVY - own
    assert with_torch or not {f"qlora_tune.{name}" for name in OF_TORCH} & found
    assert path.stem in OF_PAGE or not {f"qlora_tune.{name}" for name in OF_PAGE} & imports(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_trl_peft_and_bitsandbytes_stay_where_they_belong(path: Path) -> None:
    allowed = {
        "trl": {"trainer", "pair_trainer"},
        "peft": {"adapters", "layers", "trainer", "export", "reward_model"},
        "bitsandbytes": {"layers", "doctor"},
        "gradio": {"page_widgets"},
    }
    for library, places in allowed.items():
        if library in {name.split(".")[0] for name in imports(path)}:
            assert path.stem in places, library


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_outgrows_400_lines_and_each_says_what_it_is_for(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_code_of_a_model_is_ever_run() -> None:
    for path in MODULES:
        assert "trust_remote_code=True" not in path.read_text()
