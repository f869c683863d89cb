"""Where a chat is shown: a terminal, a stream of plain text, or a stream of JSON objects.

Text of a model as it may go to a terminal.

An answer on a terminal while it comes.

What cannot change any more is printed and scrolls away; the rest, with a status line below, is redrawn in place.
So an answer may be longer than the screen, and nothing is printed twice.

Figures of a chat: the status line and the table of `/stats`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.machine import peak_rss_bytes
from llmcad_mlx.report import generation_report
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sizes import format_size

_KEPT = "\n\t"
# C0, DEL and C1: with them a text could move the cursor, change colours or answer in the user's place.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in _KEPT}


def visible(text: str) -> str:
    """`text` without control characters, line ends and tabs left in."""
    return text.translate(_CONTROLS)


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


def status_line(engine: Engine, stats: GenerationStats | None) -> str:
    """Tokens/s, tokens per pass, and peak memory against the budget."""
    parts = (
        []
        if stats is None
        else [f"{stats.tokens_per_s:.1f} tokens/s", f"{stats.tokens_per_pass:.2f} tokens per pass"]
    )
    return " · ".join([*parts, f"memory {memory(engine)}"])


def memory(engine: Engine) -> str:
    """The process's peak, and what it may use where that is limited."""
    plan = engine.pair.plan
    budget = "" if plan is None or plan.budget_bytes is None else f" of {format_size(plan.budget_bytes)}"
    return format_size(peak_rss_bytes()) + budget


def stats_table(engine: Engine, stats: GenerationStats) -> Table:
    """What the last answer took."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rate = engine.pair.options.read_bandwidth
    rows = [
        (
            "prompt",
            f"{stats.prompt_tokens} tokens, {stats.reused_tokens} of them read before; {stats.prompt_s:.2f} s",
        ),
        ("answer", f"{stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s"),
        ("target passes", f"{stats.target_passes}, {stats.tokens_per_pass:.2f} tokens per pass"),
        (
            "draft",
            f"{stats.drafted} drafted, {stats.tested} tested, {stats.accepted} accepted; "
            f"acceptance rate {stats.acceptance_rate:.0%}",
        ),
        (
            "time",
            f"{stats.decode_s:.2f} s: drafting {stats.draft_s - stats.hidden_draft_s:.2f}, verifying "
            f"{stats.verify_s:.2f}, waiting for weights {stats.io_wait_s:.2f}",
        ),
        ("memory", f"{memory(engine)} at most"),
    ]
    if stats.streamed_bytes:
        emulated = "" if rate is None else f", reads emulated at {format_size(round(rate))}/s"
        rows.append(("streamed", f"{format_size(stats.streamed_bytes)}{emulated}"))
    for name, value in rows:
        table.add_row(name, value)
    return table


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
