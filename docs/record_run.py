"""Runs the embedded model and writes down what the pictures of docs/how-it-works.md show.

python docs/record_run.py            writes docs/pictures/round.json and curves.json
python docs/record_run.py round      the first alone: a generation with all layers streamed
python docs/record_run.py curves     the second alone: tokens per pass by the nodes of a pass

Target and draft are the embedded ones. `python docs/draw_pictures.py` draws what was written down.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcad_mlx import Engine, load
from llmcad_mlx.engine.round import Round

FOLDER = Path(__file__).parent / "pictures"
RATE = "80MB/s"  # of the emulated storage
TREE_PROMPT = (
    "Write this text again, word for word: The tide comes in twice a day. Fishermen know its hours by heart, and "
    "their children learn them before they learn to read. When the moon is full, the water climbs up to the old "
    "wall, and the boats in the harbour ride high above the quay."
)
CURVE_PROMPTS = (
    TREE_PROMPT,
    "Explain in a few sentences why the sky is blue and why it is red in the evening.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
)
NODES = (1, 2, 4, 8, 16, 32)
TREE_NODES = 16
MAX_TOKENS = 40


@dataclass
class Timeline:
    """Intervals (name, start, end) in seconds of one clock."""

    reads: list[tuple[int, float, float]] = field(default_factory=list)
    computes: list[tuple[int, float, float]] = field(default_factory=list)
    drafts: list[tuple[str, float, float]] = field(default_factory=list)
    passes: list[tuple[str, float, float]] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    """When each round ended."""


def watch(engine: Engine, timeline: Timeline) -> None:
    """Let the engine's parts note when they work. Each part is asked as before, and by the same threads."""
    target: Any = engine.pair.target
    assert target.feed is not None
    stream: Any = target.feed.stream
    stream._read = noted(stream._read, timeline.reads, lambda reading, generation: reading.unit)
    for drafter in engine.pair.drafters:
        expand: Any = noted(drafter.expand, timeline.drafts, lambda *_, source=drafter.source: source)
        drafter.expand = expand  # type: ignore[method-assign]
    target.verify = noted(target.verify, timeline.passes, lambda *_: "pass")
    take, give_back, feed = target.feed.take, target.feed.give_back, target.feed
    taken: list[tuple[int, float]] = []

    def noted_take(unit: int) -> int:
        buffer = take(unit)
        taken.append((unit, time.perf_counter()))
        return buffer

    def noted_give_back() -> None:
        timeline.computes.append((*taken.pop(0), time.perf_counter()))
        give_back()

    feed.take, feed.give_back = noted_take, noted_give_back  # type: ignore[method-assign]


def noted(call: Callable[..., Any], into: list[Any], name: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose calls are written down."""

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            into.append((name(*arguments), started, time.perf_counter()))

    return timed


def tree_of(done: Round, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The drafted tree with the state of each node."""
    tree = done.drafted
    return {
        "text": [decode([token]) for token in tree.tokens],
        "parents": tree.parents,
        "confidences": tree.confidences,
        "cumulative": tree.cumulative,
        "sources": tree.sources,
        "states": done.states(),
        "bonus_token": None if done.bonus_token is None else decode([done.bonus_token]),
        "last": done.last,
        "survivors": [] if done.survivors is None else list(done.survivors.new_to_old),
    }


def choose_round(trees: Sequence[dict[str, Any]]) -> int:
    """The round to show: one that has something of everything, and whose provisional nodes start the next one."""

    def worth(tree: dict[str, Any]) -> int:
        states = tree["states"]
        accepted, rejected = states.count("accepted"), states.count("rejected")
        return min(accepted, 4) + min(rejected, 6) + 5 * (len(tree["survivors"]) > 1 and accepted > 1)

    return max(range(1, len(trees)), key=lambda number: worth(trees[number]))


def clipped(
    intervals: Sequence[tuple[Any, float, float]], start: float, end: float
) -> list[tuple[Any, float, float]]:
    """What of the intervals lies between two times, in seconds since the first of them."""
    return [
        (name, round(max(a, start) - start, 5), round(min(b, end) - start, 5))
        for name, a, b in intervals
        if b > start and a < end
    ]


def record_round() -> dict[str, Any]:
    """One generation with all layers streamed: the tree of one of its rounds, and when what was done in it."""
    timeline, trees = Timeline(), []
    with load(pinned="0", read_bandwidth=RATE, context=512) as engine:
        assert isinstance(engine, Engine)
        watch(engine, timeline)

        def keep(done: Round) -> None:
            timeline.rounds.append(time.perf_counter())
            trees.append(tree_of(done, engine.tokenizer.decode))

        messages = [{"role": "user", "content": TREE_PROMPT}]
        options = {"max_tokens": MAX_TOKENS, "tree_nodes": TREE_NODES}
        text, stats = "", None
        for response in engine.stream_generate(messages, on_round=keep, **options):
            text, stats = text + response.text, response.stats
        assert stats is not None
        plan = engine.pair.plan
        assert plan is not None
    number = choose_round(trees)
    start, end = timeline.rounds[number - 1], timeline.rounds[number]
    parts = ("reads", "computes", "drafts", "passes")
    return {
        "prompt": TREE_PROMPT,
        "text": text,
        "rate": RATE,
        "streamed_bytes": plan.streamed_bytes,
        "stats": asdict(stats) | {"tokens_per_pass": stats.tokens_per_pass},
        "round": number + 1,
        "num_rounds": len(trees),
        "seconds": end - start,
        "tree": trees[number],
        "timeline": {part: clipped(getattr(timeline, part), start, end) for part in parts},
    }


def record_curves() -> dict[str, list[tuple[int, float]]]:
    """Tokens per pass, all prompts together, by the nodes of every pass, with and without branches."""
    curves: dict[str, list[tuple[int, float]]] = {"tree": [], "one branch": []}
    with load() as engine:
        for nodes in NODES:
            for name in curves:
                results = [
                    engine.generate(
                        [{"role": "user", "content": prompt}],
                        max_tokens=MAX_TOKENS,
                        tree_nodes=nodes,
                        tree=name == "tree",
                    ).stats
                    for prompt in CURVE_PROMPTS
                ]
                tokens = sum(stats.generated_tokens for stats in results)
                curves[name].append((nodes, tokens / sum(stats.target_passes for stats in results)))
    return curves


def main() -> None:
    recorders = {"round": record_round, "curves": record_curves}
    for name in sys.argv[1:] or recorders:
        text = json.dumps(recorders[name](), ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
