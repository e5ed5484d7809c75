"""A model hub on this machine, as far as an upload and a download need one: what it gets it keeps and hands out."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Hub:
    """The repositories by name, whether each is private, and the tokens that requests came with."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.address = ""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, content: bytes | dict[str, Any] | list[dict[str, Any]], status: int = 200) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hash(body):x}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?(?:\?.*)?", self.path):
                name = found[1]
                if name not in hub.files:
                    return self.answer({"error": "no such repository"}, 404)
                names = [{"rfilename": file} for file in hub.files[name]]
                about = {"id": name, "private": hub.private[name], "sha": COMMIT, "siblings": names}
                return self.answer(about)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+(?:\?.*)?", self.path):
                files = hub.files[found[1]].items()
                return self.answer([{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files])
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self.path):
                return self.answer(hub.files[found[1]][found[2]])
            return self.answer({"error": self.path}, 404)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/api/repos/create":
                asked = json.loads(text)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.files:
                    return self.answer({"error": "is there", "url": f"{hub.address}/{name}"}, 409)
                hub.files[name], hub.private[name] = {}, asked["visibility"] == "private"
                return self.answer({"url": f"{hub.address}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            name = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(text)["files"]]
                return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
            for entry in map(json.loads, text.splitlines()):
                if entry["key"] == "file":
                    hub.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
