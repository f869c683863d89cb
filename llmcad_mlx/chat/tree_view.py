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


def draw(picture: RoundTree, decode: Callable[[int], str]) -> RenderableType:
    """The tree, best branches first, with each node's confidence; the surest ones where there are too many.

    decode: from a token id to its text.
    """

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
    if picture.own_token is not None:
        branches[picture.last].add(Text(f"→ {text(picture.own_token)} the target's own", "bold cyan"))
    return Group(branches[ROOT], _legend(states[1:], len(tree) - len(shown)))


def _legend(states: list[str], num_hidden: int) -> Text:
    counts = [Text(f"{mark} {states.count(state)} {state}", style) for state, (mark, style) in _MARKS.items()]
    legend = Text("  ").join(counts)
    if num_hidden:
        legend.append(f"  ({num_hidden} less likely ones not shown)", "dim")
    return legend
