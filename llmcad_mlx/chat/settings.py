"""What `/set` changes: the options of the next answers, as people type them, and how answers are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llmcad_mlx.errors import UsageError

Check = Callable[[Mapping[str, Any]], None]
"""Raises UsageError for options that cannot be."""

COLOUR = "colour"
_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_INTEGERS = ("top_k", "seed", "max_tokens", "tree_nodes")
_SWITCHES = ("pipeline", "tree", "fallback")
_TEXTS = ("policy", "stop")
OPTIONS = (*_NUMBERS, *_INTEGERS, *_SWITCHES, *_TEXTS)
_OTHER_NAMES: Mapping[str, str] = {"temp": "temperature", "color": COLOUR}
_UNSET: Mapping[str, str] = {"tree_nodes": "auto", "stop": "none"}
"""How people write that an option is not set."""
_SWITCH_WORDS: Mapping[str, bool] = {"on": True, "true": True, "off": False, "false": False}


@dataclass(slots=True)
class ChatSettings:
    """`options` are those of `Engine.stream_generate`, checked by `check` before any is taken over; `colour`: show
    which tokens the draft wrote."""

    check: Check
    options: dict[str, Any] = field(default_factory=dict)
    colour: bool = False

    def set(self, name: str, text: str) -> str:
        """Set one option to what was typed; returns its name. Raises UsageError, and changes nothing, for an
        unknown name or a value that cannot be."""
        name = self.name_of(name)
        if name == COLOUR:
            self.colour = _switch(COLOUR, text)
            return name
        changed = {**self.options, name: _value(name, text)}
        self.check(changed)
        self.options = changed
        return name

    def take_over(self, saved: Mapping[str, Any]) -> None:
        """Take over saved options. Raises UsageError, and changes nothing, for one that cannot be."""
        for name in saved:
            self.name_of(name)
        changed = {**self.options, **saved}
        self.check(changed)
        self.options = changed

    @staticmethod
    def name_of(name: str) -> str:
        """The full name of an option. Raises UsageError naming the nearest."""
        known = (*OPTIONS, COLOUR)
        name = _OTHER_NAMES.get(name, name).replace("-", "_")
        if name in known:
            return name
        near = get_close_matches(name, known, 1)
        raise UsageError(f"{name}: unknown option; " + (f"did you mean {near[0]}?" if near else "/set lists them"))

    def shown(self) -> list[tuple[str, str]]:
        """All names and values, as `/set` takes them."""
        rows = [(name, _text(name, self.options[name])) for name in OPTIONS if name in self.options]
        return [*rows, (COLOUR, _text(COLOUR, self.colour))]


def _value(name: str, text: str) -> Any:
    if _UNSET.get(name) == text:
        return None
    if name in _SWITCHES:
        return _switch(name, text)
    if name in _TEXTS:
        return text.replace("\\n", "\n")
    try:
        return int(text) if name in _INTEGERS else float(text)
    except ValueError:
        kind = "an integer" if name in _INTEGERS else "a number"
        raise UsageError(f"{name}: {text!r} is not {kind}") from None


def _switch(name: str, text: str) -> bool:
    if text not in _SWITCH_WORDS:
        raise UsageError(f"{name}: {text!r} is neither on nor off")
    return _SWITCH_WORDS[text]


def _text(name: str, value: Any) -> str:
    if value is None:
        return _UNSET.get(name, "none")
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(repr, value))
    return str(value)
