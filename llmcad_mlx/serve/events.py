"""What the worker tells about a running generation: plain records, nothing that holds on to a pass's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmcad_mlx.serve.errors import ApiError


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
