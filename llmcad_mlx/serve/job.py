"""One request on its way through queue and worker, and the line between their thread and the event loop.

What the worker tells about a running generation: plain records, nothing that holds on to a pass's arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmcad_mlx.serve.errors import ApiError, bad_request
from llmcad_mlx.serve.protocol import GenerationRequest


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability before penalties and temperature."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, the text it added ("" when held back), and the likeliest tokens where asked for."""

    token: int
    text: str
    from_draft: bool
    finish_reason: str | None
    logprob: TokenLogprob | None = None
    top_logprobs: Sequence[TokenLogprob] = ()


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


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The end, without an answer."""

    error: ApiError


Progress = RoundEvent | PromptEvent | FinishedEvent
Event = Progress | FailedEvent


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
