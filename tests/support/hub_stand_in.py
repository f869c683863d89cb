"""A small local server with as much of the Hugging Face hub's API as huggingface_hub needs to download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class HubStandIn:
    """What the server holds, how it misbehaves, and what it was asked."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository → file → content."""
    breaks: list[int] = field(default_factory=list)
    """The next downloads of longer files end after so many bytes, without warning."""
    status: int = 0
    """Answer every request below /api/models/ and for files with this status."""
    refuses_tokens: int = 0
    """Answer every request that shows a token with this status."""
    etag: str = ""
    """Sent instead of a file's sha256."""
    requests: list[str] = field(default_factory=list)
    """`GET /path bytes=5-`, in order."""
    url: str = ""

    def downloads(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET") and "/resolve/" in request]


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A running server."""
    hub = HubStandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if self.hub.refuses_tokens and "Authorization" in self.headers:
            self._fail(self.hub.refuses_tokens, "")
        elif path == ["api", "models"]:
            self._json([])
        elif self.hub.status:
            self._fail(self.hub.status, "")
        elif path[:2] == ["api", "models"]:
            self._repo("/".join(path[2:4]), path[4:])
        else:
            self._file("/".join(path[:2]), path[2:])

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

    def _repo(self, repo: str, rest: list[str]) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            self._fail(404, "RepoNotFound")
        elif len(rest) == 2 and rest[1] not in ("main", COMMIT):
            self._fail(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self._json([_entry(name, content) for name, content in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

    def _file(self, repo: str, rest: list[str]) -> None:
        content = self.hub.repos.get(repo, {}).get("/".join(rest[2:]))
        if repo not in self.hub.repos:
            self._fail(404, "RepoNotFound")
        elif content is None:
            self._fail(404, "EntryNotFound")
        else:
            self._send(content)

    def _send(self, content: bytes) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.hub.etag or hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks and self.hub.breaks[0] < len(content) - start:
            self.wfile.write(content[start : start + self.hub.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _json(self, value: object) -> None:
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _fail(self, status: int, code: str) -> None:
        self._reply(status, {"X-Error-Code": code} if code else {}, b"")

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
