"""How far trees from an n-gram table reach into text that it has not seen. The text holds the target's choices."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from llmcad_mlx.drafting.table import NgramTable

_CANDIDATES = 8


def tokens_per_pass(table: NgramTable, texts: Iterable[tuple[Sequence[int], int]], num_nodes: int) -> float:
    """Generated tokens per pass with the best `num_nodes` nodes, root included.

    texts: tokens, and how many of them were given.
    """
    tokens = passes = 0
    for text, given in texts:
        place = given
        while place < len(text):
            reach = _reach(_best_paths(table, text[:place], num_nodes - 1), text[place:])
            step = min(reach + 1, len(text) - place)
            tokens, passes, place = tokens + step, passes + 1, place + step
    return tokens / passes if passes else 0.0


def _best_paths(table: NgramTable, tokens: Sequence[int], count: int) -> set[tuple[int, ...]]:
    """The `count` paths of the largest probability: best-first, as the policy grows its trees."""
    context = list(tokens[-table.order :])
    found: set[tuple[int, ...]] = set()
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while heap and len(found) <= count:
        negative, path = heapq.heappop(heap)
        found.add(path)
        for token, probability in zip(*table.candidates([*context, *path], _CANDIDATES), strict=True):
            heapq.heappush(heap, (negative * probability, (*path, token)))
    return found


def _reach(paths: set[tuple[int, ...]], text: Sequence[int]) -> int:
    length = 0
    while length < len(text) and tuple(text[: length + 1]) in paths:
        length += 1
    return length
