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

from llmcad_mlx.cpu import unlisted_arrays, use_cpu_blocks, use_cpu_linears
from llmcad_mlx.files.bundle import Bundle
from llmcad_mlx.memory.plan import MemoryPlan, ModelSizes
from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import forget_weights, restore
from llmcad_mlx.models.folder import LoadedModel
from llmcad_mlx.models.forward import body_of
from llmcad_mlx.models.probe import ProbeReport, cached_probe, probe, representative_layers
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.streaming.checksums import Checksums
from llmcad_mlx.streaming.feed import OnDemandFeed, RowReader, SequentialFeed
from llmcad_mlx.streaming.layout import Placed, in_order, pieces_like_layers, pieces_of
from llmcad_mlx.streaming.modules import (
    Streamed,
    StreamedUnit,
    Views,
    let_go,
    stream_embedding,
    stream_head,
    stream_layer,
)
from llmcad_mlx.streaming.storage import Storage
from llmcad_mlx.streaming.stream import Read, ThreadedStream
from llmcad_mlx.streaming.weights import Matrix, StoredParameter, StreamParts

Progress = Callable[[int, int], None]


class Prepared:
    """A lazily loaded model, checked; of its large weights nothing is in memory."""

    def __init__(self, loaded: LoadedModel, storage: Storage, probes: Path, bundle: Bundle | None = None) -> None:
        """probes: folder of `cached_probe`. bundle: check all that is read against its checksums, everything once
        now. Raises ModelError for a model that cannot be streamed, StorageError for altered weights."""
        self.loaded = loaded
        self.storage = storage
        self._checksums = None if bundle is None else Checksums(bundle, storage)
        model: Any = loaded.model
        use_cpu_linears(model)
        self.parts = StreamParts.of(model, loaded.weights, loaded.unchanged, loaded.path)
        placed = in_order(self.parts, range(len(self.parts.layers)), pieces_like_layers(self.parts))
        if self._checksums is not None:  # before the model is judged by what it computes
            self._checksums.check_all([unit for unit, _ in placed])
        mx.eval([module[name] for module, name in self.parts.resident], unlisted_arrays(model))
        buffer = mx.zeros((max(unit.buffer_bytes for unit, _ in placed),), mx.uint8)
        feed = OnDemandFeed([unit for unit, _ in placed], _writable(buffer), storage)
        shared: Views = {}
        units = [StreamedUnit(number, places, [buffer], feed, shared) for number, (_, places) in enumerate(placed)]
        use_cpu_blocks(model, lambda number: units[number].loaded())
        _attach(self.parts, units, range(len(self.parts.layers)), storage, None)
        report = cached_probe(model, loaded.config, probes, self._probe)
        self.model = TreeModel(model, loaded.config, report)
        with _leading_layers(model) as count:
            self._kv_bytes_per_token = kv_bytes_per_token(self.model) * len(self.parts.layers) // count
        for module in (*model.layers, *(m.module for m in self._matrices())):
            restore(module, Streamed)
        for unit in units:
            let_go(unit)
        forget_weights(model)
        for matrix in self.parts.embeddings:  # a draft may look tokens up in it before `build`
            stream_embedding(matrix.module, RowReader(matrix, storage))

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
        stream_from: Callable[[Storage], Storage],
        on_progress: Progress = lambda done, total: None,
    ) -> SequentialFeed | None:
        """Make the model ready under `plan`; returns what feeds its passes, None where they read nothing.

        stream_from: wraps the storage that passes read from (slower, faulty, …). on_progress(done, total) counts
        bytes of pinned weights.
        """
        parts = self.parts
        for matrix in parts.embeddings:
            restore(matrix.module, Streamed)
        pinned = [p for number in plan.pinned_layers for p in parts.layers[number]]
        pinned += [p for matrix in parts.embeddings if plan.pin_embedding for p in matrix.parameters]
        if parts.head is not None and plan.pin_head:
            pinned += parts.head.parameters
        self._pin(pinned, on_progress)
        placed = self._streamed(plan)
        if not placed:
            for matrix in parts.embeddings:
                if not plan.pin_embedding:
                    stream_embedding(matrix.module, RowReader(matrix, self.storage))
            return None
        size = max(unit.buffer_bytes for unit, _ in placed)
        buffers = [mx.zeros((size,), mx.uint8) for _ in range(plan.num_buffers)]
        storage = stream_from(self.storage)
        sequence, views = [unit for unit, _ in placed], [_writable(buffer) for buffer in buffers]
        if self._checksums is not None:
            sequence = self._checksums.marked(sequence)
        stream = ThreadedStream(sequence, views, storage, verify=self._checksums is not None)
        feed = SequentialFeed(stream, len(placed))
        shared: Views = {}
        units = [StreamedUnit(number, places, buffers, feed, shared) for number, (_, places) in enumerate(placed)]
        for unit in units:
            unit.bind(0)  # lets go of the lazily loaded arrays
        _attach(parts, units, self._streamed_layers(plan), storage, feed, with_rows=not plan.pin_embedding)
        return feed

    def streamed_reads(self, plan: MemoryPlan) -> list[Read]:
        """What a pass under `plan` reads, in order."""
        return [read for unit, _ in self._streamed(plan) for read in unit.reads]

    def _streamed(self, plan: MemoryPlan) -> list[Placed]:
        parts = self.parts
        head = parts.head_matrix
        resident_head = head is None or (plan.pin_embedding if parts.tied else plan.pin_head)
        pieces = [] if resident_head or head is None else pieces_of(head, plan.head_pieces)
        return in_order(parts, self._streamed_layers(plan), pieces)

    def _streamed_layers(self, plan: MemoryPlan) -> list[int]:
        pinned = set(plan.pinned_layers)
        return [number for number in range(len(self.parts.layers)) if number not in pinned]

    def _pin(self, parameters: Sequence[StoredParameter], on_progress: Progress) -> None:
        total, done = sum(p.extent.num_bytes for p in parameters), 0
        for p in parameters:
            data = mx.zeros((p.extent.num_bytes,), mx.uint8)
            view = _writable(data)
            self.storage.read_into(p.extent.file, p.extent.offset, view)
            if self._checksums is not None:
                self._checksums.check_tensor(p.extent, view)
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
    return cache.slot_nbytes


def _columns(module: Any) -> int:
    """Width of a row, unpacked."""
    if "scales" in module:
        return int(module["scales"].shape[1]) * int(module.group_size)
    return int(module["weight"].shape[1])
