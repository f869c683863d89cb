"""How an answer goes out: as one JSON object, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmcad_mlx.serve.answers import Answer
from llmcad_mlx.serve.errors import ApiError
from llmcad_mlx.serve.events import FinishedEvent, PromptEvent, RoundEvent
from llmcad_mlx.serve.fair_queue import FairQueue
from llmcad_mlx.serve.job import Job
from llmcad_mlx.serve.listening import ClientGoneError, Listener
from llmcad_mlx.serve.parts import Part, PartMaker

_DONE = b"data: [DONE]\n\n"
_GONE = 499  # nobody reads it; the counters do


def to_json(value: Any) -> bytes:
    """Compact JSON; raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class JsonResponse(Response):
    """An object as the answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_response(error: ApiError) -> Response:
    """An error as the answer."""
    return JsonResponse(error.body, error.status, error.headers)


class GenerationResponse(Response):
    """Waits for a job's answer and sends it, streamed or whole.

    The status is known when the job's turn has come; a stream that has waited `keepalive_s` for that begins
    without, and says what goes wrong later as an event of its own.
    """

    def __init__(
        self, job: Job, queue: FairQueue[Job], answer: Answer, parts: PartMaker, keepalive_s: float
    ) -> None:
        super().__init__()
        self._job = job
        self._queue = queue
        self._answer = answer
        self._parts = parts
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Listener(self._job, self._queue, receive) as listener:
            try:
                if self._job.request.stream:
                    await self._stream(listener, send)
                else:
                    await JsonResponse(await self._whole(listener))(scope, receive, send)
            except (ClientGoneError, OSError):  # servers differ in what a send to nobody does
                if not self._job.request.stream:
                    await Response(status_code=_GONE)(scope, receive, send)

    async def _whole(self, listener: Listener) -> Any:
        made: list[Part] = []
        while True:
            event = await listener.next()
            if isinstance(event, RoundEvent):
                made.extend(self._parts.round(event))
            elif isinstance(event, FinishedEvent):
                return self._answer.whole([*made, self._parts.finish()], event)

    async def _stream(self, listener: Listener, send: Send) -> None:
        await listener.next(self._keepalive_s)  # raises what keeps it from beginning
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for piece in self._pieces(listener):
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": _event(error.body) + _DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, listener: Listener) -> AsyncIterator[bytes]:
        yield _joined(self._answer.opening())
        while True:
            event = await listener.next(self._keepalive_s)
            if event is None:
                yield b": still working\n\n"
            elif isinstance(event, PromptEvent):
                yield b": prompt %d of %d\n\n" % (event.done, event.total)
            elif isinstance(event, RoundEvent):
                yield _joined([self._answer.chunk(part) for part in self._parts.round(event)])
            else:
                yield self._last(event)
                return

    def _last(self, event: FinishedEvent) -> bytes:
        chunks = [self._answer.chunk(self._parts.finish(), event.finish_reason)]
        if self._job.request.include_usage:
            chunks.append(self._answer.usage_chunk(event))
        return _joined(chunks) + _DONE


def _joined(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(map(_event, chunks))


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
