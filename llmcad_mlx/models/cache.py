"""Keys and values of a cache's committed tokens, taken out of it and put back.

What comes out is tight: the tokens in position order, without dead slots and spare capacity. Nothing that is
uncommitted is taken, and taking changes nothing.

The lazy KV cache (DESIGN 3.3): one class for draft and target.

Slots are appended in creation order and stay where they are. Which of them a row may see is the mask's
business, so accepting a path of a token tree, or dropping a branch, moves no bytes:

    slots = cache.append(parents, n)      # announce the n tokens of the next forward
    logits = model(tokens, cache=cache.layers)
    cache.commit(path)                    # these slots join the sequence, every other new one dies
    cache.rollback()                      # or: forget everything since the last commit

`LazyKVCache` owns the bookkeeping that all layers share (`SlotTable`); each `LayerCache` holds one layer's
keys and values and answers what mlx-lm's models ask of a cache.

A model's own mlx-lm cache with the protocol of `LazyKVCache`, for models that cannot take a token back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache

from llmcad_mlx.cpu.buffers import HostBuffers
from llmcad_mlx.models.positions import NodePositions
from llmcad_mlx.models.slots import AttentionPlan, SlotTable, grown_capacity


class UnsupportedCacheError(ValueError):
    """The model keeps a state that cannot be rolled back (recurrent, convolution, or of an unknown kind)."""


class LayerCache:
    """Keys and values of one layer; stands where mlx-lm puts a KVCache or RotatingKVCache.

    window: the layer sees only the last ``window`` positions, itself included (None: all).
    """

    start_position = 0  # llama4 asks: slots are never trimmed from the front

    def __init__(self, owner: LazyKVCache, window: int | None = None) -> None:
        self.owner = owner
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.host: HostBuffers | None = None
        """Set instead of keys and values in a layer that runs on the host kernels."""
        self._written = -1

    @property
    def offset(self) -> int | NodePositions:
        """Position of the first announced row; one per row when the positions do not count up."""
        offset = self.owner.offset
        if self._written == self.owner.generation and isinstance(offset, int):
            return offset + self.owner.num_appended  # as a KVCache after its update
        return offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the announced rows; returns all slots.

        keys, values: (1, kv_heads, N, head_dim), head_dim may differ. Returns them with ``num_slots`` for N.
        """
        start, end = self.owner.first_appended, self.owner.num_slots
        if keys.shape[2] != end - start:
            raise RuntimeError(f"{keys.shape[2]} tokens forwarded, {end - start} announced with append")
        if self.keys is None or self.values is None:
            capacity = grown_capacity(max(end, self.owner.expected_slots), 0)
            self.keys, self.values = self._room(keys, capacity), self._room(values, capacity)
        elif end > self.keys.shape[2]:
            more = grown_capacity(end, self.keys.shape[2]) - start
            self.keys = self._grown(self.keys, start, more)
            self.values = self._grown(self.values, start, more)
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self._written = self.owner.generation
        return self.keys_and_values()

    def host_buffers(self, kv_heads: int, dim: int) -> HostBuffers:
        """Numpy buffers with room for the announced rows, which the host kernels write themselves."""
        if self.host is None:
            self.host = HostBuffers(kv_heads, dim, self.owner.expected_slots)
        self.host.reserve(self.owner.first_appended, self.owner.num_slots)
        self._written = self.owner.generation
        return self.host

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all slots, (1, kv_heads, num_slots, head_dim) each."""
        if self.keys is None or self.values is None:
            raise RuntimeError("no keys and values before the first forward")
        end = self.owner.num_slots
        if end == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., :end, :], self.values[..., :end, :]

    def make_mask(
        self, num_rows: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask of the announced rows, as mlx-lm's ``create_attention_mask`` wants it."""
        windows = [w for w in (self.window, window_size) if w is not None]
        return self.owner.mask(num_rows, min(windows, default=None), return_array)

    def attention_plan(self) -> AttentionPlan:
        """What `make_mask` says, as slot lists, under this layer's own window."""
        return self.owner.attention_plan(self.window)

    def gather_tail(self, start: int, slots: mx.array) -> None:
        """Move ``slots``, (M,) int32, to [start, start + M)."""
        if self.host is not None:
            self.host.gather_tail(start, np.asarray(slots))
        if self.keys is None or self.values is None:
            return
        end = start + slots.shape[0]
        self.keys[..., start:end, :] = mx.take(self.keys, slots, axis=2)
        self.values[..., start:end, :] = mx.take(self.values, slots, axis=2)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays to evaluate; empty before the first forward."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare capacity included."""
        return sum(array.nbytes for array in self.state) + (self.host.nbytes if self.host else 0)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot's key and value; 0 before the first forward."""
        if self.host is not None:
            return self.host.nbytes // max(self.host.keys.shape[1], 1)
        return sum(array.nbytes // array.shape[2] for array in self.state)

    def size(self) -> int:
        """Number of slots in use."""
        return self.owner.num_slots

    def empty(self) -> bool:
        """True before the first forward."""
        return self.keys is None and self.host is None

    def is_trimmable(self) -> bool:
        """False: only the owner may drop slots."""
        return False

    def maybe_trim_front(self) -> None:
        """What llama4 asks of its chunked cache; every slot is kept, the mask hides what is out of reach."""

    @staticmethod
    def _room(rows: mx.array, num_slots: int) -> mx.array:
        batch, heads, _, dim = rows.shape
        return mx.zeros((batch, heads, num_slots, dim), rows.dtype)

    def _grown(self, buffer: mx.array, used: int, more: int) -> mx.array:
        return mx.concatenate([buffer[..., :used, :], self._room(buffer, more)], axis=2)


class LazyKVCache(SlotTable):
    """Keys and values of a sequence and of the token tree below it, for all layers of one model.

    num_layers, windows: one `LayerCache` each, with its sliding window or None.
    max_dead_share, min_dead: a commit compacts when more than this share of the slots, and at least this
    many, are dead. Below ``min_dead`` masked slots cost less than moving the others.
    linear: only chains may be appended (for models without per-node positions or masks).
    """

    can_rollback = True

    def __init__(
        self,
        num_layers: int,
        windows: Sequence[int | None] | None = None,
        *,
        max_dead_share: float = 0.25,
        min_dead: int = 64,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.max_dead_share = max_dead_share
        self.min_dead = min_dead
        self.linear = linear
        self.stores = [LayerCache(self, window) for window in (windows or [None] * num_layers)]
        self.layers: list[Any] = list(self.stores)
        """What a model gets as ``cache=``; an entry may be an mlx-lm CacheList of several stores."""
        self.expected_slots = 0
        """Room that is made at the first forward: growing again and again leaves holes in a process's memory."""
        self._offset: int | NodePositions | None = None
        self._masks: dict[int | None, mx.array] = {}

    @classmethod
    def like(cls, template: Sequence[object], **options: Any) -> LazyKVCache:
        """A cache with the structure of ``template``, the list that ``make_prompt_cache(model)`` returns.

        Raises UnsupportedCacheError for a state that cannot be rolled back.
        """
        cache = cls(0, **options)
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
        elif not isinstance(entry, mlx_cache.KVCache | mlx_cache.ConcatenateKVCache | mlx_cache.ChunkedKVCache):
            raise UnsupportedCacheError(f"its {type(entry).__name__} cannot be rolled back")
        store = LayerCache(self, window)
        self.stores.append(store)
        return store

    def commit(self, slots: Sequence[int], keep: Sequence[int] = ()) -> list[int]:
        """`SlotTable.commit`, and a compaction when too many slots are dead, which moves ``keep``."""
        kept = super().commit(slots, keep)
        if self.num_dead >= self.min_dead and self.num_dead > self.max_dead_share * self.num_slots:
            moved = dict(zip(sorted(kept), range(self.length, self.length + len(kept)), strict=True))
            self._close_gaps(sorted(kept))
            kept = [moved[slot] for slot in kept]
        return kept

    def compact(self) -> None:
        """Close the gaps that dead slots left, and drop what is uncommitted."""
        self._settle()
        self._close_gaps([])

    def _close_gaps(self, kept: Sequence[int]) -> None:
        """One gather per layer, from the first gap on. ``kept``: all uncommitted slots, ascending."""
        order = np.concatenate([self.live_slots(), np.asarray(kept, np.int32)])
        gaps = np.flatnonzero(order != np.arange(len(order)))
        if len(gaps):
            start = int(gaps[0])
            moved = mx.array(order[start:])
            for store in self.stores:
                store.gather_tail(start, moved)
            mx.eval(self.arrays())  # else the next forward would, perhaps in a thread that may not
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

    def mask(self, num_rows: int, window: int | None, return_array: bool) -> mx.array | str | None:
        """None (one row that sees all), "causal", or bool (1, 1, num_rows, num_slots): what a row may see."""
        if num_rows != self.num_appended:
            raise RuntimeError(f"{num_rows} tokens forwarded, {self.num_appended} announced with append")
        if window is not None and int(self.appended_positions().max()) < window:
            window = None
        if self._chain and window is None and (num_rows == 1 or not return_array):
            return None if num_rows == 1 else "causal"
        if window not in self._masks:
            self._masks[window] = mx.array(self.visible(window)[None, None])
        return self._masks[window]

    def arrays(self) -> list[mx.array]:
        """All key and value buffers, for ``mx.eval``."""
        return [array for store in self.stores for array in store.state]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(store.nbytes for store in self.stores)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot in all layers; 0 before the first forward."""
        return sum(store.slot_nbytes for store in self.stores)

    def _accept_shape(self, chain: bool) -> None:
        if self.linear and not chain:
            raise ValueError("this model takes chains only, not trees")

    def _forget_append(self) -> None:
        super()._forget_append()
        self._offset = None
        self._masks = {}


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


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer: keys (kv_heads, L, key_dim), values (kv_heads, L, value_dim)."""

    keys: mx.array
    values: mx.array
    on_host: bool
    """Whether the layer runs on the host kernels."""

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.keys.nbytes + self.values.nbytes

    def fits(self, other: LayerState) -> bool:
        """Whether both could be parts of one sequence: all but the number of tokens is the same."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return self.on_host == other.on_host and all(
            a.ndim == b.ndim == 3 and a.dtype == b.dtype and (a.shape[0], a.shape[2]) == (b.shape[0], b.shape[2])
            for a, b in pairs
        )


def take_layer(cache: LazyKVCache, store: LayerCache, length: int) -> LayerState | None:
    """A copy of the first `length` committed tokens' keys and values; None for a layer never written."""
    slots = cache.live_slots()[:length]
    if store.host is not None:
        return LayerState(mx.array(store.host.keys[:, slots]), mx.array(store.host.values[:, slots]), True)
    if store.keys is None or store.values is None:
        return None
    rows = mx.array(slots)
    state = LayerState(mx.take(store.keys[0], rows, axis=1), mx.take(store.values[0], rows, axis=1), False)
    mx.eval(state.keys, state.values)
    return state


def put_layers(cache: LazyKVCache, layers: Iterable[LayerState | None], length: int) -> None:
    """Make the `length` tokens of `layers`, one entry for each of the cache's stores, all that the cache holds.

    Layers are taken one by one, so they may be read from a file meanwhile. Raises ValueError, and leaves the
    cache empty, for another number of layers or tokens, or for shapes that the cache cannot take.
    """
    cache.truncate(0)
    slots = cache.append(None, length)
    try:
        for store, layer in zip(cache.stores, layers, strict=True):
            if layer is not None:
                _put(store, layer, length)
        cache.commit(slots)
    except BaseException:
        cache.truncate(0)
        raise


def _put(store: LayerCache, layer: LayerState, length: int) -> None:
    if layer.keys.shape[1] != length or layer.values.shape[1] != length:
        raise ValueError(f"{layer.keys.shape[1]} keys and {layer.values.shape[1]} values for {length} tokens")
    if not layer.on_host:
        store.update_and_fetch(layer.keys[None], layer.values[None])
        mx.eval(store.state)
        return
    heads, _, dim = layer.keys.shape
    buffers = store.host_buffers(heads, dim)
    buffers.keys[:, :length] = np.asarray(layer.keys)
    buffers.values[:, :length] = np.asarray(layer.values)
