"""An answer on a terminal while it comes.

What cannot change any more is printed and scrolls away; the rest, with a status line below, is redrawn in place.
So an answer may be longer than the screen, and nothing is printed twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from llmcad_mlx.api import Response
from llmcad_mlx.chat.visible import visible

_REDRAW_S = 0.08
_SHOW_PROGRESS_S = 0.5
_ROOM_BELOW = 3  # lines of the screen that the moving part leaves free
_DRAFT_STYLE = "green"


class Growing(Protocol):
    """Text that grows, as blocks to print."""

    def add(self, response: Response) -> None:
        """Take the next token."""

    def finished(self) -> Iterator[RenderableType]:
        """What cannot change any more, each block once."""

    def rest(self) -> RenderableType | None:
        """What still may; None for nothing."""


class GrowingMarkdown:
    """Markdown by its top-level blocks: the last one may change, those before it do not."""

    def __init__(self) -> None:
        self._text = ""
        self._printed = False

    def add(self, response: Response) -> None:
        """Take the next token's text."""
        self._text += visible(response.text)

    def finished(self) -> Iterator[RenderableType]:
        """All blocks but the last. The line that is being written does not count: it may turn into anything."""
        complete = self._text[: self._text.rfind("\n") + 1]
        starts = [t.map[0] for t in Markdown(complete).parsed if t.level == 0 and t.map]
        if len(set(starts)) > 1:
            lines = self._text.splitlines(keepends=True)
            done, self._text = "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])
            yield self._spaced(done)
            self._printed = True

    def rest(self) -> RenderableType | None:
        """The last block."""
        return self._spaced(self._text) if self._text.strip() else None

    def _spaced(self, text: str) -> RenderableType:
        markdown = Markdown(text.strip("\n"))
        return Group("", markdown) if self._printed else markdown


class GrowingColours:
    """The text as it is, line by line; tokens that the draft wrote have a colour."""

    def __init__(self) -> None:
        self._text = Text()

    def add(self, response: Response) -> None:
        """Take the next token's text."""
        self._text.append(visible(response.text), _DRAFT_STYLE if response.from_draft else None)

    def finished(self) -> Iterator[RenderableType]:
        """All complete lines."""
        end = self._text.plain.rfind("\n")
        if end >= 0:
            done, self._text = self._text[:end], self._text[end + 1 :]
            yield done

    def rest(self) -> RenderableType | None:
        """The last line."""
        return self._text if self._text.plain else None


class StreamView:
    """Shows one answer. A context manager; leaving it, for whatever reason, leaves the text as far as it got.

    status: the line below, asked for when it is drawn. clock: seconds.
    """

    def __init__(
        self,
        console: Console,
        text: Growing,
        status: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._text, self._status, self._clock = console, text, status, clock
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop",
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._started = self._drawn = clock()

    def __enter__(self) -> StreamView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update("")
        self._live.stop()  # takes the moving part away
        for block in self._text.finished():
            self._console.print(block)
        rest = self._text.rest()
        if rest is not None:
            self._console.print(rest)

    def progress(self, done: int, total: int) -> None:
        """Prompt tokens read so far."""
        if self._clock() - self._started > _SHOW_PROGRESS_S:
            self._draw(Text(f"reading: {done}/{total} tokens", "dim"))

    def add(self, response: Response) -> None:
        """Take the next token."""
        self._text.add(response)
        if self._clock() - self._drawn < _REDRAW_S:
            return
        for block in self._text.finished():
            self._live.console.print(block)
        rest = self._text.rest()
        status = Text(self._status(), "dim", no_wrap=True, overflow="ellipsis")
        self._draw(status if rest is None else Group(_LastLines(rest), status))

    def _draw(self, shown: RenderableType) -> None:
        self._live.update(shown, refresh=True)
        self._drawn = self._clock()


class _LastLines:
    """The end of a block that is taller than the screen."""

    def __init__(self, block: RenderableType) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(console.size.height - _ROOM_BELOW, 1)
        lines = console.render_lines(self._block, options.update(height=None), pad=False)
        for line in lines[-room:]:
            yield from line
            yield Segment.line()
