"""One request to an OpenAI-compatible endpoint that the user names: what may be sent where, retries, what came back."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from dataclasses import dataclass
from typing import Any

from qlora_tune.errors import ConfigError, DataError, join_problems

RETRIES = 3
MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint: its address up to, without, /chat/completions.

    The key is read from the environment variable that is named, and is in no row, message or file. Without TLS only
    this machine is spoken to, unless allow_insecure.
    """

    url: str
    model: str
    api_key_env: str = ""
    timeout_seconds: float = 120.0
    allow_insecure: bool = False


def check_endpoint(endpoint: Endpoint) -> str:
    """Return the key ("" for none). Raises ConfigError naming all that is wrong, never the key or the whole address."""
    import httpx

    try:
        url = httpx.URL(endpoint.url)
    except httpx.InvalidURL:
        raise ConfigError("The endpoint's address is not valid. Expected https://HOST/v1 or the like.") from None
    problems = []
    if url.scheme not in ("http", "https") or not url.host:
        problems.append("its address must begin with https://HOST (http:// for this machine)")
    elif url.scheme == "http" and not endpoint.allow_insecure and not is_loopback(url.host):
        problems.append(f"http:// to {url.host} would send texts and key readable by others: use https://")
    if url.userinfo or url.query or url.fragment:
        problems.append("its address holds a login, a query or a fragment: put the key into an environment variable")
    key = os.environ.get(endpoint.api_key_env, "").strip() if endpoint.api_key_env else ""
    if endpoint.api_key_env and not key:
        problems.append(f"the environment variable {endpoint.api_key_env} is not set: set it to the endpoint's key")
    if not (key.isascii() and key.isprintable()):
        problems.append(f"{endpoint.api_key_env} holds characters that no key has")
    if problems:
        raise ConfigError(join_problems("The endpoint can't be used:", problems))
    return key


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connect(endpoint: Endpoint, key: str) -> Any:
    """A client that speaks to the endpoint alone; a context manager."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Without trust_env: neither a proxy nor a .netrc login from the environment comes between.
    return httpx.Client(headers=headers, timeout=endpoint.timeout_seconds, follow_redirects=False, trust_env=False)


def ask(client: Any, endpoint: Endpoint, key: str, prompt: str, standing: str, **sampling: float) -> str:
    """Post one request, again after a pause where that may help; returns the body of the answer.

    `standing` tells what a failure leaves, `sampling` is the API's own (temperature, max_tokens, seed). Raises
    ConfigError where the endpoint refuses, DataError where it stays away.
    """
    import httpx

    body = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}], **sampling}
    host = httpx.URL(endpoint.url).host
    found = ""
    for attempt in range(RETRIES + 1):
        wait = 2.0**attempt
        try:
            response = client.post(endpoint.url.rstrip("/") + "/chat/completions", json=body)
        except httpx.RequestError as error:
            found = type(error).__name__
        else:
            if response.is_success:
                return str(response.text)
            found = f"status {response.status_code}"
            if response.status_code != 429 and response.status_code < 500:
                raise ConfigError(_explain_status(response, host, key))
            wait = _read_pause(response.headers.get("retry-after", ""), wait)
        if attempt < RETRIES:
            time.sleep(wait)
    raise DataError(
        f"{host}: no answer in {RETRIES + 1} attempts ({found}). {standing} The same command goes on there."
    )


def read_content(body: str) -> str | None:
    """What the model said, out of the body of an answer; None where that is no chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def _explain_status(response: Any, host: str, key: str) -> str:
    if response.has_redirect_location:
        target = response.next_request.url.host if response.next_request else "another address"
        return f"{host}: redirects to {target}, which is not followed. Name the endpoint's final address."
    said = response.text.replace(key, "***") if key else response.text
    said = re.sub(r"\s+", " ", said)[:200]
    return f"{host}: refused with status {response.status_code}: {said}. Check address, model and key."


def _read_pause(retry_after: str, otherwise: float) -> float:
    return min(float(retry_after), MAX_PAUSE_SECONDS) if retry_after.isdecimal() else otherwise
