"""The server's OpenAPI document, made of the schemas that it checks requests with.

Checks a request against JSON Schema: the very schema that `/openapi.json` shows.

Only the keywords the server's own schemas use; another is an error, so that nothing is shown that is not checked.

The fields of a request, as JSON FieldSchema: what `/openapi.json` shows and `schema.check` enforces.

A field that OpenAI knows and this server cannot heed is not here, so it is refused by name; the few that change
no output (labels, for the most part) are accepted and ignored.

OpenAI's chat messages and tools as the model's chat template wants them.

A request's JSON as a checked record.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmcad_mlx import __version__
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import Prompt
from llmcad_mlx.serve.errors import ApiError, bad_request
from llmcad_mlx.serve.settings import ServerSettings
from llmcad_mlx.settings import POLICIES, GenerationOptions

Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
_NAMES = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "null": "null",
}


def check(value: Any, schema: Schema, where: str = "") -> None:
    """Raise an ApiError (400) that names the field, `where` included, when `value` is not what `schema` allows."""
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], where)
    if "type" in schema and not _is_one_of(value, schema["type"]):
        raise _refused(where, f"must be {_named(schema['type'])}, not {_shown(value)}")
    for keyword, argument in schema.items():
        rule = _RULES.get(keyword)
        if rule is None:
            if keyword not in _NOT_RULES:
                raise NotImplementedError(f"schema keyword {keyword} is not checked")
        elif complaint := rule(value, argument):
            raise _refused(where, complaint)
    if isinstance(value, dict):
        _check_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            check(item, schema["items"], f"{where}[{index}]")


def _check_any(value: Any, choices: list[Schema], where: str) -> None:
    complaints = []
    for choice in choices:
        try:
            return check(value, choice, where)
        except ApiError as error:
            complaints.append((_is_one_of(value, choice.get("type", list(_TYPES))), error))
    fitting = [error for fits, error in complaints if fits]
    if len(fitting) == 1:  # the type says which one was meant
        raise fitting[0]
    kinds = [kind for choice in choices for kind in _as_list(choice.get("type", []))]
    raise _refused(where, f"must be {_named(kinds)} as described in /openapi.json, not {_shown(value)}")


def _check_object(value: dict[str, Any], schema: Schema, where: str) -> None:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            raise _refused(f"{where}.{name}".lstrip("."), "is missing")
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        inner = f"{where}.{_cut(name)}".lstrip(".")
        if "propertyNames" in schema:
            check(name, schema["propertyNames"], f"{where}: key {_shown(name)}".lstrip(": "))
        if name in properties:
            check(item, properties[name], inner)
        elif others is False:
            raise _refused(inner, "is not a field this server knows; see /openapi.json")
        elif isinstance(others, Mapping):
            check(item, others, inner)


def _is_one_of(value: Any, kinds: str | list[str]) -> bool:
    names = [kind for kind in _as_list(kinds) if kind == "boolean" or not isinstance(value, bool)]
    return any(isinstance(value, _TYPES[kind]) for kind in names)


def _as_list(kinds: str | list[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _at_least(value: Any, low: float) -> str | None:
    return f"must be at least {low}, not {_shown(value)}" if _is_number(value) and value < low else None


def _at_most(value: Any, high: float) -> str | None:
    return f"must be at most {high}, not {_shown(value)}" if _is_number(value) and value > high else None


def _above(value: Any, low: float) -> str | None:
    return f"must be above {low}, not {_shown(value)}" if _is_number(value) and value <= low else None


def _no_shorter(value: Any, length: int) -> str | None:
    return f"must have at least {length} characters" if isinstance(value, str) and len(value) < length else None


def _no_longer(value: Any, length: int) -> str | None:
    return f"must have at most {length} characters" if isinstance(value, str) and len(value) > length else None


def _no_fewer(value: Any, count: int) -> str | None:
    return f"must have at least {count} entries" if isinstance(value, list) and len(value) < count else None


def _no_more(value: Any, count: int) -> str | None:
    return f"must have at most {count} entries" if isinstance(value, list) and len(value) > count else None


def _no_more_keys(value: Any, count: int) -> str | None:
    return f"must have at most {count} keys" if isinstance(value, dict) and len(value) > count else None


def _one_of(value: Any, values: list[Any]) -> str | None:
    if any(type(value) is type(known) and value == known for known in values):
        return None
    return f"must be {' or '.join(map(_shown, values))}, not {_shown(value)}"


def _matches(value: Any, pattern: str) -> str | None:
    fits = not isinstance(value, str) or re.fullmatch(pattern.removeprefix("^").removesuffix("$"), value)
    return None if fits else f"must match {pattern}"


_RULES: Mapping[str, Callable[[Any, Any], str | None]] = {
    "minimum": _at_least,
    "maximum": _at_most,
    "exclusiveMinimum": _above,
    "minLength": _no_shorter,
    "maxLength": _no_longer,
    "minItems": _no_fewer,
    "maxItems": _no_more,
    "maxProperties": _no_more_keys,
    "enum": _one_of,
    "pattern": _matches,
}
_NOT_RULES = {
    "type", "anyOf", "properties", "required", "additionalProperties", "propertyNames", "items", "description",
    "default", "title", "examples",
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(kinds: str | list[str]) -> str:
    return " or ".join(dict.fromkeys(_NAMES[kind] for kind in _as_list(kinds) if kind != "null"))


def _shown(value: Any) -> str:
    """A value as it may stand in a message: short, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f'"{_cut(value)}"'
    if _is_number(value):
        return str(value) if abs(value) < 10**20 else "a very large number"
    return {None: "null", True: "true", False: "false"}[value]


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def _refused(where: str, complaint: str) -> ApiError:
    param = where or None
    return bad_request(f"{where or 'the request'}: {complaint}", param)


FieldSchema = dict[str, Any]

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_TOP_LOGPROBS = 20
_MAX_TOKEN = 2**31 - 1


def _field(kind: str, description: str, **rules: Any) -> FieldSchema:
    """A field that may be left out or null."""
    if "enum" in rules:
        rules["enum"] = [*rules["enum"], None]
    return {"type": [kind, "null"], "description": description, **rules}


def _only(value: Any, kind: str, why: str) -> FieldSchema:
    return _field(kind, why, enum=[value])


_TEXT_PART: FieldSchema = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

_TOOL_CALL: FieldSchema = {
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

MESSAGE: FieldSchema = {
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

TOOL: FieldSchema = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"], "description": "JSON FieldSchema of the arguments."},
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

_SHARED: dict[str, FieldSchema] = {
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

CHAT: FieldSchema = {
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

COMPLETION: FieldSchema = {
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


def with_limits(schema: Mapping[str, Any], max_tokens: int) -> FieldSchema:
    """The schema with the server's own limit on the length of an answer."""
    properties = dict(schema["properties"])
    for name in ("max_tokens", "max_completion_tokens"):
        if name in properties:
            properties[name] = {**properties[name], "maximum": max_tokens}
    return {**schema, "properties": properties}


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
            GenerationOptions.of(**options)
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


_REFUSALS = {
    "400": "The request cannot be served as it is; the message names the field.",
    "401": "The key is missing or wrong.",
    "404": "Another model than the one served.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too many requests wait; Retry-After says for how long.",
    "503": "The server is shutting down.",
}
_ERROR: FieldSchema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANSWER: FieldSchema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
        "speculation": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage"],
}


def openapi_document(schemas: Mapping[Kind, Mapping[str, Any]], needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document. `schemas`: of both kinds of request. `needs_key`: whether the server has one."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llmcad-mlx", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation.", schemas["chat"])},
            "/v1/completions": {"post": _generation("Continue a text.", schemas["completion"])},
            "/v1/models": {"get": _get("The model that is served.")},
            "/health": {"get": {**_get("Whether the server works."), "security": []}},
            "/metrics": {"get": _get("Counters, as Prometheus reads them.", "text/plain")},
            "/openapi.json": {"get": _get("This document.")},
        },
        "components": {"schemas": {"Error": _ERROR, "Answer": _ANSWER}},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _generation(summary: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    answer = {
        "description": "The answer, whole or as server-sent events.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answer, **{status: _error(text) for status, text in _REFUSALS.items()}},
    }


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, media_type: str = "application/json") -> dict[str, Any]:
    content = {media_type: {"schema": {"type": "string" if media_type == "text/plain" else "object"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "It is.", "content": content},
            "401": _error(_REFUSALS["401"]),
        },
    }
