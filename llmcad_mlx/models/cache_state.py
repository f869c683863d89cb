"""Keys and values of a cache's committed tokens, taken out of it and put back.

What comes out is tight: the tokens in position order, without dead slots and spare capacity. Nothing that is
uncommitted is taken, and taking changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from llmcad_mlx.models.lazy_cache import LayerCache, LazyKVCache


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
