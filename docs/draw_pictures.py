"""Draws the pictures of docs/how-it-works.md from a recorded run: python docs/draw_pictures.py

`python docs/record_run.py` records one. Needs matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

FOLDER = Path(__file__).parent / "pictures"
# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
BLUE, ORANGE, SKY, GREEN, GREY = "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#888888"
DARK_SKY, BROWN = "#2F7FB0", "#A65F00"
STYLES = {
    "root": {"facecolor": "black", "edgecolor": "black", "linestyle": "-"},
    "accepted": {"facecolor": BLUE, "edgecolor": BLUE, "linestyle": "-"},
    "rejected": {"facecolor": "white", "edgecolor": GREY, "linestyle": "-"},
    "provisional": {"facecolor": "#FFF4DC", "edgecolor": ORANGE, "linestyle": "--"},
    "kept": {"facecolor": ORANGE, "edgecolor": ORANGE, "linestyle": "-"},
    "bonus": {"facecolor": GREEN, "edgecolor": GREEN, "linestyle": "-"},
}
INK = {"rejected": "#444444", "provisional": "#444444", "kept": "black"}  # white on the others
MOST_KEPT, MOST_OTHERS = 5, 7  # drawn of the nodes that were not sent to the target
LABELS = {
    "root": "last token of the text",
    "accepted": "accepted",
    "rejected": "tested and rejected",
    "provisional": "drafted, not sent to the target",
    "kept": "the same, kept: the next round begins with it",
    "bonus": "the target's own token",
}


# --- The token tree -----------------------------------------------------------------------------------------


def shown_nodes(tree: dict[str, Any]) -> list[int]:
    """All nodes that were tested, and the likeliest provisional ones; those that survived first."""
    states, survivors = tree["states"], set(tree["survivors"])
    provisional = [node for node, state in enumerate(states) if state == "provisional"]
    provisional.sort(key=lambda node: (node not in survivors, -tree["cumulative"][node]))
    kept = {node for node, state in enumerate(states) if state != "provisional"}
    for node in provisional:
        of_a_kind = [
            other for other in provisional if other in kept and (other in survivors) == (node in survivors)
        ]
        room = MOST_KEPT if node in survivors else MOST_OTHERS
        if tree["parents"][node] in kept and len(of_a_kind) < room:
            kept.add(node)
    return sorted(kept)


def places_of(tree: dict[str, Any], nodes: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Depth to the right, branches below each other: the one that the text took on top, then the likeliest."""
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes[1:]:
        children[tree["parents"][node]].append(node)
    places: dict[int, tuple[float, float]] = {}
    next_row = 0.0

    def taken(node: int) -> bool:
        return tree["states"][node] == "accepted" or node in tree["survivors"][:1]

    def place(node: int, depth: int) -> None:
        nonlocal next_row
        below = sorted(children[node], key=lambda child: (not taken(child), -tree["cumulative"][child]))
        if not below:
            places[node] = (depth, next_row)
            next_row += 1.0
            return
        for child in below:
            place(child, depth + 1)
        places[node] = (depth, places[below[0]][1])

    place(0, 0)
    return places


def draw_tree(stream: dict[str, Any], file: Path) -> None:
    tree = stream["tree"]
    nodes = shown_nodes(tree)
    places = places_of(tree, nodes)
    states = [
        "root",
        *("kept" if n in tree["survivors"] else state for n, state in enumerate(tree["states"]) if n),
    ]
    own = tree["bonus_token"]
    bonus = next(
        (node for node in nodes if tree["parents"][node] == tree["last"] and tree["text"][node] == own), None
    )
    if bonus is None:
        x, y = places[tree["last"]]
        taken = [row for depth, row in places.values() if depth > x]
        bonus_at = (x + 1, y) if (x + 1, y) not in places.values() else (x + 1, max(taken) + 1)
    depth = max(x for x, _ in places.values()) + 1
    rows = max(y for _, y in places.values()) + 1
    figure = Figure(figsize=(1.2 * depth + 0.6, 0.42 * rows + 1.6), layout="constrained")
    axes = figure.subplots()
    for node in nodes[1:]:
        (x0, y0), (x1, y1) = places[tree["parents"][node]], places[node]
        bold = states[node] == "accepted" or node == bonus
        axes.plot(
            [x0, x0 + 0.5, x0 + 0.5, x1], [y0, y0, y1, y1],
            color=BLUE if bold else "#BBBBBB", linewidth=2.0 if bold else 1.0, zorder=1.5 if bold else 1.0,
        )  # fmt: skip
    for node in nodes:
        state = "bonus" if node == bonus else states[node]
        put(axes, places[node], tree["text"][node], state, None if node == 0 else tree["confidences"][node])
    if bonus is None and own is not None:
        (x0, y0), (x1, y1) = places[tree["last"]], bonus_at
        axes.plot([x0, x0 + 0.5, x0 + 0.5, x1], [y0, y0, y1, y1], color=GREEN, linewidth=2.0, zorder=1)
        put(axes, bonus_at, own, "bonus", None)
    axes.set(xlim=(-0.5, depth + 0.1), ylim=(rows + 0.2, -0.8))
    axes.axis("off")
    handles = [Patch(label=LABELS[state], **style) for state, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    tokens = sum(state == "accepted" for state in states) + (own is not None)
    hidden = len(states) - len(nodes)
    more = f"; {hidden} more that were not sent are left out" if hidden else ""
    figure.suptitle(
        f"Round {stream['round']} of {stream['num_rounds']}: one pass of the target gave {tokens} tokens\n"
        f"numbers: how likely the draft's token seemed after its parent{more}",
        fontsize=10,
    )
    figure.savefig(file, dpi=150)


def put(axes: Any, place: tuple[float, float], text: str, state: str, confidence: float | None) -> None:
    style = STYLES[state]
    shown = text.replace("\n", "⏎").replace(" ", "␣") or "∅"
    axes.text(
        *place, shown, ha="center", va="center", fontsize=9, color=INK.get(state, "white"), family="DejaVu Sans",
        bbox={"boxstyle": "round,pad=0.35", "linewidth": 1.2, **style}, zorder=2,
    )  # fmt: skip
    if confidence is not None:
        axes.text(
            place[0], place[1] + 0.46, f"{confidence:.2f}", ha="center", va="center", fontsize=6.5, color=GREY
        )


# --- One streamed pass --------------------------------------------------------------------------------------


def draw_timeline(stream: dict[str, Any], file: Path) -> None:
    """One round, from the end of the one before to its own."""
    timeline, pieces = stream["timeline"], {unit for unit, *_ in stream["timeline"]["computes"]}
    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    axes = figure.subplots()

    def bar(row: int, start: float, end: float, colour: str) -> None:
        axes.barh(row, 1e3 * (end - start), left=1e3 * start, height=0.55, color=colour)

    for _, start, end in timeline["passes"]:
        axes.axvspan(1e3 * start, 1e3 * end, color="#EEF3F8", zorder=0)
        axes.text(
            500 * (start + end), -0.62, "the target's pass", ha="center", va="center", fontsize=9, color=BLUE
        )
    for unit, start, end in timeline["reads"]:
        bar(0, start, end, (SKY, DARK_SKY)[unit % 2])
    for _, start, end in timeline["computes"]:
        bar(1, start, end, BLUE)
    for source, start, end in timeline["drafts"]:
        if source == "model":  # looking up takes no time that could be seen
            inside = any(first <= start < last for _, first, last in timeline["passes"])
            bar(2, start, end, ORANGE if inside else BROWN)
    axes.set_yticks([0, 1, 2], ["disk: reads a layer", "target: computes\nwith a layer", "draft: takes a step"])
    axes.set(ylim=(2.5, -0.9), xlim=(0, 1e3 * stream["seconds"]), xlabel="milliseconds since the round began")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(color=SKY, label="reading"),
        Patch(color=BLUE, label="computing"),
        Patch(color=BROWN, label="drafting before the pass"),
        Patch(color=ORANGE, label="drafting while the pass waits for weights"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"Round {stream['round']}: {stream['streamed_bytes'] / 1e6:.0f} MB of weights in {len(pieces)} pieces, "
        f"storage emulated at {stream['rate']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=150)


# --- Tokens per pass ----------------------------------------------------------------------------------------


def draw_curves(curves: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("tree", BLUE), ("one branch", ORANGE)):
        nodes, tokens = zip(*curves[name], strict=True)
        axes.plot(nodes, tokens, "o-", color=colour, label=name)
        up = 8 if name == "tree" else -13
        for x, y in zip(nodes, tokens, strict=True):
            axes.annotate(
                f"{y:.1f}",
                (x, y),
                xytext=(0, up),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(x) for x in nodes])
    axes.set(xlabel="nodes in every pass, the text's last token included", ylabel="tokens per pass")
    axes.set_ylim(0, 1.15 * max(y for curve in curves.values() for _, y in curve))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)


def draw(folder: Path = FOLDER) -> None:
    recorded = json.loads((FOLDER / "round.json").read_text(encoding="utf-8"))
    draw_tree(recorded, folder / "tree.png")
    draw_timeline(recorded, folder / "timeline.png")
    curves = json.loads((FOLDER / "curves.json").read_text(encoding="utf-8"))
    draw_curves(curves, folder / "tokens_per_pass.png")


if __name__ == "__main__":
    draw()
