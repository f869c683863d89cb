"""Requests on their way: the queue that takes turns between clients, and what the worker tells of each in plain
records, none of which holds on to a pass's arrays."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmcad_mlx.serve.protocol import ApiError, GenerationRequest, bad_request, shutting_down


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and bytes, and its log probability before penalties and temperature."""

    token: int
    text: str
    content: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token and the text it added ("" when held back). `logprobs`, where asked for: its own, then
    those of the likeliest tokens, which may have it among them, the same. Its own text is what it added."""

    token: int
    text: str
    from_draft: bool
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class RoundEvent:
    """One round's tokens; `tree` is its token tree as the contract has it, where asked for."""

    tokens: Sequence[TokenEvent]
    tree: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Prompt tokens done so far; the first one says that the request's turn has come."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end: why, and the figures of the whole generation."""

    finish_reason: str
    usage: dict[str, Any]


Progress = RoundEvent | PromptEvent | FinishedEvent
Event = Progress | ApiError  # an error is the end, without an answer

_MAX_BACKLOG = 1024  # events a client may be behind: each may hold a tree of hundreds of nodes


@dataclass(eq=False, slots=True)
class Job:
    """A request with its prompt's tokens. `events` belong to the loop, everything else may be read anywhere.
    `cancelled`: why it ends before its next round, which a client that is still there is told. `is_complete`: it
    ends there too, but in order, for nothing that could still come is wanted."""

    request: GenerationRequest
    prompt: list[int]
    client: str
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: ApiError | None = None
    is_complete: bool = False

    def send(self, event: Event) -> None:
        """Hand an event to the loop; called by the worker."""
        if self.events.qsize() > _MAX_BACKLOG and not isinstance(event, ApiError):
            self.cancel(bad_request("the answer is read too slowly", code="slow_reader"))
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self, reason: ApiError) -> None:
        """End the generation within its round, or before it has begun."""
        self.cancelled = self.cancelled or reason


class FairQueue:
    """Jobs of several clients, handed out round robin: one from each client that has any, then the next.

    Safe to use from several threads. `limit`: most jobs that wait. One client may hold half of the places (but
    always one), so that a client with many requests leaves room for the others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._per_client = max(1, limit // 2)
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, job: Job) -> bool:
        """Add at the end of the client's line; False where it has no place. Raises ApiError (503) once closed."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self) >= self._limit or len(self._waiting.get(job.client, ())) >= self._per_client:
                return False
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()
            return True

    def take(self) -> Job | None:
        """Wait for the next job; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            client, line = self._waiting.popitem(last=False)
            job = line.popleft()
            if line:
                self._waiting[client] = line  # at the end: the others come first
            return job

    def remove(self, job: Job) -> None:
        """Take a job out, unless its turn has come already."""
        with self._changed:
            line = self._waiting.get(job.client, deque())
            if job in line:
                line.remove(job)
                if not line:
                    del self._waiting[job.client]

    def close(self) -> list[Job]:
        """End: `take` returns None from now on. Returns what was still waiting."""
        with self._changed:
            self._closed = True
            left = [job for line in self._waiting.values() for job in line]
            self._waiting.clear()
            self._changed.notify_all()
            return left
