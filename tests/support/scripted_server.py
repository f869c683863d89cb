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

from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.page import page_routes

Step = bytes | threading.Event | None
"""Bytes to send, something to wait for, or None to break the connection."""

CARD = {"id": "tiny", "owned_by": "llmcad-mlx", "context_length": 512, "draft": "tinier"}
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def chunk(
    pieces: Sequence[tuple[str, bool]] = (), round: dict[str, Any] | None = None, finish_reason: str | None = None
) -> bytes:
    """One chunk; `pieces` are (text, from_draft) for each token, whose ids count from 5."""
    tokens = [{"id": 5 + at, "text": text, "from_draft": drafted} for at, (text, drafted) in enumerate(pieces)]
    speculation: dict[str, Any] = {"tokens": tokens} if round is None else {"tokens": tokens, "round": round}
    text = "".join(text for text, _ in pieces)
    choice = {"index": 0, "text": text, "delta": {"content": text}, "finish_reason": finish_reason}
    return event({"choices": [choice], "usage": None, "speculation": speculation})


def answer(*texts: str) -> list[Step]:
    """A plain answer without rounds, one chunk for each text."""
    return [*(chunk([(text, False)]) for text in texts), DONE]


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


@dataclass
class ScriptedServer:
    """Answers each generation request with the next of `scripts`, the last one again and again.

    A script is what to stream, or a whole response; `models` answers /v1/models. `requests`: bodies of the
    generation requests that came, `seen`: path and key of every request. `vanished` is set when a client has gone
    in the middle of an answer. `key`: the API key, if one is needed.
    """

    scripts: list[list[Step] | Response] = field(default_factory=list)
    key: str | None = None
    models: Response | None = None
    model: dict[str, Any] = field(default_factory=lambda: dict(CARD))
    requests: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    vanished: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[ScriptedServer]:
        """Serve on a free port of loopback, at `url`."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        routes = [
            *page_routes(ServerSettings()),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._generation, methods=["POST"]),
            Route("/v1/completions", self._generation, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="critical", ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(10)
            listener.close()

    def _refused(self, request: Request) -> Response | None:
        sent = request.headers.get("authorization")
        self.seen.append((request.url.path, sent))
        if self.key is None or sent == f"Bearer {self.key}":
            return None
        return refusal(401, "The API key is missing or wrong.")

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or self.models or JSONResponse({"object": "list", "data": [self.model]})

    async def _generation(self, request: Request) -> Response:
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
                if step is None:
                    raise ConnectionError("as the script wants it")
                if isinstance(step, bytes):
                    yield step
                else:
                    while not step.is_set():
                        await anyio.sleep(0.005)
        except anyio.get_cancelled_exc_class():
            self.vanished.set()
            raise
