"""One request on its way through queue and worker, and the line between their thread and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from llmcad_mlx.serve.errors import ApiError, bad_request
from llmcad_mlx.serve.events import Event, FailedEvent
from llmcad_mlx.serve.requests import GenerationRequest

_MAX_BACKLOG = 1024  # events a client may be behind: each may hold a tree of hundreds of nodes


@dataclass(eq=False, slots=True)
class Job:
    """A request with its prompt's tokens. `events` belong to the loop, everything else may be read anywhere.

    A cancelled job's generation ends before its next round.
    """

    request: GenerationRequest
    prompt: list[int]
    client: str
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    reason: ApiError | None = None
    """What a client that is still there is told when the job is cancelled."""

    def send(self, event: Event) -> None:
        """Hand an event to the loop; called by the worker."""
        if self.events.qsize() > _MAX_BACKLOG and not isinstance(event, FailedEvent):
            self.cancel(bad_request("the answer is read too slowly", code="slow_reader"))
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self, reason: ApiError | None = None) -> None:
        """End the generation within its round, or before it has begun."""
        self.reason = self.reason or reason
        self.cancelled = True
