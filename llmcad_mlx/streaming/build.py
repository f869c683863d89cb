"""Makes a model ready to run under a memory plan: what is pinned, what is streamed, and the order of reading.

Two steps, because the plan needs to know the model: `Prepared` is a model without its large weights, checked and
measured on a few layers read on demand; `Prepared.build` brings in what the plan pins and streams the rest.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from llmcad_mlx.cpu import unlisted_arrays, use_cpu_blocks, use_cpu_linears
from llmcad_mlx.errors import StorageError
from llmcad_mlx.files.bundle import FILE, Bundle
from llmcad_mlx.files.safetensors import TensorExtent
from llmcad_mlx.memory import Attention, MemoryPlan, ModelSizes, TokenBytes
from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import adapt, forget_weights, restore
from llmcad_mlx.models.cache import ModelCache
from llmcad_mlx.models.folder import LoadedModel
from llmcad_mlx.models.probe import cached_probe, probe, representative_layers
from llmcad_mlx.models.tree_model import ProbeReport, TreeModel, body_of
from llmcad_mlx.streaming.modules import (
    OnDemandFeed,
    RowReader,
    SequentialFeed,
    Streamed,
    StreamedEmbedding,
    StreamedHead,
    StreamedLayer,
    StreamedUnit,
    Views,
    WeightFeed,
)
from llmcad_mlx.streaming.storage import BLOCK_BYTES, FileStorage, Storage, ThrottledStorage, address_of
from llmcad_mlx.streaming.stream import Read, Unit, WeightStream
from llmcad_mlx.streaming.ways import fits_page_cache, known_way, short_pieces
from llmcad_mlx.streaming.weights import PlacedUnit, StreamParts

_CHECKED_BYTES = 4 << 20  # at a time
_NUM_HEADS = ("num_attention_heads", "n_heads", "n_head")  # in configurations


class Prepared:
    """A lazily loaded model, checked; of its large weights nothing is in memory."""

    def __init__(self, loaded: LoadedModel, probes: Path, bundle: Bundle | None = None) -> None:
        """probes: folder of `cached_probe`. bundle: check all that is read against its checksums, everything once
        now. Raises ModelError for a model that cannot be streamed, StorageError for altered weights."""
        self.loaded = loaded
        self.storage = FileStorage()
        model: Any = loaded.model
        use_cpu_linears(model)
        self.parts = StreamParts.of(loaded)
        placed = self.parts.all_units()
        # Before the model is judged by what it computes.
        self._checksums = None if bundle is None else Checksums(bundle, self.storage, placed)
        mx.eval([module[name] for module, name in self.parts.resident], unlisted_arrays(model))
        with self._read_on_demand(placed):
            report = cached_probe(model, loaded.config, probes, _probe_leading)
            self.model = TreeModel(model, loaded.config, report)
            with _leading_layers(model) as count:
                cache = _after_one_token(self.model)
            self._state = TokenState(
                _bytes_of_all(cache, self.model.new_cache(), len(self.parts.layers) / count),
                attention_of(cache.layers, loaded.config),
            )
        self._attach((), (), self.storage)  # a draft may look tokens up before `build`

    @contextmanager
    def _read_on_demand(self, placed: Sequence[PlacedUnit]) -> Iterator[None]:
        """Let modules read their weights whenever they compute, into one buffer. Afterwards they have none."""
        parts, model = self.parts, self.loaded.model
        buffers, (memory,) = _buffers_for(placed, 1)
        feed = OnDemandFeed(placed, memory, self.storage)
        units = _streamed_units(placed, buffers, feed)
        use_cpu_blocks(model, lambda number: units[number].loaded())
        self._attach(range(len(parts.layers)), units, self.storage)
        yield
        for module in (*parts.modules, *(matrix.module for matrix in parts.matrices)):
            restore(module, Streamed)
        for unit in units:  # nothing refers to the buffer any more; modules are of no use until they get weights
            unit.buffers, unit.views = (), {}
            for place in unit.placements:
                p = place.parameter
                p.module[p.name] = mx.zeros(place.shape, p.wanted)  # never evaluated: takes no memory
        forget_weights(model)

    def _attach(
        self,
        layers: Sequence[int],
        units: Sequence[StreamedUnit],
        rows_from: Storage | None,
        feed: SequentialFeed | None = None,
    ) -> None:
        """Let modules take their weights from `units`: one for each of `layers`, then the head's.

        rows_from: where embeddings look rows up, which `feed` counts; None: they are in memory.
        """
        parts, pieces = self.parts, units[len(layers) :]
        for number, unit in zip(layers, units, strict=False):
            adapt(parts.modules[number], StreamedLayer, _unit=unit)
        if pieces and parts.head is not None:
            adapt(parts.head.module, StreamedHead, _pieces=pieces)
        if rows_from is None:
            return
        for matrix in parts.embeddings:
            own = pieces if matrix is parts.head_matrix else ()
            adapt(matrix.module, StreamedEmbedding, _rows=RowReader(matrix, rows_from, feed), _pieces=own)

    @property
    def sizes(self) -> ModelSizes:
        return sizes_of(self.parts, self._state, self.model.vocab_size)

    def build(self, plan: MemoryPlan, read_bandwidth: float | None) -> SequentialFeed | None:
        """Make the model ready under `plan`; returns what feeds its passes, None where they read nothing.

        read_bandwidth: bytes per second at which passes read, to emulate slower storage.
        """
        for matrix in self.parts.embeddings:
            restore(matrix.module, Streamed)
        self._pin(plan)
        layers, placed = self.streamed(plan)
        storage: Storage = self.storage
        units, feed = list[StreamedUnit](), None
        if placed:
            sequence = placed if self._checksums is None else self._checksums.marked(placed)
            way = known_way(placed[0].reads[0].file)
            if fits_page_cache(plan):  # direct reads would not use it
                way = replace(way, direct=False)
            self.storage.direct = way.direct
            if read_bandwidth is not None:
                storage, way = ThrottledStorage(storage, read_bandwidth), short_pieces(way, read_bandwidth)
            buffers, memory = _buffers_for(placed, plan.num_buffers)
            feed = SequentialFeed(WeightStream(sequence, memory, storage, way), len(placed))
            units = _streamed_units(placed, buffers, feed)
            for unit in units:
                unit.bind(0)  # lets go of the lazily loaded arrays
        self._attach(layers, units, None if plan.pin_embedding else storage, feed)
        return feed

    def streamed(self, plan: MemoryPlan) -> tuple[list[int], list[PlacedUnit]]:
        """The layers that `plan` does not pin, and all that a pass reads, in order."""
        layers = [number for number in range(len(self.parts.layers)) if number not in plan.pinned_layers]
        pinned = plan.pin_head if self.parts.head is not None else plan.pin_embedding
        return layers, self.parts.units(layers, 0 if pinned else plan.head_pieces)

    def _pin(self, plan: MemoryPlan) -> None:
        """Read what the plan keeps in memory."""
        parts = self.parts
        kept = [p for number in plan.pinned_layers for p in parts.layers[number]]
        if plan.pin_embedding:
            kept += [p for matrix in parts.embeddings for p in matrix.parameters]
        if parts.head is not None and plan.pin_head:
            kept += parts.head.parameters
        for p in kept:
            data = mx.zeros((p.extent.num_bytes,), mx.uint8)
            view = _writable(data)
            self.storage.read_into(p.extent.file, p.extent.offset, view)
            if self._checksums is not None:
                self._checksums.compare(p.extent, hashlib.sha256(view).hexdigest())
            p.module[p.name] = data.view(p.stored).reshape(p.extent.shape).astype(p.wanted)
            mx.eval(p.module[p.name])


class Checksums:
    """Compares what `storage` reads of a bundle with the bundle's checksums, one for each tensor.

    What is streamed at once is some tensors, or some rows of several, with what lies between them. So every byte
    is read once at load. On the way the tensors are compared with the bundle, and each unit gets a checksum of its
    own, with which the stream compares every later read of it.
    """

    def __init__(self, bundle: Bundle, storage: Storage, units: Sequence[Unit]) -> None:
        """Reads `units`, then the tensors that are in none of them. Raises StorageError as `marked` does."""
        self._storage = storage
        self._known = bundle.tensor_sha256
        self._marks: dict[tuple[Read, ...], str] = {}
        self._extents: dict[Path, list[TensorExtent]] = {}  # in the order of their bytes
        self._unread = {extent for layer in bundle.layers for extent in layer.tensors if extent.num_bytes}
        for extent in sorted(self._unread, key=lambda extent: extent.offset):
            self._extents.setdefault(extent.file, []).append(extent)
        self._buffer = memoryview(bytearray(_CHECKED_BYTES))
        self.marked(units)
        for extent in list(self._unread):
            self.marked([Unit(extent.name, (Read(extent.file, extent.offset, extent.num_bytes, 0),))])

    def marked(self, units: Sequence[Unit]) -> list[Unit]:
        """`units` with the checksums of their bytes, read now unless they were before.

        A tensor is compared where its parts follow each other among `units`, from its first byte to its last.
        Raises StorageError naming file and tensor for bytes that are not the bundle's, and what reading raises.
        """
        begun: dict[TensorExtent, _Part] = {}
        for unit in units:
            if unit.reads in self._marks:
                continue
            whole = hashlib.sha256()
            for read in unit.reads:
                end = read.offset + read.num_bytes
                for start in range(read.offset, end, _CHECKED_BYTES):
                    block = self._buffer[: min(_CHECKED_BYTES, end - start)]
                    self._storage.read_into(read.file, start, block)
                    whole.update(block)
                    self._follow(read.file, start, block, begun)
            self._marks[unit.reads] = whole.hexdigest()
        return [replace(unit, sha256=self._marks[unit.reads]) for unit in units]

    def _follow(self, file: Path, start: int, block: memoryview, begun: dict[TensorExtent, _Part]) -> None:
        """Take account of the tensors in `block`, which lies at `start` of the file."""
        extents, end = self._extents[file], start + len(block)
        first = bisect_right(extents, start, key=lambda extent: extent.offset) - 1
        for extent in extents[max(first, 0) :]:
            if extent.offset >= end:
                break
            part = begun.setdefault(extent, _Part(extent.offset))
            if start <= part.end < end:
                stop = min(end, extent.offset + extent.num_bytes)
                part.digest.update(block[part.end - start : stop - start])
                part.end = stop
                if stop == extent.offset + extent.num_bytes:
                    self.compare(extent, part.digest.hexdigest())
                    self._unread.discard(extent)

    def compare(self, extent: TensorExtent, sha256: str) -> None:
        """`sha256` is that of the tensor at `extent`, read. Raises StorageError where it is not the bundle's."""
        if sha256 != self._known[extent.name]:
            raise StorageError(
                f"{extent.file}: {extent.name} was altered (its sha256 is not the one in {FILE}); "
                "fetch or convert the model again"
            )


@dataclass(slots=True)
class _Part:
    """Of a tensor, read up to `end` of its file."""

    end: int
    digest: Any = field(default_factory=hashlib.sha256)


def _buffers_for(placed: Sequence[PlacedUnit], count: int) -> tuple[list[mx.array], list[memoryview]]:
    """Buffers (B,) uint8 that hold any of the units, at addresses for direct reads, and their memory."""
    size = max((read.buffer_offset + read.num_bytes for unit in placed for read in unit.reads), default=0)
    buffers = []
    for _ in range(count):
        whole = mx.zeros((size + BLOCK_BYTES,), mx.uint8)
        start = -address_of(_writable(whole)) % BLOCK_BYTES
        buffers.append(whole[start : start + size])  # a view
    return buffers, [_writable(buffer) for buffer in buffers]


def _writable(array: mx.array) -> memoryview:
    """The memory of an MLX array, for reading into. Nothing may compute with it meanwhile."""
    mx.eval(array)
    view: Any = np.asarray(array)
    return memoryview(view)


def _streamed_units(
    placed: Sequence[PlacedUnit], buffers: Sequence[mx.array], feed: WeightFeed
) -> list[StreamedUnit]:
    views: Views = {}
    return [StreamedUnit(number, each.places, buffers, feed, views) for number, each in enumerate(placed)]


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


def sizes_of(parts: StreamParts, state: TokenState, logit_columns: int) -> ModelSizes:
    """The sizes of a model that was taken apart."""
    shapes = [p.extent.shape for layer in parts.layers for p in layer]
    return ModelSizes(
        layer_bytes=parts.layer_bytes,
        resident_bytes=sum(module[name].nbytes for module, name in parts.resident),
        embedding_bytes=sum(m.num_bytes for m in parts.embeddings),
        head_bytes=parts.head.num_bytes if parts.head else 0,
        kv_bytes_per_token=state.kv_bytes,
        logit_columns=logit_columns,
        hidden=max((_columns(m.module) for m in parts.matrices), default=0),
        widest=max((shape[-2] for shape in shapes), default=0),
        attention=state.attention,
    )


@dataclass(frozen=True, slots=True)
class TokenState:
    """What a model keeps of a token, in bytes, and how it attends; None: without scores."""

    kv_bytes: TokenBytes
    attention: Attention | None


def token_state(model: TreeModel) -> TokenState:
    """Found by forwarding one token."""
    cache = _after_one_token(model)
    return TokenState(TokenBytes.of(cache.token_nbytes), attention_of(cache.layers, model.config))


def _after_one_token(model: TreeModel) -> ModelCache:
    cache = model.new_cache()
    model.prefill([0], cache)
    return cache


def _bytes_of_all(leading: ModelCache, whole: ModelCache, ratio: float) -> TokenBytes:
    """What a token takes in all layers. leading: a cache of which only the first layers, 1 / `ratio` of them, hold
    one. whole: an empty cache, which tells the windows. A layer takes what those of its window do."""
    known = [(window, size) for window, size in leading.token_nbytes if size]
    if leading.capability == "plain" or not known:
        return TokenBytes(round(sum(size for _, size in known) * ratio))
    alike = {window: [size for other, size in known if other == window] for window, _ in whole.token_nbytes}
    every = [size for _, size in known]
    layers = ((window, mean(alike[window] or every)) for window, _ in whole.token_nbytes)
    return TokenBytes.of((window, round(size)) for window, size in layers)


def attention_of(layers: Sequence[Any], config: Mapping[str, Any]) -> Attention | None:
    """How a model attends, by the caches of its layers after a forward. None where all are on the CPU kernels."""
    found = [leaf.keys for layer in layers for leaf in getattr(layer, "caches", [layer]) if hasattr(leaf, "keys")]
    keys = [array for array in found if isinstance(array, mx.array) and array.ndim == 4]
    if not keys:
        return None
    widest = max(keys, key=lambda array: array.shape[3])
    text = config.get("text_config") or config
    heads = next((text[name] for name in _NUM_HEADS if isinstance(text.get(name), int)), widest.shape[1])
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    return Attention(heads, widest.shape[1], widest.shape[3], widest.itemsize, on_metal)


def _columns(module: Any) -> int:
    if "scales" in module:
        return int(module["scales"].shape[1]) * int(module.group_size)
    return int(module["weight"].shape[1])
