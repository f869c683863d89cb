"""Makes a model ready to run under a memory plan: what is pinned, what is streamed, and the order of reading.

Two steps, because the plan needs to know the model: `Prepared` is a model without its large weights, checked and
measured on a few layers read on demand; `Prepared.build` brings in what the plan pins and streams the rest.
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
from llmcad_mlx.memory import MemoryPlan, ModelSizes
from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import forget_weights, restore
from llmcad_mlx.models.folder import LoadedModel
from llmcad_mlx.models.forward import body_of
from llmcad_mlx.models.probe import ProbeReport, cached_probe, probe, representative_layers
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.streaming.checksums import Checksums
from llmcad_mlx.streaming.feed import OnDemandFeed, RowReader, SequentialFeed
from llmcad_mlx.streaming.modules import (
    Streamed,
    StreamedUnit,
    Views,
    WeightFeed,
    let_go,
    stream_embedding,
    stream_head,
    stream_layer,
)
from llmcad_mlx.streaming.storage import Storage
from llmcad_mlx.streaming.stream import Read, WeightStream
from llmcad_mlx.streaming.weights import PlacedUnit, StoredParameter, StreamParts


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
        self.parts = StreamParts.of(loaded)
        placed = self.parts.all_units()
        if self._checksums is not None:  # before the model is judged by what it computes
            self._checksums.check_all([each.unit for each in placed])
        mx.eval([module[name] for module, name in self.parts.resident], unlisted_arrays(model))
        with self._read_on_demand(placed):
            self.model = TreeModel(
                model, loaded.config, cached_probe(model, loaded.config, probes, _probe_leading)
            )
            self._kv_bytes_per_token = self._measure_kv_bytes()
        for matrix in self.parts.embeddings:  # a draft may look tokens up in it before `build`
            stream_embedding(matrix.module, RowReader(matrix, storage))

    @contextmanager
    def _read_on_demand(self, placed: Sequence[PlacedUnit]) -> Iterator[None]:
        """Let modules read their weights whenever they compute, into one buffer. Afterwards they have none."""
        parts, model = self.parts, self.loaded.model
        buffer = mx.zeros((max(each.unit.buffer_bytes for each in placed),), mx.uint8)
        feed = OnDemandFeed([each.unit for each in placed], _writable(buffer), self.storage)
        units = _streamed_units(placed, [buffer], feed)
        use_cpu_blocks(model, lambda number: units[number].loaded())
        _attach(parts, range(len(parts.layers)), units)
        _attach_rows(parts, units[len(parts.layers) :], self.storage, None)
        yield
        for module in (*parts.modules, *(matrix.module for matrix in parts.matrices)):
            restore(module, Streamed)
        for unit in units:
            let_go(unit)
        forget_weights(model)

    def _measure_kv_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers, from those of the leading ones."""
        with _leading_layers(self.loaded.model) as count:
            return kv_bytes_per_token(self.model) * len(self.parts.layers) // count

    @property
    def sizes(self) -> ModelSizes:
        """What the memory plan needs to know."""
        parts = self.parts
        shapes = [p.extent.shape for layer in parts.layers for p in layer]
        return ModelSizes(
            layer_bytes=parts.layer_bytes,
            resident_bytes=sum(module[name].nbytes for module, name in parts.resident),
            embedding_bytes=sum(m.num_bytes for m in parts.embeddings),
            head_bytes=parts.head.num_bytes if parts.head else 0,
            kv_bytes_per_token=self._kv_bytes_per_token,
            logit_columns=self.model.vocab_size,
            hidden=max((_columns(m.module) for m in parts.matrices), default=0),
            widest=max((shape[-2] for shape in shapes), default=0),
        )

    def build(self, plan: MemoryPlan, stream_from: Callable[[Storage], Storage]) -> SequentialFeed | None:
        """Make the model ready under `plan`; returns what feeds its passes, None where they read nothing.

        stream_from: wraps the storage that passes read from (slower, faulty, …).
        """
        parts = self.parts
        for matrix in parts.embeddings:
            restore(matrix.module, Streamed)
        self._pin(plan)
        placed, layers = self._streamed(plan), self._streamed_layers(plan)
        if not placed:
            if not plan.pin_embedding:
                _attach_rows(parts, (), self.storage, None)
            return None
        buffers = [
            mx.zeros((max(each.unit.buffer_bytes for each in placed),), mx.uint8) for _ in range(plan.num_buffers)
        ]
        storage = stream_from(self.storage)
        sequence = [each.unit for each in placed]
        if self._checksums is not None:
            sequence = self._checksums.marked(sequence)
        views = [_writable(buffer) for buffer in buffers]
        feed = SequentialFeed(WeightStream(sequence, views, storage), len(placed))
        units = _streamed_units(placed, buffers, feed)
        for unit in units:
            unit.bind(0)  # lets go of the lazily loaded arrays
        _attach(parts, layers, units)
        if not plan.pin_embedding:
            _attach_rows(parts, units[len(layers) :], storage, feed)
        return feed

    def streamed_reads(self, plan: MemoryPlan) -> list[Read]:
        """What a pass under `plan` reads, in order."""
        return [read for each in self._streamed(plan) for read in each.unit.reads]

    def _streamed(self, plan: MemoryPlan) -> list[PlacedUnit]:
        pinned = plan.pin_embedding if self.parts.tied else plan.pin_head
        return self.parts.units(self._streamed_layers(plan), 0 if pinned else plan.head_pieces)

    def _streamed_layers(self, plan: MemoryPlan) -> list[int]:
        pinned = set(plan.pinned_layers)
        return [number for number in range(len(self.parts.layers)) if number not in pinned]

    def _pin(self, plan: MemoryPlan) -> None:
        """Read what the plan keeps in memory."""
        parts = self.parts
        kept: list[StoredParameter] = [p for number in plan.pinned_layers for p in parts.layers[number]]
        if plan.pin_embedding:
            kept += [p for matrix in parts.embeddings for p in matrix.parameters]
        if parts.head is not None and plan.pin_head:
            kept += parts.head.parameters
        for p in kept:
            data = mx.zeros((p.extent.num_bytes,), mx.uint8)
            view = _writable(data)
            self.storage.read_into(p.extent.file, p.extent.offset, view)
            if self._checksums is not None:
                self._checksums.check_tensor(p.extent, view)
            p.module[p.name] = data.view(p.stored).reshape(p.extent.shape).astype(p.wanted)
            mx.eval(p.module[p.name])


def _streamed_units(
    placed: Sequence[PlacedUnit], buffers: Sequence[mx.array], feed: WeightFeed
) -> list[StreamedUnit]:
    views: Views = {}
    return [StreamedUnit(number, each.places, buffers, feed, views) for number, each in enumerate(placed)]


def _attach(parts: StreamParts, layers: Sequence[int], units: Sequence[StreamedUnit]) -> None:
    """Let modules take their weights from `units`: one for each of `layers`, then the head's."""
    for number, unit in zip(layers, units, strict=False):
        stream_layer(parts.modules[number], unit)
    pieces = units[len(layers) :]
    if pieces and parts.head is not None:
        stream_head(parts.head.module, pieces)


def _attach_rows(
    parts: StreamParts, pieces: Sequence[StreamedUnit], storage: Storage, feed: SequentialFeed | None
) -> None:
    """Let embeddings look rows up in the files; one that is the head takes its weights from `pieces`, too."""
    for matrix in parts.embeddings:
        own = pieces if parts.tied and matrix is parts.head_matrix else ()
        stream_embedding(matrix.module, RowReader(matrix, storage, feed), own)


def _writable(array: mx.array) -> memoryview:
    """The memory of an MLX array, for reading into. Nothing may compute with it meanwhile."""
    mx.eval(array)
    view: Any = np.asarray(array)
    return memoryview(view)


def _probe_leading(model: Module) -> ProbeReport:
    """On the leading layers, one of each kind; on all of them where that is not enough."""
    with _leading_layers(model):
        report = probe(model)
    if report.capability != "tree":
        return probe(model)
    positions.install(model)  # in the other layers too
    return report


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
