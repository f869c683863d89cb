"""A job's events as they come, for as long as the client is there."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from llmcad_mlx.serve.events import Event, FailedEvent, FinishedEvent, Progress
from llmcad_mlx.serve.fair_queue import FairQueue
from llmcad_mlx.serve.job import Job


class ClientGoneError(Exception):
    """The client closed the connection."""


class Listener:
    """Hands out a job's events; an asynchronous context manager.

    Whoever leaves it before the job has ended (the client gone, an error, the server going down) cancels the
    job: it loses its place in the queue, or its generation ends within the round.
    """

    def __init__(self, job: Job, queue: FairQueue[Job], receive: Receive) -> None:
        """`receive`: the connection's, its body read to the end."""
        self._job = job
        self._queue = queue
        self._receive = receive
        self._next: asyncio.Task[Event] | None = None
        self._ended = False

    async def __aenter__(self) -> Listener:
        self._gone = asyncio.create_task(self._wait_until_gone())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gone.cancel()
        if self._next is not None:
            self._next.cancel()
        if not self._ended:
            self._job.cancel()
            self._queue.remove(self._job.client, self._job)

    async def next(self, timeout_s: float | None = None) -> Progress | None:
        """The next event; None after `timeout_s` without one.

        Raises ClientGoneError, and the ApiError of a job that failed.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._job.events.get())
        done, _ = await asyncio.wait(
            {self._next, self._gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self._gone in done:
            raise ClientGoneError
        if not done:
            return None
        event, self._next = self._next.result(), None
        if isinstance(event, FailedEvent):
            self._ended = True
            raise event.error
        self._ended = isinstance(event, FinishedEvent)
        return event

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
