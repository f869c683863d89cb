"""The fields of a request, as JSON Schema: what `/openapi.json` shows and `schema.check` enforces.

A field that OpenAI knows and this server cannot heed is not here, so it is refused by name; the few that change
no output (labels, for the most part) are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcad_mlx.settings import POLICIES

Schema = dict[str, Any]

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_TOP_LOGPROBS = 20
_MAX_TOKEN = 2**31 - 1


def _field(kind: str, description: str, **rules: Any) -> Schema:
    """A field that may be left out or null."""
    if "enum" in rules:
        rules["enum"] = [*rules["enum"], None]
    return {"type": [kind, "null"], "description": description, **rules}


def _only(value: Any, kind: str, why: str) -> Schema:
    return _field(kind, why, enum=[value])


_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

_TOOL_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "arguments": {"type": "string", "description": "A JSON object, as text."},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        },
    },
    "required": ["function"],
}

MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {"type": "array", "items": _TEXT_PART},
            ],
            "description": "Text, or a list of text parts.",
        },
        "name": {"type": ["string", "null"]},
        "tool_calls": {"type": ["array", "null"], "items": _TOOL_CALL},
        "tool_call_id": {"type": ["string", "null"]},
        "refusal": {"type": ["string", "null"], "description": "Ignored."},
    },
    "required": ["role"],
    "additionalProperties": False,
}

TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"], "description": "JSON Schema of the arguments."},
                "strict": {"type": ["boolean", "null"], "enum": [False, None]},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}

_IGNORED = "Accepted and ignored: it changes no output."

_SHARED: dict[str, Schema] = {
    "model": _field("string", "The name in /v1/models, or left out."),
    "max_tokens": _field("integer", "Tokens to generate at most.", minimum=1),
    "temperature": _field("number", "0 is greedy.", minimum=0, maximum=100),
    "top_p": _field("number", "Nucleus sampling; 1 is off.", exclusiveMinimum=0, maximum=1),
    "top_k": _field("integer", "Sample from the k most likely tokens; 0 is off.", minimum=0, maximum=_MAX_TOKEN),
    "min_p": _field("number", "Least probability, relative to the best; 0 is off.", minimum=0, maximum=1),
    "repetition_penalty": _field(
        "number", "Divides logits of the last 20 tokens; 0 is off.", minimum=0, maximum=100
    ),
    "presence_penalty": _field("number", "Taken off logits of the last 20 tokens.", minimum=-100, maximum=100),
    "frequency_penalty": _field("number", "The same, for each time a token occurred.", minimum=-100, maximum=100),
    "logit_bias": _field(
        "object",
        "Token id to a number added to its logit.",
        propertyNames={"type": "string", "pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -1000, "maximum": 1000},
        maxProperties=1024,
    ),
    "stop": {
        "anyOf": [
            {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_STOP_LENGTH},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                "maxItems": MAX_STOPS,
            },
        ],
        "description": "Ends the text before one of these.",
    },
    "seed": _field(
        "integer", "Same seed, same text; drawn at random when left out.", minimum=0, maximum=2**64 - 1
    ),
    "policy": _field("string", "How the draft is used; changes speed, not text.", enum=list(POLICIES)),
    "tree_nodes": _field("integer", "Nodes per target pass, root included.", minimum=1, maximum=4096),
    "speculation": {
        "anyOf": [
            {"type": ["boolean", "null"]},
            {
                "type": "object",
                "properties": {"tokens": {"type": "boolean"}, "trees": {"type": "boolean"}},
                "additionalProperties": False,
            },
        ],
        "description": "Also send which tokens came from the draft, and each round's token tree.",
    },
    "stream": _field("boolean", "Send the answer in pieces, as server-sent events."),
    "stream_options": _field(
        "object",
        "Only with stream.",
        properties={"include_usage": {"type": ["boolean", "null"]}},
        additionalProperties=False,
    ),
    "n": _only(1, "integer", "One answer per request."),
    "user": _field("string", "Whose turn it is in the queue.", maxLength=512),
    "metadata": _field("object", _IGNORED),
}

CHAT: Schema = {
    "type": "object",
    "properties": {
        "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
        **_SHARED,
        "max_completion_tokens": _field("integer", "The same as max_tokens.", minimum=1),
        "logprobs": _field("boolean", "Also give the target's log probability of each token."),
        "top_logprobs": _field("integer", "And of so many likeliest tokens.", minimum=0, maximum=MAX_TOP_LOGPROBS),
        "tools": {
            "type": ["array", "null"],
            "items": TOOL,
            "maxItems": 128,
            "description": "Functions it may call.",
        },
        "tool_choice": _field("string", "The others cannot be enforced.", enum=["auto", "none"]),
        "parallel_tool_calls": _only(True, "boolean", "The model decides how many functions it calls."),
        "response_format": _field(
            "object",
            "Text only.",
            properties={"type": {"type": "string", "enum": ["text"]}},
            required=["type"],
            additionalProperties=False,
        ),
        "modalities": _field("array", "Text only.", items={"type": "string", "enum": ["text"]}),
        "store": _only(False, "boolean", "Nothing is stored."),
        "service_tier": _field("string", _IGNORED),
        "safety_identifier": _field("string", _IGNORED),
        "prompt_cache_key": _field("string", _IGNORED),
    },
    "required": ["messages"],
    "additionalProperties": False,
}

COMPLETION: Schema = {
    "type": "object",
    "properties": {
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": _MAX_TOKEN},
                    "minItems": 1,
                },
            ],
            "description": "Text, or token ids.",
        },
        **_SHARED,
        "logprobs": _field(
            "integer", "Log probabilities of so many likeliest tokens.", minimum=0, maximum=MAX_TOP_LOGPROBS
        ),
        "echo": _only(False, "boolean", "The prompt is not repeated."),
        "best_of": _only(1, "integer", "One answer per request."),
    },
    "required": ["prompt"],
    "additionalProperties": False,
}


def with_limits(schema: Mapping[str, Any], max_tokens: int) -> Schema:
    """The schema with the server's own limit on the length of an answer."""
    properties = dict(schema["properties"])
    for name in ("max_tokens", "max_completion_tokens"):
        if name in properties:
            properties[name] = {**properties[name], "maximum": max_tokens}
    return {**schema, "properties": properties}
