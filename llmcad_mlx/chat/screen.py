"""Where a chat is shown: a terminal, a stream of plain text, or a stream of JSON objects."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.chat.figures import status_line
from llmcad_mlx.chat.stream_view import GrowingColours, GrowingMarkdown, StreamView
from llmcad_mlx.chat.visible import visible
from llmcad_mlx.report import generation_report
from llmcad_mlx.stats import GenerationStats


class AnswerView(Protocol):
    """Takes one answer as it comes."""

    def progress(self, done: int, total: int) -> None:
        """Prompt tokens read so far."""

    def add(self, response: Response) -> None:
        """The next token."""


class Screen(Protocol):
    """What a session needs to be seen."""

    def answer(self, engine: Engine, options: dict[str, Any], colour: bool) -> AbstractContextManager[AnswerView]:
        """Show an answer. options: what it is generated with; colour: tell the draft's tokens apart."""

    def show(self, what: RenderableType) -> None:
        """Show what a command has to say."""

    def note(self, line: str) -> None:
        """One line beside the conversation."""

    def error(self, line: str) -> None:
        """One line about what cannot be."""


class TerminalScreen:
    """Markdown and colours, by Rich."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, markup=False, emoji=False)

    def answer(self, engine: Engine, options: dict[str, Any], colour: bool) -> AbstractContextManager[AnswerView]:
        """Streamed; with `colour` as it is, without as Markdown."""
        watched = _Watched()
        text = GrowingColours() if colour else GrowingMarkdown()
        view = StreamView(self.console, text, lambda: status_line(engine, watched.stats))
        watched.view = view
        return watched

    def show(self, what: RenderableType) -> None:
        """Print it."""
        self.console.print(what)

    def note(self, line: str) -> None:
        """Print it dim."""
        self.console.print(line, style="dim", soft_wrap=True)

    def error(self, line: str) -> None:
        """Print it red."""
        self.console.print(line, style="red", soft_wrap=True)


class _Watched:
    """A `StreamView` whose status line knows the running figures."""

    view: StreamView

    def __init__(self) -> None:
        self.stats: GenerationStats | None = None

    def __enter__(self) -> _Watched:
        self.view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.__exit__(kind, error, trace)

    def progress(self, done: int, total: int) -> None:
        self.view.progress(done, total)

    def add(self, response: Response) -> None:
        self.stats = response.stats
        self.view.add(response)


class PlainScreen:
    """Text without any escape codes, for pipes and files. Counts errors: they are a script's business."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._console = Console(
            file=self._out, highlight=False, markup=False, emoji=False, color_system=None, force_terminal=False,
            width=100,
        )  # fmt: skip
        self.num_errors = 0

    def answer(self, engine: Engine, options: dict[str, Any], colour: bool) -> AbstractContextManager[AnswerView]:
        """Printed as it comes; there are no colours here."""
        return _PlainAnswer(self._out)

    def show(self, what: RenderableType) -> None:
        """Print it, without colours."""
        self._console.print(what)

    def note(self, line: str) -> None:
        """On standard error: standard output is for answers."""
        print(line, file=self._err, flush=True)

    def error(self, line: str) -> None:
        """On standard error."""
        self.num_errors += 1
        print(f"error: {line}", file=self._err, flush=True)


class _PlainAnswer:
    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> _PlainAnswer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, BrokenPipeError):
            print(file=self._out, flush=True)

    def progress(self, done: int, total: int) -> None:
        pass

    def add(self, response: Response) -> None:
        print(visible(response.text), end="", file=self._out, flush=True)


class JsonScreen(PlainScreen):
    """One JSON object for each answer on standard output, nothing else there."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        super().__init__(err or sys.stderr, err)  # what commands show is not an answer
        self._answers = out or sys.stdout

    def answer(self, engine: Engine, options: dict[str, Any], colour: bool) -> AbstractContextManager[AnswerView]:
        """Collected, and printed at its end."""
        return _JsonAnswer(self._answers, engine, options)


class _JsonAnswer:
    def __init__(self, out: TextIO, engine: Engine, options: dict[str, Any]) -> None:
        self._out, self._engine, self._options = out, engine, options
        self._responses: list[tuple[int, str]] = []
        self._last: Response | None = None

    def __enter__(self) -> _JsonAnswer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is None or self._last.stats is None:
            return
        text, tokens = "".join(text for _, text in self._responses), [token for token, _ in self._responses]
        reason = self._last.finish_reason or "interrupted"
        report = generation_report(self._engine, text, tokens, reason, self._last.stats, self._options)
        print(json.dumps(report), file=self._out, flush=True)

    def progress(self, done: int, total: int) -> None:
        pass

    def add(self, response: Response) -> None:
        self._responses.append((response.token, response.text))
        self._last = response
