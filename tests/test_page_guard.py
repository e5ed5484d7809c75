"""Between page and network: who is answered, how much is read, and what a browser may run."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from qlora_tune import page_guard
from qlora_tune.errors import ConfigError
from qlora_tune.page_guard import FREE_GUESSES, LOOPBACK, MAX_BODY_BYTES, UPLOAD_PATH, Guard, app_options, ask_password

UPLOAD_BYTES = 4 * MAX_BODY_BYTES
HERE = "http://127.0.0.1:7860"
RIGHT = "correct horse"
INLINE = "window.config = {a: 1 < 2};\nstart()"
PAGE = f"""<!doctype html><html><head><script>{INLINE}</script>
<script type="module" src="/assets/index.js"></script><script  type="module">second()</script></head>
<body>café<script></script></body></html>"""


async def home(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


async def parts_of_a_page(request: Request) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(PAGE.encode()), 7):
            yield PAGE.encode()[start : start + 7]

    return StreamingResponse(pieces(), media_type="text/html; charset=utf-8")


async def size(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def file(request: Request) -> PlainTextResponse:
    return PlainTextResponse("<script>x</script>", headers={"content-disposition": "attachment"})


def guarded(public: bool = False) -> Starlette:
    """A small server behind the guard, as the page's is."""
    routes = [Route("/", home, methods=["GET", "HEAD"]), Route("/pieces", parts_of_a_page), Route("/file", file)]
    routes += [Route(path, size, methods=["POST"]) for path in ("/size", UPLOAD_PATH)]
    return Starlette(routes=routes, middleware=app_options(public, UPLOAD_BYTES)["middleware"])


def ask(method: str, path: str, public: bool = False, base: str = HERE, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(guarded(public), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "LOCALHOST:1"])
def test_this_machines_own_names_are_answered(host: str) -> None:
    assert ask("GET", "/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost@evil.example", "localhost.", "",
     "0.0.0.0:7860", "192.168.0.9", "xn--localhost", "localhost.evil.example"],
)  # fmt: skip
def test_another_host_name_is_refused(host: str) -> None:
    refused = ask("GET", "/", headers={"host": host})
    assert refused.status_code == 421
    assert "config" not in refused.text


@pytest.mark.parametrize(
    "host",
    ["[", "[::1", "127.0.0.1:port", "localhost:99999999"],
)  # fmt: skip
def test_a_malformed_host_never_crashes_the_server(host: str) -> None:
    assert ask("GET", "/", headers={"host": host}).status_code in (200, 400, 421)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:8000", "http://localhost:7860", "",
     "http://127.0.0.1:7860.evil.example", "http://127.0.0.1:7860@evil.example", "file://"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_of_other_pages_are_refused(method: str, origin: str) -> None:
    path = "/" if method == "GET" else "/size"
    assert ask(method, path, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("origin", ["http://[", "http://[::1"])
def test_a_malformed_origin_never_crashes_the_server(origin: str) -> None:
    assert ask("GET", "/", headers={"origin": origin}).status_code in (400, 403)


def test_the_pages_own_requests_pass() -> None:
    assert ask("POST", "/size", headers={"origin": HERE}, content=b"abc").text == "3"
    assert ask("POST", "/size", content=b"abc").text == "3"  # no browser, or the address bar


def test_a_public_page_is_answered_under_its_name_but_not_to_other_pages() -> None:
    public = "https://abc.gradio.live"
    assert ask("GET", "/", public=True, base=public).status_code == 200
    assert ask("GET", "/", public=True, base=public, headers={"origin": public}).status_code == 200
    assert ask("GET", "/", public=True, base=public, headers={"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(("path", "limit"), [("/size", MAX_BODY_BYTES), (UPLOAD_PATH, UPLOAD_BYTES)])
def test_a_body_is_refused_by_its_length_before_it_is_read(path: str, limit: int) -> None:
    assert ask("POST", path, content=bytes(limit)).text == str(limit)
    asked = ask("POST", path, headers={"content-length": str(limit + 1)}, content=b"")
    assert (asked.status_code, asked.text) == (413, f"Larger than {limit:,} bytes.")


@pytest.mark.parametrize("length", ["-1", "x", "", "1e3", "²"])
def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    headers: Any = [(b"content-length", length.encode("latin-1"))]
    assert ask("POST", "/size", headers=headers, content=b"x").status_code == 413


@pytest.mark.parametrize("size", [MAX_BODY_BYTES, MAX_BODY_BYTES + 1])
def test_a_body_without_a_length_is_cut_off_at_the_limit(size: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, size, 1 << 20):
            yield bytes(min(1 << 20, size - start))

    answer = ask("POST", "/size", content=pieces())
    assert "content-length" not in answer.request.headers
    assert (answer.status_code == 200) is (size <= MAX_BODY_BYTES)
    assert answer.status_code == 200 or str(size) not in answer.text


def policy_of(answer: httpx.Response) -> dict[str, list[str]]:
    """The Content-Security-Policy, by directive."""
    (header,) = answer.headers.get_list("content-security-policy")
    directives = [directive.split() for directive in header.split(";")]
    return {name: sources for name, *sources in directives}


def hash_of(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@pytest.mark.parametrize("path", ["/", "/pieces"])
def test_a_page_may_run_its_own_inline_scripts_and_no_others(path: str) -> None:
    answer = ask("GET", path)
    assert answer.text == PAGE
    sources = policy_of(answer)["script-src"]
    assert sorted(sources) == sorted(["'self'", hash_of(INLINE), hash_of("second()"), hash_of("")])
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "data:", "https:"} & set(sources)


def test_a_page_loads_nothing_from_elsewhere_and_is_framed_by_nobody() -> None:
    answer = ask("GET", "/")
    policy = policy_of(answer)
    assert policy["default-src"] == ["'none'"]
    assert policy["frame-ancestors"] == ["'none'"]
    allowed = {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}
    assert {source for name in policy if name != "script-src" for source in policy[name]} <= allowed
    assert [name for name in policy if "'unsafe-inline'" in policy[name]] == ["style-src"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"


def test_what_is_no_page_may_run_nothing_at_all() -> None:
    answer = ask("GET", "/file")
    assert answer.text == "<script>x</script>"
    assert policy_of(answer) == {"default-src": ["'none'"], "sandbox": []}
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_refusal_can_not_be_read_as_a_page() -> None:
    answer = ask("GET", "/", headers={"host": "<script>alert(1)</script>"})
    assert answer.status_code == 421
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_head_of_a_page_is_answered() -> None:
    answer = ask("HEAD", "/")
    assert (answer.status_code, answer.content) == (200, b"")


def serve_raw(app: Any, path: str = "/") -> list[tuple[Any, int]]:
    """What the guard sends, each with how many pieces the application had sent by then."""
    sent: list[tuple[Any, int]] = []
    scope = {"type": "http", "path": path, "method": "GET", "headers": [(b"host", b"localhost")]}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append((dict(message), app.count))

    asyncio.run(Guard(app, LOOPBACK, UPLOAD_BYTES)(scope, receive, send))
    return sent


class Pieces:
    """An application that sends three pieces and counts them."""

    def __init__(self, content_type: bytes) -> None:
        self.count, self.content_type = 0, content_type

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.content_type)]})
        for number in range(3):
            self.count += 1
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": number < 2})


@pytest.mark.parametrize("content_type", [b"text/event-stream", b"application/json", b"text/plain"])
def test_a_streaming_answer_passes_piece_by_piece(content_type: bytes) -> None:
    sent = serve_raw(Pieces(content_type))
    bodies = [(message["body"], count) for message, count in sent if message["type"] == "http.response.body"]
    assert bodies == [(b"0", 1), (b"1", 2), (b"2", 3)]
    assert sent[0][1] == 0  # its head first


def test_a_page_is_sent_whole_once_all_its_scripts_are_known() -> None:
    sent = serve_raw(Pieces(b"text/html"))
    assert [message["type"] for message, _ in sent] == ["http.response.start", "http.response.body"]
    assert sent[1][0]["body"] == b"012"
    assert not sent[1][0].get("more_body")


def test_what_is_no_http_request_reaches_the_application() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, LOOPBACK, 1)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_there_are_no_pages_about_the_interface() -> None:
    options = app_options(False, 1)
    assert [options[name] for name in ("docs_url", "redoc_url", "openapi_url")] == [None] * 3


def test_a_local_page_asks_for_nothing_and_a_public_one_needs_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TUNE_PASSWORD", "long enough")
    assert ask_password("", public=False) is None
    with pytest.raises(ConfigError, match="Others could reach this page"):
        ask_password("", public=True)
    assert ask_password("me", public=True) == ("me", "long enough")
    assert ask_password("me", public=False) == ("me", "long enough")


@pytest.mark.parametrize("public", [True, False])
def test_a_short_password_is_refused(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TUNE_PASSWORD", "1234567")
    with pytest.raises(ConfigError, match="at least 8 characters"):
        ask_password("me", public)


def test_a_password_that_is_not_set_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_TUNE_PASSWORD", raising=False)
    monkeypatch.setattr(page_guard, "getpass", lambda prompt: "typed in secret")
    assert ask_password("me", public=True) == ("me", "typed in secret")


def log_in(guesses: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Guess at a real page with a password, each time so many seconds after the guess before."""
    import gradio as gr

    with gr.Blocks() as page:
        gr.Markdown("secret")
    app = gr.routes.App.create_app(page, app_kwargs=app_options(True, UPLOAD_BYTES))
    app.auth = {"me": RIGHT}
    now = 0.0
    monkeypatch.setattr(page_guard, "time", SimpleNamespace(monotonic=lambda: now))

    async def send() -> list[int]:
        nonlocal now
        answers = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
            for wait, password in guesses:
                now += wait
                answers.append(await client.post("/login", data={"username": "me", "password": password}))
        return [answer.status_code for answer in answers]

    return asyncio.run(send())


def test_after_some_wrong_passwords_even_the_right_one_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [(0.0, "no")] * FREE_GUESSES
    assert log_in([*wrong, (0, RIGHT)], monkeypatch) == [400] * FREE_GUESSES + [200]
    answers = log_in([*wrong, (0, "no"), (0, RIGHT), (1.9, RIGHT), (0.2, RIGHT), (0, "no")], monkeypatch)
    assert answers[FREE_GUESSES:] == [400, 429, 429, 200, 400]


def test_a_program_that_guesses_for_a_day_gets_a_hundred_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = log_in([(60.0, str(number)) for number in range(24 * 60)], monkeypatch)
    assert 90 < answers.count(400) < 115
    assert set(answers) == {400, 429}


def test_many_guesses_at_once_gain_nothing() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send() -> list[int]:
        transport = httpx.ASGITransport(Guard(slow, None, 1000))
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
            answers = await asyncio.gather(*(client.post("/login") for _ in range(50)))
        return [answer.status_code for answer in answers]

    assert asyncio.run(send()).count(400) == FREE_GUESSES + 1
