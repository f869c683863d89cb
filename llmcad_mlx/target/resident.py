"""The target with all its weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from llmcad_mlx.models.tree_model import ModelCache, TreeModel
from llmcad_mlx.target.target import Verification
from llmcad_mlx.tree.token_tree import TokenTree


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
        return Verification(logits, result.slots, self.vocab_size)

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
