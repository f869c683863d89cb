"""Modules of an mlx-lm model whose weights are in memory only while they compute.

The model's own code stays as it is: an adaptation fetches the module's weights before the call, evaluates what
depends on them, and gives the memory back. So any mlx-lm architecture streams, its decoder layers whole, its head
in pieces of rows, its embedding by the rows that are looked up.

Weights lie in reused buffers. Each tensor is a view into one, made once and bound to the module's parameter
before every call; nothing is copied and nothing allocated.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from llmcad_mlx.models.adapt import Adaptation, adapt
from llmcad_mlx.streaming.feed import OnDemandFeed, RowReader, SequentialFeed
from llmcad_mlx.streaming.weights import Placement

WeightFeed = OnDemandFeed | SequentialFeed

Views = dict[Hashable, list[mx.array]]
"""By buffer and layout, the tensors that lie in it."""


@dataclass(slots=True)
class StreamedUnit:
    """What is brought in at once: a decoder layer, or a piece of the head."""

    number: int
    placements: Sequence[Placement]
    buffers: Sequence[mx.array]
    """uint8, the stream's buffers."""
    feed: WeightFeed
    views: Views = field(default_factory=dict)
    """Made so far. Units that lie alike in the buffers share them: a deep model has tens of thousands."""

    _layout: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self._layout = tuple((place.offset, place.shape, place.stored) for place in self.placements)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The unit's weights are bound to their modules while the block runs, and garbage afterwards."""
        index = self.feed.take(self.number)
        try:
            self.bind(index)
            yield
        finally:
            self.feed.give_back()

    def bind(self, index: int) -> None:
        """Let the modules' parameters be views into buffer `index`, whatever it holds."""
        key = index, self._layout
        if key not in self.views:
            self.views[key] = [self._view(self.buffers[index], place) for place in self.placements]
        for place, view in zip(self.placements, self.views[key], strict=True):
            # Not cached: a converted copy would be resident memory.
            place.module[place.name] = view if place.stored == place.wanted else view.astype(place.wanted)

    @staticmethod
    def _view(buffer: mx.array, place: Placement) -> mx.array:
        view = buffer[place.offset : place.offset + place.num_bytes].view(place.stored).reshape(place.shape)
        mx.eval(view)
        return view


class Streamed(Adaptation):
    """A module whose weights are in memory only while it computes."""


class StreamedLayer(Streamed):
    """A decoder layer."""

    _unit: StreamedUnit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._unit.loaded():
            out = super().__call__(*args, **kwargs)
            # Everything that depends on the weights, the layer's keys and values included.
            states = [value.state for value in (*args, *kwargs.values()) if hasattr(value, "state")]
            leaves: Any = tree_flatten([out, states])
            mx.eval([array for _, array in leaves if isinstance(array, mx.array)])
        return out


def _by_pieces(module: Any, call: Any, x: mx.array) -> mx.array:
    """Outputs (…, rows) float32 of a matrix that comes in pieces of rows: each output depends on one row only."""
    mx.eval(x)
    bias = module.get("bias")
    num_rows = sum(piece.placements[0].shape[0] for piece in module._pieces)
    # Written in place: collecting the pieces would take the logits' memory twice.
    whole = mx.zeros((*x.shape[:-1], num_rows), mx.float32)
    mx.eval(whole)
    out: Any = np.asarray(whole)
    first = 0
    for piece in module._pieces:
        with piece.loaded():
            rows = module["weight"].shape[0]
            if bias is not None:
                module["bias"] = bias[first : first + rows]
            try:
                out[..., first : first + rows] = np.asarray(call(x).astype(mx.float32))
            finally:
                if bias is not None:
                    module["bias"] = bias
        first += rows
    return whole


class StreamedHead(Streamed):
    """A linear layer whose rows come in pieces."""

    _pieces: Sequence[StreamedUnit]

    def __call__(self, x: mx.array) -> mx.array:
        return _by_pieces(self, super().__call__, x)


class StreamedEmbedding(Streamed):
    """An embedding whose rows are looked up one by one; as a head, its rows come in pieces."""

    _rows: RowReader
    _pieces: Sequence[StreamedUnit]

    def __call__(self, ids: mx.array) -> mx.array:
        unique, inverse = np.unique(np.asarray(ids), return_inverse=True)
        for name, rows in self._rows.rows(unique.tolist()).items():
            self[name] = rows
        out = super().__call__(mx.array(inverse.reshape(ids.shape).astype(np.int32)))
        mx.eval(out)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        return _by_pieces(self, super().as_linear, x)  # type: ignore[misc]


def stream_layer(layer: Module, unit: StreamedUnit) -> None:
    """Let a decoder layer's weights come with `unit`."""
    adapt(layer, StreamedLayer, _unit=unit)


def stream_head(head: Module, pieces: Sequence[StreamedUnit]) -> None:
    """Let the rows of a linear layer come with `pieces`, in order."""
    adapt(head, StreamedHead, _pieces=pieces)


def stream_embedding(embedding: Module, rows: RowReader, pieces: Sequence[StreamedUnit] = ()) -> None:
    """Look an embedding's rows up with `rows`; as the model's head its rows come with `pieces`."""
    adapt(embedding, StreamedEmbedding, _rows=rows, _pieces=pieces)


def let_go(unit: StreamedUnit) -> None:
    """Let nothing refer to the unit's buffers any more; its modules are of no use until they get weights again."""
    unit.buffers = ()
    unit.views = {}
    for place in unit.placements:
        place.module[place.name] = mx.zeros(place.shape, place.wanted)  # never evaluated: takes no memory
