"""Builds a target under a memory plan: what is pinned, what is streamed, and the order of reading.

Two steps, because the plan needs to know the model: `Prepared` is a model without its large weights, checked and
measured on a few layers read on demand; `Prepared.build` makes a target of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from llmcad_mlx.models import positions
from llmcad_mlx.models.forward import body_of
from llmcad_mlx.models.host import forget_block_views, use_host_blocks, use_host_kernels
from llmcad_mlx.models.kinds import representative_layers
from llmcad_mlx.models.lazy_cache import LazyKVCache
from llmcad_mlx.models.loading import LoadedModel
from llmcad_mlx.models.probe import ProbeReport, probe
from llmcad_mlx.models.probe_cache import cached_probe
from llmcad_mlx.models.streaming import (
    Placement,
    StreamedUnit,
    let_go,
    make_resident,
    stream_embedding,
    stream_head,
    stream_layer,
)  # fmt: skip
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.target.feeds import OnDemandFeed, RowReader, SequentialFeed
from llmcad_mlx.target.parts import Matrix, StoredParameter, StreamParts
from llmcad_mlx.target.plan import MemoryPlan, ModelSizes
from llmcad_mlx.target.resident import ResidentTarget
from llmcad_mlx.target.storage import Storage
from llmcad_mlx.target.stream import Read, ThreadedStream, Unit
from llmcad_mlx.target.streamed import StreamedTarget
from llmcad_mlx.target.weights import WeightIndex

_ALIGNMENT = 64  # of a tensor in a buffer
_PIECE_ROWS = 64  # a piece of the head has a multiple of so many rows, as the kernels' blocks do

Progress = Callable[[int, int], None]
Placed = tuple[Unit, list[Placement]]


class Prepared:
    """A lazily loaded model, checked; of its large weights nothing is in memory."""

    def __init__(self, loaded: LoadedModel, storage: Storage, probes: Path) -> None:
        """probes: folder of `cached_probe`. Raises ModelError for a model that cannot be streamed."""
        self.loaded = loaded
        self.storage = storage
        model: Any = loaded.model
        use_host_kernels(model)
        index = WeightIndex.of(loaded.path)
        self.parts = StreamParts.of(model, index, loaded.unchanged, loaded.path)
        mx.eval([module[name] for module, name in self.parts.resident])
        placed = _in_order(self.parts, range(len(self.parts.layers)), _pieces_like_layers(self.parts))
        buffer = mx.zeros((max(unit.buffer_bytes for unit, _ in placed),), mx.uint8)
        feed = OnDemandFeed([unit for unit, _ in placed], _writable(buffer), storage)
        units = [StreamedUnit(number, places, [buffer], feed) for number, (_, places) in enumerate(placed)]
        use_host_blocks(model, lambda number: units[number].loaded())
        _attach(self.parts, units, range(len(self.parts.layers)), storage, None)
        report = cached_probe(model, loaded.config, probes, self._probe)
        self.model = TreeModel(model, loaded.config, report)
        with _leading_layers(model) as count:
            self._kv_bytes_per_token = kv_bytes_per_token(self.model) * len(self.parts.layers) // count
        for module in (*model.layers, *(m.module for m in self._matrices())):
            make_resident(module)
        for unit in units:
            let_go(unit)
        forget_block_views(model)

    def _matrices(self) -> list[Matrix]:
        return [*self.parts.embeddings, *([self.parts.head] if self.parts.head else [])]

    @staticmethod
    def _probe(model: Module) -> ProbeReport:
        """On the leading layers, one of each kind; on all of them where that is not enough."""
        with _leading_layers(model):
            report = probe(model)
        if report.capability != "tree":
            return probe(model)
        positions.install(model)  # in the other layers too
        return report

    @property
    def sizes(self) -> ModelSizes:
        """What the memory plan needs to know."""
        parts = self.parts
        shapes = [p.extent.shape for layer in parts.layers for p in layer]
        return ModelSizes(
            layer_bytes=parts.layer_bytes,
            resident_bytes=sum(module[name].nbytes for module, name in parts.resident),
            embedding_bytes=sum(m.num_bytes for m in parts.embeddings),
            head_bytes=0 if parts.tied or parts.head is None else parts.head.num_bytes,
            kv_bytes_per_token=self._kv_bytes_per_token,
            logit_columns=self.model.vocab_size,
            hidden=max((_columns(m.module) for m in self._matrices()), default=0),
            widest=max((shape[-2] for shape in shapes), default=0),
        )

    def build(
        self,
        plan: MemoryPlan,
        vocab_size: int,
        stream_from: Callable[[Storage], Storage],
        on_progress: Progress = lambda done, total: None,
    ) -> ResidentTarget:
        """The target under `plan`. stream_from: wraps the storage that passes read from (slower, faulty, …).

        on_progress(done, total) counts bytes of pinned weights.
        """
        parts = self.parts
        pinned = [p for number in plan.pinned_layers for p in parts.layers[number]]
        pinned += [p for matrix in parts.embeddings if plan.pin_embedding for p in matrix.parameters]
        if parts.head is not None and plan.pin_head:
            pinned += parts.head.parameters
        self._pin(pinned, on_progress)
        streamed = [number for number in range(len(parts.layers)) if number not in set(plan.pinned_layers)]
        head = parts.head_matrix
        resident_head = head is None or (plan.pin_embedding if parts.tied else plan.pin_head)
        pieces = [] if resident_head or head is None else _pieces(head, plan.head_pieces)
        placed = _in_order(parts, streamed, pieces)
        if not placed:
            for matrix in parts.embeddings:
                if not plan.pin_embedding:
                    stream_embedding(matrix.module, RowReader(matrix, self.storage))
            return ResidentTarget(self.model, vocab_size)
        size = max(unit.buffer_bytes for unit, _ in placed)
        buffers = [mx.zeros((size,), mx.uint8) for _ in range(plan.num_buffers)]
        storage = stream_from(self.storage)
        stream = ThreadedStream([unit for unit, _ in placed], [_writable(b) for b in buffers], storage)
        feed = SequentialFeed(stream, len(placed))
        units = [StreamedUnit(number, places, buffers, feed) for number, (_, places) in enumerate(placed)]
        for unit in units:
            unit.bind(0)  # lets go of the lazily loaded arrays
        _attach(parts, units, streamed, storage, feed, with_rows=not plan.pin_embedding)
        return StreamedTarget(self.model, vocab_size, feed, plan.prefill_chunk)

    def _pin(self, parameters: Sequence[StoredParameter], on_progress: Progress) -> None:
        total, done = sum(p.extent.num_bytes for p in parameters), 0
        for p in parameters:
            data = mx.zeros((p.extent.num_bytes,), mx.uint8)
            self.storage.read_into(p.extent.file, p.extent.offset, _writable(data))
            p.module[p.name] = data.view(p.stored).reshape(p.extent.shape).astype(p.wanted)
            mx.eval(p.module[p.name])
            done += p.extent.num_bytes
            on_progress(done, total)


def _attach(
    parts: StreamParts,
    units: Sequence[StreamedUnit],
    layers: Sequence[int],
    storage: Storage,
    feed: SequentialFeed | None,
    with_rows: bool = True,
) -> None:
    """Let the model's modules take their weights from `units`: one for each of `layers`, then the head's."""
    for number, unit in zip(layers, units, strict=False):
        stream_layer(parts.modules[number], unit)
    pieces = units[len(layers) :]
    if pieces and parts.head is not None:
        stream_head(parts.head.module, pieces)
    for matrix in parts.embeddings if with_rows else ():
        own = pieces if parts.tied and matrix is parts.head_matrix else ()
        stream_embedding(matrix.module, RowReader(matrix, storage, feed), own)


def _in_order(parts: StreamParts, layers: Sequence[int], pieces: Sequence[Placed]) -> list[Placed]:
    """The units of one pass."""
    return [*(_place(f"layer {number}", parts.layers[number]) for number in layers), *pieces]


def _place(name: str, parameters: Sequence[StoredParameter]) -> Placed:
    """Lay parameters out in a buffer, in the order of the file so that reading is sequential."""
    offset, reads, places = 0, [], []
    for p in sorted(parameters, key=lambda p: (str(p.extent.file), p.extent.offset)):
        reads.append(Read(p.extent.file, p.extent.offset, p.extent.num_bytes, offset))
        places.append(Placement(p.module, p.name, offset, p.extent.num_bytes, p.extent.shape, p.stored, p.wanted))
        offset += -(-p.extent.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return Unit(name, tuple(reads)), places


def _pieces(matrix: Matrix, count: int) -> list[Placed]:
    """The head's rows in at most `count` pieces."""
    size = -(-matrix.num_rows // count)
    size = -(-size // _PIECE_ROWS) * _PIECE_ROWS
    found = []
    for first in range(0, matrix.num_rows, size):
        rows = min(size, matrix.num_rows - first)
        offset, reads, places = 0, [], []
        for p in matrix.parameters:
            row_bytes = p.extent.num_bytes // matrix.num_rows
            num_bytes = rows * row_bytes
            reads.append(Read(p.extent.file, p.extent.offset + first * row_bytes, num_bytes, offset))
            shape = (rows, *p.extent.shape[1:])
            places.append(Placement(p.module, p.name, offset, num_bytes, shape, p.stored, p.wanted))
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        found.append((Unit(f"head rows {first} to {first + rows}", tuple(reads)), places))
    return found


def _pieces_like_layers(parts: StreamParts) -> list[Placed]:
    head = parts.head_matrix
    if head is None:
        return []
    return _pieces(head, -(-head.num_bytes // max(max(parts.layer_bytes, default=0), 1 << 20)))


def _writable(array: mx.array) -> memoryview:
    """The memory of an MLX array, for reading into. Nothing may compute with it meanwhile."""
    mx.eval(array)
    view: Any = np.asarray(array)
    return memoryview(view)


@contextmanager
def _leading_layers(model: Any) -> Iterator[int]:
    """Let the model have only its first layers, one of each kind among them; yields how many."""
    body: Any = body_of(model)
    layers = model.layers
    count = representative_layers(layers)
    if body is None or count == len(layers) or body.get("layers") is not layers:
        yield len(layers)
        return
    body.layers = layers[:count]
    try:
        yield count
    finally:
        body.layers = layers


def kv_bytes_per_token(model: TreeModel) -> int:
    """Bytes of one token's keys and values, found by forwarding one."""
    cache = model.new_cache()
    model.prefill([0], cache)
    if not isinstance(cache, LazyKVCache):
        return sum(array.nbytes for array in cache.arrays())
    total = 0
    for store in cache.stores:
        if store.host is not None:
            total += store.host.nbytes // store.host.keys.shape[1]
        elif store.keys is not None and store.values is not None:
            total += (store.keys.nbytes + store.values.nbytes) // store.keys.shape[2]
    return total


def _columns(module: Any) -> int:
    """Width of a row, unpacked."""
    if "scales" in module:
        return int(module["scales"].shape[1]) * int(module.group_size)
    return int(module["weight"].shape[1])
