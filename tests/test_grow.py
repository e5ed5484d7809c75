"""Growing data: what is proposed, dropped and decided adds up, survives a kill, and gets out only when accepted."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, say, serve_chat

from qlora_tune.cli import main
from qlora_tune.cli_grow import edit_in
from qlora_tune.data import load_examples
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.grow import (
    PROMPT,
    Pool,
    Source,
    decide,
    edit,
    grow_pool,
    open_model,
    read_pool,
    refuse_task,
    texts_of,
    to_seeds,
    write_accepted,
)
from qlora_tune.self_instruct import Proposal
from qlora_tune.shapes import Example

SEEDS = [
    ("Name the capital of the country.", "France", "Paris"),
    ("Turn this sentence into the past tense.", "She walks home.", "She walked home."),
    ("How many legs does a spider have?", "", "A spider has eight legs."),
    ("Give three words that rhyme with cat.", "", "hat, bat, mat"),
    ("Is this review positive or negative?", "I loved every page of it.", "positive"),
    ("Sort these numbers from small to large.", "7 2 9 4", "2 4 7 9"),
    ("Write a short greeting for a new colleague.", "", "Welcome to the team!"),
    ("Correct the spelling mistakes.", "Teh dog iz here.", "The dog is here."),
    ("Which season comes after winter?", "", "Spring comes after winter."),
]
FRESH = [
    ("Suggest a healthy breakfast for somebody in a hurry.", "", "Oats with yoghurt and berries."),
    ("Translate the word into German.", "bread", "Brot"),
    ("Explain why the sky looks blue at noon.", "", "Air scatters blue light more than red light."),
    ("List two uses of an old newspaper.", "", "Wrapping glasses and lighting a stove."),
    ("Convert kilometres to metres.", "3 kilometres", "3000 metres"),
    ("Who wrote Romeo and Juliet?", "", "William Shakespeare wrote it."),
    ("Describe the smell of rain on dry ground.", "", "Earthy, sweet and a little dusty."),
    ("Choose the odd one out.", "apple, pear, hammer", "hammer"),
]


@pytest.fixture
def server() -> Iterator[Server]:
    with serve_chat() as server:
        yield server


@pytest.fixture
def seeds_file(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    path.write_text(write(SEEDS))
    return path


def write(tasks: list[tuple[str, str, str]]) -> str:
    return "".join(json.dumps({"instruction": i, "input": g, "output": o}) + "\n" for i, g, o in tasks)


def seeds() -> list[Proposal]:
    return [Proposal(f"seeds.jsonl:{n}", *texts) for n, texts in enumerate(SEEDS, start=1)]


def teacher(number: int) -> Reply:
    return say(write(FRESH[2 * number : 2 * number + 2]))


def said(*answers: str) -> Source:
    """Somebody who proposes these answers, one a request, and then says nothing."""
    return Source("teacher", lambda prompt, number: answers[number - 1] if number <= len(answers) else "")


def grown(path: Path, *answers: str, wanted: int = 50) -> Pool:
    return grow_pool(path, said(*answers), seeds(), wanted, seed=1)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_endpoint_proposes_a_person_decides_and_only_what_was_accepted_gets_out(
    server: Server,
    seeds_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.reply = lambda number: teacher(number) if number else say(write([*FRESH[:2], SEEDS[0]]))
    pool, rows = tmp_path / "pool.jsonl", tmp_path / "rows.jsonl"
    asked = ("--endpoint", server.url, "--endpoint-model", "teacher", "--number", 5)
    shown = run(capsys, "grow", seeds_file, "--output", pool, *asked)
    assert "3 requests: 7 proposed = 5 in" in shown
    assert "dropped 1: ROUGE-L too high with another instruction" in shown
    assert "dropped 1: more than were wanted" in shown
    assert "are sent to" not in shown  # it is this machine
    assert server.requests[0]["temperature"] == 0.8
    # accept; edit the output alone; reject; a slip, then skip; stop
    monkeypatch.setattr("sys.stdin", io.StringIO("a\ne\n\n\nDas Brot\nr\nx\n\nq\n"))
    shown = run(capsys, "review", pool, "--accepted", rows)
    assert "Explain why the sky looks blue" in shown
    assert '"x" is none of these' in shown
    assert "2 rows to train on" in shown
    by = {"source": "teacher at 127.0.0.1"}
    assert [json.loads(line) for line in rows.read_text().splitlines()] == [
        {"instruction": FRESH[0][0], "input": "", "output": FRESH[0][2], **by, "edited": False},
        {"instruction": FRESH[1][0], "input": "bread", "output": "Das Brot", **by, "edited": True},
    ]
    assert [example.answer for example in load_examples([rows])[0]] == [FRESH[0][2], "Das Brot"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "1 of 2" in run(capsys, "review", pool)  # what was decided is not asked again
    statuses = [line.status for line in read_pool(pool).proposals.values()]
    assert statuses == ["accepted", "edited", "rejected", "pending", "pending"]


def test_nothing_that_nobody_accepted_can_be_written_or_trained_on(tmp_path: Path) -> None:
    pool, rows = tmp_path / "pool.jsonl", tmp_path / "rows.jsonl"
    chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    found = grown(pool, write(FRESH[:2]), chatml + "### Human: hi### Assistant: ho")
    decide(pool, next(iter(found.proposals)), None)
    with pytest.raises(DataError, match="nobody has accepted"):
        write_accepted(pool, rows)
    assert not rows.exists()
    with pytest.raises(DataError):
        load_examples([pool])
    # Nor in one file with rows that can be: each line of the pool is refused by itself.
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(write(SEEDS) + pool.read_text())
    assert len(load_examples([mixed])[0]) == len(SEEDS)


def test_proposed_is_kept_and_dropped_and_each_dropped_one_is_there_with_reason_and_text(tmp_path: Path) -> None:
    long_text = " ".join(f"word{n}" for n in range(60))
    answers = [
        write(FRESH[:1]) + '{"instruction": "Cut off in the mid',
        write([FRESH[0], SEEDS[2], ("Draw a picture of a horse.", "", "Here it is.")]),
        write([("Tell me how locks are opened.", "", "I'm sorry, but I can't help with that.")]),
        write([("Summarize the text in one line.", long_text, "A list of words.")]),
        write([("Find a heading that would suit.", long_text, "Many words")]),
        '[{"instruction": "Say something nice"}, {"instruction": "Repeat what I say", "output": "repeat what I say"}]',
        "I would rather not.",
    ]
    pool = grown(tmp_path / "pool.jsonl", *answers)
    assert [proposal.instruction for _, proposal in pool.having("pending")] == [
        FRESH[0][0],
        "Summarize the text in one line.",
    ]
    reasons = [refused.reason.partition(":")[0] for refused in pool.dropped]
    empty = "no pair of instruction and output as text"
    assert reasons[:9] == [
        empty,
        "ROUGE-L 1.00 with",
        "ROUGE-L 1.00 with",
        'the instruction says "picture", which text alone can\'t serve',
        "refusal",
        "near duplicate",
        empty,
        "the answer repeats the question",
        empty,
    ]
    assert reasons[9:] == [empty] * 7  # with three of those above, ten requests in a row that brought nothing
    assert pool.dropped[0].proposal == '{"instruction": "Cut off in the mid'
    assert pool.dropped[8].proposal == "I would rather not."
    assert read_pool(tmp_path / "pool.jsonl") == pool
    assert pool.requests == len(answers) + 7


def test_the_prompt_shows_eight_tasks_two_of_them_proposed_before(tmp_path: Path) -> None:
    prompts: list[str] = []

    def propose(prompt: str, number: int) -> str:
        prompts.append(prompt)
        return write(FRESH[2 * number - 2 : 2 * number])

    path = tmp_path / "pool.jsonl"
    pool = grow_pool(path, Source("teacher", propose), seeds(), 6, seed=3)
    parts = [[json.loads(line) for line in prompt.splitlines() if line.startswith("{")] for prompt in prompts]
    own = [texts_of(proposal) for _, proposal in pool.having("pending")]
    assert [len(tasks) for tasks in parts] == [8, 8, 8]
    assert [sum(task in own for task in tasks) for tasks in parts] == [0, 2, 2]
    named = [line.seeds for line in pool.proposals.values()]
    assert len(named[0]) == 8
    assert len([name for name in named[2] if name in pool.proposals]) == 2
    assert "Write 4 new tasks" in prompts[0]
    assert "Write 2 new tasks" in prompts[2]


def test_tasks_that_do_not_fit_the_context_are_not_shown_the_longest_first(tmp_path: Path) -> None:
    long = Proposal("seeds.jsonl:99", "Read this: " + "tea " * 300, "", "Yes.")
    asked: list[str] = []
    source = Source("small", lambda prompt, number: asked.append(prompt) or write(FRESH), lambda text: len(text) < 700)
    pool = grow_pool(tmp_path / "pool.jsonl", source, [*seeds()[:3], long], 4, seed=1)
    assert {name for line in pool.proposals.values() for name in line.seeds} == {f"seeds.jsonl:{n}" for n in (1, 2, 3)}
    with pytest.raises(DataError, match="leaves no room"):
        grow_pool(tmp_path / "other.jsonl", source, [long], 4, seed=1)


def test_an_interrupted_call_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    prompts: dict[Path, list[str]] = {}

    def asker(path: Path) -> Source:
        def propose(prompt: str, number: int) -> str:
            prompts.setdefault(path, []).append(prompt)
            return write(FRESH[2 * number - 2 : 2 * number])

        return Source("teacher", propose)

    def interrupt(pool: Pool) -> None:
        if pool.requests == 2:
            raise KeyboardInterrupt

    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    expected = grow_pool(whole, asker(whole), seeds(), 8, seed=7)
    with pytest.raises(KeyboardInterrupt):
        grow_pool(torn, asker(torn), seeds(), 8, seed=7, on_progress=interrupt)
    found = grow_pool(torn, asker(torn), seeds(), 8, seed=7)
    assert prompts[torn] == prompts[whole]
    assert found.proposals.keys() == expected.proposals.keys()
    assert grow_pool(torn, said(), seeds(), 8, seed=7) == found  # it holds what was asked for


def test_wherever_a_pool_is_torn_the_lines_before_count_and_the_next_ones_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    first, second = grown(path, write(FRESH[:2]), wanted=2).proposals
    decide(path, first, None)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        decided = end == len(whole) - 1
        assert read_pool(path).proposals[first].status == ("rejected" if decided else "pending")
        decide(path, second, None)
        assert read_pool(path).proposals[second].status == "rejected"
        assert len(path.read_bytes().splitlines()) == 3 + decided


@pytest.mark.parametrize(
    "line",
    [
        '{"instruction": "Name it.", "output": "Tea"}',
        "not JSON",
        '{"status": "accepted", "time": 1.0, "id": "unknown"}',
        '{"status": "pending", "time": 1.0, "id": "a"}',
        '{"status": "lost", "time": 1.0}',
        '{"status": "dropped", "time": 1.0, "more": 1}',
    ],
)
def test_a_file_that_is_no_pool_is_named_with_its_line_and_left_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    for content in (f"{line}\n", line) if not line.startswith('{"status') else (f"{line}\n",):
        path.write_text(content)
        with pytest.raises(DataError, match=r"pool.jsonl:1: is no line of a pool"):
            grown(path, write(FRESH))
        assert path.read_text() == content


def test_a_proposal_is_decided_on_once_and_an_edit_must_be_a_task(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    pool = grown(path, write(FRESH[:2]), wanted=2)
    (first, proposal), (second, other) = pool.having("pending")
    decide(path, first, edit(proposal, output=f" {proposal.output}\r\n"))  # nothing but white space around it
    assert read_pool(path).proposals[first].status == "accepted"
    for id in (first, "unknown"):
        with pytest.raises(DataError, match="none that waits"):
            decide(path, id, None)
    with pytest.raises(DataError, match="Not accepted: .*empty"):
        decide(path, second, edit(other, output="  "))
    assert read_pool(path).proposals[second].status == "pending"


def test_an_editor_changes_texts_and_what_it_leaves_behind_is_checked(tmp_path: Path) -> None:
    proposal = Proposal("teacher", 'Say "hi" \\ in C:\\new.', "", 'one\n\n  two """ three')
    keep = f"{sys.executable} -c pass"
    assert edit_in(keep, proposal) == proposal
    script = tmp_path / "change.py"
    opened = "import sys, pathlib; file = pathlib.Path(sys.argv[1]); "
    script.write_text(f"{opened}file.write_text(file.read_text().replace('hi', 'ho'))")
    assert edit_in(f"{sys.executable} {script}", proposal) == edit(proposal, instruction='Say "ho" \\ in C:\\new.')
    script.write_text(f"{opened}file.write_text('output = 3')")
    for bad in (f"{sys.executable} {script}", f"{sys.executable} -c 1/0", "no-such-editor"):
        with pytest.raises(ConfigError):
            edit_in(bad, proposal)


def test_seeds_are_rows_of_one_question_and_its_answer() -> None:
    user: Any = {"role": "user", "content": "Name it.\n\nhot\n\ndrink"}
    answer: Any = {"role": "assistant", "content": "Tea"}
    system: Any = {"role": "system", "content": "Be brief."}
    examples = [Example(turns, None, "s:1") for turns in ((user, answer), (system, user, answer), (user, answer) * 2)]
    assert to_seeds(examples) == [Proposal("s:1", "Name it.", "hot\n\ndrink", "Tea")]
    with pytest.raises(DataError, match="None of the seed rows"):
        to_seeds(examples[1:])


def test_a_good_task_is_kept_beside_the_seeds() -> None:
    assert [refuse_task(Proposal("t", *texts), seeds()) for texts in FRESH] == [None] * len(FRESH)


@pytest.mark.slow
def test_a_run_and_its_base_propose_and_the_same_seed_gives_the_same(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_tune.grow.FRUITLESS_REQUESTS", 3)
    finished_run, config, _ = finished
    sample = "sample_heldout.jsonl"
    pools = [tmp_path / f"{name}.jsonl" for name in ("one", "again", "base")]
    for path, name in zip(pools, (finished_run.path, finished_run.path, "builtin"), strict=True):
        options = ("--max-new-tokens", 48, "--seed", 5, "--runs-dir", config.runs_dir)
        shown = run(capsys, "grow", sample, "--output", path, "--model", name, "--number", 3, *options)
        pool = read_pool(path)
        proposed = len(pool.proposals) + len(pool.dropped)
        assert f"{pool.requests} requests: {proposed} proposed" in shown
        assert pool.requests >= 3  # it proposes nothing of use
    one, again, base = (read_pool(path).dropped for path in pools)
    assert one == again
    assert len({refused.proposal for refused in one}) > 1  # each request is another draw
    assert one[0].source.startswith(f"{finished_run.name} ")
    assert base[0].source.startswith("builtin ")


def test_a_model_knows_which_prompts_fit_and_draws_by_seed_and_request() -> None:
    from qlora_tune.base import find_base

    source = open_model("builtin", find_base("builtin").path, None, 1, max_new_tokens=16, temperature=2.0)
    assert source.fits(PROMPT.format(count=1, examples=""))
    assert not source.fits("tea " * 300)
    first, again, other = (source.ask("Tell me about tea.", number) for number in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["grow", "--output", "X"], "Name the files of seed tasks"),
        (["grow", "SEEDS", "--output", "SEEDS"], "is one of the files that are read"),
        (["grow", "SEEDS", "--output", "X", "--endpoint", "http://localhost:1/v1"], "together with --endpoint-model"),
        (["grow", "SEEDS", "--output", "X", "--endpoint", "E", "--endpoint-model", "m", "--model", "r"], "neither"),
        (
            ["grow", "SEEDS", "--output", "X", "--endpoint", "http://example.org/v1", "--endpoint-model", "m"],
            "use https://",
        ),
        (["grow", "SEEDS", "--output", "X", "--temperature", "-1"], "Expected a temperature"),
        (["review", "X"], "no such file"),
        (["review", "SEEDS"], "is no line of a pool"),
        (["review", "SEEDS", "--accepted", "SEEDS"], "is one of the files that are read"),
    ],
)
def test_what_a_user_can_mend_is_said_in_words(
    seeds_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = seeds_file.read_bytes()
    assert main([str(seeds_file) if argument == "SEEDS" else argument for argument in arguments]) == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")
    assert seeds_file.read_bytes() == before
    assert not (tmp_path / "X").exists()


def test_seed_rows_go_to_another_machine_only_after_that_was_said(
    seeds_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_before: list[str] = []

    def leave(*args: Any, **options: Any) -> str:
        shown_before.append(capsys.readouterr().out)
        return teacher(len(shown_before) - 1)[1]

    monkeypatch.setattr("qlora_tune.grow.ask", leave)  # nothing may leave this machine in a test
    away = ("--endpoint", "https://teacher.example/v1", "--endpoint-model", "teacher")
    run(capsys, "grow", seeds_file, "--output", tmp_path / "pool.jsonl", *away, "--number", 2)
    assert "seed rows are sent to teacher.example" in shown_before[0]
