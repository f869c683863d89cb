"""A server that says what a test wrote down: the page's own routes, and scripted answers of the API."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmcad_mlx.serve.options import ServerSettings
from llmcad_mlx.serve.page import page_routes

Step = bytes | threading.Event
"""Bytes to send, or something to wait for."""


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chunk(
    pieces: Sequence[tuple[str, bool]], round: dict[str, Any] | None = None, finish_reason: str | None = None
) -> bytes:
    """One chunk; `pieces` are (text, from_draft) for each token."""
    text = "".join(text for text, _ in pieces)
    speculation: dict[str, Any] = {
        "tokens": [{"id": 5, "text": text, "from_draft": drafted} for text, drafted in pieces]
    }
    if round is not None:
        speculation["round"] = round
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice], "speculation": speculation})


def node(text: str, parent: int, state: str, confidence: float = 0.5, source: str = "model") -> dict[str, Any]:
    return {"id": 7, "text": text, "parent": parent, "confidence": confidence, "source": source, "state": state}


def tree_round(index: int, nodes: Sequence[dict[str, Any]], bonus: str, **figures: Any) -> dict[str, Any]:
    known = {"tokens_per_s": 12.34, "tokens_per_pass": 2.5, "peak_rss_bytes": 312_000_000, "budget_bytes": 10**9}
    return {"index": index, "nodes": list(nodes), "bonus": {"id": 9, "text": bonus}, **known, **figures}


def answer(*texts: str) -> list[Step]:
    """A plain answer without rounds, one chunk for each text."""
    return [*(chunk([(text, False)]) for text in texts), DONE]


@dataclass
class ScriptedServer:
    """Answers each chat request with the next of `scripts`, the last one again and again.

    A script is what to stream, or a whole response. `requests`: bodies of the requests that came. `vanished` is
    set when a client has gone in the middle of an answer. `key`: the API key, if one is needed.
    """

    scripts: list[list[Step] | Response] = field(default_factory=list)
    key: str | None = None
    model: dict[str, Any] = field(default_factory=lambda: {"id": "tiny", "draft": "tinier"})
    requests: list[dict[str, Any]] = field(default_factory=list)
    vanished: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def app(self) -> Starlette:
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        return Starlette(routes=[*page_routes(ServerSettings()), Route("/v1/models", self._models), chat])

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return refusal(401, "The API key is missing or wrong.")

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": [self.model]})

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        self.requests.append(await request.json())
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        if isinstance(script, Response):
            return script
        return StreamingResponse(self._stream(script), media_type="text/event-stream")

    async def _stream(self, script: list[Step]) -> AsyncIterator[bytes]:
        try:
            for step in script:
                if isinstance(step, bytes):
                    yield step
                else:
                    while not step.is_set():
                        await anyio.sleep(0.005)
        except anyio.get_cancelled_exc_class():
            self.vanished.set()
            raise


def refusal(status: int, message: str, **headers: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve `app` on a free port of loopback; the address without a slash at the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
