"""Times single passes of a loaded target over random trees of any size, after a context of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.prompt import encode_prompt
from llmcad_mlx.tree.token_tree import TokenTree

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 256, 1024, 2048, 4096)
FEW_NODES, SHORT_CONTEXT = 16, 256  # what a tree and a cache have while something else grows
MIN_CONTEXT = 128  # with less room there is nothing to compare

_SEED = 0
_TEXT = "The tide comes in twice a day, and the fishermen know their hours by heart. "
_WORTH_IT = 1.5  # the longest context that fits is measured too where it is so much longer than the last


@dataclass(frozen=True, slots=True)
class TimedPass:
    """Seconds of one pass, and how many of them the computing thread waited for reads."""

    seconds: float
    wait_s: float


class PassTimer:
    """Times passes of one loaded target over random trees, after a text that repeats itself."""

    def __init__(self, pair: LoadedPair) -> None:
        """Raises UsageError where the target has no room for a context to grow in."""
        self._pair, self._target = pair, pair.target
        kind = pair.target.capability
        self.few_nodes = 1 if kind == "plain" else min(FEW_NODES, pair.max_nodes)
        room = pair.context_length or CONTEXTS[-1] + self.few_nodes
        check_room(room)
        self.contexts = _that_fit(CONTEXTS, room - self.few_nodes)
        self.short_context = max(length for length in self.contexts if length <= SHORT_CONTEXT)
        most = 1 if kind == "plain" else min(pair.max_nodes, room - self.short_context)
        self.node_counts = [count for count in NODES if count <= most]
        text = encode_prompt(_TEXT, pair.tokenizer, pair.vocab_size)
        self._tokens = (text * (self.contexts[-1] // len(text) + 1))[: self.contexts[-1]]
        self._trees = {
            count: random_tree(count, pair.vocab_size, line=kind != "tree")
            for count in {*self.node_counts, self.few_nodes}
        }

    @property
    def streamed_bytes(self) -> int:
        """Bytes read on each pass."""
        return 0 if self._pair.plan is None else self._pair.plan.streamed_bytes

    def fill(self, length: int) -> None:
        """Let the cache hold `length` tokens."""
        self._target.truncate(length)
        missing = self._tokens[self._target.num_cached : length]
        self._target.prefill(missing, lambda done: None, lambda: False)

    def measure(self, nodes: int) -> TimedPass:
        """One pass. It follows one of the same kind, unmeasured: a stream reads ahead during the pass before."""
        clock, tree = self._pair.clock, self._trees[nodes]
        self._target.verify(tree)
        started, waited = clock(), self._target.io_wait_s
        self._target.verify(tree)
        return TimedPass(clock() - started, self._target.io_wait_s - waited)


def random_tree(num_nodes: int, vocab_size: int, line: bool = False) -> TokenTree:
    """The same random tokens every time, each below a random node, or below the last one in a `line`."""
    rng = np.random.default_rng([_SEED, num_nodes])
    tree = TokenTree(int(rng.integers(vocab_size)))
    while len(tree) < num_nodes:  # a token that its parent has as a child already adds nothing
        parent = len(tree) - 1 if line else int(rng.integers(len(tree)))
        tree.add(parent, int(rng.integers(vocab_size)), 0.5)
    return tree


def _that_fit(lengths: Sequence[int], most: int) -> list[int]:
    """The lengths up to `most`, and `most` itself where it is much longer than the last that fits."""
    fitting = [length for length in lengths if length <= most]
    if len(fitting) < len(lengths) and most > fitting[-1] * _WORTH_IT:
        fitting.append(most)
    return fitting


def check_room(context: int) -> None:
    """Raises UsageError where `context` tokens are too few to measure growth."""
    if context < MIN_CONTEXT:
        raise UsageError(
            f"context: room for {context} tokens leaves nothing to grow; --growth needs {MIN_CONTEXT} or more"
        )
