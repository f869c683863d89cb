"""Checks a request against JSON Schema: the very schema that `/openapi.json` shows.

Only the keywords the server's own schemas use; another is an error, so that nothing is shown that is not checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llmcad_mlx.serve.errors import ApiError, bad_request

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
