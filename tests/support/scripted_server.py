"""An HTTP server that answers with what a test wrote down, standard library only."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CARD = {
    "id": "tiny",
    "object": "model",
    "created": 0,
    "owned_by": "llmcad-mlx",
    "context_length": 512,
    "draft": "ngram",
}
MODELS = json.dumps({"object": "list", "data": [CARD]}).encode()
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(*tokens: tuple[int, str, bool], reason: str | None = None) -> bytes:
    """A chunk of a completion: tokens are (id, text, from_draft)."""
    text = "".join(text for _, text, _ in tokens)
    listed = [{"id": number, "text": text, "from_draft": drafted} for number, text, drafted in tokens]
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return event(
        {"object": "text_completion", "choices": [choice], "usage": None, "speculation": {"tokens": listed}}
    )


def usage(**changes: Any) -> bytes:
    figures = {
        "target_passes": 2, "drafted": 9, "tested": 6, "accepted": 1, "acceptance_rate": 0.25,
        "streamed_bytes": 10, "prompt_s": 0.5, "decode_s": 2.0, "draft_s": 0.25, "verify_s": 1.0, "io_wait_s": 0.5,
    }  # fmt: skip
    counted = {
        "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4}, "speculation": figures | changes,
    }  # fmt: skip
    return event({"object": "text_completion", "choices": [], "usage": counted})


@dataclass
class Script:
    """`models`: status and body of /v1/models. `status`, `headers`, `steps`: of a completion; a step is bytes to
    send, a function to call, or None to break the connection."""

    models: tuple[int, bytes] = (200, MODELS)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    steps: Sequence[bytes | Callable[[], Any] | None] = ()
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the client went away in the middle of an answer."""


@contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Its address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.requests.append((self.path, dict(self.headers), None))
            status, body = script.models
            self._head(status, {"Content-Length": str(len(body))})
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.requests.append((self.path, dict(self.headers), body))
            self._head(
                script.status,
                {"Transfer-Encoding": "chunked", "Content-Type": "text/event-stream", **script.headers},
            )
            try:
                for step in script.steps:
                    if step is None:
                        return  # without the last chunk
                    if callable(step):
                        step()
                    else:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(step), step))
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                script.gone.set()

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.protocol_version = "HTTP/1.1"
            self.close_connection = True
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
