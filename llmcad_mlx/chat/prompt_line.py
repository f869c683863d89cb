"""The line that people type into, by prompt-toolkit: history, many lines, completion, a status line below."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from llmcad_mlx.chat.commands import COMMANDS
from llmcad_mlx.chat.settings import COLOUR, OPTIONS

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
