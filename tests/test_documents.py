"""Documents become pairs by rule: every answer stands in its document, every skip has a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from qlora_tune.data import load_examples
from qlora_tune.documents import Recipe, Task, load_recipe, make_pairs, read_documents, write_pairs
from qlora_tune.errors import ConfigError, DataError

GUIDE = """\
---
author: nobody
---

# A *short* guide

[![badge](b.svg)](ci)

How to brew a pot of tea in
three easy steps.

## Water

Boil it. See [why][1].

[1]: https://example.org

Setext
------

```
# no heading
```
"""


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    path = tmp_path / "guide.md"
    path.write_text(GUIDE)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def one_task(user: str, assistant: str, **limits: int) -> Recipe:
    return Recipe((Task("only", user, assistant, **limits),))


def test_the_built_in_recipe_gives_titles_openings_and_section_titles(guide: Path) -> None:
    report = make_pairs([guide])
    assert report.counts == {"title": 1, "opening": 1, "section title": 2}
    answers = {(e.task, e.source): e.answer for e in report.examples}
    assert answers == {
        ("title", "guide.md:5"): "A short guide",
        ("opening", "guide.md:5"): "How to brew a pot of tea in\nthree easy steps.",
        ("section title", "guide.md:12"): "Water",
        ("section title", "guide.md:18"): "Setext",
    }


def test_a_short_opening_is_skipped_with_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.md", "# T\n\nToo short.\n")
    report = make_pairs([path])
    assert report.counts["opening"] == 0
    assert ("opening", "the answer has 10 characters, expected at least 40") in [
        (s.task, s.reason) for s in report.skipped
    ]


def test_the_text_of_a_document_holds_all_but_the_front_matter(guide: Path) -> None:
    (document,) = read_documents([guide])
    fields = document.passages[0].fields
    assert "author" not in fields["text"]
    assert fields["text"].startswith("# A *short* guide")
    assert "# A *short* guide" not in fields["body"]
    assert "[1]: https://example.org" in fields["body"]
    assert [section.fields["section_title"] for section in document.sections] == ["Water", "Setext"]
    assert "# no heading" in document.sections[1].fields["section"]


def test_link_definitions_before_the_first_words_stay_in_the_text(tmp_path: Path) -> None:
    (document,) = read_documents([write(tmp_path / "a.md", "[1]: https://example.org\n\n# T\n\nSee [1].\n")])
    assert document.passages[0].text == "[1]: https://example.org\n\n# T\n\nSee [1]."


def test_a_text_file_has_a_title_only_where_its_first_line_stands_alone(tmp_path: Path) -> None:
    titled = write(tmp_path / "titled.txt", "Tea\r\n\r\nBoil water.\r\nWait.\r\n\r\nDrink.\r\n")
    plain = write(tmp_path / "plain.txt", "Boil water.\nWait.\n\nDrink.\n")
    report = make_pairs([titled, plain], one_task("{body}", "{title}"))
    assert [(e.messages[0]["content"], e.answer) for e in report.examples] == [("Boil water.\nWait.\n\nDrink.", "Tea")]
    assert [(s.source, s.reason) for s in report.skipped] == [("plain.txt:1", "{title} is missing or empty")]


def test_a_long_text_is_split_between_paragraphs_and_loses_none(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 20 for number in range(20)]
    path = write(tmp_path / "long.txt", "Title\n\n" + "\n\n".join(paragraphs))
    (document,) = read_documents([path], max_chars=500)
    assert all(len(passage.text) <= 500 for passage in document.passages)
    assert "\n\n".join(passage.text for passage in document.passages) == "\n\n".join(
        ["Title", *(paragraph.strip() for paragraph in paragraphs)]
    )
    assert [bool(passage.fields["title"]) for passage in document.passages][:2] == [True, False]
    assert path.read_text().split("\n")[int(document.passages[1].source.partition(":")[2]) - 1].startswith("Paragraph")


def test_a_paragraph_longer_than_a_piece_is_reported_and_what_stands_around_it_stays_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "before\nit\n\n" + "x" * 300 + "\n\nafter it\n")
    (document,) = read_documents([path], max_chars=200)
    assert [passage.text for passage in document.passages] == ["before\nit", "after it"]
    assert [skip.source for skip in document.skipped] == ["a.txt:4"]


def test_a_row_of_a_table_is_a_document_and_its_columns_are_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'town name,a:b\nParis,"two\nlines"\nRome\n007,NA\n')
    report = make_pairs([path], Recipe((Task("t", "Where? {a:b}", "{town name}", system="Say {a:b}."),)))
    assert [(e.source, e.answer) for e in report.examples] == [("t.csv:2", "Paris"), ("t.csv:5", "007")]
    assert report.examples[0].messages[0] == {"role": "system", "content": "Say two\nlines."}
    assert [(s.source, s.reason) for s in report.skipped] == [("t.csv:4", "the row has 1 cells, expected 2")]


def test_braces_in_a_document_stay_and_doubled_ones_in_a_template_are_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "q,a\n{a} {0!r} {{,{q}\n")
    report = make_pairs([path], one_task('{{"q": "{q}"}}', "{a}"))
    assert report.examples[0].messages[0]["content"] == '{"q": "{a} {0!r} {{"}'
    assert report.examples[0].answer == "{q}"


def test_an_unknown_field_is_refused_with_those_that_exist(guide: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)\{body\}.*\{title\}.*\"only\" names \{headline\}"):
        make_pairs([guide], one_task("{body}", "{headline}"))
    with pytest.raises(ConfigError, match=r"(?s)\{question\}.*\"title\" names \{body\}"):
        make_pairs([write(tmp_path / "t.csv", "question,reply\na,b\n")])


def test_a_task_for_tables_skips_texts_and_says_so(guide: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "question,reply\na,b\n")
    report = make_pairs([guide, table], one_task("{question}", "{reply}"))
    assert [e.source for e in report.examples] == ["t.csv:2"]
    assert [(s.source, s.reason) for s in report.skipped] == [("guide.md:1", "the document has no {question}")]


def test_an_answer_outside_its_limits_is_skipped_with_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "q,a\nx,1\nx,123\nx,12345\n")
    report = make_pairs([path], one_task("{q}", "{a}", min_chars=2, max_chars=4))
    assert [e.answer for e in report.examples] == ["123"]
    assert [s.reason for s in report.skipped] == [
        "the answer has 1 characters, expected 2 to 4",
        "the answer has 5 characters, expected 2 to 4",
    ]


def test_every_file_that_cannot_be_read_is_named_with_the_line(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"one\ntwo\ncaf\xe9\n")
    twice = write(tmp_path / "twice.csv", "a,a\n1,2\n")
    open_quote = write(tmp_path / "quote.csv", 'a,b\n1,2\n3,"4\n')
    with pytest.raises(DataError) as caught:
        make_pairs([latin, twice, open_quote, tmp_path / "none.txt", tmp_path / "a.pdf"])
    message = str(caught.value)
    for part in (
        "latin.txt:3: not UTF-8",
        "twice.csv:1",
        "quote.csv:3: not valid CSV",
        "none.txt: can't",
        "a.pdf: is no",
    ):
        assert part in message


def test_an_empty_document_is_counted(tmp_path: Path) -> None:
    report = make_pairs([write(tmp_path / "empty.md", "\n \n")])
    assert report.examples == ()
    assert ("empty.md:1", "", "the document is empty") in [(s.source, s.task, s.reason) for s in report.skipped]


def test_a_recipe_is_read_from_toml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.toml",
        'max_document_chars = 300\n[[task]]\nname = "t"\nuser = "{body}"\nassistant = "{title}"\nmin_chars = 2\n',
    )
    assert load_recipe(path) == Recipe((Task("t", "{body}", "{title}", min_chars=2),), 300)


def test_everything_wrong_with_a_recipe_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", 'colour = 1\n[[task]]\nname = "t"\nuser = "x"\nmin_chars = 0\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    for part in ("colour", "task 1 assistant", "task 1 min_chars"):
        assert part in str(caught.value)
    path = write(tmp_path / "s.toml", '[[task]]\nname = "t"\nuser = "{x"\nassistant = "a"\n' * 2)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert 'two tasks are called "t"' in str(caught.value)
    assert "{{ and }}" in str(caught.value)


def test_written_pairs_say_what_made_them_and_are_read_as_training_rows(guide: Path, tmp_path: Path) -> None:
    report = make_pairs([guide])
    out = tmp_path / "pairs.jsonl"
    write_pairs(report, out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["made_by"] == "rule:title"
    assert rows[0]["source"] == "guide.md:5"
    examples, _ = load_examples([out])
    assert [e.messages for e in examples] == [e.messages for e in report.examples]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guide.md", "pairs.jsonl"]


def test_writing_to_a_place_that_is_no_folder_is_explained(guide: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be written"):
        write_pairs(make_pairs([guide]), guide / "pairs.jsonl")


def test_every_answer_from_real_documents_stands_in_them() -> None:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    report = make_pairs(paths)
    assert report.counts["title"] == len(paths)
    assert report.counts["section title"] > 10
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    for example in report.examples:
        name, _, line = example.source.partition(":")
        assert example.answer in texts[name]
        if example.task == "section title":
            assert example.answer in texts[name].split("\n")[int(line) - 1]


def test_a_real_table_gives_a_pair_a_row(shared_data: Path) -> None:
    report = make_pairs([shared_data / "raw" / "structured_demo.csv"], one_task("{text}", "{meta}"))
    assert len(report.examples) == 6
    assert report.examples[2].messages[0]["content"] == "你好，请问你是谁"
