"""The target with all its weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.models.tree_model import ModelCache, TreeModel
from llmcad_mlx.tree.token_tree import TokenTree


class Verification:
    """The target's logits for every node of a tree, from one pass.

    `logits` (N, V) are evaluated. On a CPU rows are views of MLX's memory; elsewhere only what is asked for is
    copied.
    """

    def __init__(self, logits: mx.array, slots: Sequence[int], vocab_size: int) -> None:
        self.logits = logits
        self.slots = slots
        self._vocab_size = vocab_size
        self._greedy: list[int] | None = None
        on_cpu = mx.default_device() == mx.cpu
        self._rows: npt.NDArray[np.float32] | None = np.asarray(logits) if on_cpu else None

    def row(self, node: int) -> npt.NDArray[np.float32]:
        """Logits (V,) after `node`. Read only."""
        if self._rows is not None:
            return self._rows[node]
        return np.asarray(self.logits[node].astype(mx.float32))

    def greedy_row(self, node: int) -> tuple[int, float]:
        """The largest real logit after `node`: its token and its value (NaN if the row has one)."""
        if self._rows is not None:
            row = self._rows[node][: self._vocab_size]
            token = int(row.argmax())
            return token, float(row[token])
        if self._greedy is None:
            real = self.logits[:, : self._vocab_size]
            self._peaks: list[float] = real.max(axis=1).tolist()  # type: ignore[assignment]
            self._greedy = real.argmax(axis=1).tolist()  # type: ignore[assignment]
        assert self._greedy is not None
        return self._greedy[node], self._peaks[node]


class ResidentTarget:
    """Verifies token trees with a model that is wholly in memory. Keeps the cache of one session."""

    def __init__(self, model: TreeModel, vocab_size: int) -> None:
        """`vocab_size`: number of real tokens, padding left out."""
        self.model = model
        self.vocab_size = vocab_size
        self.cache: ModelCache = model.new_cache()

    @property
    def capability(self) -> str:
        """ "tree", "chain" or "plain": what `verify` takes (any tree, a line, a lone root)."""
        return self.model.capability

    @property
    def num_cached(self) -> int:
        """Committed tokens in the cache."""
        return self.cache.length

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        """Append `tokens` to the cache in large chunks; see `TreeModel.prefill`."""
        self.model.prefill(tokens, self.cache, on_progress=on_progress, should_stop=should_stop)

    def verify(self, tree: TokenTree) -> Verification:
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
        if self.capability == "plain" and length < self.cache.length:
            length = 0
        if self.capability != "plain":
            self.cache.rollback()
        self.cache.truncate(min(length, self.cache.length))
