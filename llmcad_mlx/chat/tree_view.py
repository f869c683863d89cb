"""The token tree of a round, drawn: the accepted path, what the target rejected, and what it was not given."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from llmcad_mlx.chat.screen import visible
from llmcad_mlx.engine.round import ACCEPTED, PROVISIONAL, REJECTED, RoundTree
from llmcad_mlx.tree.token_tree import MODEL, ROOT

_MARKS = {ACCEPTED: ("✓", "bold green"), REJECTED: ("✗", "red"), PROVISIONAL: ("·", "yellow")}
_MOST_NODES = 48  # more do not fit on a screen


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
    if picture.bonus_token is not None:
        branches[picture.last].add(Text(f"→ {text(picture.bonus_token)} the target's own", "bold cyan"))
    return Group(branches[ROOT], _legend(states[1:], len(tree) - len(shown)))


def _legend(states: list[str], num_hidden: int) -> Text:
    counts = [Text(f"{mark} {states.count(state)} {state}", style) for state, (mark, style) in _MARKS.items()]
    legend = Text("  ").join(counts)
    if num_hidden:
        legend.append(f"  ({num_hidden} less likely ones not shown)", "dim")
    return legend
