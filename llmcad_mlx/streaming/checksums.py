"""A bundle's weights against its checksums, while they are read.

`llmcad.json` has a checksum for each tensor. What is streamed is not always a whole tensor: a piece of the head is
some rows of several. So every byte is read once at load; on the way the tensors are compared with the bundle and
each unit gets a checksum of its own, with which the stream compares every later read of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import StorageError
from llmcad_mlx.files.bundle import FILE, Bundle
from llmcad_mlx.files.safetensors import TensorExtent
from llmcad_mlx.streaming.storage import Storage
from llmcad_mlx.streaming.stream import Read, Unit

_BLOCK_BYTES = 4 << 20


@dataclass(slots=True)
class _Tensor:
    """A tensor that is being read."""

    extent: TensorExtent
    left: int
    digest: Any = field(default_factory=hashlib.sha256)


class Checksums:
    """Compares what `storage` reads of a bundle with the bundle's checksums."""

    def __init__(self, bundle: Bundle, storage: Storage) -> None:
        self._storage = storage
        self._known = bundle.tensor_sha256
        self._units: dict[tuple[Read, ...], str] = {}
        self._extents = [tensor.extent for layer in bundle.layers for tensor in layer.tensors]
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))

    def check_all(self, units: Sequence[Unit]) -> None:
        """Read `units`, then all that is in none of them. Raises StorageError as `marked` does."""
        self.marked(units)
        read = {(part.file, part.offset) for unit in units for part in unit.reads}
        for extent in self._extents:
            if (extent.file, extent.offset) not in read and extent.num_bytes:
                self.marked([Unit(extent.name, (Read(extent.file, extent.offset, extent.num_bytes, 0),))])

    def marked(self, units: Sequence[Unit]) -> list[Unit]:
        """`units` with the checksums of their bytes, read now unless they were before.

        A tensor's parts must follow each other among `units`, from its first byte to its last. Raises StorageError
        naming file and tensor for bytes that are not the bundle's, and what reading raises.
        """
        unread = [unit for unit in units if unit.reads not in self._units]
        places: dict[tuple[Path, int], _Tensor] = {
            (extent.file, extent.offset): _Tensor(extent, extent.num_bytes)
            for extent in self._extents
            if extent.num_bytes
        }
        for unit in unread:
            whole = hashlib.sha256()
            for read in unit.reads:
                tensor = places.pop((read.file, read.offset))
                for block in self._blocks(read):
                    whole.update(block)
                    tensor.digest.update(block)
                tensor.left -= read.num_bytes
                if tensor.left:
                    places[read.file, read.offset + read.num_bytes] = tensor
                else:
                    self._compare(tensor.extent, tensor.digest.hexdigest())
            self._units[unit.reads] = whole.hexdigest()
        return [replace(unit, sha256=self._units[unit.reads]) for unit in units]

    def check_tensor(self, extent: TensorExtent, data: memoryview) -> None:
        """`data` was read as the tensor at `extent`. Raises StorageError where it is not the bundle's."""
        self._compare(extent, hashlib.sha256(data).hexdigest())

    def _compare(self, extent: TensorExtent, sha256: str) -> None:
        if sha256 != self._known[extent.name]:
            raise StorageError(
                f"{extent.file}: {extent.name} was altered (its sha256 is not the one in {FILE}); "
                "fetch or convert the model again"
            )

    def _blocks(self, read: Read) -> Iterator[memoryview]:
        for start in range(0, read.num_bytes, _BLOCK_BYTES):
            block = self._buffer[: min(_BLOCK_BYTES, read.num_bytes - start)]
            self._storage.read_into(read.file, read.offset + start, block)
            yield block
