"""Pairs through an endpoint: a real little server answers, well and badly; what is kept, refused, retried, resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, say, serve_chat

from qlora_tune.data import load_examples
from qlora_tune.endpoint import Endpoint
from qlora_tune.errors import ConfigError, DataError
from qlora_tune.self_instruct import (
    Filters,
    GenerationReport,
    Proposal,
    generate_pairs,
    measure_rouge_l,
    refuse_proposal,
    split_words,
)
from qlora_tune.shapes import Example

KEY = "sk-very-secret-0123"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve_chat() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("qlora_tune.endpoint.time.sleep", waited.append)
    return waited


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("Tea\n\nBoil {water} for tea.\n\n" + "\n\n".join(f"Fact number {n} about tea." for n in range(40)))
    return path


def propose(*pairs: tuple[str, str]) -> Reply:
    return say(json.dumps({"pairs": [{"instruction": i, "input": "", "output": o} for i, o in pairs]}))


def fresh(number: int) -> Reply:
    """Two pairs that share no words with those of any other request."""
    words = [f"{chr(97 + number % 26)}{chr(97 + part)}{'x' * (number // 26)}" for part in range(8)]
    return propose((" ".join(words[:4]), f"one {number}"), (" ".join(words[4:]), f"two {number}"))


def generate(server: Server, notes: Path, out: Path, wanted: int, **changes: Any) -> GenerationReport:
    return generate_pairs([notes], Endpoint(server.url, "teacher-1"), [], wanted, out, **changes)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_kept_pairs_carry_where_they_come_from_and_are_read_as_training_rows(server: Server, notes: Path) -> None:
    server.reply = fresh
    out = notes.with_name("made.jsonl")
    report = generate(server, notes, out, 3, seed=5)
    rows = read(out)
    assert len(rows) == len(report.kept) == 3
    assert {key: rows[0][key] for key in ("made_by", "endpoint", "prompt_version", "seed", "source", "task")} == {
        "made_by": "teacher-1",
        "endpoint": f"127.0.0.1:{server.server_address[1]}",
        "prompt_version": 1,
        "seed": 5,
        "source": "notes.txt:1",
        "task": "self-instruct",
    }
    assert load_examples([out])[0][0].answer == "one 0"
    assert [refused.reason for refused in report.refused] == ["more than were wanted"]
    assert not notes.with_name("made.partial.jsonl").exists()


def test_the_request_is_a_chat_completion_about_the_text_with_seeds_as_examples(server: Server, notes: Path) -> None:
    server.reply = fresh
    seed = Example(
        ({"role": "user", "content": "Name a {drink}.\n\nhot"}, {"role": "assistant", "content": "Tea"}), None, "s:1"
    )
    generate_pairs([notes], Endpoint(server.url + "/", "teacher-1"), [seed], 2, notes.with_name("o.jsonl"))
    (request,) = server.requests
    assert (request["path"], request["model"], request["key"]) == ("/v1/chat/completions", "teacher-1", None)
    prompt = request["messages"][0]["content"]
    assert "- Name a {drink}.\n" in prompt
    assert "hot" not in prompt.replace("phrased", "")
    assert "Boil {water} for tea." in prompt
    assert prompt.startswith("Write 2 different tasks")


def test_the_key_comes_from_the_environment_and_stands_in_no_file_or_message(
    server: Server, notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    endpoint = Endpoint(server.url, "teacher-1", api_key_env="TEACHER_KEY")
    server.reply = lambda number: fresh(number) if number < 1 else (401, f"wrong key {KEY}", {})
    with pytest.raises(ConfigError, match=r"status 401: wrong key \*\*\*") as caught:
        generate_pairs([notes], endpoint, [], 9, notes.with_name("o.jsonl"))
    assert [request["key"] for request in server.requests] == [f"Bearer {KEY}"] * 2
    written = "".join(path.read_text() for path in notes.parent.iterdir())
    assert "one 0" in written
    assert KEY not in written + str(caught.value) + caplog.text + repr(endpoint)


def test_a_key_that_is_not_set_and_other_faults_are_said_at_once_without_the_address(notes: Path) -> None:
    endpoint = Endpoint("http://me:hidden@example.org/v1?token=hidden", "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError) as caught:
        generate_pairs([notes], endpoint, [], 1, notes.with_name("o.jsonl"))
    for part in ("use https://", "a login, a query", "NO_SUCH_KEY is not set"):
        assert part in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_plain_http_beyond_this_machine_is_possible_when_asked_for(notes: Path) -> None:
    endpoint = Endpoint("http://example.org/v1", "m", api_key_env="NO_SUCH_KEY", allow_insecure=True)
    with pytest.raises(ConfigError) as caught:
        generate_pairs([notes], endpoint, [], 1, notes.with_name("o.jsonl"))
    assert "use https://" not in str(caught.value)


@pytest.mark.parametrize("tail", ["?key=hidden", "#hidden"])
def test_an_address_with_a_query_or_fragment_is_refused(tail: str, server: Server, notes: Path) -> None:
    with pytest.raises(ConfigError, match="a query or a fragment"):
        generate_pairs([notes], Endpoint(server.url + tail, "m"), [], 1, notes.with_name("o.jsonl"))


def test_a_proxy_of_the_environment_is_not_used(
    server: Server, notes: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    with Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
    server.reply = fresh
    assert len(generate(server, notes, notes.with_name("o.jsonl"), 2).kept) == 2


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:80", "http://", "http://127.0.0.1.example.org/v1"])
def test_addresses_that_are_no_safe_web_address_are_refused(url: str, notes: Path) -> None:
    with pytest.raises(ConfigError):
        generate_pairs([notes], Endpoint(url, "m"), [], 1, notes.with_name("o.jsonl"))


def test_too_many_requests_and_server_errors_are_tried_again_after_a_pause(
    server: Server, notes: Path, pauses: list[float]
) -> None:
    early = [(429, "", {"retry-after": "7"}), (503, "", {}), (429, "", {"retry-after": "9999"})]
    server.reply = lambda number: early[number] if number < 3 else fresh(number)
    report = generate(server, notes, notes.with_name("o.jsonl"), 2)
    assert len(report.kept) == 2
    assert pauses == [7.0, 2.0, 60.0]


def test_an_endpoint_that_stays_away_is_reported_and_what_was_kept_stays(
    server: Server, notes: Path, pauses: list[float]
) -> None:
    server.reply = lambda number: fresh(number) if number == 0 else (500, "", {})
    with pytest.raises(DataError, match=r"4 attempts \(status 500\)\. 2 pairs stand in .*o\.partial\.jsonl"):
        generate(server, notes, notes.with_name("o.jsonl"), 4)
    assert pauses == [1.0, 2.0, 4.0]
    assert not notes.with_name("o.jsonl").exists()
    assert [len(line["kept"]) for line in read(notes.with_name("o.partial.jsonl"))[1:]] == [2]


def test_an_endpoint_that_is_not_there_is_reported(notes: Path, pauses: list[float]) -> None:
    with Server() as gone:
        url = gone.url
    with pytest.raises(DataError, match="ConnectError"):
        generate_pairs([notes], Endpoint(url, "m"), [], 1, notes.with_name("o.jsonl"))


def test_redirects_are_not_followed(server: Server, notes: Path) -> None:
    with Server() as other:
        server.reply = lambda number: (307, "", {"location": other.url + "/chat/completions"})
        with pytest.raises(ConfigError, match="redirects to 127.0.0.1, which is not followed"):
            generate(server, notes, notes.with_name("o.jsonl"), 1)
        assert other.requests == []


def test_garbage_is_refused_with_its_text_and_the_work_goes_on(server: Server, notes: Path) -> None:
    garbage: list[Reply] = [
        (200, "<html>", {}),
        (200, '{"choices": []}', {}),
        say("I can't."),
        say('{"pairs": [{"instruction": 7}, "text", {"instruction": "Say how tea is made", "output": "\\ud800"}]}'),
    ]
    server.reply = lambda number: garbage[number] if number < len(garbage) else fresh(number)
    report = generate(server, notes, notes.with_name("o.jsonl"), 2)
    assert len(report.kept) == 2
    refused = read(notes.with_name("o.refused.jsonl"))
    assert [row["proposal"][:12] for row in refused][:4] == ["<html>", '{"choices": ', "I can't.", '{"instructio']
    assert len(refused) == len(report.refused) == 6
    assert "lone surrogate" in refused[-1]["reason"]


@pytest.mark.parametrize(
    "wrapped",
    ["```json\n{}\n```", '<think>{{"pairs": [1]}}</think>Here [you] are: {} Enjoy!', "{}"],
)
def test_json_is_found_however_it_is_wrapped(wrapped: str, server: Server, notes: Path) -> None:
    pairs = json.dumps([{"instruction": "Name the drink here", "output": "Tea"}])
    server.reply = lambda number: say(wrapped.replace("{{", "{").replace("}}", "}").replace("{}", pairs))
    report = generate(server, notes, notes.with_name("o.jsonl"), 1)
    assert [proposal.output for proposal in report.kept] == ["Tea"]


def test_an_endpoint_that_repeats_itself_comes_to_an_end(server: Server, notes: Path) -> None:
    server.reply = lambda number: propose(("Name the drink here", "Tea"))
    report = generate(server, notes, notes.with_name("o.jsonl"), 50)
    assert len(report.kept) == 1
    assert report.requests == 6
    assert {refused.reason for refused in report.refused} == {"ROUGE-L 1.00 with: Name the drink here"}


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(server: Server, notes: Path) -> None:
    server.reply = fresh
    whole, resumed = notes.with_name("whole.jsonl"), notes.with_name("resumed.jsonl")
    generate(server, notes, whole, 12, seed=3, max_document_chars=300)
    asked = [request["messages"] for request in server.requests]

    def interrupt(report: GenerationReport) -> None:
        if report.requests == 3:
            raise KeyboardInterrupt

    server.requests.clear()
    with pytest.raises(KeyboardInterrupt):
        generate(server, notes, resumed, 12, seed=3, max_document_chars=300, on_progress=interrupt)
    with notes.with_name("resumed.partial.jsonl").open("a") as file:
        file.write('{"kept": [{"sou')  # cut off by a kill
    generate(server, notes, resumed, 12, seed=3, max_document_chars=300)
    assert [request["messages"] for request in server.requests] == asked
    assert len({json.dumps(messages) for messages in asked}) == len(asked) == 6
    assert resumed.read_bytes() == whole.read_bytes()


def test_fruitless_requests_count_across_an_interruption(server: Server, notes: Path) -> None:
    server.reply = lambda number: propose(("Name the drink here", "Tea"))

    def interrupt(report: GenerationReport) -> None:
        if report.requests == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(server, notes, notes.with_name("o.jsonl"), 50, on_progress=interrupt)
    assert generate(server, notes, notes.with_name("o.jsonl"), 50).requests == 6


def test_what_another_call_began_is_not_continued_and_nothing_is_overwritten(server: Server, notes: Path) -> None:
    server.reply = lambda number: fresh(number) if number == 0 else (400, "no", {})
    out = notes.with_name("o.jsonl")
    with pytest.raises(ConfigError, match="status 400"):
        generate(server, notes, out, 4)
    with pytest.raises(ConfigError, match="begun with other"):
        generate(server, notes, out, 4, seed=1)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        generate(server, notes, out, 4)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("instruction", "given", "answer", "reason"),
    [
        ("Explain tea", "", "x", "has 2 words, expected 3 to 150"),
        ("tea " * 151, "", "x", "has 151 words"),
        ("- name the drink", "", "x", "does not start with a word"),
        ("Draw the tea pot", "", "x", 'says "draw"'),
        ("Please go  to the shop", "", "x", 'says "go to"'),
        ("Name the drink here", "", " ", "turn 2 (assistant) is empty"),
        ("Repeat this word please", "Tea", "tea ", "repeats the question"),
        ("Name the drink here", "", "Name the drink here", "repeats the question"),
        ("Say what colour tea usually has", "", "x", "ROUGE-L 0.83 with: Say what colour tea normally has"),
    ],
)
def test_a_proposal_that_self_instruct_would_not_keep_is_refused(
    instruction: str, given: str, answer: str, reason: str
) -> None:
    found = refuse_proposal(
        Proposal("a:1", instruction, given, answer), ["Say what colour tea normally has"], Filters()
    )
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("instruction", ["Imagine you are drinking tea", "Write about profiles", "请 给 出 茶"])
def test_a_good_proposal_is_kept(instruction: str) -> None:
    assert refuse_proposal(Proposal("a:1", instruction, "", "x"), ["Say what colour tea has"], Filters()) is None


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    first, second = split_words("The cat sat, on the mat!"), split_words("the CAT on a mat")
    assert measure_rouge_l(first, second) == pytest.approx(2 * 4 / (6 + 5))
    assert measure_rouge_l([], []) == 0.0
    assert split_words("写一个 short 标题") == ["写", "一", "个", "short", "标", "题"]
