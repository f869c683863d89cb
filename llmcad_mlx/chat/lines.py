"""Where the lines of a chat come from: a prompt with history, many lines and completion, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from llmcad_mlx.chat.commands import COMMANDS, SETTINGS
from llmcad_mlx.chat.session import ChatSession
from llmcad_mlx.report import status_line


def from_terminal(session: ChatSession, history: Path | None) -> None:
    """Take messages and commands until /quit or Ctrl-D. history: the file that keeps what was typed, if any."""
    names = session.engine.pair.names
    session.screen.note(f"[{names.target_label}, draft {names.draft_label}; /help lists the commands]")
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))  # what Alt-Enter sends, too
    prompt: PromptSession[str] = PromptSession(
        [("class:prompt", ">>> ")],
        history=_history(history),
        multiline=True,
        key_bindings=keys,
        completer=CommandCompleter(),
        complete_while_typing=False,
        bottom_toolbar=lambda: status_line(session.engine, session.stats, get_app().output.get_size().columns),
        prompt_continuation="... ",
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"}),
        enable_suspend=True,
    )
    going = True
    while going:
        stopped = ""
        try:
            line = prompt.prompt()
            stopped = "stopped; "
            going = session.handle(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            session.screen.note(f"[{stopped}/quit or Ctrl-D ends the chat]")


def from_pipe(session: ChatSession) -> None:
    """Read standard input to its end: one message or command a line."""
    for number, data in enumerate(sys.stdin.buffer, 1):
        try:
            line = data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            session.screen.error(f"line {number}: is not UTF-8 text")
            continue
        if not session.handle(line):
            break


class _CarefulHistory(FileHistory):
    """A disk that is full or read only is no reason to end a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history(path: Path | None) -> History:
    """The history of `path`, which only its owner may read; one in memory where it cannot be opened."""
    with suppress(OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            return _CarefulHistory(str(path))
    return InMemoryHistory()


class CommandCompleter(Completer):
    """Names of commands, then what may follow: files, or names of settings. Nothing in messages."""

    def __init__(self) -> None:
        helps, files = {f"/{command.name}": command.help for command in COMMANDS}, PathCompleter(expanduser=True)
        self._names = WordCompleter([*helps], meta_dict=helps, sentence=True)
        self._after = {"/save": files, "/load": files, "/set": WordCompleter([*SETTINGS])}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What the text before the cursor may go on with."""
        name, blank, argument = document.text_before_cursor.partition(" ")
        if blank and name in self._after:
            return self._after[name].get_completions(Document(argument), complete_event)
        return self._names.get_completions(document, complete_event) if name.startswith("/") else ()
