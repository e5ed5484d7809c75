"""What stands between the page and the network: whose requests are answered, and what a browser may load from it.

A web page that is open in the same browser can reach a local server too. So requests under another host name (DNS
rebinding) or from another origin are refused, bodies are limited, and every answer carries a Content-Security-Policy
under which only the server's own scripts run and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from getpass import getpass
from typing import Any

from qlora_tune.errors import ConfigError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 16 << 20  # of anything but an upload
SHORTEST_PASSWORD = 8
UPLOAD_PATH = "/gradio_api/upload"
LOGIN_PATH = "/login"
FREE_GUESSES = 4  # people mistype; a program is slowed down to a hundred guesses a day
LONGEST_WAIT_S = 900
_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::\d+)?")
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.S)
_POLICY = (
    "default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; manifest-src 'self'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


def app_options(public: bool, max_upload_bytes: int) -> dict[str, Any]:
    """FastAPI's options for a guarded page. A public one answers under any host name: it asks for a password."""
    from starlette.middleware import Middleware

    guard = Middleware(Guard, hosts=None if public else LOOPBACK, max_upload_bytes=max_upload_bytes)
    return {"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None}


def ask_password(user: str, public: bool) -> tuple[str, str] | None:
    """The name and password to ask visitors for; None where nobody but this machine can come. Raises ConfigError."""
    if public and not user:
        raise ConfigError(
            "Others could reach this page, read your data and start runs. Give --user NAME and a password."
        )
    if not user:
        return None
    password = os.environ.get("QLORA_TUNE_PASSWORD") or getpass("password: ")
    if len(password) < SHORTEST_PASSWORD:
        raise ConfigError(f"The password should have at least {SHORTEST_PASSWORD} characters.")
    return user, password


class Guesses:
    """Wrong passwords in a row, whoever sent them: through a tunnel all visitors have one address.

    Each beyond the free ones locks the login, for everybody who isn't in yet, twice as long as the one before.
    """

    def __init__(self) -> None:
        self._wrong, self._locked_until = 0, 0.0

    def begin(self) -> tuple[int, str] | None:
        """Take a guess for wrong until it proves right, so that many at once gain nothing; refuse while locked."""
        left = self._locked_until - time.monotonic()
        if left > 0:
            return 429, f"Too many wrong passwords. The login opens again in {left:.0f} seconds."
        self._wrong += 1
        if self._wrong > FREE_GUESSES:
            wait = min(2.0 ** min(self._wrong - FREE_GUESSES, 30), LONGEST_WAIT_S)
            self._locked_until = time.monotonic() + wait
        return None

    def watch(self, send: Send) -> Send:
        """Forget the wrong guesses once one was answered as right."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._wrong, self._locked_until = 0, 0.0
            await send(message)

        return watched


class Guard:
    """ASGI middleware. `hosts` are the names that the server answers to; None for any, where a password is asked."""

    def __init__(self, app: Asgi, hosts: Collection[str] | None, max_upload_bytes: int) -> None:
        self._app, self._hosts, self._max_upload = app, hosts, max_upload_bytes
        self._guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page has none, and they would pass the checks below
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        limit = self._max_upload if scope["path"] == UPLOAD_PATH else MAX_BODY_BYTES
        guesses = scope["method"] == "POST" and scope["path"].rstrip("/") == LOGIN_PATH
        reason = self._refuse(headers) or _refuse_length(headers, limit) or (self._guesses.begin() if guesses else None)
        if reason:
            await _answer(send, *reason)
            return
        send = self._guesses.watch(send) if guesses else send
        await self._app(scope, _limited(receive, limit), _with_policy(send))

    def _refuse(self, headers: MutableMapping[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        name = _HOST.fullmatch(host)
        if self._hosts is not None and (not name or name[1].strip("[]").lower() not in self._hosts):
            return 421, f"This page is not served under the host name {host[:100]!r}."
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Requests from other pages are refused."
        return None


def _refuse_length(headers: MutableMapping[bytes, str], limit: int) -> tuple[int, str] | None:
    length = headers.get(b"content-length", "0")
    return (413, f"Larger than {limit:,} bytes.") if not length.isdecimal() or int(length) > limit else None


def _limited(receive: Receive, limit: int) -> Receive:
    """Cut off a body that is longer than it may be, whatever its header said."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > limit else message

    return limited


def _with_policy(send: Send) -> Send:
    """Add the policy to each answer. A page is held back until it is whole, for the hashes of its own scripts."""
    start: Message | None = None
    page = b""

    async def guarded(message: Message) -> None:
        nonlocal start, page
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_HEADERS]
            if dict(message["headers"]).get(b"content-type", b"").startswith(b"text/html"):
                start = message
                return
            message["headers"].append((b"content-security-policy", b"default-src 'none'; sandbox"))
        elif message["type"] == "http.response.body" and start is not None:
            page += message.get("body", b"")
            if message.get("more_body"):
                return
            start["headers"].append((b"content-security-policy", _policy(page).encode()))
            await send(start)
            message, start = {"type": "http.response.body", "body": page}, None
        await send(message)

    return guarded


def _policy(page: bytes) -> str:
    hashes = {base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE_SCRIPT.findall(page)}
    return _POLICY.format(scripts=" ".join(f"'sha256-{digest}'" for digest in sorted(hashes)))


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
