"""What a typed line means: the commands of a chat, and the settings that `/set` changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import GenerationOptions


@dataclass(frozen=True, slots=True)
class Command:
    """`argument`: what follows the name, for people: "" nothing, "[…]" may be left out."""

    name: str
    argument: str
    help: str


COMMANDS: tuple[Command, ...] = (
    Command("help", "", "this list"),
    Command("system", "[TEXT]", "show or set the system message; 'none' takes it away"),
    Command("clear", "", "forget all messages"),
    Command("undo", "", "take back the last message and its answer"),
    Command("regen", "", "answer the last message again, with the next seed"),
    Command("save", "FILE", "write messages, settings and caches to a file"),
    Command("load", "FILE", "go on with a saved conversation"),
    Command("set", "[NAME VALUE]", "show or change settings: temperature, max_tokens, policy, colour, …"),
    Command("stats", "", "figures of the last answer"),
    Command("tree", "", "the token tree of the last round"),
    Command("quit", "", "end the chat (also Ctrl-D)"),
)
KEYS = (
    "Enter sends; Esc Enter or Alt-Enter begins a new line, pasted lines stay together.",
    "Tab completes commands, Up and Down go through what was typed before.",
    "Ctrl-C stops an answer, which stays in the conversation as far as it got.",
    "A message that begins with / is sent with a blank before it.",
)
_OTHER_COMMAND_NAMES = {"exit": "quit", "bye": "quit", "?": "help"}  # as in other chats


def parse(line: str) -> tuple[str, str] | None:
    """A command's name and its argument, None for a message. Raises UsageError for a command that cannot be."""
    if not line.startswith("/"):
        return None
    name, _, argument = line[1:].strip().partition(" ")
    name, argument = _OTHER_COMMAND_NAMES.get(name, name), argument.strip()
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        near = get_close_matches(name, [command.name for command in COMMANDS], 1, 0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise UsageError(f"/{name}: unknown command; {hint}")
    if argument and not command.argument:
        raise UsageError(f"/{name}: takes nothing, not {argument!r}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name}: give a {command.argument.lower()}, like /{name} talk.chat")
    return name, argument


COLOUR = "colour"
SETTINGS: Mapping[str, type] = {
    "temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "top_k": int, "seed": int, "max_tokens": int, "tree_nodes": int, "pipeline": bool,
    "tree": bool, "fallback": bool, "policy": str, "stop": str, COLOUR: bool,
}  # fmt: skip
"""What `/set` changes, and the kind of its values: options of `GenerationOptions.of`, and the colour."""
_SHOWN_WHEN_SET = ("repetition_penalty", "presence_penalty", "frequency_penalty", "stop")
_OTHER_SETTING_NAMES = {"temp": "temperature", "color": COLOUR}
_UNSET = {"tree_nodes": "auto", "stop": "none"}
_SWITCH = {"on": True, "true": True, "off": False, "false": False}
_NOT_A = {float: "not a number", int: "not an integer", bool: "neither on nor off"}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`options`: those of the answers to come. `colour`: show which tokens the draft wrote."""

    options: GenerationOptions
    colour: bool = False

    def values(self, in_full: bool = False) -> dict[str, Any]:
        """The options by name, as JSON takes them; in_full: those too that are off unless somebody sets them."""
        values, defaults = self.options.keywords(), GenerationOptions().keywords()
        off = [name for name in _SHOWN_WHEN_SET if values[name] == defaults[name] and not in_full]
        hidden = {COLOUR, *off}
        return {name: values[name] for name in SETTINGS if name not in hidden}

    def with_values(self, values: Mapping[str, Any]) -> ChatSettings:
        """The settings with some options changed. Raises UsageError for one that cannot be."""
        return replace(self, options=GenerationOptions.of(**{**self.options.keywords(), **values}))

    def typed(self, name: str, text: str) -> ChatSettings:
        """The settings with the one of that full name as it was typed. Raises UsageError for what is no value."""
        kind: Any = SETTINGS[name]
        value: Any
        if _UNSET.get(name) == text:
            value = None
        elif kind is str:
            value = text.replace("\\n", "\n")
        else:
            try:
                value = _SWITCH[text] if kind is bool else kind(text)
            except (ValueError, KeyError):
                raise UsageError(f"{name}: {text!r} is {_NOT_A[kind]}") from None
        return replace(self, colour=value) if name == COLOUR else self.with_values({name: value})

    def text(self, name: str) -> str:
        """The value of the setting of that full name, as `/set` takes it."""
        value = self.colour if name == COLOUR else self.options.keywords()[name]
        if value is None or value == ():
            return _UNSET[name]
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, tuple) and len(value) > 1:  # of stop strings
            return ", ".join(map(repr, value))
        return str(value[0] if isinstance(value, tuple) else value)


def setting_name(name: str) -> str:
    """The full name of a setting. Raises UsageError naming the nearest."""
    name = _OTHER_SETTING_NAMES.get(name, name).replace("-", "_")
    if name in SETTINGS:
        return name
    near = get_close_matches(name, SETTINGS, 1)
    raise UsageError(f"{name}: unknown option; " + (f"did you mean {near[0]}?" if near else "/set lists them"))
