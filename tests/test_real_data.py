"""Real instruction files with real dirt: each is read, or refused for the right reason, and every row is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tune.check import check_files
from qlora_tune.data import load_examples
from qlora_tune.errors import DataError
from qlora_tune.mixture import load_recipe, mix_examples, write_mixture

# Rows in, rows kept, the shape of most. Folders of the real data, by file.
READ = {
    "alpaca/alpaca_cot_zh_11.jsonl": (11, 10, "alpaca"),
    "alpaca/alpaca_en_demo.json": (999, 999, "alpaca"),
    "alpaca/alpaca_tiny_with_text.json": (100, 100, "alpaca"),
    "alpaca/dolly_12.json": (12, 12, "dolly"),
    "alpaca/dolly_3k_rows0-699.json": (700, 700, "alpaca"),
    "gpteacher/toolformer_similarity_0.6.json": (2396, 2396, "alpaca"),
    "messages/chatml_zh_4.jsonl": (4, 4, "messages"),
    "messages/toy_chat_fine_tuning.jsonl": (5, 4, "messages"),
    "messages/v1_sft_demo.jsonl": (500, 500, "messages"),
    "planted/containers/bom_crlf.jsonl": (5, 5, "alpaca"),
    "planted/containers/cp1252.csv": (6, 6, "alpaca"),
    "planted/containers/json_array_named_jsonl.jsonl": (5, 5, "alpaca"),
    "planted/containers/no_final_newline.jsonl": (5, 5, "alpaca"),
    "planted/containers/single_object.json": (1, 1, "alpaca"),
    "planted/containers/utf16_bom.jsonl": (6, 6, "alpaca"),
    "self_instruct/seed_tasks.jsonl": (175, 175, "self-instruct"),
    "self_instruct/user_oriented_instructions.jsonl": (252, 252, "self-instruct"),
    "sharegpt/conversation_1.json": (1, 1, "sharegpt"),
    "sharegpt/dummy_conversation.json": (500, 500, "sharegpt"),
    "sharegpt/glaive_toolcall_en_demo.json": (300, 300, "sharegpt"),
    "t0_templates/ag_news_classify.jsonl": (200, 200, "prompt-completion"),
    "t0_templates/common_gen_Put_together.jsonl": (200, 200, "prompt-completion"),
}
REFUSED = {
    "clinical/MTS-Dialog-TrainingSet.csv": 'its keys ("ID", "section_header", "section_text", "dialogue")',
    "council/answer_gpt35.jsonl": "is plain text",
    "council/gen_13b-alpaca.jsonl": "a prompt but no answer",
    "council/vicuna_bench_question.jsonl": "a prompt but no answer",
    "eval/ifeval_input_data.jsonl": "a prompt but no answer",
    "eval/mt_bench_reference_gpt4.jsonl": "are no known shape",
    "flan/cot_aqua.tsv": '"column_1", "column_2", "column_3"',
    "flan/flan_collection_info.csv": "are no known shape",
    "planted/containers/truncated.jsonl.gz": "damaged or cut off",
    "planted/leak_a.key.jsonl": "are no known shape",
    "preference/dpo_en_demo.json": "preference pair",
    "preference/kto_en_demo.json": "judged answer",
    "preference/stack_exchange_paired_tiny.json": "preference pair",
    "raw/dedup_demo_14.jsonl": "is plain text",
    "raw/structured_demo.csv": "is plain text",
    "raw/structured_demo.parquet": "is plain text",
    "sharegpt/conversation_1_empty_turn.json": "turn 2 (assistant) is empty",
    "t0_templates/trec_fine_grained_ABBR.jsonl": "the file has no rows",
}


@pytest.mark.parametrize("name", READ)
def test_a_real_file_is_read_row_for_row(shared_data: Path, name: str) -> None:
    rows_in, kept, shape = READ[name]
    _, report = load_examples([shared_data / name])
    assert (report.rows_in, report.kept, report.rejected) == (rows_in, kept, rows_in - kept)
    assert report.shapes.most_common(1)[0][0] == shape


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_pairs_is_refused_with_the_reason(shared_data: Path, name: str) -> None:
    with pytest.raises(DataError) as refused:
        load_examples([shared_data / name])
    assert REFUSED[name] in str(refused.value)


def test_checking_every_file_at_once_counts_every_row(shared_data: Path) -> None:
    files = [path for path in sorted(shared_data.rglob("*")) if path.is_file() and path.suffix != ".md"]
    report = check_files(files)
    assert [Path(file.path).name for file in report.files if file.refused] == ["truncated.jsonl.gz"]
    assert report.rows_in == report.kept + report.rejected > 19_000
    assert report.counts["unreadable row"] == report.rejected


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("flan/cot_strategyqa.tsv", {"prompt": "column_1", "completion": "column_2"}, 2061),
        ("flan/cot_aqua.tsv", {"question": "column_1", "answer": "column_3"}, 2728),
        ("council/gen_13b-alpaca.jsonl", {"question": "text", "answer": "generation"}, 80),
        ("clinical/MTS-Dialog-ValidationSet.csv", {"prompt": "dialogue", "completion": "section_text"}, 100),
    ],
)
def test_columns_of_other_names_are_mapped(shared_data: Path, name: str, columns: dict[str, str], rows: int) -> None:
    _, report = load_examples([shared_data / name], columns=columns)
    assert report.rows_in == rows
    assert report.kept >= rows - 5


def test_twenty_clinical_tasks_get_a_system_prompt_each_and_small_ones_survive_the_split(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "clinical" / "MTS-Dialog-TrainingSet.csv"
    columns = {"prompt": "dialogue", "completion": "section_text", "task": "section_header"}
    _, read = load_examples([source], columns=columns)
    templates = "".join(f'[[template]]\ntask = "{task}"\nsystem = "Write the section {task}."\n' for task in read.tasks)
    (tmp_path / "templates.toml").write_text(templates)
    mapping = ", ".join(f'{name} = "{column}"' for name, column in columns.items())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'templates = "templates.toml"\n[[source]]\npath = "{source}"\nmap = {{ {mapping} }}\n')
    mixture = mix_examples(load_recipe(recipe))
    assert len(mixture.by_task) == 20
    assert sum(task.rows_in for task in mixture.by_task) == 1201
    assert all(task.rows_in == task.train + task.heldout + task.dropped for task in mixture.by_task)
    smallest = min(mixture.by_task, key=lambda task: task.rows_in)
    assert (smallest.rows_in, smallest.train) == (2, 2)
    assert 100 <= len(mixture.heldout) <= 140
    train_file, heldout_file = write_mixture(mixture, tmp_path / "mixed.jsonl")
    rows = [json.loads(line) for line in train_file.read_text(encoding="utf-8").splitlines()]
    assert all(row["messages"][0]["content"] == f"Write the section {row['task']}." for row in rows)
    leaks = check_files([train_file], [heldout_file]).counts
    assert not leaks["leak: same conversation"] + leaks["leak: same prompt"]
