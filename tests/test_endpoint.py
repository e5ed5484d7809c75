"""One request to an endpoint: a real little server is late, busy, or talks nonsense."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from chat_server import Reply, Server, say, serve_chat

from qlora_tune.endpoint import Endpoint, ask, check_endpoint, connect, is_loopback, read_content
from qlora_tune.errors import ConfigError, DataError


@pytest.fixture
def server() -> Iterator[Server]:
    with serve_chat() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("qlora_tune.endpoint.time.sleep", waited.append)
    return waited


def ask_for(endpoint: Endpoint, **sampling: float) -> str:
    key = check_endpoint(endpoint)
    with connect(endpoint, key) as client:
        return ask(client, endpoint, key, "Propose.", "Nothing stands yet.", **sampling)


def test_a_busy_endpoint_is_asked_again_with_the_same_request(server: Server, pauses: list[float]) -> None:
    server.reply = lambda number: (429, "", {"retry-after": "3"}) if number == 0 else say("a task")
    assert read_content(ask_for(Endpoint(server.url, "teacher"), temperature=0.8)) == "a task"
    assert pauses == [3.0]
    assert server.requests[0] == server.requests[1]
    assert server.requests[0] == {
        "path": "/v1/chat/completions",
        "key": None,
        "model": "teacher",
        "messages": [{"role": "user", "content": "Propose."}],
        "temperature": 0.8,
    }


def test_an_answer_that_comes_too_late_is_asked_for_again_and_then_reported(
    server: Server, pauses: list[float]
) -> None:
    over = threading.Event()

    def late(number: int) -> Reply:
        over.wait(30)
        return 204, "", {}

    server.reply = late
    with pytest.raises(DataError, match=r"127.0.0.1: no answer in 4 attempts \(ReadTimeout\)\. Nothing stands yet"):
        ask_for(Endpoint(server.url, "teacher", timeout_seconds=0.1))
    over.set()
    assert pauses == [1.0, 2.0, 4.0]
    assert len(server.requests) == 4


def test_a_refusal_is_said_at_once_without_the_key(
    server: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret-0123")
    server.reply = lambda number: (400, "no such model; you sent sk-very-secret-0123", {})
    with pytest.raises(ConfigError, match=r"status 400: no such model; you sent \*\*\*") as caught:
        ask_for(Endpoint(server.url, "teacher", "TEACHER_KEY"))
    assert server.requests[0]["key"] == "Bearer sk-very-secret-0123"
    assert "very-secret" not in str(caught.value)
    assert pauses == []


@pytest.mark.parametrize("body", ["<html>", "[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'])
def test_a_body_that_is_no_chat_completion_has_no_content(body: str) -> None:
    assert read_content(body) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_is_known(host: str) -> None:
    assert is_loopback(host)
    assert not is_loopback(f"{host}.example.org")
