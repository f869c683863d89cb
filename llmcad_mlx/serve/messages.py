"""OpenAI's chat messages and tools as the model's chat template wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmcad_mlx.serve.errors import bad_request


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is text and whose tool arguments are objects, as templates expect them.

    Raises ApiError (400) for an empty conversation of parts and for arguments that are no JSON object.
    """
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    if content is None and not (role == "assistant" and calls):
        raise bad_request(f"{where}.content: is missing", f"{where}.content")
    out: dict[str, Any] = {"role": role, "content": content or ""}
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            out[name] = message[name]
    if calls:
        if role != "assistant":
            raise bad_request(f"{where}.tool_calls: only the assistant calls tools", f"{where}.tool_calls")
        out["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return out


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(f"{where}.function.arguments: is not a JSON object", f"{where}.function.arguments")
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if "id" in call:
        out["id"] = call["id"]
    return out
