"""Writes a safetensors file piece by piece, so a model larger than memory can be written.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

_DTYPE_NAMES = {"uint32": "U32", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its name, numpy dtype name (uint32, float16 or float32) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class SafetensorsWriter:
    """One file; its tensors lie in the order of `specs`. Rows may be written in any order.

    `pwrite` rather than a memory map: a full disk is then an OSError, not a killed process.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        position = 0
        for spec in specs:
            end = position + spec.num_bytes
            header[spec.name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = _offsets(specs, 8 + len(text))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
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

    def write(self, name: str, first_row: int, rows: npt.NDArray[Any]) -> None:
        """Write `rows` of tensor `name`, the first of them at index `first_row` of its first axis.

        Raises ValueError when dtype or shape are not the ones announced, OSError when the disk is full.
        """
        spec = self._specs[name]
        fits = rows.shape[1:] == spec.shape[1:] and first_row + rows.shape[0] <= spec.shape[0]
        if rows.dtype != np.dtype(spec.dtype) or not fits:
            raise ValueError(f"{name}: {rows.dtype}{rows.shape} does not fit {spec.dtype}{spec.shape}")
        row_bytes = spec.num_bytes // spec.shape[0]
        self._write(self._offsets[name] + first_row * row_bytes, np.ascontiguousarray(rows).tobytes())

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._descriptor)

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


def _offsets(specs: Sequence[TensorSpec], start: int) -> dict[str, int]:
    offsets: dict[str, int] = {}
    for spec in specs:
        offsets[spec.name] = start
        start += spec.num_bytes
    return offsets
