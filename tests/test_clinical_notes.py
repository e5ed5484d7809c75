"""Real dialogues with 20 kinds of note sections, trained for two steps: every section has its row in the table, and the
numbers in it are those that the answers themselves give."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import settings

from qlora_tune.comparison import score_table
from qlora_tune.contracts import read_contracts
from qlora_tune.evaluate import compare
from qlora_tune.prepare import prepare
from qlora_tune.runs import new_run
from qlora_tune.train import train

CONTRACTS = """
[[contract]]
task = "*"
regex = "(?!Doctor:|Patient:).+"
max_words = 12

[[contract]]
task = "ALLERGY"
labels = ["None.", "No known allergies."]

[[contract]]
task = "ROS"
max_characters = 40
"""


def keeps_contract(task: str, answer: str) -> bool:
    """What CONTRACTS says, said again in plain Python."""
    text = " ".join(answer.split())
    if task == "ALLERGY":
        return text.lower() in ("none.", "no known allergies.", "none", "no known allergies")
    if task == "ROS":
        return len(text) <= 40
    words = re.findall(r"[a-z0-9]+", text.lower())
    return bool(text) and not text.startswith(("Doctor:", "Patient:")) and len(words) <= 12


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and held-out rows: for each section the shortest dialogues, so that they fit the base's context."""
    from conftest import SHARED_DATA

    files = [SHARED_DATA / "clinical" / f"MTS-Dialog-{part}Set.csv" for part in ("Training", "Validation")]
    if not all(file.is_file() for file in files):
        pytest.skip("the real data files are not present (shared/ beside the checkout)")
    rows = defaultdict(list)
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                rows[row["section_header"]].append(row)
    folder = tmp_path_factory.mktemp("notes")
    paths = folder / "train.csv", folder / "heldout.csv"
    for path, chosen in zip(paths, (slice(2, 6), slice(0, 2)), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["ID", "section_header", "section_text", "dialogue"])
            writer.writeheader()
            for section in rows.values():
                writer.writerows(sorted(section, key=lambda row: len(row["dialogue"] + row["section_text"]))[chosen])
    return paths


def test_every_section_has_its_row_and_every_number_follows_from_the_answers(
    sections: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "contracts.toml").write_text(CONTRACTS)
    columns = {"instruction": "section_header", "input": "dialogue", "output": "section_text", "task": "section_header"}
    config = settings(
        data=[str(sections[0])],
        heldout_data=[str(sections[1])],
        map=[f"{field}={column}" for field, column in columns.items()],
        contracts=str(tmp_path / "contracts.toml"),
        max_steps="2",
        runs_dir=str(tmp_path / "runs"),
    )
    setup, run = prepare(config), new_run(config)
    assert run.read_config().contracts == str((tmp_path / "contracts.toml").resolve())
    comparison = compare(
        train(config, run, setup).model,
        setup.chat,
        setup.data.heldout_examples,
        score_rows=100,
        max_new_tokens=24,
        batch_size=40,
        seed=1,
        contracts=read_contracts(tmp_path / "contracts.toml"),
    )
    scores = comparison.by_task()
    assert len(scores) == 20
    assert sum(score.rows for score in scores) == comparison.total().rows == len(setup.data.heldout_examples) >= 35
    for score in scores:
        answers = [answer for answer in comparison.answers if answer.task == score.task]
        assert len(answers) == score.rows
        for means, texts in ((score.base, [a.base for a in answers]), (score.tuned, [a.tuned for a in answers])):
            assert means["contract"] == sum(keeps_contract(score.task, text) for text in texts) / score.rows, score.task
            same = [" ".join(t.split()) == " ".join(a.reference.split()) for t, a in zip(texts, answers, strict=True)]
            assert means["exact_match"] == sum(same) / score.rows
    table = score_table([*scores, comparison.total()]).splitlines()
    assert "contract kept" in table[0]
    assert len(table) == 2 + 20 + 1
    for score, line in zip([*scores, comparison.total()], table[2:], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:2] == [score.task, str(score.rows)]
        place = [cell.strip() for cell in table[0].split("|")[1:-1]].index("contract kept")
        assert cells[place] == f"{100 * score.base['contract']:.1f} → {100 * score.tuned['contract']:.1f}"
    assert 0 < comparison.total().base["contract"] < 1 or 0 < comparison.total().tuned["contract"] < 1
