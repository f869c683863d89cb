"""From a generation's rounds to the parts of an answer: what becomes one chunk of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmcad_mlx.serve.events import RoundEvent, TokenEvent
from llmcad_mlx.serve.tool_calls import Heard, ToolListener


@dataclass(frozen=True, slots=True)
class Part:
    """Text or tool calls, the tokens they came with, and the tree of the round they belong to."""

    text: str
    calls: Sequence[dict[str, Any]]
    tokens: Sequence[TokenEvent]
    tree: dict[str, Any] | None


class PartMaker:
    """Cuts rounds into parts, one for each piece of text.

    Tokens that show no text yet go with the next part that has some. Every round's tree is in one part: the
    round's first, or one without text where the whole round shows none.
    """

    def __init__(self, tools: ToolListener | None) -> None:
        """`tools`: listens for tool calls, None for a request without tools."""
        self._tools = tools
        self._held: list[TokenEvent] = []
        self._tree: dict[str, Any] | None = None

    def round(self, event: RoundEvent) -> Iterator[Part]:
        """The parts of a round."""
        if self._tree is not None:
            yield self._part(Heard())
        self._tree = event.tree
        for token in event.tokens:
            self._held.append(token)
            heard = Heard(token.text) if self._tools is None else self._tools.feed(token.text)
            if heard.text or heard.calls:
                yield self._part(heard)

    def finish(self) -> Part:
        """What is left at the end; it may be empty."""
        return self._part(Heard() if self._tools is None else self._tools.finish())

    def _part(self, heard: Heard) -> Part:
        tokens, self._held = self._held, []
        tree, self._tree = self._tree, None
        return Part(heard.text, heard.calls, tokens, tree)
