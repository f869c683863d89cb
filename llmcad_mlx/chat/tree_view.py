"""The token tree of a round, drawn: the accepted path, what the target rejected, and what it was not given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from llmcad_mlx.chat.screen import visible
from llmcad_mlx.engine.round import Round
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, ROOT, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

ACCEPTED, REJECTED, PROVISIONAL = "accepted", "rejected", "provisional"
_MARKS = {ACCEPTED: ("✓", "bold green"), REJECTED: ("✗", "red"), PROVISIONAL: ("·", "yellow")}
_MOST_NODES = 48  # more do not fit on a screen


@dataclass(frozen=True, slots=True)
class RoundTree:
    """What a picture of a round needs; holds on to no logits."""

    drafted: TokenTree
    selection: Selection
    walk: Walk

    @classmethod
    def of(cls, done: Round) -> RoundTree:
        """The part of `done` that is kept."""
        return cls(done.drafted, done.selection, done.walk)

    def states(self) -> list[str]:
        """For each drafted node: accepted, rejected (tested in vain) or provisional (not sent to the target)."""
        accepted = {self.selection.new_to_old[node] for node in self.walk.nodes}
        tested = {node for node, new in enumerate(self.selection.old_to_new) if new != DROPPED}
        return [
            ACCEPTED if node in accepted else REJECTED if node in tested else PROVISIONAL
            for node in range(len(self.drafted))
        ]

    @property
    def own_token(self) -> int | None:
        """The target's own token after the accepted path; None where the text ended before it."""
        return self.walk.tokens[-1] if len(self.walk.tokens) > len(self.walk.nodes) else None

    @property
    def last(self) -> int:
        """The drafted node that the target's own token follows."""
        return self.selection.new_to_old[self.walk.last]


def draw(tree: RoundTree, decode: Callable[[int], str]) -> RenderableType:
    """The tree, best branches first, with each node's confidence; the surest ones where there are too many.

    decode: from a token id to its text.
    """
    drafted, states = tree.drafted, tree.states()
    shown = set(drafted.select(_MOST_NODES).new_to_old)
    shown |= {node for node, state in enumerate(states) if state == ACCEPTED}
    branches = {ROOT: Tree(Text(_quoted(decode, drafted.tokens[ROOT]), "bold"))}
    order = sorted(shown - {ROOT}, key=lambda node: (drafted.depths[node], -drafted.cumulative[node]))
    for node in order:
        mark, style = _MARKS[states[node]]
        label = Text.assemble(
            (f"{mark} {_quoted(decode, drafted.tokens[node])}", style),
            f" {drafted.confidences[node]:.2f}",
            (_source(drafted.sources[node]), "dim"),
        )
        branches[node] = branches[drafted.parents[node]].add(label)
    if tree.own_token is not None:
        branches[tree.last].add(Text(f"→ {_quoted(decode, tree.own_token)} the target's own", "bold cyan"))
    return Group(branches[ROOT], _legend(states, len(drafted) - len(shown)))


def _legend(states: list[str], num_hidden: int) -> Text:
    counts = {state: states[1:].count(state) for state in _MARKS}
    parts = [
        Text(
            f"{mark} {counts[ACCEPTED]} accepted" if state == ACCEPTED else f"{mark} {counts[state]} {state}",
            style,
        )
        for state, (mark, style) in _MARKS.items()
    ]
    legend = Text("  ").join(parts)
    if num_hidden:
        legend.append(f"  ({num_hidden} less likely ones not shown)", "dim")
    return legend


def _quoted(decode: Callable[[int], str], token: int) -> str:
    return repr(visible(decode(token)))


def _source(source: str) -> str:
    return "" if source == MODEL else f" {source}"
