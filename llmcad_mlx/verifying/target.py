"""The target whose weights are read from the disk on every pass.

Who verifies: the interface of all targets, and what a pass returns.

The target with all its weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.models.tree_model import ModelCache, TreeModel
from llmcad_mlx.streaming.feed import Background, SequentialFeed
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


class Target(Protocol):
    """A large model that checks token trees. Keeps the cache of one session.

    The cache holds all tokens of the sequence but the last, which is the next tree's root.

    A target whose weights are streamed calls `background(seconds)` again and again while the layer it needs next
    is not in memory. Each call does one step of other work, which delays nothing if it takes no longer than
    `seconds`; after False, nothing being worth doing, the target waits for the layer.
    """

    @property
    def capability(self) -> str:
        """ "tree", "chain" or "plain": what `verify` takes (any tree, a line, a lone root)."""

    @property
    def num_cached(self) -> int:
        """Committed tokens in the cache."""

    @property
    def io_wait_s(self) -> float:
        """Seconds spent waiting for reads so far, background steps left out; 0.0 with all weights in memory."""

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights read so far, loading left out."""

    def free_seconds(self) -> float:
        """How long drafting may go on before the next pass ends later for it: its weights load meanwhile."""

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
        background: Callable[[float], bool] | None = None,
    ) -> None:
        """Append `tokens` to the cache in large chunks; on_progress gets the number done."""

    def verify(self, tree: TokenTree, background: Callable[[float], bool] | None = None) -> Verification:
        """One pass over all nodes. The root is the token that follows the cached ones."""

    def commit(self, verification: Verification, nodes: Sequence[int]) -> None:
        """The root and `nodes`, the accepted path below it, join the sequence; other nodes are dropped."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` cached tokens, or none where the model cannot take tokens back."""


class ResidentTarget:
    """Verifies token trees with a model that is wholly in memory. Keeps the cache of one session."""

    def __init__(self, model: TreeModel, vocab_size: int) -> None:
        """`vocab_size`: number of real tokens, padding left out."""
        self.model = model
        self.vocab_size = vocab_size
        self.cache: ModelCache = model.new_cache()

    @property
    def capability(self) -> str:
        """See `Target`."""
        return self.model.capability

    @property
    def num_cached(self) -> int:
        """Committed tokens in the cache."""
        return self.cache.length

    @property
    def io_wait_s(self) -> float:
        """Nothing is read."""
        return 0.0

    @property
    def streamed_bytes(self) -> int:
        """Nothing is read."""
        return 0

    def free_seconds(self) -> float:
        """Nothing is read."""
        return 0.0

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
        background: Callable[[float], bool] | None = None,
    ) -> None:
        """Append `tokens` to the cache in large chunks; see `TreeModel.prefill`."""
        self.model.prefill(tokens, self.cache, on_progress=on_progress, should_stop=should_stop)

    def verify(self, tree: TokenTree, background: Callable[[float], bool] | None = None) -> Verification:
        """One pass over all nodes. The root is the token that follows the cached ones."""
        if self.capability != "plain":
            self.cache.rollback()  # an interrupted round may have left its nodes
        first = self.cache.num_slots
        parents = [-1, *(first + parent for parent in tree.parents[1:])]
        result = self.model.forward(tree.tokens, self.cache, parents)
        logits = result.logits.astype(mx.float32)
        mx.eval(logits, self.cache.arrays())
        return Verification(logits, result.slots)

    def commit(self, verification: Verification, nodes: Sequence[int]) -> None:
        """The root and `nodes`, the accepted path below it, join the sequence; other nodes are dropped."""
        self.cache.commit([verification.slots[0], *(verification.slots[node] for node in nodes)])

    def truncate(self, length: int) -> None:
        """Keep the first `length` cached tokens, or none where the model cannot take tokens back."""
        # What a "plain" model has seen it keeps, the token of an interrupted round too.
        if self.capability == "plain" and (length < self.cache.length or self.cache.num_slots > self.cache.length):
            length = 0
        if self.capability != "plain":
            self.cache.rollback()
        self.cache.truncate(min(length, self.cache.length))

    def close(self) -> None:
        """Nothing to stop."""


class StreamedTarget(ResidentTarget):
    """Verifies token trees with a model that is larger than the memory it may use.

    A pass asks for the streamed units in their order. Whenever the next one is not in memory yet, the pass's
    `background` is called instead of waiting.
    """

    def __init__(self, model: TreeModel, vocab_size: int, feed: SequentialFeed, prefill_chunk: int) -> None:
        """model: its streamed modules take their weights from `feed`. prefill_chunk: prompt tokens per pass."""
        super().__init__(model, vocab_size)
        self.feed = feed
        self.prefill_chunk = prefill_chunk

    @property
    def io_wait_s(self) -> float:
        """Seconds blocked on reads so far."""
        return self.feed.stream.wait_s

    @property
    def streamed_bytes(self) -> int:
        """Bytes read so far."""
        return self.feed.bytes_read

    def free_seconds(self) -> float:
        """How long drafting may go on before the next pass ends later for it."""
        return self.feed.free_seconds()

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
        background: Background | None = None,
    ) -> None:
        """Append `tokens` to the cache, `prefill_chunk` of them with each pass."""
        with self.feed.working(background):
            self.model.prefill(
                tokens, self.cache, self.prefill_chunk, on_progress=on_progress, should_stop=should_stop
            )

    def verify(self, tree: TokenTree, background: Background | None = None) -> Verification:
        """One pass over all nodes."""
        with self.feed.working(background):
            return super().verify(tree)

    def close(self) -> None:
        """Stop reading."""
        self.feed.close()
