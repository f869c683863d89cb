"""The line that people type into, by prompt-toolkit: history, many lines, completion, a status line below.

The commands of a chat: their names, what they take, and what a line means.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from llmcad_mlx.chat.settings import COLOUR, OPTIONS
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


_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})


class PromptLine:
    """Asks for a message or a command.

    history: the file that keeps what was typed, None to keep nothing. status: the line below.
    """

    def __init__(self, history: Path | None, status: Callable[[], str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            multiline=True,
            key_bindings=_keys(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            bottom_toolbar=status,
            prompt_continuation="... ",
            style=_STYLE,
            enable_suspend=True,
        )

    def ask(self) -> str:
        """What was typed. Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt([("class:prompt", ">>> ")])


class _CarefulHistory(FileHistory):
    """A disk that is full or read only is no reason to end a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history(path: Path | None) -> History:
    """The history of `path`, which only its owner may read; one in memory where it cannot be opened."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _CarefulHistory(str(path))


def _keys() -> KeyBindings:
    """Enter sends; Escape Enter, which is also what Alt-Enter sends, begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Names of commands, then what may follow: files, or names of settings. Nothing in messages."""

    def __init__(self) -> None:
        files = PathCompleter(expanduser=True)
        names = WordCompleter([*OPTIONS, COLOUR])
        self._after: dict[str, Completer] = {"save": files, "load": files, "set": names}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What the text before the cursor may go on with."""
        text = document.text_before_cursor
        name, blank, argument = text[1:].partition(" ")
        if not text.startswith("/"):
            return
        if blank and name in self._after:
            yield from self._after[name].get_completions(Document(argument), complete_event)
        elif not blank:
            for command in COMMANDS:
                if command.name.startswith(name):
                    yield Completion(f"/{command.name}", -len(text), display_meta=command.help)
