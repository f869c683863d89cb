"""Writes docs/api.md from the docstrings: python docs/make_api_reference.py

A test fails while the committed page is not what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
SECTIONS = (
    (
        "Loading",
        "`load` is all one needs. For a model on this machine it passes its options on to `llmcad_mlx.api.load`.",
        ("llmcad_mlx.load", "llmcad_mlx.api.load"),
    ),
    ("Engines", "", ("llmcad_mlx.Engine", "llmcad_mlx.RemoteEngine")),
    (
        "What a generation returns",
        "",
        ("llmcad_mlx.Response", "llmcad_mlx.Result", "llmcad_mlx.GenerationStats"),
    ),
    (
        "Options of a generation",
        "Each field is a keyword of `stream_generate` and `generate`; the fields of `StopSettings` are called "
        "`max_tokens`, `stop` and `stop_tokens` there.",
        (
            "llmcad_mlx.settings.SamplingSettings",
            "llmcad_mlx.settings.SpeculationSettings",
            "llmcad_mlx.settings.StopSettings",
            "llmcad_mlx.settings.GenerationOptions",
        ),
    ),
    (
        "Rounds",
        "What `on_round` gets, for those who want to see how a text came about.",
        (
            "llmcad_mlx.engine.round.Round",
            "llmcad_mlx.tree.token_tree.TokenTree",
            "llmcad_mlx.tree.token_tree.Selection",
            "llmcad_mlx.tree.walk.Walk",
        ),
    ),
    ("mlx-lm's functions", "", ("llmcad_mlx.mlx_lm_plugin.load", "llmcad_mlx.mlx_lm_plugin.stream_generate")),
    (
        "Errors",
        "Every message is one line; [troubleshooting](troubleshooting.md) says more about each.",
        (
            "llmcad_mlx.LlmcadError",
            "llmcad_mlx.UsageError",
            "llmcad_mlx.ContextLengthError",
            "llmcad_mlx.BudgetError",
            "llmcad_mlx.ModelError",
            "llmcad_mlx.VocabularyError",
            "llmcad_mlx.DownloadError",
            "llmcad_mlx.GenerationError",
            "llmcad_mlx.StorageError",
            "llmcad_mlx.RemoteError",
        ),
    ),
)


def page() -> str:
    """The text of docs/api.md."""
    lines = [
        "# Python API",
        "",
        "Written by `python docs/make_api_reference.py` from the docstrings; a test fails when this page is out",
        "of date. The command line has `--help`, the HTTP API [a page of its own](server.md).",
    ]
    for title, text, names in SECTIONS:
        lines += ["", f"## {title}"] + (["", text] if text else [])
        for name in names:
            lines += _entry(name)
    return "\n".join(lines) + "\n"


def _entry(name: str) -> Iterator[str]:
    module, _, attribute = name.rpartition(".")
    thing = getattr(import_module(module), attribute)
    yield from ("", f"### `{name}`", "")
    if not inspect.isclass(thing):
        yield from _described(attribute, thing)
        return
    yield from _fenced(f"class {attribute}{_bases(thing)}", *_class_lines(thing))
    yield from _doc(thing)
    for member, value in vars(thing).items():
        if member.startswith("_") or not _is_described(value):
            continue
        yield from ("", f"#### `{attribute}.{member}`", "")
        if isinstance(value, property):
            assert value.fget is not None
            yield from _fenced(f"{member}: {_annotation(value.fget.__annotations__.get('return'))}")
            yield from _doc(value)
        else:
            yield from _described(member, getattr(thing, member))


def _is_described(value: object) -> bool:
    return isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)


def _bases(kind: type) -> str:
    bases = [base.__name__ for base in kind.__bases__ if base is not object]
    return f"({', '.join(bases)})" if bases else ""


def _class_lines(kind: type) -> list[str]:
    """The own fields of a dataclass, or how to make one of another class."""
    if dataclasses.is_dataclass(kind):
        own = inspect.get_annotations(kind)
        return [f"    {field.name}{_field(field)}" for field in dataclasses.fields(kind) if field.name in own]
    if "__init__" not in vars(kind):
        return []
    return [f"    {line}" for line in _signature("__init__", kind.__init__)]  # type: ignore[misc]


def _field(field: dataclasses.Field[Any]) -> str:
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    return f": {_annotation(field.type)}{default}"


def _described(name: str, function: Callable[..., Any]) -> Iterator[str]:
    yield from _fenced(*_signature(name, function))
    yield from _doc(function, list(inspect.signature(function).parameters))


def _signature(name: str, function: Callable[..., Any]) -> list[str]:
    """`name(a: int, b: str = 'x') -> T`, a line for each parameter where one line is too long."""
    signature = inspect.signature(function)
    parameters, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
        keyword_only = keyword_only or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parameters.append(_parameter(parameter))
    returned = signature.return_annotation
    end = "" if returned is signature.empty else f" -> {_annotation(returned)}"
    whole = f"{name}({', '.join(parameters)}){end}"
    return [whole] if len(whole) <= 100 else [f"{name}(", *(f"    {p}," for p in parameters), f"){end}"]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _fenced(*lines: str) -> Iterator[str]:
    yield from ("```python", *lines, "```")


def _doc(thing: object, parameters: Collection[str] = ()) -> list[str]:
    """The docstring; where it explains a parameter ("name: …"), an item of a list."""
    text = inspect.getdoc(thing)  # a name that says it all may have none
    if not text:
        return []
    names = "|".join(parameters) or "$."
    return ["", re.sub(rf"(?:^|(?<=\.) |\n)({names}): ", r"\n- `\1`: ", text)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
