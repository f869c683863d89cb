"""The commands of a chat: their names, what they take, and what a line means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from llmcad_mlx.errors import UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """`argument`: what may follow the name, for people; "" for nothing. `needed`: it must."""

    name: str
    argument: str
    help: str
    needed: bool = False


COMMANDS: tuple[Command, ...] = (
    Command("help", "", "this list"),
    Command("system", "[TEXT]", "show or set the system message; 'none' takes it away"),
    Command("clear", "", "forget all messages"),
    Command("undo", "", "take back the last message and its answer"),
    Command("regen", "", "answer the last message again, with the next seed"),
    Command("save", "FILE", "write messages, settings and caches to a file", needed=True),
    Command("load", "FILE", "go on with a saved conversation", needed=True),
    Command("set", "[NAME VALUE]", "show or change settings: temperature, max_tokens, policy, colour, …"),
    Command("stats", "", "figures of the last answer"),
    Command("tree", "", "the token tree of the last round"),
    Command("quit", "", "end the chat (also Ctrl-D)"),
)

_OTHER_NAMES: Mapping[str, str] = {"exit": "quit", "bye": "quit", "?": "help"}
"""What other chats call them."""

KEYS = (
    "Enter sends; Esc Enter or Alt-Enter begins a new line, pasted lines stay together.",
    "Tab completes commands, Up and Down go through what was typed before.",
    "Ctrl-C stops an answer, which stays in the conversation as far as it got.",
    "A message that begins with / is sent with a blank before it.",
)


@dataclass(frozen=True, slots=True)
class Call:
    """A command as typed."""

    name: str
    argument: str


def parse(line: str) -> Call | None:
    """The command that a line is, None for a message. Raises UsageError, one line, for one that cannot be."""
    if not line.startswith("/"):
        return None
    name, _, argument = line[1:].strip().partition(" ")
    name, argument = _OTHER_NAMES.get(name, name), argument.strip()
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        near = get_close_matches(name, [command.name for command in COMMANDS], 1, 0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        raise UsageError(f"/{name}: unknown command; {hint}")
    if argument and not command.argument:
        raise UsageError(f"/{name}: takes nothing, not {argument!r}")
    if command.needed and not argument:
        raise UsageError(f"/{name}: give a {command.argument.lower()}, like /{name} talk.chat")
    return Call(name, argument)
