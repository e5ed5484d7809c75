"""Mixtures: nothing crosses the split, limits and weights hold, and every row read is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_tune.data import duplicate_key, load_examples
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.mixture import Coverage, Mixture, load_recipe, mix_examples, write_mixture
from qlora_tune.shapes import Example

TEMPLATES = """
[[template]]
task = "*"
user = "Please answer. {prompt}"
[[template]]
task = "*"
system = "You write questions about {task}."
user = "The answer: {answer}"
assistant = "{prompt}"
"""


def write_rows(path: Path, number: int, task: str | None = None, **more: Any) -> None:
    rows = [
        {"prompt": f"{path.stem} {task} {n}", "completion": f"answer {n}", "task": task, **more} for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mix(folder: Path, recipe: str, templates: str = "") -> Mixture:
    (folder / "templates.toml").write_text(templates or TEMPLATES, encoding="utf-8")
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return mix_examples(load_recipe(folder / "recipe.toml"))


def sources(*names: str, weights: Sequence[float] = ()) -> str:
    tables = [f'[[source]]\npath = "{name}.jsonl"\n' for name in names]
    return "".join(
        t + (f"weight = {w}\n" if w else "") for t, w in zip(tables, weights or [0] * len(names), strict=True)
    )


def origins(examples: Sequence[Example]) -> Counter[str]:
    return Counter(example.source.split(":")[0] for example in examples)


def check_sums(mixture: Mixture) -> None:
    """Every row is in exactly one place, in the account as in the mixture itself."""
    rows: list[Coverage] = [*mixture.by_source, *mixture.by_task]
    for row in rows:
        assert row.examples == row.train + row.heldout + row.unseen + row.dropped + row.capped
    for rows in (list(mixture.by_source), list(mixture.by_task)):
        assert sum(row.train for row in rows) == len({example.source for example in mixture.train})
        assert sum(row.written for row in rows) == len(mixture.train)
        assert sum(row.heldout for row in rows) == len({example.source for example in mixture.heldout})
        assert sum(row.unseen for row in rows) == len({example.source for example in mixture.unseen})
        assert sum(row.share for row in rows) == pytest.approx(1)
    for row, report in zip(mixture.by_source, mixture.reports, strict=True):
        assert (row.rows_in, row.rejected) == (report.rows_in, report.rejected)
    apart = [{example.source for example in part} for part in (mixture.train, mixture.heldout, mixture.unseen)]
    assert sum(map(len, apart)) == len(set().union(*apart))
    trained = {duplicate_key(example) for example in mixture.train}
    assert not trained & {duplicate_key(example) for example in (*mixture.heldout, *mixture.unseen)}


def everything(folder: Path) -> str:
    """Two sources, a bad row, an unseen task, limits, templates: all at once."""
    write_rows(folder / "a.jsonl", 80, "sums")
    write_rows(folder / "b.jsonl", 60, "names")
    with (folder / "b.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "broken"\n')
        for number in range(12):
            file.write(json.dumps({"prompt": f"film {number}", "completion": "good", "task": "sentiment"}) + "\n")
        file.write(json.dumps({"prompt": "a sums 3", "completion": "x", "task": "sentiment"}) + "\n")
    head = 'holdout_tasks = ["sentiment"]\nmax_rows_per_task = 40\ntemplates = "templates.toml"\nheldout_share = 0.2\n'
    return head + sources("a", "b")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = everything(tmp_path)
    written = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        files = write_mixture(mix(tmp_path, f"seed = {seed}\n{recipe}"), tmp_path / name / "mix.jsonl")
        written.append({file.name: file.read_bytes() for file in files})
    assert set(written[0]) == {"mix.jsonl", "mix_heldout.jsonl", "mix_unseen.jsonl"}
    assert written[0] == written[1]
    assert all(written[0][name] != written[2][name] for name in written[0])


def test_every_row_read_is_accounted_for(tmp_path: Path) -> None:
    mixture = mix(tmp_path, everything(tmp_path))
    check_sums(mixture)
    a, b = mixture.by_source
    assert (a.name, a.rows_in, a.rejected, a.heldout, a.train, a.capped) == ("a.jsonl", 80, 0, 16, 40, 24)
    assert (b.name, b.rows_in, b.rejected, b.heldout, b.train, b.capped) == ("b.jsonl", 74, 1, 12, 40, 8)
    by_task = {row.name: row for row in mixture.by_task}
    assert (by_task["names"].train, by_task["names"].share, by_task["names"].templates) == (40, 0.5, 2)
    assert by_task["names"].reversed == sum("write questions about names" in e.prompt for e in mixture.train)
    assert by_task["sentiment"].train == 0


def test_copies_of_a_prompt_never_cross_the_split_even_between_sources(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 40, "t")
    rows = [{"prompt": f"  A t  {n}", "completion": "other", "task": "u"} for n in range(40)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mixture = mix(tmp_path, "heldout_share = 0.3\n" + sources("a", "b"))
    check_sums(mixture)
    assert len(mixture.heldout) == 24
    assert all(origins(part)["a.jsonl"] == origins(part)["b.jsonl"] for part in (mixture.train, mixture.heldout))


def test_a_heldout_task_is_never_trained_on(tmp_path: Path) -> None:
    mixture = mix(tmp_path, everything(tmp_path))
    assert {example.task for example in mixture.unseen} == {"sentiment"}
    assert "sentiment" not in {example.task for example in (*mixture.train, *mixture.heldout)}


def test_an_unseen_row_whose_prompt_is_trained_on_is_left_out_and_named(tmp_path: Path) -> None:
    mixture = mix(
        tmp_path, everything(tmp_path).replace("0.2", "0").replace("= 40", "= 99").replace("templates =", "#")
    )
    check_sums(mixture)
    assert [(p.file, p.line) for p in mixture.dropped] == [("b.jsonl", 74)]
    assert "a.jsonl:4" in mixture.dropped[0].reason
    assert (len(mixture.unseen), mixture.by_source[1].dropped) == (12, 1)


def test_a_prompt_that_is_trained_on_in_other_words_is_not_unseen(tmp_path: Path) -> None:
    mixture = mix(tmp_path, everything(tmp_path).replace("0.2", "0").replace("= 40", "= 99"))
    assert "b.jsonl:74" not in {example.source for example in mixture.unseen}
    assert [(p.file, p.line) for p in mixture.dropped] == [("b.jsonl", 74)]


def test_heldout_rows_are_not_worded_as_a_training_row_is(tmp_path: Path) -> None:
    """A reversed template of a task with one answer asks every row the same."""
    rows = [{"prompt": f"film {n}", "completion": "good", "task": "t"} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = 'templates = "templates.toml"\nheldout_share = 0.2\n' + sources("a")
    mixture = mix(tmp_path, recipe)
    check_sums(mixture)
    assert {example.template for example in mixture.train} == {1, 2}
    assert [example.template for example in mixture.heldout] == [1] * 10
    backwards = mix(tmp_path, recipe, '[[template]]\ntask = "t"\nuser = "{answer}"\nassistant = "{prompt}"\n')
    check_sums(backwards)
    assert (backwards.heldout, backwards.by_source[0].dropped, len(backwards.dropped)) == ((), 10, 10)


def test_proportional_mixing_keeps_the_proportions_and_the_cap(tmp_path: Path) -> None:
    for name, number in (("a", 300), ("b", 100), ("c", 50)):
        write_rows(tmp_path / f"{name}.jsonl", number)
    head = "heldout_share = 0\n"
    assert origins(mix(tmp_path, head + sources("a", "b", "c")).train) == {
        "a.jsonl": 300,
        "b.jsonl": 100,
        "c.jsonl": 50,
    }
    small = mix(tmp_path, f"{head}max_rows = 45\n" + sources("a", "b", "c"))
    assert origins(small.train) == {"a.jsonl": 30, "b.jsonl": 10, "c.jsonl": 5}
    capped = mix(tmp_path, f"{head}max_rows = 50\nmax_rows_per_source = 100\n" + sources("a", "b", "c"))
    assert origins(capped.train) == {"a.jsonl": 20, "b.jsonl": 20, "c.jsonl": 10}
    check_sums(capped)


def test_rows_are_drawn_from_the_whole_of_a_source_and_by_the_seed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 200)
    found = []
    for seed in (1, 2):
        mixture = mix(tmp_path, f"seed = {seed}\nmax_rows = 20\n" + sources("a"))
        found.append([{int(e.source.split(":")[1]) for e in part} for part in (mixture.train, mixture.heldout)])
        assert max(found[-1][0]) > 100
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("weights", "max_rows", "expected"),
    [
        ((1, 1), None, (20, 20)),
        ((3, 1), None, (60, 20)),
        ((100, 1), None, (100, 1)),
        ((0.1, 0.2), None, (10, 20)),
        ((3, 1), 8, (6, 2)),
        ((2, 1), 8, (5, 3)),
        ((1, 1), 5000, (20, 20)),
    ],
)
def test_weights_are_shares_of_the_mixture_and_repeat_no_row(
    tmp_path: Path, weights: tuple[float, float], max_rows: int | None, expected: tuple[int, int]
) -> None:
    write_rows(tmp_path / "a.jsonl", 100)
    write_rows(tmp_path / "b.jsonl", 20)
    limit = f"max_rows = {max_rows}\n" if max_rows else ""
    mixture = mix(tmp_path, f'heldout_share = 0\nmixing = "weights"\n{limit}' + sources("a", "b", weights=weights))
    found = origins(mixture.train)
    assert (found["a.jsonl"], found["b.jsonl"]) == expected
    assert len({example.source for example in mixture.train}) == len(mixture.train)
    check_sums(mixture)


def test_the_source_that_sets_the_size_of_a_weighted_mixture_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 100)
    write_rows(tmp_path / "b.jsonl", 20)
    recipe = 'heldout_share = 0\nmixing = "weights"\n' + sources("a", "b")
    assert [note.split()[0] for note in mix(tmp_path, recipe).notes] == ["b.jsonl"]
    assert mix(tmp_path, "max_rows = 10\n" + recipe).notes == ()


def test_a_source_of_unseen_tasks_only_does_not_empty_a_weighted_mixture(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 10, "t")
    write_rows(tmp_path / "b.jsonl", 10, "u")
    mixture = mix(tmp_path, 'holdout_tasks = ["u"]\nheldout_share = 0\nmixing = "weights"\n' + sources("a", "b"))
    assert (len(mixture.train), len(mixture.unseen)) == (10, 10)
    assert "b.jsonl: no row is left to train on" in mixture.notes


def test_rows_without_a_task_get_their_sources_and_others_keep_theirs(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    write_rows(tmp_path / "b.jsonl", 5, "own")
    mixture = mix(tmp_path, "heldout_share = 0\n" + sources("a", "b").replace('jsonl"\n', 'jsonl"\ntask = "given"\n'))
    assert {row.name: row.train for row in mixture.by_task} == {"given": 5, "own": 5}


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort,art\nq1,a1,t\nq2,a2,u\n", encoding="utf-8")
    table = '[[source]]\npath = "a.csv"\nmap = { prompt = "frage", completion = "antwort", task = "art" }\n'
    mixture = mix(tmp_path, "heldout_share = 0\n" + table)
    assert {(e.prompt, e.answer, e.task) for e in mixture.train} == {("q1", "a1", "t"), ("q2", "a2", "u")}


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for folder, number in (("x", 6), ("y", 4)):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "a.jsonl", number, folder)
    mixture = mix(tmp_path, 'heldout_share = 0\n[[source]]\npath = "x"\n[[source]]\npath = "y/a.jsonl"\n')
    assert [(row.name, row.train) for row in mixture.by_source] == [("x", 6), ("y/a.jsonl", 4)]
    assert origins(mixture.train) == {"x/a.jsonl": 6, "y/a.jsonl": 4}


def test_copies_in_several_templates_stay_on_one_side_and_apart_from_each_other(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50, "t")
    mixture = mix(tmp_path, 'templates = "templates.toml"\ntemplates_per_row = 2\nheldout_share = 0.2\n' + sources("a"))
    check_sums(mixture)
    (row,) = mixture.by_source
    assert (row.train, row.written, row.heldout, len(mixture.heldout)) == (40, 80, 10, 20)
    neighbours = sum(one.source == two.source for one, two in zip(mixture.train, mixture.train[1:], strict=False))
    assert neighbours < 10


def test_rows_are_shuffled_over_the_sources(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    write_rows(tmp_path / "b.jsonl", 50)
    mixture = mix(tmp_path, "heldout_share = 0\n" + sources("a", "b"))
    assert 10 < origins(mixture.train[:50])["a.jsonl"] < 40


def test_what_is_written_reads_back_as_the_same_messages_tasks_and_tools(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": 'quotes " \\ \u2028 ünï 😀\r\n{answer}', "completion": " kept \n", "task": "t", "system": "S {x}"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "task": "half \ud800"},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "context only", "weight": 0},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"é": [1, None]}}]},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "Seven."},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = 'heldout_share = 0\ntemplates = "templates.toml"\n' + sources("a")
    mixture = mix(tmp_path, recipe, '[[template]]\ntask = "*"\nuser = "Ünï: {prompt}"\n')
    (written,) = write_mixture(mixture, tmp_path / "new" / "mix.jsonl")
    back, report = load_examples([written])
    assert report.problems == []
    assert [(e.messages, e.task, e.tools) for e in back] == [(e.messages, e.task, e.tools) for e in mixture.train]
    assert len(back) == 3
    lines = [json.loads(line) for line in written.read_bytes().splitlines()]
    assert [(line["source"], line["template"]) for line in lines] == [(e.source, e.template) for e in mixture.train]
    assert "ünï 😀".encode() in written.read_bytes()


def test_only_parts_that_have_rows_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    mixture = mix(tmp_path, "heldout_share = 0\n" + sources("a"))
    (tmp_path / "out").mkdir()
    assert write_mixture(mixture, tmp_path / "out" / "mix.jsonl") == [tmp_path / "out" / "mix.jsonl"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mix.jsonl"]


def test_a_mixture_never_overwrites_what_it_was_made_of_or_stands_beside_older_parts(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 20)
    write_rows(tmp_path / "mix_heldout.jsonl", 20)
    (tmp_path / "templates.jsonl").write_text('{"task": "*"}\n', encoding="utf-8")
    mixture = mix(tmp_path, 'templates = "templates.jsonl"\n' + sources("a", "mix_heldout"))
    before = (tmp_path / "mix_heldout.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for name in ("a.jsonl", "mix.jsonl", "link.jsonl", "templates.jsonl"):
        with pytest.raises(ConfigError, match="was read for this mixture"):
            write_mixture(mixture, tmp_path / name)
    assert (tmp_path / "mix_heldout.jsonl").read_bytes() == before
    assert not (tmp_path / "mix.jsonl").exists()
    write_rows(tmp_path / "old_unseen.jsonl", 1)
    with pytest.raises(ConfigError, match="earlier mixture"):
        write_mixture(mixture, tmp_path / "old.jsonl")
    with pytest.raises(ConfigError, match="JSON Lines"):
        write_mixture(mixture, tmp_path / "mix.csv")


def test_a_write_that_fails_leaves_the_old_files_and_no_halves(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 20)
    mixture = mix(tmp_path, sources("a"))
    out = tmp_path / "out"
    write_rows(out.with_name("file"), 1)
    with pytest.raises(DataError, match="can't be written"):
        write_mixture(mixture, out.with_name("file") / "mix.jsonl")
    out.mkdir()
    (out / "mix.jsonl").write_bytes(b"old")
    (out / ".mix_heldout.jsonl.unfinished").mkdir()  # the second part can't be written
    with pytest.raises(DataError, match="can't be written"):
        write_mixture(mixture, out / "mix.jsonl")
    assert (out / "mix.jsonl").read_bytes() == b"old"
    assert not (out / ".mix.jsonl.unfinished").exists()


def test_every_problem_of_a_recipe_is_named_at_once(tmp_path: Path) -> None:
    recipe = """
        sed = 1
        heldout_share = 2
        mixing = "weight"
        max_rows = 0
        [[source]]
        path = "a.jsonl"
        wieght = 1
        max_rows_per_task = 5
        [[source]]
        weight = -1
        map = { promt = "frage" }
    """
    with pytest.raises(ConfigError) as raised:
        mix(tmp_path, recipe)
    for expected in (
        'sed: no such key. Did you mean "seed"?',
        "heldout_share = 2: ",
        "mixing = 'weight': should be 'proportional' or 'weights'",
        "max_rows = 0: ",
        'source 1: wieght: no such key. Did you mean "weight"?',
        "source 1: max_rows_per_task: no such key. Move it above the first [[source]]",
        "source 2: path is missing",
        "source 2: weight = -1: ",
        'source 2: map: no field is called "promt"',
    ):
        assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ('holdout_tasks = ["sentimnet"]', 'no row is of the task "sentimnet". Did you mean "sentiment"?'),
        ('holdout_tasks = ["sentiment"]', "none is left to train on"),
        ("templates_per_row = 2", "templates_per_row needs templates"),
        ('templates = "missing.toml"', "missing.toml: no such file"),
        ("source = []", "source"),
    ],
)
def test_a_recipe_that_can_not_do_what_it_says_is_refused(tmp_path: Path, head: str, expected: str) -> None:
    write_rows(tmp_path / "a.jsonl", 5, "sentiment")
    with pytest.raises((ConfigError, DataError)) as raised:
        mix(tmp_path, f"{head}\n" + ("" if "source" in head else sources("a")))
    assert expected in str(raised.value)


def test_a_weight_without_weights_mixing_and_a_file_named_twice_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    with pytest.raises(ConfigError, match="source 2 has a weight"):
        mix(tmp_path, sources("a", "b", weights=(0, 2)))
    with pytest.raises(ConfigError, match="a.jsonl is read by more than one"):
        mix(tmp_path, sources("a") + '[[source]]\npath = "./a.jsonl"\n')


def test_all_sources_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError) as raised:
        mix(tmp_path, sources("a", "b"))
    assert "a.jsonl: no such file" in str(raised.value)
    assert "No usable row in" in str(raised.value)


def test_a_template_for_a_task_that_no_row_has_is_noted(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5, "sentiment")
    recipe = 'templates = "templates.toml"\nheldout_share = 0\n' + sources("a")
    assert mix(tmp_path, recipe).notes == ()
    mixture = mix(tmp_path, recipe, '[[template]]\ntask = "sentimnt"\n')
    assert mixture.notes == ('template 1 is for the task "sentimnt", which no row has. Did you mean "sentiment"?',)
    assert mixture.by_source[0].unworded == 5


def test_clinical_dialogues_become_notes_with_a_system_prompt_for_each_section(
    shared_data: Path, tmp_path: Path
) -> None:
    table = shared_data / "clinical" / "MTS-Dialog-TrainingSet.csv"
    recipe = f"""
        templates = "templates.toml"
        max_rows_per_task = 100
        holdout_tasks = ["ALLERGY"]
        [[source]]
        path = '{table}'
        map = {{ prompt = "dialogue", completion = "section_text", task = "section_header" }}
    """
    templates = """
        [[template]]
        task = "*"
        system = "You write the section {task} of a clinical note."
        user = "Dialogue:\\n{prompt}"
        [[template]]
        task = "GENHX"
        user = "Invent the dialogue behind this note:\\n{answer}"
        assistant = "{prompt}"
    """
    mixture = mix(tmp_path, recipe, templates)
    check_sums(mixture)
    (row,) = mixture.by_source
    assert (row.rows_in, row.rejected) == (1201, 0)
    assert len(mixture.by_task) == 20
    assert max(task.train for task in mixture.by_task) == 100
    assert all(task.train for task in mixture.by_task if task.name != "ALLERGY")
    assert {example.task for example in mixture.unseen} == {"ALLERGY"}
    for example in (*mixture.train, *mixture.heldout, *mixture.unseen):
        first = example.messages[0]["content"]
        assert example.template == 2 or first == f"You write the section {example.task} of a clinical note."
    assert {task.name for task in mixture.by_task if task.reversed} == {"GENHX"}
    for part, file in zip(
        (mixture.train, mixture.heldout, mixture.unseen), write_mixture(mixture, tmp_path / "mix.jsonl"), strict=True
    ):
        assert [(e.messages, e.task) for e in load_examples([file])[0]] == [(e.messages, e.task) for e in part]


def test_other_real_files_mix_and_every_row_is_accounted_for(shared_data: Path, tmp_path: Path) -> None:
    names = ["alpaca/dolly_3k_rows0-699.json", "alpaca/alpaca_en_demo.json", "sharegpt/glaive_toolcall_en_demo.json"]
    names += ["self_instruct/seed_tasks.jsonl", "t0_templates/ag_news_classify.jsonl", "messages/v1_sft_demo.jsonl"]
    tables = "".join(f"[[source]]\npath = '{shared_data / name}'\nweight = {n + 1}\n" for n, name in enumerate(names))
    head = 'mixing = "weights"\nmax_rows_per_task = 150\nheldout_share = 0.1\ntemplates = "templates.toml"\n'
    mixture = mix(tmp_path, head + tables)
    check_sums(mixture)
    written = write_mixture(mixture, tmp_path / "mix.jsonl")
    for part, file in zip((mixture.train, mixture.heldout), written, strict=True):
        back, report = load_examples([file])
        assert [(e.messages, e.task, e.tools) for e in back] == [(e.messages, e.task, e.tools) for e in part]
        assert not report.rejected
