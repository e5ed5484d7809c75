"""The shipped sample: its four files hold what they claim, and no held-out row has been read before."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import corpus
import leaks
import make_sample
import pytest
from sample_tasks import TASKS, UNSCORED_TASKS, UNSEEN_TASKS
from split import ENTITIES, is_reserved
from transformers import AutoTokenizer
from world import ANIMALS, COUNTRIES, JOBS

ROOT = Path(__file__).resolve().parent.parent
FILES = ("sample.jsonl", *leaks.SCORED_FILES)


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return leaks.read_rows(ROOT / "sample.jsonl")


@pytest.fixture(scope="module")
def scored() -> dict[str, dict]:
    return leaks.read_scored(ROOT)


def test_the_script_makes_exactly_the_shipped_files() -> None:
    made = make_sample.make_files(seed=0, rows_per_task=make_sample.PAIRS, scored_per_task=make_sample.SCORED)
    for name in FILES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == made[name], name


def test_every_task_has_rows_in_its_files(pairs: list[dict], scored: dict[str, dict]) -> None:
    assert set(Counter(row["task"] for row in pairs)) == TASKS.keys() | UNSCORED_TASKS.keys()
    tasks = {name: {row["task"] for key, row in scored.items() if key.startswith(name)} for name in leaks.SCORED_FILES}
    assert tasks["sample_heldout.jsonl"] == tasks["sample_rephrased.jsonl"] == TASKS.keys()
    assert tasks["sample_unseen.jsonl"] == UNSEEN_TASKS.keys()
    assert len(TASKS) >= 16
    assert len(UNSEEN_TASKS) >= 4
    assert not TASKS.keys() & UNSEEN_TASKS.keys()


def test_no_held_out_prompt_or_answer_pair_stands_in_the_pairs(pairs: list[dict], scored: dict[str, dict]) -> None:
    assert len(scored) == 920
    assert leaks.find_in_pairs(scored, pairs) == []


def test_no_held_out_prompt_or_passage_stands_in_the_corpus(scored: dict[str, dict]) -> None:
    for shard in (0, min(corpus.PRACTICE_SHARDS)):
        documents = list(islice(corpus.generate_documents(0, shard), 6000))
        assert leaks.find_in_text(scored, ["\n".join(documents)]) == []


def test_answers_use_no_token_that_the_base_never_met(pairs: list[dict], scored: dict[str, dict]) -> None:
    """An embedding never trained can't be learned by LoRA: a "?", in the corpus always before a quote, came out as
    a broken byte, and "remember" as "reme"."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "qlora_tune" / "builtin")
    shards = [islice(corpus.generate_documents(0, shard), 5000) for shard in (0, 3, 7)]
    met = {token for documents in shards for text in documents for token in tokenizer.encode(text)}
    answers = [leaks.conversation(row)[1::2] for row in (*pairs, *scored.values()) if "messages" not in row]
    answers += [
        [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        for row in (*pairs, *scored.values())
        if "messages" in row
    ]
    used = {token for texts in answers for text in texts for token in tokenizer.encode(text)}
    assert {tokenizer.decode([token]) for token in used - met} == set()
    assert tokenizer.encode("?")[0] not in met


def test_the_card_tells_of_the_whole_corpus_and_of_these_files() -> None:
    card = (ROOT / "qlora_tune" / "builtin" / "README.md").read_text(encoding="utf-8")
    assert "**none found**" in card
    for name in leaks.SCORED_FILES:
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() in card, name


@pytest.mark.parametrize("how", ["as it is", "in capitals", "with another input break", "inside a longer text"])
def test_a_planted_copy_is_found(pairs: list[dict], scored: dict[str, dict], how: str) -> None:
    name, row = next((name, row) for name, row in scored.items() if row.get("input") and row["task"] == "summary")
    copies = {
        "as it is": dict(row),
        "in capitals": row | {"input": row["input"].upper()},
        "with another input break": {"instruction": f"{row['instruction']} {row['input']}", "output": row["output"]},
        "inside a longer text": {"instruction": f"Note this. {row['input']} Thanks.", "output": "ok"},
    }
    assert name in {leak.row for leak in leaks.find_in_pairs(scored, [*pairs, copies[how]])}
    assert name in {leak.row for leak in leaks.find_in_text(scored, ["\n".join(leaks.conversation(copies[how]))])}


def test_a_passage_inside_the_instruction_is_searched_for_too(scored: dict[str, dict]) -> None:
    inline = {
        "task": "past_tense",
        "instruction": "Past tense, please: Ravi pushes the old lamp.",
        "output": "Ravi pushed the old lamp.",
    }
    assert leaks.as_words("Ravi pushes the old lamp.") in leaks.texts_of(inline)


def test_the_last_question_of_a_talk_and_a_list_written_otherwise_are_found(scored: dict[str, dict]) -> None:
    talks = {name: row for name, row in scored.items() if "messages" in row and row["task"] not in leaks.NEED_CONTEXT}
    assert len(talks) > 20
    for name, row in talks.items():
        *_, question, answer = leaks.conversation(row)
        if len(leaks.as_words(question).split()) >= leaks.SHORTEST_TEXT:
            alone = {"task": row["task"], "instruction": question, "output": answer}
            assert name in {leak.row for leak in leaks.find_in_pairs({name: row}, [alone])}
    name, row = next((n, r) for n, r in scored.items() if r["task"] == "bullets" and r.get("input", "").count(",") > 1)
    *most, last = row["input"].split(", ")
    assert leaks.find_in_text({name: row}, [f"She bought {', '.join(most)} and {last}."])[0].row == name


def test_an_opposite_and_its_reverse_stand_on_one_side(pairs: list[dict], scored: dict[str, dict]) -> None:
    said = re.compile(r"the opposite of (\w+) is (\w+)", re.IGNORECASE)

    def opposites(rows: Iterable[dict]) -> set[frozenset[str]]:
        texts = " ".join(text for row in rows for text in leaks.conversation(row)).lower()
        return {frozenset(found) for found in said.findall(texts)}

    held_out = opposites(row for row in scored.values() if row["task"] == "words")
    assert len(held_out) > 3
    assert not held_out & opposites(pairs)


@pytest.mark.parametrize(
    ("task", "entities"),
    [
        ("country", [country.name for country in COUNTRIES]),
        ("animal", [animal.name for animal in ANIMALS]),
        ("job", [job.name for job in JOBS]),
    ],
)
def test_held_out_entities_are_never_asked_about_in_the_pairs(
    task: str, entities: list[str], pairs: list[dict], scored: dict[str, dict]
) -> None:
    def asked(row: dict) -> set[str]:
        words = set(leaks.as_words(leaks.conversation(row)[-2]).split())
        return {name for name in entities if name.lower() in words}

    of_pairs = {name for row in pairs if row["task"] == task for name in asked(row)}
    of_scored = {name for row in scored.values() if row["task"] == task for name in asked(row)}
    assert of_pairs
    assert of_scored
    assert not any(is_reserved(name, ENTITIES) for name in of_pairs)
    assert all(is_reserved(name, ENTITIES) for name in of_scored)


def test_the_corpus_is_the_same_for_the_same_seed_and_differs_otherwise() -> None:
    def text(seed: int, shard: int) -> str:
        return "".join(islice(corpus.generate_documents(seed, shard), 200))

    assert text(0, 3) == text(0, 3)
    assert text(0, 3) != text(1, 3)
    assert text(0, 3) != text(0, 4)
