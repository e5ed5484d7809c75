"""Answerers side by side: each answers as it does alone, on rows that none was trained on; blind until the end."""

from __future__ import annotations

import io
import json
import re
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from qlora_tune import evaluate
from qlora_tune.answer_files import LETTERS, count_exact, read_answers, write_answers
from qlora_tune.cli import main
from qlora_tune.errors import ConfigError, DataError, ModelError
from qlora_tune.export import open_adapter
from qlora_tune.generate import generate_answers
from qlora_tune.runs import Run, fingerprint_files
from qlora_tune.scores import is_exact_match
from qlora_tune.side_by_side import Panel, answer_questions, find_questions, open_panel
from qlora_tune.votes import read_votes

LIMIT = 16
OPTIONS: dict[str, Any] = {"rows": 12, "seed": 7, "max_new_tokens": LIMIT, "batch_size": 5}


def change_weights(adapter: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    record = json.loads((adapter / "qlora_tune.json").read_text())
    (adapter / "qlora_tune.json").write_text(json.dumps(record | {"sha256": {}}))


@pytest.fixture(scope="module")
def runs(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one base, whose names are in no row: `zebu` as it was trained, `okapi` with another adapter."""
    folder = tmp_path_factory.mktemp("side") / "runs"
    for name in ("zebu", "okapi"):
        shutil.copytree(finished[0].path, folder / name, ignore=shutil.ignore_patterns("checkpoints"))
        Run(folder / name).update_state(pid=None)
    change_weights(folder / "okapi" / "adapter", lambda weights: {name: 0.8 * each for name, each in weights.items()})
    return folder


def panel_of(runs: Path, *names: str, base: str | None = None) -> Panel:
    return open_panel(names, str(runs), base, runs.parent)


@pytest.fixture(scope="module")
def answers(runs: Path) -> Any:
    panel = panel_of(runs, "zebu", "okapi", "base")
    return answer_questions(panel, find_questions(panel, ())[0], **OPTIONS)


def test_adapters_on_one_base_answer_exactly_as_each_alone(runs: Path, answers: Any) -> None:
    for name in ("zebu", "okapi"):
        trained = open_adapter(runs / name / "adapter")
        prompts = [row.question.prompt for row in answers]
        alone = generate_answers(trained.load(), trained.chat, prompts, max_new_tokens=LIMIT, batch_size=5)
        assert [row.answers[name] for row in answers] == alone
    assert any(row.answers["zebu"] != row.answers["okapi"] for row in answers)
    assert [list(row.answers) for row in answers] == [["zebu", "okapi", "base"]] * 12


def test_rows_base_and_reference_are_those_of_evaluate(runs: Path, answers: Any) -> None:
    trained = open_adapter(runs / "zebu" / "adapter")
    comparison = evaluate.compare(
        trained.load(),
        trained.chat,
        Run(runs / "zebu").read_heldout(),
        score_rows=12,
        max_new_tokens=LIMIT,
        batch_size=5,
        seed=7,
    )
    expected = [(row.source, row.prompt, row.reference, row.base, row.tuned) for row in comparison.answers]
    found = [(row.question.source, row.question.prompt, row.question.reference) for row in answers]
    assert [(*row, a.answers["base"], a.answers["zebu"]) for row, a in zip(found, answers, strict=True)] == expected
    right = sum(is_exact_match(row.tuned, row.reference) for row in comparison.answers)
    assert count_exact(answers, "zebu") == (right, 12)
    assert right > 0


def test_an_adapter_of_another_base_or_another_quantization_is_refused_naming_both(runs: Path, tmp_path: Path) -> None:
    from test_model import changed_base

    base = changed_base(tmp_path)
    for number, change in enumerate(
        ({"base_model": str(base.path), "base_fingerprint": base.fingerprint}, {"load_in_4bit": False})
    ):
        adapter = tmp_path / f"adapter{number}"
        shutil.copytree(runs / "okapi" / "adapter", adapter)
        record = json.loads((adapter / "qlora_tune.json").read_text())
        (adapter / "qlora_tune.json").write_text(json.dumps(record | change))
        with pytest.raises(
            ModelError, match=r"zebu was trained on builtin .*adapter\d was trained on .*one base"
        ) as told:
            panel_of(runs, "zebu", str(adapter))
        assert (str(base.path) if number == 0 else "load_in_4bit=False") in str(told.value)


def test_a_second_adapter_with_missing_tensors_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "okapi" / "adapter", tmp_path / "cut")
    change_weights(tmp_path / "cut", lambda weights: dict(list(weights.items())[1:]))
    panel = panel_of(runs, "zebu", str(tmp_path / "cut"))
    with pytest.raises(ModelError, match="incomplete or was changed"):
        answer_questions(panel, find_questions(panel, ())[0], **OPTIONS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["zebu"], "Expected 2 to 23 answerers to compare, given 1"),
        (["zebu", "zebu"], "zebu and zebu are the same answerer"),
        (["zebu", "{runs}/zebu/adapter"], "are the same answerer"),
        (["zebu", "base", "base"], "base and base are the same"),
        (["base", "{runs}/some.jsonl"], "Name a run or adapter"),
        (["zebu", "tie"], "what a vote says"),
    ],
)
def test_answerers_that_can_not_be_put_side_by_side_are_refused(names: list[str], message: str, runs: Path) -> None:
    (runs / "some.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    shutil.copytree(runs / "okapi", runs / "tie", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=message):
        panel_of(runs, *(name.format(runs=runs) for name in names))


@pytest.fixture
def learned(runs: Path, tmp_path: Path) -> tuple[Path, list[Any]]:
    """`gnu`, a run that was trained on some of the rows that zebu holds out; its folder of runs, and those rows."""
    folder = tmp_path / "runs"
    shutil.copytree(runs / "zebu", folder / "zebu")
    shutil.copytree(runs / "okapi", folder / "gnu")
    shared = Run(folder / "zebu").read_heldout()[:40:4]
    files = []
    for name, rows in (("train", shared), ("heldout", [])):
        pairs = [{"messages": row.messages} for row in rows] or [{"prompt": "Who?", "completion": "Nobody."}]
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    gnu = Run(folder / "gnu")
    config = tomllib.loads((gnu.path / "config.toml").read_text())
    config |= {"data": files[:1], "heldout_data": files[1:]}
    (gnu.path / "config.toml").write_text(tomli_w.dumps(config))
    gnu.write_heldout([])
    gnu.update_state(data_fingerprint=fingerprint_files(files))
    return folder, shared


def test_rows_that_any_of_the_runs_was_trained_on_are_left_out(learned: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, shared = learned
    sources = {row.source for row in shared}
    heldout = {row.source for row in Run(folder / "zebu").read_heldout()}
    for names in (["zebu", "gnu"], ["zebu", "base"]):
        questions, report = find_questions(panel_of(folder, *names), ())
        left_out = sources if "gnu" in names else set()
        assert {question.source for question in questions} == heldout - left_out
        assert len(report.problems) == len(left_out)
        assert all("(gnu)" in problem.reason for problem in report.problems)
    data = tmp_path / "other.jsonl"
    rows = [{"messages": row.messages} for row in Run(folder / "zebu").read_heldout()[:8]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, report = find_questions(panel_of(folder, "zebu", "gnu"), [str(data)])
    assert [question.source for question in questions] == [f"other.jsonl:{n}" for n in (2, 3, 4, 6, 7, 8)]
    data.write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match=r"No row is left to answer[\s\S]*trained on"):
        find_questions(panel_of(folder, "zebu", "gnu"), [str(data)])
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="gone or have changed"):
        find_questions(panel_of(folder, "zebu", "gnu"), ())


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["compare", *arguments]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.out + captured.err


def test_blind_letters_differ_by_row_and_names_come_at_the_end(
    runs: Path, answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "zebu",
        "okapi",
        "base",
        "--runs-dir",
        str(runs),
        "--rows",
        "12",
        "--seed",
        "7",
        "--max-new-tokens",
        "16",
    ]
    out = run_cli(capsys, *options, "--batch-size", "5", "--blind")
    before, _, key = out.partition("the letters")
    assert not re.search("zebu|okapi|base", before)
    shown = [line.split() for line in key.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    expected = [row.letter(7) for row in answers]
    assert [dict(zip(LETTERS, names, strict=False)) for _, *names in shown] == expected
    assert len({tuple(letters.values()) for letters in expected}) > 1
    assert [row.letter(8) for row in answers] != expected
    named = run_cli(capsys, *options)
    assert named.count("A  zebu") == named.count("C  base") == 12
    assert "the letters" not in named


def vote(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run_cli(capsys, *arguments, "--vote", "--rows", "5", "--max-new-tokens", "8")


def test_votes_are_kept_as_they_are_given_and_a_second_call_goes_on(
    learned: tuple[Path, list[Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(learned[0])
    out = vote(capsys, monkeypatch, "B\nmaybe\n\nt\nn\n", "zebu", "base", "--runs-dir", folder, "--blind")
    assert '"maybe" is none of these' in out
    assert "row 5 of 5" in out
    votes = read_votes(learned[0] / "zebu" / "votes.jsonl")
    panel = panel_of(learned[0], "zebu", "base")
    options = OPTIONS | {"rows": 5, "seed": 42, "max_new_tokens": 8, "batch_size": 16}
    rows = answer_questions(panel, find_questions(panel, ())[0], **options)
    assert [each.winner for each in votes] == [rows[0].letter(42)["B"], "tie", "none"]
    assert [each.key for each in votes] == [rows[place].question.key for place in (0, 2, 3)]
    assert [each.answers for each in votes] == [rows[place].answers for place in (0, 2, 3)]
    assert all(each.blind and each.seed == 42 and each.fingerprints == panel.fingerprints for each in votes)
    assert {each.base for each in votes} == {panel.base} == {votes[0].fingerprints["base"]}

    out = vote(capsys, monkeypatch, "b\nq\n", "base", "zebu", "--runs-dir", folder)
    assert "3 of 5 rows are voted on already" in out
    assert out.count("· sample_heldout.jsonl:") == 2
    assert "2 decided, 1 ties, 1 with no good answer" in out
    (added,) = read_votes(learned[0] / "zebu" / "votes.jsonl")[3:]
    assert (added.winner, added.key, added.blind) == ("zebu", rows[1].question.key, False)
    out = vote(capsys, monkeypatch, "q\na\n", "zebu", "gnu", "--runs-dir", folder)
    assert "voted on already" not in out  # on these two, that is
    assert out.count("· sample_heldout.jsonl:") == 1
    assert len(read_votes(learned[0] / "zebu" / "votes.jsonl")) == 4


def test_answers_kept_in_a_file_are_compared_without_a_model(
    runs: Path, answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept#1.jsonl"
    write_answers(path, answers)
    for name in ("zebu", "okapi", "base"):
        assert [text for _, text in read_answers(path, name).values()] == [row.answers[name] for row in answers]
    panel = panel_of(runs, f"{path}#zebu", f"{path}#base")
    with monkeypatch.context() as none:
        none.setattr("qlora_tune.model.load_base", None)
        again = answer_questions(panel, find_questions(panel, ())[0], **OPTIONS)
    assert [row.question for row in again] == [row.question for row in answers]
    for row, kept in zip(again, answers, strict=True):
        assert row.answers == {f"kept#1.jsonl#{name}": kept.answers[name] for name in ("zebu", "base")}
    assert panel.base is None
    with pytest.raises(DataError, match="answers of several. Say whose: .*#zebu, .*#okapi, .*#base"):
        panel_of(runs, str(path), "zebu")
    with pytest.raises(DataError, match='no answers of "gnu"'):
        panel_of(runs, f"{path}#gnu", "zebu")


def test_rows_that_a_file_does_not_answer_are_counted_and_left_out(runs: Path, tmp_path: Path) -> None:
    heldout = Run(runs / "zebu").read_heldout()
    single = [row for row in heldout if len(row.messages) == 2][:3]
    lines = [{"prompt": row.messages[0]["content"], "answer": "mine"} for row in single]  # text as people write it
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "Unasked?", "answer": "x"}]))
    panel = panel_of(runs, "zebu", str(path))
    notes: list[str] = []
    found = answer_questions(panel, find_questions(panel, ())[0], **OPTIONS, on_note=notes.append)
    assert [row.question.source for row in found] == [row.source for row in single]
    assert all(row.answers["mine.jsonl"] == "mine" for row in found)
    assert notes == [f"{len(heldout) - 3} of {len(heldout)} rows left out: mine.jsonl has no answer to them"]


def test_prompts_that_leave_no_room_for_an_answer_are_counted_and_left_out(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "x"}) + "\n" for text in ("Hi. " * 90, "Hi.")))
    shutil.copytree(runs / "okapi" / "adapter", tmp_path / "lone")
    panel = panel_of(runs, str(tmp_path / "lone"), str(path))
    notes: list[str] = []
    found = answer_questions(
        panel, find_questions(panel, ())[0], **OPTIONS | {"max_new_tokens": 100}, on_note=notes.append
    )
    assert [row.question.prompt[0]["content"] for row in found] == ["Hi."]
    assert notes[0].startswith("1 of 2 rows left out: with 64 tokens for the answer")
    assert notes[1].startswith("answers end at 64 tokens")


def test_lines_that_are_no_answers_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [
        '{"prompt": "a", "answer": "b"}',
        '{"prompt": "a"}',
        '{"prompt": "a", "answer": "c"}',
        '{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}',
        '{"prompt": "b", "answer": "b", "task": 1}',
        '{"prompt": "b", ',
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as told:
        read_answers(path)
    reasons = re.findall(r"line (\d): (.*)", str(told.value))
    assert [number for number, _ in reasons] == ["2", "3", "4", "5", "6"]
    assert "another way" in reasons[1][1]
    assert '"task" is a number' in reasons[3][1]
    path.write_text("")
    with pytest.raises(DataError, match="no lines"):
        read_answers(path)


def test_a_zip_answers_and_what_it_was_trained_on_is_said_to_be_unknown(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "gift.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in (runs / "okapi" / "adapter").iterdir():
            archive.write(path, f"gift/{path.name}")
    options = ["--rows", "2", "--max-new-tokens", "8", "--runs-dir", str(runs)]
    kept = tmp_path / "kept.jsonl"
    out = run_cli(capsys, "zebu", str(packed), *options, "--output", str(kept))
    assert "not known what was trained on for gift.zip:" in out
    assert set(map(len, (read_answers(kept, "zebu"), read_answers(kept, "gift.zip")))) == {2}
    assert "Name rows to answer with --data" in run_cli(capsys, str(packed), "base", *options, code=2)
    refused = run_cli(capsys, str(packed), f"{kept}#zebu", *options, "--vote", code=2)
    assert "Name a file with --votes" in refused
    assert "is one of the files that are read" in run_cli(
        capsys, "zebu", f"{kept}#gift.zip", *options, "--output", str(kept), code=2
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    votes = ["--vote", "--votes", str(tmp_path / "votes.jsonl")]
    run_cli(capsys, str(packed), f"{kept}#zebu", *options, *votes)
    assert [each.winner for each in read_votes(tmp_path / "votes.jsonl")] == ["gift.zip"]
    assert "Give both" in run_cli(capsys, "zebu", "base", *options, *votes[1:], code=2)
