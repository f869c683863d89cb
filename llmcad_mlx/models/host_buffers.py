"""Keys and values of one layer as numpy arrays, for the host kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_STEP = 256
_SPARE = 3  # the score kernel reads keys in fours and may touch three slots past the last


class HostBuffers:
    """keys, values: (kv_heads, capacity, dim) float32. Slots are written in place by the kernels."""

    __slots__ = ("keys", "values")

    def __init__(self, kv_heads: int, dim: int) -> None:
        self.keys: Floats = np.zeros((kv_heads, _STEP, dim), np.float32)
        self.values: Floats = np.zeros((kv_heads, _STEP, dim), np.float32)

    def reserve(self, used: int, num_slots: int) -> None:
        """Make room for ``num_slots`` slots, keeping the first ``used``; grows by a quarter at least."""
        capacity = self.keys.shape[1]
        if num_slots + _SPARE <= capacity:
            return
        capacity = -(-max(num_slots + _SPARE, capacity * 5 // 4) // _STEP) * _STEP
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
