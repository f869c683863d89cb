"""Where each tensor of a model folder lies in its files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.models.loading import check_weight_files


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """One tensor: `num_bytes` at `offset` of `file`; `dtype` is safetensors' name for it ("U32", "F16")."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


class WeightIndex(Mapping[str, TensorExtent]):
    """Tensor names of a folder and their extents."""

    def __init__(self, extents: Mapping[str, TensorExtent], files: list[Path]) -> None:
        self._extents = dict(extents)
        self.files = files

    @classmethod
    def of(cls, folder: Path) -> WeightIndex:
        """Read the headers of the folder's weight files. Raises ModelError naming a bad file."""
        files = check_weight_files(folder)
        extents = {extent.name: extent for file in files for extent in _extents(file)}
        return cls(extents, files)

    def __getitem__(self, name: str) -> TensorExtent:
        return self._extents[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)


def _extents(file: Path) -> Iterator[TensorExtent]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        assert math.prod(shape) >= 0
        yield TensorExtent(name, file, 8 + length + start, end - start, entry["dtype"], shape)
