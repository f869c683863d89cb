"""What a model remembers of one sequence, and of the token tree below its end.

Draft and target work with a `ModelCache`, whatever the model can do:

    slots = cache.append(parents, n)      # announce the n tokens of the next forward
    logits = model(tokens, cache=cache.layers)
    cache.commit(path)                    # these slots join the sequence, every other new one dies
    cache.rollback()                      # or: forget everything since the last commit

`LazyKVCache` (DESIGN 3.3) is for models that keep keys and values only. Slots are appended in creation order and
stay where they are. Which of them a row may see is the mask's business, so accepting a path of a token tree, or
dropping a branch, moves no bytes. The bookkeeping that all layers share is a `SlotTable`; each `LayerCache` holds
one layer's keys and values and answers what mlx-lm's models ask of a cache. A layer with a sliding window gives up
what none of its rows can see any more, a few hundred tokens late; so only so many can be taken back.

`PlainCache` is the model's own mlx-lm cache, for models whose state cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache

from llmcad_mlx.models.positions import NodePositions
from llmcad_mlx.models.slots import (
    FRONT_STEP,
    SPARE_SLOTS,
    Front,
    Ints,
    SlotTable,
    grown_capacity,
    most_window_dead,
    window_rows,
)

Capability = Literal["tree", "chain", "plain"]
"""What may be appended: any tree; a line whose rejected end can be dropped; only what is then committed."""

Floats = npt.NDArray[np.float32]


class UnsupportedCacheError(ValueError):
    """The model keeps a state that cannot be rolled back (recurrent, convolution, or of an unknown kind)."""


@dataclass(frozen=True, slots=True)
class LayerState:
    """A copy of one layer's state, (kv_heads, L, dim) each: L tokens in position order, without dead slots.

    They are the sequence's last L, in a layer with a window perhaps not all.
    """

    keys: mx.array
    values: mx.array
    on_cpu_kernels: bool
    """Whether the layer runs on the CPU kernels, whose rows are not MLX's bit for bit."""

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def fits(self, other: LayerState) -> bool:
        """Whether both could be parts of one sequence: all but the number of tokens is the same."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return self.on_cpu_kernels == other.on_cpu_kernels and all(
            a.ndim == b.ndim == 3 and a.dtype == b.dtype and (a.shape[0], a.shape[2]) == (b.shape[0], b.shape[2])
            for a, b in pairs
        )


class ModelCache(Protocol):
    """The state of one sequence in one model; the module's text says how it is used.

    `layers`: what the model gets as ``cache=``. `length`: committed tokens. `num_slots`: slots in use, before the
    next append's. `expected_slots`: room to make at the first forward, because growing leaves holes in memory.
    """

    layers: list[Any]
    length: int
    num_slots: int
    expected_slots: int

    @property
    def least_length(self) -> int:
        """The least that `truncate` and `states` can keep of the committed tokens, 0 excepted."""

    @property
    def capability(self) -> Capability:
        """What `append` takes; "plain": nothing can be taken back or copied, and `commit` takes all slots."""

    @property
    def token_nbytes(self) -> list[tuple[int | None, int]]:
        """Each layer's window, and the bytes that one token takes in it; 0 before the first forward."""

    @property
    def states_nbytes(self) -> int:
        """Bytes that `states` of all committed tokens takes."""

    def append(self, parents: Sequence[int] | None, n: int) -> range:
        """`SlotTable.append`. Raises ValueError for a shape that the capability excludes."""

    def commit(self, slots: Sequence[int], keep: Sequence[int] = ()) -> list[int]:
        """`SlotTable.commit`. Raises ValueError, and changes nothing, for what is no path or cannot be dropped."""

    def rollback(self) -> None:
        """Back to the last commit. Raises ValueError where something would have to be taken back and cannot."""

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` committed tokens: 0, or at least `least_length`. Else raises ValueError."""

    def drop_appended(self, n: int) -> None:
        """Drop the last ``n`` slots of the present append, which were forwarded only to fill a block."""

    def arrays(self) -> list[mx.array]:
        """All state in MLX's hands, for ``mx.eval``."""

    def states(self, length: int) -> Iterator[LayerState | None]:
        """Copies of the state after the first ``length`` committed tokens, layer by layer; None: never written.
        Raises ValueError for a "plain" cache, and for less than `least_length`."""

    def restore(self, states: Iterable[LayerState | None], length: int) -> None:
        """Make the ``length`` tokens of ``states`` all that the cache holds.

        Layers are taken one by one, so they may be read from a file meanwhile. Raises ValueError, and leaves the
        cache empty, for another number of layers or tokens, for layers with a window that lack what the next row
        sees, or for shapes that the cache cannot take.
        """


class LayerCache:
    """Keys and values of one layer; stands where mlx-lm puts a KVCache or RotatingKVCache.

    window: the layer sees only the last ``window`` positions, itself included (None: all). Its buffers begin with
    the slot of the window's front.
    """

    start_position = 0  # llama4 asks: its slots are never trimmed from the front

    def __init__(self, owner: LazyKVCache, window: int | None = None) -> None:
        self.owner = owner
        self.window = window
        self.keys: Any = None
        """(1, kv_heads, capacity, head_dim) MLX, or (kv_heads, capacity, head_dim) numpy float32 in a layer that
        runs on the CPU kernels; None before the first forward."""
        self.values: Any = None
        self._written = -1

    @property
    def offset(self) -> int | NodePositions:
        """Position of the first announced row; one per row when the positions do not count up."""
        offset = self.owner.offset
        if self._written == self.owner.generation and isinstance(offset, int):
            return offset + self.owner.num_appended  # as a KVCache after its update
        return offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the announced rows, (1, kv_heads, N, head_dim) keys and values; returns those of all slots."""
        start, end = self._announced()
        if keys.shape[2] != end - start:
            raise RuntimeError(f"{keys.shape[2]} tokens forwarded, {end - start} announced with append")
        capacity = self._needed_capacity(0)
        if capacity:
            self.keys = self._moved(self.keys, mx.zeros((*keys.shape[:2], capacity, keys.shape[3]), keys.dtype))
            room = (*values.shape[:2], capacity, values.shape[3])
            self.values = self._moved(self.values, mx.zeros(room, values.dtype))
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self._written = self.owner.generation
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all slots held, (1, kv_heads, slots, head_dim) each; afm7 asks a second time."""
        if self.keys is None:
            raise RuntimeError("no keys and values before the first forward")
        _, end = self._announced()
        if end == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., :end, :], self.values[..., :end, :]

    def kernel_buffers(self, kv_heads: int, dim: int) -> tuple[Floats, Floats]:
        """Numpy keys and values with room for the announced rows, which the CPU kernels write themselves."""
        capacity = self._needed_capacity(SPARE_SLOTS)
        if capacity:
            room = (kv_heads, capacity, dim)
            self.keys, self.values = (
                self._moved(old, np.zeros(room, np.float32)) for old in (self.keys, self.values)
            )
        self._written = self.owner.generation
        return self.keys, self.values

    def _announced(self) -> tuple[int, int]:
        """Where the announced rows begin in the buffers, and end; restored ones may begin at the front."""
        first = self.owner.front(self.window).slot
        return max(self.owner.first_appended - first, 0), self.owner.num_slots - first

    def _needed_capacity(self, spare: int) -> int:
        """What to grow to for the announced rows and `spare` more slots; 0 where there is room."""
        capacity = 0 if self.keys is None else self.keys.shape[-2]
        start, end = self._announced()
        needed = end + spare
        if needed <= capacity:
            return 0
        wanted = max(needed, self.owner.expected_slots + spare)
        grown = grown_capacity(wanted, capacity)
        if self.window is None:
            return grown
        most = max(needed, window_rows(self.window) + end - start + spare)  # beyond which little is ever needed
        return min(grown, grown_capacity(most, 0))

    def _moved(self, old: Any, new: Any) -> Any:
        """`new`, with what `old` holds before the announced rows."""
        used, _ = self._announced()
        if old is not None and used:
            new[..., :used, :] = old[..., :used, :]
        return new

    def make_mask(
        self, num_rows: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask of the announced rows, as mlx-lm's ``create_attention_mask`` wants it."""
        windows = [w for w in (self.window, window_size) if w is not None]
        first = self.owner.front(self.window).slot
        return self.owner.mask(num_rows, min(windows, default=None), return_array, first)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one slot; 0 before the first forward."""
        return 0 if self.keys is None else (self.keys.nbytes + self.values.nbytes) // self.keys.shape[-2]

    def move(self, rows: Ints, start: int) -> None:
        """Copy the buffers' rows at ``rows`` to those from ``start`` on.

        The rows are copied before they are stored: an array that is still to be read cannot be changed in place,
        and all of the layer's buffer would be copied.
        """
        if self.keys is None or not len(rows):
            return
        buffers = (self.keys, self.values)
        moved = [_rows(buffer, rows) for buffer in buffers]
        if self.state:
            mx.eval(moved)
        for buffer, new in zip(buffers, moved, strict=True):
            buffer[..., start : start + len(rows), :] = new
        mx.eval(self.state)  # else the next forward would, perhaps in a thread that may not

    def take(self, rows: Ints) -> LayerState | None:
        """A copy of the buffers' rows at ``rows``; None before the first forward."""
        if self.keys is None:
            return None
        if isinstance(self.keys, np.ndarray):
            return LayerState(mx.array(_rows(self.keys, rows)), mx.array(_rows(self.values, rows)), True)
        keys, values = _rows(self.keys, rows)[0], _rows(self.values, rows)[0]
        mx.eval(keys, values)
        return LayerState(keys, values, False)

    def put(self, layer: LayerState) -> None:
        """Store ``layer`` as the announced rows. Raises ValueError for another number of tokens."""
        start, end = self._announced()
        length = end - start
        if layer.keys.shape[1] != length or layer.values.shape[1] != length:
            raise ValueError(f"{layer.keys.shape[1]} keys and {layer.values.shape[1]} values for {length} tokens")
        if not layer.on_cpu_kernels:
            self.update_and_fetch(layer.keys[None], layer.values[None])
            mx.eval(self.state)
            return
        keys, values = self.kernel_buffers(layer.keys.shape[0], layer.keys.shape[2])
        keys[:, :length] = np.asarray(layer.keys)
        values[:, :length] = np.asarray(layer.values)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate; empty before the first forward, and for the CPU kernels."""
        return (self.keys, self.values) if isinstance(self.keys, mx.array) else ()

    def maybe_trim_front(self) -> None:
        """llama4 asks its chunked cache; every slot is kept, the mask hides what is out of reach."""


def _rows(buffer: Any, rows: Ints) -> Any:
    """A copy of a buffer's rows at ``rows``."""
    return buffer[:, rows] if isinstance(buffer, np.ndarray) else mx.take(buffer, mx.array(rows), axis=2)


class LazyKVCache(SlotTable):
    """Keys and values of a sequence and of the token tree below it, for all layers of one model.

    windows: one `LayerCache` each, with its sliding window or None.
    linear: only chains may be appended (for models without per-node positions or masks).
    """

    max_dead_share = 0.25
    min_dead = 64
    """A commit compacts when more than this share of the slots, and at least this many, are dead: a few masked
    slots cost less than moving the others. And when a layer with a window holds too many of them."""

    def __init__(self, windows: Sequence[int | None] = (None,), linear: bool = False) -> None:
        super().__init__(linear, (window for window in windows if window is not None))
        self.stores = [LayerCache(self, window) for window in windows]
        self.layers: list[Any] = list(self.stores)
        """An entry may be an mlx-lm CacheList of several stores."""
        self.expected_slots = 0
        self._offset: int | NodePositions | None = None
        self._masks: dict[tuple[int | None, int], mx.array] = {}

    @classmethod
    def like(cls, template: Sequence[object], linear: bool = False) -> LazyKVCache:
        """A cache with the structure of ``template``, the list that ``make_prompt_cache(model)`` returns. Raises
        UnsupportedCacheError for a state that cannot be rolled back."""
        cache = cls((), linear)
        cache.layers = [cache._stand_in(entry) for entry in template]
        return cache

    def _stand_in(self, entry: object) -> Any:
        """What replaces one entry of a model's own cache; windows become masks, so that nothing rotates."""
        if isinstance(entry, mlx_cache.CacheList):
            return mlx_cache.CacheList(*(self._stand_in(inner) for inner in entry.caches))
        window = None
        if isinstance(entry, mlx_cache.RotatingKVCache):
            if entry.keep:
                raise UnsupportedCacheError("a rotating cache that keeps its first tokens has no stand-in")
            window = entry.max_size
            self._fronts[window] = Front()
        elif not isinstance(entry, mlx_cache.KVCache | mlx_cache.ConcatenateKVCache | mlx_cache.ChunkedKVCache):
            raise UnsupportedCacheError(f"its {type(entry).__name__} cannot be rolled back")
        store = LayerCache(self, window)
        self.stores.append(store)
        return store

    def commit(self, slots: Sequence[int], keep: Sequence[int] = ()) -> list[int]:
        """`SlotTable.commit`, and a compaction when too many slots are dead, which moves ``keep``."""
        kept = super().commit(slots, keep)
        if self._too_many_dead():
            moved = dict(zip(sorted(kept), range(self.length, self.length + len(kept)), strict=True))
            self._close_gaps(sorted(kept))
            kept = [moved[slot] for slot in kept]
        return kept

    def _too_many_dead(self) -> bool:
        dead = self.num_dead
        if dead < self.min_dead:
            return False
        if dead > self.max_dead_share * self.num_slots:
            return True
        held = ((window, dead - front.slot + front.tokens) for window, front in self._fronts.items())
        return any(num_dead > most_window_dead(window) for window, num_dead in held)

    def _move_front(self, window: int) -> None:
        old = self.front(window).slot
        super()._move_front(window)
        rest = np.arange(self.front(window).slot - old, self.num_slots - old, dtype=np.int32)
        for store in self.stores:
            if store.window == window:
                store.move(rest, 0)

    def _close_gaps(self, kept: Sequence[int]) -> None:
        """One gather per layer, from the first gap on, so that only one's copies are added to memory. ``kept``:
        all uncommitted slots, ascending."""
        order = np.concatenate([self.live_slots(), np.asarray(kept, np.int32)])
        gaps = np.flatnonzero(order != np.arange(len(order)))
        if len(gaps):
            for store in self.stores:
                front = self.front(store.window)
                start = max(int(gaps[0]), front.tokens)
                store.move(order[start:] - np.int32(front.slot), start - front.tokens)
            self._renumber(len(kept))

    @property
    def offset(self) -> int | NodePositions:
        """Position of the first appended row when positions count up from it, else one position per row."""
        if self._offset is None:
            positions = self.appended_positions()
            if len(positions) == 0:
                self._offset = self.length
            elif np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
                self._offset = int(positions[0])
            else:
                self._offset = NodePositions(positions.copy())
        return self._offset

    def mask(self, num_rows: int, window: int | None, return_array: bool, first: int = 0) -> mx.array | str | None:
        """None (one row that sees all), "causal", or bool (1, 1, num_rows, num_slots - first): what a row may see
        of the slots from ``first`` on."""
        if num_rows != self.num_appended:
            raise RuntimeError(f"{num_rows} tokens forwarded, {self.num_appended} announced with append")
        if window is not None and int(self.appended_positions().max()) < window:
            window = None
        if self._chain and window is None and (num_rows == 1 or not return_array):
            return None if num_rows == 1 else "causal"
        if (window, first) not in self._masks:
            self._masks[window, first] = mx.array(self.visible(window)[None, None, :, first:])
        return self._masks[window, first]

    @property
    def capability(self) -> Capability:
        return "chain" if self.linear else "tree"

    def arrays(self) -> list[mx.array]:
        return [array for store in self.stores for array in store.state]

    @property
    def token_nbytes(self) -> list[tuple[int | None, int]]:
        return [(store.window, store.row_nbytes) for store in self.stores]

    @property
    def states_nbytes(self) -> int:
        return sum((self.length - self.front(window).tokens) * size for window, size in self.token_nbytes)

    def states(self, length: int) -> Iterator[LayerState | None]:
        if length < self.least_length:
            raise ValueError(f"what comes before token {self.least_length} is not held any more")
        slots = self.live_slots()[:length]
        fronts = (self.front(store.window) for store in self.stores)
        return (s.take(slots[f.tokens :] - np.int32(f.slot)) for s, f in zip(self.stores, fronts, strict=True))

    def restore(self, states: Iterable[LayerState | None], length: int) -> None:
        self.truncate(0)
        slots = self.append(None, length)
        known: dict[int | None, int] = {}
        try:
            for store, layer in zip(self.stores, states, strict=True):
                if layer is not None:
                    missing = length - layer.keys.shape[1]
                    if known.setdefault(store.window, missing) != missing:
                        raise ValueError("layers with one window hold different numbers of tokens")
                    self._restore_front(store.window, missing)
                    store.put(layer)
            self.commit(slots)
        except BaseException:
            self.truncate(0)
            raise

    def _restore_front(self, window: int | None, missing: int) -> None:
        """What is restored lacks the first tokens in the layers with ``window``."""
        if missing:
            front, length = Front(missing, missing), self.num_slots
            if window is None or missing < 0 or missing % FRONT_STEP or front.least_length(window) > length:
                raise ValueError(f"a layer lacks {missing} of {length} tokens")
            self._fronts[window] = front

    def _forget_append(self) -> None:
        super()._forget_append()
        self._offset = None
        self._masks = {}


class PlainCache:
    """Append-only: every forwarded token must be committed, in order.

    make_layers: returns a fresh list of mlx-lm caches, one per layer.
    """

    capability: Capability = "plain"

    def __init__(self, make_layers: Callable[[], list[Any]]) -> None:
        self._make_layers = make_layers
        self.layers = make_layers()
        self.length = self.num_slots = self.expected_slots = 0

    def append(self, parents: Sequence[int] | None, n: int) -> range:
        start = self.num_slots
        if parents is not None:
            expected = list(range(start - 1, start + n - 1))
            if [start - 1 if parent == -1 else parent for parent in parents] != expected:
                raise ValueError("this model takes no trees and no second branch")
        self.num_slots = start + n
        return range(start, start + n)

    def commit(self, slots: Sequence[int], keep: Sequence[int] = ()) -> list[int]:
        if keep or list(slots) != list(range(self.length, self.num_slots)):
            raise ValueError("this model cannot forget a token it has seen; commit all appended slots")
        self.length = self.num_slots
        return []

    def rollback(self) -> None:
        self.drop_appended(self.num_slots - self.length)

    def truncate(self, length: int) -> None:
        """Keep everything (``length`` tokens) or start again (0)."""
        if length == 0:
            self.layers = self._make_layers()
            self.length = self.num_slots = 0
        elif length != self.length or self.num_slots != self.length:
            raise ValueError("this model can only keep all of its tokens or none")

    def drop_appended(self, n: int) -> None:
        if n:
            raise ValueError("this model cannot forget a token it has seen")

    def arrays(self) -> list[mx.array]:
        leaves: Any = tree_flatten([layer.state for layer in self.layers])
        return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]

    @property
    def least_length(self) -> int:
        return self.length

    @property
    def token_nbytes(self) -> list[tuple[int | None, int]]:
        """All layers as one: what their windows save is mlx-lm's affair."""
        return [(None, sum(array.nbytes for array in self.arrays()) // max(self.num_slots, 1))]

    @property
    def states_nbytes(self) -> int:
        return 0

    def states(self, length: int) -> Iterator[LayerState | None]:
        raise ValueError("this model's state cannot be copied layer by layer")

    def restore(self, states: Iterable[LayerState | None], length: int) -> None:
        self.states(length)
