"""A request's JSON as a checked record."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmcad_mlx.api import GenerationOptions
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import Prompt
from llmcad_mlx.serve.errors import ApiError, bad_request
from llmcad_mlx.serve.fields import CHAT, COMPLETION, with_limits
from llmcad_mlx.serve.messages import template_messages
from llmcad_mlx.serve.schema import Schema, check
from llmcad_mlx.serve.settings import ServerSettings

Kind = Literal["chat", "completion"]

_ENGINE_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "policy", "tree_nodes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asked for.

    `options` are `Engine.stream_generate`'s, checked, with a seed. `top_logprobs`: None for none, else how many
    beside the chosen token's. `show_tokens`, `show_trees`: which of the speculation to send.
    """

    kind: Kind
    prompt: Prompt
    options: Mapping[str, Any]
    tools: list[dict[str, Any]] | None = None
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    show_tokens: bool = False
    show_trees: bool = False
    user: str = field(default="")


class RequestReader:
    """Checks requests against the schema and this server's limits."""

    def __init__(self, settings: ServerSettings, model: str) -> None:
        """`model`: the name of what is served."""
        self._settings = settings
        self._model = model
        self.schemas: Mapping[Kind, Schema] = {
            "chat": with_limits(CHAT, settings.max_tokens),
            "completion": with_limits(COMPLETION, settings.max_tokens),
        }

    def read(self, kind: Kind, body: Any) -> GenerationRequest:
        """The request in `body`. Raises ApiError: 400 naming the field, 404 for another model."""
        check(body, self.schemas[kind])
        given = {name: value for name, value in body.items() if value is not None}
        if given.get("model", self._model) != self._model:
            raise ApiError(
                404,
                f'model: "{given["model"][:80]}" is not served here; ask for "{self._model}" or leave it out',
                param="model",
                code="model_not_found",
            )
        stream = given.get("stream", False)
        if "stream_options" in given and not stream:
            raise bad_request("stream_options: goes with stream only", "stream_options")
        show_tokens, show_trees = _speculation(given.get("speculation", False))
        return GenerationRequest(
            kind=kind,
            prompt=template_messages(given["messages"]) if kind == "chat" else given["prompt"],
            options=self._options(given),
            tools=_tools(given),
            stream=stream,
            include_usage=bool(given.get("stream_options", {}).get("include_usage")),
            top_logprobs=_top_logprobs(kind, given),
            show_tokens=show_tokens,
            show_trees=show_trees,
            user=given.get("user", ""),
        )

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"temperature": self._settings.temperature}
        options.update({name: given[name] for name in _ENGINE_OPTIONS if name in given})
        options["max_tokens"] = self._max_tokens(given)
        # Drawn, not fixed: who asks twice at a temperature expects two answers. 53 bits stay exact everywhere.
        options["seed"] = given["seed"] if "seed" in given else secrets.randbits(53)
        if "logit_bias" in given:
            options["logit_bias"] = {int(token): value for token, value in given["logit_bias"].items()}
        try:
            GenerationOptions.of(options)
        except UsageError as error:
            raise refused(error) from None
        return options

    def _max_tokens(self, given: Mapping[str, Any]) -> int:
        limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
        if len(limits) == 2:
            raise bad_request("max_completion_tokens: differs from max_tokens; give one", "max_completion_tokens")
        return int(limits.pop()) if limits else self._settings.max_tokens


def refused(error: UsageError) -> ApiError:
    """An option or prompt that the engine refuses."""
    option, colon, _ = str(error).partition(":")
    return bad_request(str(error), option if colon and option.isidentifier() else None)


def _speculation(value: Any) -> tuple[bool, bool]:
    if isinstance(value, bool):
        return value, value
    return value.get("tokens", False), value.get("trees", False)


def _top_logprobs(kind: Kind, given: Mapping[str, Any]) -> int | None:
    if kind == "completion":
        return given.get("logprobs")
    if not given.get("logprobs", False):
        if given.get("top_logprobs", 0):
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        return None
    return int(given.get("top_logprobs", 0))


def _tools(given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if not given.get("tools"):
        if given.get("tool_choice") == "auto":
            raise bad_request("tool_choice: there are no tools", "tool_choice")
        return None
    return None if given.get("tool_choice") == "none" else given["tools"]
