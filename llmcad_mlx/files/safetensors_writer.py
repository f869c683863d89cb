"""Writes a safetensors file piece by piece, so a model larger than memory can be written.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

DATA_ALIGNMENT = 4096
"""Tensor bytes begin at a multiple of this: a page, and a block of most disks."""

_DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_NUMPY_DTYPES: Mapping[str, str] = {"U32": "uint32", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype ("U32", "BF16", …) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return _DTYPE_BITS[self.dtype] // 8

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class SafetensorsWriter:
    """One file; its tensors lie in the order of `specs`. Bytes may be written in any order.

    `metadata`: entries for the header beside `format`.

    `pwrite` rather than a memory map: a full disk is then an OSError, not a killed process.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._specs = {spec.name: spec for spec in specs}
        header: dict[str, object] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
        position = 0
        starts: dict[str, int] = {}
        for spec in specs:
            starts[spec.name] = position
            end = position + spec.num_bytes
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
        self._offsets = {name: 8 + len(text) + start for name, start in starts.items()}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(0, len(text).to_bytes(8, "little") + text)
        os.ftruncate(self._descriptor, 8 + len(text) + position)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def offset(self, name: str) -> int:
        """Where the bytes of tensor `name` begin in the file."""
        return self._offsets[name]

    def write_rows(self, name: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Write `rows` of tensor `name`, the first of them at index `first_row` of its first axis.

        Returns the number of bytes. Raises ValueError when dtype or shape are not the ones announced, OSError when
        the disk is full.
        """
        spec = self._specs[name]
        fits = rows.shape[1:] == spec.shape[1:] and first_row + rows.shape[0] <= spec.shape[0]
        if rows.dtype.name != _NUMPY_DTYPES.get(spec.dtype) or not fits:
            raise ValueError(f"{name}: {rows.dtype}{rows.shape} does not fit {spec.dtype}{spec.shape}")
        row_bytes = spec.num_bytes // spec.shape[0]
        return self.write_bytes(name, first_row * row_bytes, np.ascontiguousarray(rows).tobytes())

    def write_bytes(self, name: str, start: int, data: bytes | memoryview) -> int:
        """Write `data` from byte `start` of tensor `name` on; returns its length.

        Raises ValueError when it goes past the tensor's end, OSError when the disk is full.
        """
        if start + len(data) > self._specs[name].num_bytes:
            raise ValueError(f"{name}: {len(data)} bytes at {start} go past its {self._specs[name].num_bytes}")
        self._write(self._offsets[name] + start, data)
        return len(data)

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """What was written at `offset` of the file."""
        return os.pread(self._descriptor, num_bytes, offset)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._descriptor)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written
