"""The target: a large model that checks token trees, its weights in memory or read from the disk on every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.models.cache import ModelCache
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.streaming.modules import Background, SequentialFeed
from llmcad_mlx.tree.token_tree import TokenTree


class Verification:
    """The target's logits for every node of a tree, from one pass.

    `logits` (N, V) float32 are evaluated; `slots[i]` is where node i lies in the target's cache.
    """

    def __init__(self, logits: mx.array, slots: Sequence[int]) -> None:
        self.logits = logits
        self.slots = slots
        self._rows: npt.NDArray[np.float32] = np.asarray(logits)  # a view wherever host and device share memory

    def row(self, node: int) -> npt.NDArray[np.float32]:
        """Logits (V,) after `node`. Read only."""
        row: npt.NDArray[np.float32] = self._rows[node]
        return row


class Target:
    """Verifies what its cache's capability says: any tree, a line, or a lone root. Keeps the cache of one session.

    The cache holds all tokens of the sequence but the last, which is the next tree's root.

    With a feed, weights are read during each pass. Whenever the layer it needs next is not in memory yet, the pass
    calls `background(seconds)`, again and again. Each call does one step of other work, which delays nothing if it
    takes no longer than `seconds`; after False, nothing being worth doing, the pass waits for the layer. Without a
    feed no pass ever waits, and `background` is never called.
    """

    def __init__(
        self,
        model: TreeModel,
        vocab_size: int,
        feed: SequentialFeed | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        """vocab_size: number of real tokens, padding left out. feed: brings the weights of `model`'s streamed
        modules. prefill_chunk: prompt tokens of one pass; None: as many as the model likes."""
        self.model = model
        self.vocab_size = vocab_size
        self.feed = feed
        self.prefill_chunk = prefill_chunk
        self.cache: ModelCache = model.new_cache()

    @property
    def num_cached(self) -> int:
        return self.cache.length

    @property
    def rounding(self) -> float:
        """By how much the difference of two logits may change with the number of rows in a pass, as far as the
        probe has seen: twice what one may. 0.0 on our kernels and in fp32 on a Linux CPU."""
        return 2 * self.model.report.max_difference

    @property
    def io_wait_s(self) -> float:
        """Seconds spent waiting for reads so far, background steps left out; 0.0 without a feed."""
        return 0.0 if self.feed is None else self.feed.stream.wait_s

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights read so far, loading left out; 0 without a feed."""
        return 0 if self.feed is None else self.feed.bytes_read

    def free_seconds(self) -> float:
        """How long drafting may go on before the next pass ends later for it: its weights load meanwhile."""
        return 0.0 if self.feed is None else self.feed.free_seconds()

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        background: Background | None = None,
    ) -> None:
        """Append `tokens` to the cache, `prefill_chunk` of them in each pass; see `TreeModel.prefill`."""
        with self._working(background):
            self.model.prefill(tokens, self.cache, self.prefill_chunk, on_progress)

    def verify(self, tree: TokenTree, background: Background | None = None) -> Verification:
        """One pass over all nodes. The root is the token that follows the cached ones."""
        with self._working(background):
            if self.cache.capability != "plain":
                self.cache.rollback()  # an interrupted round may have left its nodes
            first = self.cache.num_slots
            parents = [-1, *(first + parent for parent in tree.parents[1:])]
            result = self.model.forward(tree.tokens, self.cache, parents)
            logits = result.logits.astype(mx.float32)
            mx.eval(logits, self.cache.arrays())
        return Verification(logits, result.slots)

    def _working(self, background: Background | None) -> AbstractContextManager[None]:
        return nullcontext() if self.feed is None else self.feed.working(background)

    def commit(self, verification: Verification, nodes: Sequence[int]) -> None:
        """The root and `nodes`, the accepted path below it, join the sequence; other nodes are dropped."""
        self.cache.commit([verification.slots[0], *(verification.slots[node] for node in nodes)])

    def truncate(self, length: int) -> None:
        """Keep the first `length` cached tokens, or none where the model cannot take the others back."""
        if self.cache.capability != "plain":
            self.cache.rollback()
        elif self.cache.num_slots > self.cache.length:
            length = 0  # an interrupted round's tokens have been seen
        length = min(length, self.cache.length)
        self.cache.truncate(length if length >= self.cache.least_length else 0)

    def close(self) -> None:
        if self.feed is not None:
            self.feed.stream.close()
