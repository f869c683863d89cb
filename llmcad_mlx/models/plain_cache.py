"""A model's own mlx-lm cache with the protocol of `LazyKVCache`, for models that cannot take a token back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class PlainCache:
    """Append-only: every forwarded token must be committed, in order.

    make_layers: returns a fresh list of mlx-lm caches, one per layer.
    """

    can_rollback = False

    def __init__(self, make_layers: Callable[[], list[Any]]) -> None:
        self._make_layers = make_layers
        self.layers = make_layers()
        self.length = 0
        """Number of committed tokens."""
        self.num_slots = 0

    def append(self, parents: Sequence[int] | None, n: int) -> range:
        """Announce ``n`` tokens that continue the sequence; returns their slots.

        Raises ValueError when ``parents`` are not that chain.
        """
        start = self.num_slots
        if parents is not None:
            expected = list(range(start - 1, start + n - 1))
            if [start - 1 if parent == -1 else parent for parent in parents] != expected:
                raise ValueError("this model takes no trees and no second branch")
        self.num_slots = start + n
        return range(start, start + n)

    def commit(self, slots: Sequence[int]) -> None:
        """Commit all uncommitted slots. Raises ValueError for fewer: their state cannot be taken back."""
        if list(slots) != list(range(self.length, self.num_slots)):
            raise ValueError("this model cannot forget a token it has seen; commit all appended slots")
        self.length = self.num_slots

    def rollback(self) -> None:
        """Does nothing when nothing is uncommitted, else raises ValueError."""
        if self.num_slots != self.length:
            raise ValueError("this model cannot forget a token it has seen")

    def truncate(self, length: int) -> None:
        """Keep everything (``length`` tokens) or start again (0); raises ValueError for a part."""
        if length == 0:
            self.layers = self._make_layers()
            self.length = self.num_slots = 0
        elif length != self.length or self.num_slots != self.length:
            raise ValueError("this model can only keep all of its tokens or none")

    def arrays(self) -> list[mx.array]:
        """All state, for ``mx.eval``."""
        leaves: Any = tree_flatten([layer.state for layer in self.layers])
        return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(array.nbytes for array in self.arrays())
