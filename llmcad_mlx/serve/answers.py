"""How an answer goes out: in OpenAI's form, as one JSON object or as server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmcad_mlx.serve.jobs import (
    FairQueue,
    FinishedEvent,
    Job,
    Progress,
    RoundEvent,
    TokenEvent,
    TokenLogprob,
)
from llmcad_mlx.serve.parts import Json, Part, PartMaker
from llmcad_mlx.serve.protocol import ApiError, GenerationRequest, shutting_down, to_json


class Answer(ABC):
    """The shape of one kind of answer, whole or in chunks, which share id and time."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, request: GenerationRequest, model: str) -> None:
        self._request = request
        self._model = model
        self._id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._num_calls = 0

    def opening(self) -> list[Json]:
        """Chunks before any text."""
        return []

    def chunk(self, part: Part, finish_reason: str | None = None) -> Json:
        """A part as a chunk; the last one has a `finish_reason`."""
        choice = self._choice(part, finish_reason, is_whole=False)
        return self._chunk([choice], **self._speculation(part.tokens, round=part.tree))

    def whole(self, parts: Sequence[Part], finished: FinishedEvent) -> Json:
        """All parts as one object."""
        joined = Part(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            [call for part in parts for call in part.calls],
            [token for part in parts for token in part.tokens],
        )
        choice = self._choice(joined, finished.finish_reason, is_whole=True)
        trees = [part.tree for part in parts if part.tree is not None]
        speculation = self._speculation(joined.tokens, rounds=trees)
        return self._object(self.object_name, [choice], usage=finished.usage, **speculation)

    def closing(self, part: Part, finished: FinishedEvent) -> list[Json]:
        """The last chunks: what is left of the text, and the usage where asked for."""
        chunks = [self.chunk(part, finished.finish_reason)]
        if self._request.include_usage:
            chunks.append(self._object(self.chunk_name, [], usage=finished.usage))
        return chunks

    def _choice(self, part: Part, finish_reason: str | None, *, is_whole: bool) -> Json:
        said = self._said(part, is_whole)
        self._num_calls += len(part.calls)
        # Where one call is all that is wanted, the limit may be reached before the generation is told to end.
        is_call = self._num_calls and (finish_reason == "stop" or (finish_reason and self._request.one_call))
        has_logprobs = self._request.top_logprobs is not None and len(part.tokens) > 0
        return {
            "index": 0,
            **said,
            "logprobs": self._logprobs(part.tokens) if has_logprobs else None,
            "finish_reason": "tool_calls" if is_call else finish_reason,
        }

    @abstractmethod
    def _said(self, part: Part, is_whole: bool) -> Json:
        """The part's text and calls; `_num_calls` came before them."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json: ...

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        usage = {"usage": None} if self._request.include_usage else {}
        return self._object(self.chunk_name, choices, **usage, **more)

    def _object(self, name: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}

    def _speculation(self, tokens: Sequence[TokenEvent], **trees: Any) -> Json:
        found = {name: tree for name, tree in trees.items() if tree}
        if self._request.show_tokens and tokens:
            told = [{"id": token.token, "text": token.text, "from_draft": token.from_draft} for token in tokens]
            found = {"tokens": told, **found}
        return {"speculation": found} if found else {}


class ChatAnswer(Answer):
    """chat.completion and its chunks."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _said(self, part: Part, is_whole: bool) -> Json:
        if is_whole:
            text = part.text.rstrip() or None if part.calls else part.text
            more: Json = {"reasoning": part.reasoning} if part.reasoning else {}
            if part.calls:
                more["tool_calls"] = part.calls
            return {"message": {"role": "assistant", "content": text, "refusal": None, **more}}
        delta: Json = {"content": part.text} if part.text else {}
        if part.reasoning:
            delta["reasoning"] = part.reasoning
        if part.calls:
            numbered = enumerate(part.calls, self._num_calls)
            delta["tool_calls"] = [{"index": index, **call} for index, call in numbered]
        return {"delta": delta}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json:
        content = []
        for token in tokens:
            own, *top = map(_logprob, token.logprobs)
            content.append({**own, "top_logprobs": top})
        return {"content": content, "refusal": None}


def _logprob(entry: TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.content)}


class CompletionAnswer(Answer):
    """text_completion, whose chunks have the same form."""

    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"
    _offset = 0

    def _said(self, part: Part, is_whole: bool) -> Json:
        return {"text": part.text}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> Json:
        """The older form: lists side by side, with where each token's text begins."""
        ends = [*accumulate((len(token.text) for token in tokens), initial=self._offset)]
        self._offset = ends.pop()
        return {
            "tokens": [token.logprobs[0].text for token in tokens],
            "token_logprobs": [token.logprobs[0].logprob for token in tokens],
            "top_logprobs": [_by_text(*token.logprobs) for token in tokens],
            "text_offset": ends,
        }


def _by_text(chosen: TokenLogprob, *likeliest: TokenLogprob) -> dict[str, float]:
    """Log probabilities by text. Of tokens with one text the chosen one has it, else the likeliest; the others are
    there by their ids."""
    found: dict[str, float] = {}
    for one in likeliest if chosen in likeliest else (*likeliest, chosen):
        is_taken = one.text in found or (one.text == chosen.text and one != chosen)
        found[f"token_id:{one.token}" if is_taken else one.text] = one.logprob
    return found


_DONE = b"data: [DONE]\n\n"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """Waits for a job's answer and sends it, streamed or whole. Its status is known when the job's turn has come:
    a stream that has waited `keepalive_s` for that begins without, and tells of what goes wrong in an event."""

    job: Job
    queue: FairQueue
    answer: Answer
    parts: PartMaker
    keepalive_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._progress(receive)) as progress:
            with suppress(ClientDisconnect, OSError):  # servers differ in what a send to nobody does
                if self.job.request.stream:
                    await self._stream(progress, send)
                else:
                    await JSONResponse(await self._whole(progress))(scope, receive, send)

    async def _progress(self, receive: Receive) -> AsyncGenerator[Progress | None]:
        """The job's events to its end, None after every `keepalive_s` without one. Close it when you leave it.

        Raises ClientDisconnect, and the ApiError of a job that failed. Whoever leaves before the job has ended
        (the client gone, an error, the server going down) cancels it: it loses its place in the queue, or its
        generation ends within the round.
        """
        gone = asyncio.create_task(_wait_until_gone(receive))
        coming = asyncio.create_task(self.job.events.get())
        has_ended = False
        try:
            while not has_ended:
                done, _ = await asyncio.wait({coming, gone}, timeout=self.keepalive_s, return_when=FIRST_COMPLETED)
                if gone in done:
                    raise ClientDisconnect
                if not done:
                    yield None
                    continue
                event = coming.result()
                has_ended = isinstance(event, FinishedEvent | ApiError)
                if isinstance(event, ApiError):
                    raise event
                if not has_ended:
                    coming = asyncio.create_task(self.job.events.get())
                yield event
        finally:
            gone.cancel()
            coming.cancel()
            if not has_ended:
                self.job.cancel(shutting_down())
                self.queue.remove(self.job)

    async def _whole(self, progress: AsyncIterator[Progress | None]) -> Json:
        made: list[Part] = []
        async for event in progress:
            if isinstance(event, RoundEvent):
                made.extend(self._parts_of(event))
            elif isinstance(event, FinishedEvent):
                return self.answer.whole([*made, self.parts.finish()], event)
        raise AssertionError("a job ends with an event")

    def _parts_of(self, event: RoundEvent) -> Iterator[Part]:
        yield from self.parts.round(event)
        self.job.is_complete = self.parts.is_complete

    async def _stream(self, progress: AsyncIterator[Progress | None], send: Send) -> None:
        await anext(progress)  # raises what keeps it from beginning
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await _send_piece(send, _events(self.answer.opening()))
            last = time.monotonic()
            async for event in progress:
                piece = self._piece(event)
                if event is None or (not piece and time.monotonic() - last >= self.keepalive_s):
                    piece = b": still working\n\n"
                if piece:
                    await _send_piece(send, piece)
                    last = time.monotonic()
        except ApiError as error:
            await _send_piece(send, _events([error.body]) + _DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _piece(self, event: Progress | None) -> bytes:
        """What a stream gets for an event; nothing for one that shows nothing."""
        match event:
            case RoundEvent():
                return _events([self.answer.chunk(part) for part in self._parts_of(event)])
            case FinishedEvent():
                return _events(self.answer.closing(self.parts.finish(), event)) + _DONE
        return b""


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_piece(send: Send, piece: bytes) -> None:
    if piece:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _events(chunks: Sequence[Json]) -> bytes:
    return b"".join(b"data: " + to_json(chunk) + b"\n\n" for chunk in chunks)
