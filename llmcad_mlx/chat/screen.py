"""Where a chat is shown: a terminal, a stream of plain text, or a stream of JSON objects; and its token trees."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar, Self

from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown, TableElement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.chat.commands import ChatSettings
from llmcad_mlx.engine.round import ACCEPTED, PROVISIONAL, REJECTED, RoundTree
from llmcad_mlx.markdown import NO_MARKER, MarkdownParser
from llmcad_mlx.report import Answer, status_line
from llmcad_mlx.tree.token_tree import MODEL, ROOT

# C0, DEL and C1: with them a text could move the cursor, change colours or answer in the user's place.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_REDRAW_S = 0.08
_SHOW_PROGRESS_S = 0.5
_MARKS = {ACCEPTED: ("✓", "bold green"), REJECTED: ("✗", "red"), PROVISIONAL: ("·", "yellow")}
_MOST_NODES = 48  # more do not fit on a screen


def visible(text: str) -> str:
    """A model's `text` as it may go to a terminal: without control characters, line ends and tabs left in."""
    return text.translate(_CONTROLS)


class AnswerView:
    """Takes one answer as it comes. A context manager; leaving it, for whatever reason, ends what is shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, opened: str) -> None:
        """What the prompt ends with that is part of the answer: the tag of thinking, or nothing."""

    def progress(self, done: int, total: int) -> None:
        """Prompt tokens read so far."""

    def add(self, response: Response) -> None:
        """Take the next token."""

    def end(self) -> None:
        """No token follows."""


class PlainScreen:
    """Text without any escape codes, for pipes and files; notes and errors go to standard error.

    json_output: one JSON object for each answer on standard output, nothing else there. Errors are counted, for
    they are a script's business.
    """

    def __init__(self, json_output: bool) -> None:
        self._json_output, self.num_errors = json_output, 0
        self._console = Console(
            file=sys.stderr if json_output else sys.stdout, highlight=False, markup=False, emoji=False,
            color_system=None, force_terminal=False, width=100,
        )  # fmt: skip

    def answer(self, engine: Engine, settings: ChatSettings, answer: Answer) -> AnswerView:
        """Show an answer, which is generated with these settings; `answer` is what there is of it."""
        return _JsonAnswer(engine, settings, answer) if self._json_output else _PlainAnswer()

    def show(self, what: RenderableType) -> None:
        self._console.print(what)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def error(self, line: str) -> None:
        self.num_errors += 1
        print(f"error: {line}", file=sys.stderr, flush=True)


class _PlainAnswer(AnswerView):
    def begin(self, opened: str) -> None:
        print(opened, end="", flush=True)

    def add(self, response: Response) -> None:
        print(visible(response.text), end="", flush=True)

    def end(self) -> None:
        print(flush=True)


class _JsonAnswer(AnswerView):
    def __init__(self, engine: Engine, settings: ChatSettings, answer: Answer) -> None:
        self._engine, self._options, self._answer = engine, settings.options, answer

    def end(self) -> None:
        if self._answer.tokens:
            print(json.dumps(self._answer.report(self._engine, self._options)), flush=True)


class TerminalScreen:
    """Answers as Markdown, or with the colour as they are. Methods as `PlainScreen`."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)

    def answer(self, engine: Engine, settings: ChatSettings, _: Answer) -> AnswerView:
        text = GrowingColours() if settings.colour else GrowingMarkdown()
        return TerminalAnswer(self._console, text, engine)

    def show(self, what: RenderableType) -> None:
        self._console.print(what)

    def note(self, line: str) -> None:
        self._console.print(line, style="dim", soft_wrap=True)

    def error(self, line: str) -> None:
        self._console.print(line, style="red", soft_wrap=True)


Screen = PlainScreen | TerminalScreen


class _Parser(MarkdownParser):
    """Addresses are shown, so they stay as they were written. A table in a fence that names no language is a
    table: wrapped as code it could not be read."""

    def normalizeLink(self, url: str) -> str:  # noqa: N802
        return url

    def parse(self, src: str, env: MutableMapping[str, Any] | None = None) -> list[Token]:
        return [part for token in super().parse(src, env) for part in self._table_in(token) or [token]]

    def _table_in(self, token: Token) -> list[Token]:
        if token.type != "fence" or token.info.strip():
            return []
        tokens = super().parse(token.content)
        if not tokens or [t.type for t in tokens if t.level == 0] != ["table_open", "table_close"]:
            return []
        for part in tokens:
            part.level += token.level
        tokens[0].map = token.map
        return tokens


_PARSER = _Parser()


class _Table(TableElement):
    """Long words go on in the next line: rich would cut them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
            yield table


class ShownMarkdown(Markdown):
    """Markdown of which the reader sees every character but markers; where a layout would leave one out (a cell
    beyond the last column, a title of a link), the source as it is."""

    elements: ClassVar = {**Markdown.elements, "table_open": _Table}

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self._source, self.parsed = text, _PARSER.parse(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown: list[Any] = [*super().__rich_console__(console, options)]
        # What names a language, and the numbers of a list, which may be counted anew, are markers.
        markers = "".join(t.info.partition(" ")[0] for t in self.parsed if t.type in ("fence", "list_item_open"))
        wanted = _letters(self._source) - _letters(markers)
        if wanted <= _letters("".join(part.text for part in shown if not part.control)):
            yield from shown
        else:
            yield Text(self._source)


def _letters(text: str) -> Counter[str]:
    return Counter(NO_MARKER.findall(text))


class GrowingMarkdown:
    """Markdown by its top-level blocks: the last one may change, those before it do not."""

    def __init__(self) -> None:
        self._text = ""
        self._printed = False

    def begin(self, opened: str) -> None:
        self._text = opened

    def add(self, response: Response) -> None:
        self._text += visible(response.text)

    def finished(self) -> Iterator[RenderableType]:
        """All blocks but the last, each once. The line that is being written does not count: it may turn into
        anything."""
        complete = self._text[: self._text.rfind("\n") + 1]
        starts = [t.map[0] for t in _PARSER.parse(complete) if t.level == 0 and t.map]
        if len(set(starts)) > 1:
            lines = self._text.split("\n")  # what Markdown takes for lines
            self._text = "\n".join(lines[starts[-1] :])
            yield self._spaced("\n".join(lines[: starts[-1]]))
            self._printed = True

    def rest(self) -> RenderableType | None:
        """The last block, which may still change; None for nothing."""
        return self._spaced(self._text) if self._text.strip() else None

    def _spaced(self, text: str) -> RenderableType:
        markdown = ShownMarkdown(text.strip("\n"))
        return Group("", markdown) if self._printed else markdown


class GrowingColours:
    """The text as it is, line by line; tokens that the draft wrote have a colour. Methods as `GrowingMarkdown`."""

    def __init__(self) -> None:
        self._text = Text()

    def begin(self, opened: str) -> None:
        self._text.append(opened)

    def add(self, response: Response) -> None:
        self._text.append(visible(response.text), "green" if response.from_draft else None)

    def finished(self) -> Iterator[RenderableType]:
        end = self._text.plain.rfind("\n")
        if end >= 0:
            done, self._text = self._text[:end], self._text[end + 1 :]
            yield done

    def rest(self) -> RenderableType | None:
        return self._text if self._text.plain else None


class TerminalAnswer(AnswerView):
    """What cannot change any more is printed and scrolls away; the rest, with a status line below, is redrawn in
    place. So an answer may be longer than the screen, and nothing is printed twice."""

    def __init__(self, console: Console, text: GrowingMarkdown | GrowingColours, engine: Engine) -> None:
        self._console, self._text, self._engine = console, text, engine
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop",
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._started = self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def begin(self, opened: str) -> None:
        self._text.begin(opened)

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() - self._started > _SHOW_PROGRESS_S:
            self._draw(Text(f"reading: {done}/{total} tokens", "dim"))

    def add(self, response: Response) -> None:
        self._text.add(response)
        if time.monotonic() - self._drawn < _REDRAW_S:
            return
        rest = self._print_finished()
        line = status_line(self._engine, response.stats, self._console.width)
        status = Text(line, "dim", no_wrap=True, overflow="ellipsis")
        self._draw(status if rest is None else Group(_LastLines(rest), status))

    def end(self) -> None:
        self._live.update("")  # the moving part goes, the text stays as far as it got
        self._live.stop()
        rest = self._print_finished()
        if rest is not None:
            self._console.print(rest)

    def _print_finished(self) -> RenderableType | None:
        """Print what cannot change any more; returns the rest."""
        for block in self._text.finished():
            self._console.print(block)
        return self._text.rest()

    def _draw(self, shown: RenderableType) -> None:
        self._live.update(shown, refresh=True)
        self._drawn = time.monotonic()


class _LastLines:
    """The end of a block that is taller than the screen."""

    def __init__(self, block: RenderableType) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(console.size.height - 3, 1)  # leaves some of the screen free below
        lines = console.render_lines(self._block, options.update(height=None), pad=False)
        for line in lines[-room:]:
            yield from line
            yield Segment.line()


def draw(picture: RoundTree, decode: Callable[[int], str]) -> RenderableType:
    """The tree, best branches first, with confidences; of too many nodes the surest. decode: a token's text."""

    def text(token: int) -> str:
        return repr(visible(decode(token)))

    tree, states = picture.drafted, picture.states()
    shown = set(tree.select(_MOST_NODES).new_to_old)
    shown |= {node for node, state in enumerate(states) if state == ACCEPTED}
    branches = {ROOT: Tree(Text(text(tree.tokens[ROOT]), "bold"))}
    for node in sorted(shown - {ROOT}, key=lambda node: (tree.depths[node], -tree.cumulative[node])):
        mark, style = _MARKS[states[node]]
        source = "" if tree.sources[node] == MODEL else f" {tree.sources[node]}"
        label = Text.assemble(
            (f"{mark} {text(tree.tokens[node])}", style), f" {tree.confidences[node]:.2f}", (source, "dim")
        )
        branches[node] = branches[tree.parents[node]].add(label)
    if picture.bonus_token is not None:
        branches[picture.last].add(Text(f"→ {text(picture.bonus_token)} the target's own", "bold cyan"))
    counts = [Text(f"{mark} {states[1:].count(state)} {state}", style) for state, (mark, style) in _MARKS.items()]
    legend = Text("  ").join(counts)
    if len(shown) < len(tree):
        legend.append(f"  ({len(tree) - len(shown)} less likely ones not shown)", "dim")
    return Group(branches[ROOT], legend)
