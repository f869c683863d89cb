"""From the arguments of `stream_generate` to the body of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import DEFAULT_MAX_TOKENS, SpeculationSettings, StopSettings

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

_PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "policy", "tree_nodes",
)  # fmt: skip
_HERE = ("max_tokens", "stop")
_LOCAL_ONLY = (
    "on_progress", "on_round", "stop_tokens", "logits_processors", "repetition_context_size",
    "presence_context_size", "frequency_context_size", "pipeline", "tree", "fallback",
)  # fmt: skip
_DEFAULTS = {"temperature": 0.0, "seed": 0}  # an engine's, whatever the server's are


def completion_request(prompt: Prompt, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a streamed request. Raises UsageError naming the option that is wrong."""
    for name in options:
        if name in _LOCAL_ONLY:
            raise UsageError(f"{name}: an engine on another machine does not take it; leave it out")
        if name not in (*_PASSED_ON, *_HERE):
            known = ", ".join(sorted((*_PASSED_ON, *_HERE)))
            raise UsageError(f"{name}: unknown option; the options are {known}")
    SpeculationSettings(**{name: options[name] for name in ("policy", "tree_nodes") if name in options})
    stopping = StopSettings.of(options.get("max_tokens", DEFAULT_MAX_TOKENS), options.get("stop"))
    path, body = _prompt(prompt)
    body |= {"stream": True, "stream_options": {"include_usage": True}, "speculation": {"tokens": True}}
    body |= _DEFAULTS
    body |= {name: _checked(name, options[name]) for name in _PASSED_ON if name in options}
    if stopping.max_tokens != -1:
        body["max_tokens"] = stopping.max_tokens
    if stopping.stop_strings:
        body["stop"] = list(stopping.stop_strings)
    return path, body


def _checked(name: str, value: Any) -> Any:
    """A value that JSON can hold. The server would take null for an option that is left out."""
    if value is None and name not in ("logit_bias", "tree_nodes"):
        raise UsageError(f"{name}: None is not a value; leave it out")
    if isinstance(value, Mapping):
        value = {str(key): item for key, item in value.items()}
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError(f"{name}: {value!r} cannot be sent; give a finite number") from None
    return value


def _prompt(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    if isinstance(prompt, str):
        return "/v1/completions", {"prompt": _not_empty(prompt)}
    items: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(items, Sequence) or isinstance(items, bytes | bytearray):
        raise UsageError(f"prompt: give text, token ids or messages, not {type(prompt).__name__}")
    _not_empty(items)
    if all(isinstance(item, Mapping) for item in items):
        return "/v1/chat/completions", {"messages": [dict(item) for item in items]}
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise UsageError(f"prompt: {item!r} is neither a token id nor a message")
    return "/v1/completions", {"prompt": [int(item) for item in items]}


def _not_empty(prompt: Any) -> Any:
    if not prompt:
        raise UsageError("prompt: it is empty; give text, messages or at least one token")
    return prompt
