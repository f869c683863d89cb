"""Keys and values of one layer as numpy arrays, for the host kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmcad_mlx.models.slots import SPARE_SLOTS, grown_capacity

Floats = npt.NDArray[np.float32]


class HostBuffers:
    """keys, values: (kv_heads, capacity, dim) float32. Slots are written in place by the kernels."""

    __slots__ = ("keys", "values")

    def __init__(self, kv_heads: int, dim: int, num_slots: int = 0) -> None:
        """num_slots: expected; pages that are never written take no memory."""
        capacity = grown_capacity(num_slots + SPARE_SLOTS, 0) if num_slots else 0
        self.keys: Floats = np.zeros((kv_heads, capacity, dim), np.float32)
        self.values: Floats = np.zeros((kv_heads, capacity, dim), np.float32)

    def reserve(self, used: int, num_slots: int) -> None:
        """Make room for ``num_slots`` slots, keeping the first ``used``."""
        capacity = self.keys.shape[1]
        if num_slots + SPARE_SLOTS <= capacity:
            return
        capacity = grown_capacity(num_slots + SPARE_SLOTS, capacity)
        self.keys, self.values = (self._grown(a, used, capacity) for a in (self.keys, self.values))

    def gather_tail(self, start: int, slots: npt.NDArray[np.int32]) -> None:
        """Move ``slots`` (M,) to [start, start + M)."""
        for array in (self.keys, self.values):
            array[:, start : start + len(slots)] = array[:, slots]

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers, spare capacity included."""
        return self.keys.nbytes + self.values.nbytes

    @staticmethod
    def _grown(array: Floats, used: int, capacity: int) -> Floats:
        grown = np.zeros((array.shape[0], capacity, array.shape[2]), np.float32)
        grown[:, :used] = array[:, :used]
        return grown
