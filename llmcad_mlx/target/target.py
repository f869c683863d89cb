"""Who verifies: the interface of all targets, and what a pass returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.tree.token_tree import TokenTree


class Verification:
    """The target's logits for every node of a tree, from one pass.

    `logits` (N, V) float32 are evaluated; `slots[i]` is where node i lies in the target's cache. On a CPU rows
    are views of MLX's memory; elsewhere only what is asked for is copied.
    """

    def __init__(self, logits: mx.array, slots: Sequence[int], vocab_size: int) -> None:
        """`vocab_size`: number of real tokens; columns beyond are padding and never chosen."""
        self.logits = logits
        self.slots = slots
        self._vocab_size = vocab_size
        self._greedy: tuple[list[int], list[float]] | None = None
        on_cpu = mx.default_device() == mx.cpu
        self._rows: npt.NDArray[np.float32] | None = np.asarray(logits) if on_cpu else None

    def row(self, node: int) -> npt.NDArray[np.float32]:
        """Logits (V,) after `node`. Read only."""
        return self._rows[node] if self._rows is not None else np.asarray(self.logits[node])

    def greedy_row(self, node: int) -> tuple[int, float]:
        """The largest real logit after `node`: its token and its value (NaN if the row has one)."""
        if self._rows is not None:
            row = self._rows[node][: self._vocab_size]
            token = int(row.argmax())
            return token, float(row[token])
        if self._greedy is None:
            # All rows at once: one read-back a pass instead of one a token.
            real = self.logits[:, : self._vocab_size]
            tokens, peaks = mx.argmax(real, axis=1), mx.max(real, axis=1)
            mx.eval(tokens, peaks)
            self._greedy = np.asarray(tokens).tolist(), np.asarray(peaks).tolist()
        return self._greedy[0][node], self._greedy[1][node]


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
