"""Safetensors: one reader of headers, which checks them once for everybody, and a writer.

Format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header with each tensor's dtype,
shape and range of bytes, the tensors' bytes. MLX trusts a header, so what is cut off or foreign is found before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import MAX_IO_BYTES, POINTER, check_open_files, is_pointer

DATA_ALIGNMENT = 16 << 10
"""Tensor bytes are written from a multiple of this on: a page of Apple silicon, and a multiple of disks'
blocks."""

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Dtype:
    """Bits of an element, and MLX's dtype; None where this engine has no use for it."""

    bits: int
    mlx: mx.Dtype | None = None


DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(8, mx.bool_), "U8": Dtype(8, mx.uint8), "I8": Dtype(8, mx.int8), "F4": Dtype(4),
    "F8_E5M2": Dtype(8), "F8_E4M3": Dtype(8), "F8_E8M0": Dtype(8), "U16": Dtype(16, mx.uint16),
    "I16": Dtype(16, mx.int16), "F16": Dtype(16, mx.float16), "BF16": Dtype(16, mx.bfloat16),
    "U32": Dtype(32, mx.uint32), "I32": Dtype(32, mx.int32), "F32": Dtype(32, mx.float32),
    "U64": Dtype(64, mx.uint64), "I64": Dtype(64, mx.int64), "F64": Dtype(64), "C64": Dtype(64),
}  # fmt: skip
"""By the names that headers use."""


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of an MLX dtype. Raises KeyError where safetensors has none."""
    return {known.mlx: name for name, known in DTYPES.items() if known.mlx is not None}[dtype]


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """One tensor: `num_bytes` at `offset` of `file`; `dtype` is a name of `DTYPES`."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


WeightIndex = Mapping[str, TensorExtent]
"""By name, the tensors of a model folder."""


def read_weights(folder: Path) -> WeightIndex:
    """Read the headers of a folder's weight files. Raises ModelError naming a bad file, or two that hold a tensor
    of the same name: which one a loader takes would be chance."""
    found: dict[str, TensorExtent] = {}
    for file in weight_files(folder):
        for extent in read_tensors(file):
            if extent.name in found:
                raise ModelError(
                    f"{file}: holds {extent.name}, as {found[extent.name].file.name} does; "
                    "delete the file that does not belong to the model"
                )
            found[extent.name] = extent
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted. Raises ModelError where there are none.

    What an index or a leftover says beyond that is for `missing_part`: published folders have indexes of another
    build, and finished downloads leave traces of unfinished tries.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        lacking = missing_part(folder)
        raise ModelError(
            lacking or f"{folder}: no model*.safetensors; convert the model first, or download it again"
        )
    return files


def missing_part(folder: Path) -> str | None:
    """What seems to be missing in a folder with too few tensors, in a line."""
    for leftover in [*folder.glob("*.incomplete"), *folder.glob(".cache/**/*.incomplete")]:
        return f"{leftover}: a download was not finished; start it again"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, "download it again").get("weight_map")
        named = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else {index.name}
        for name in sorted(named):
            if not (folder / name).is_file():
                return f"{folder / name}: missing, though the index names it; download it again"
    return None


def read_tensors(file: Path) -> list[TensorExtent]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ModelError unless the file is whole, and its header agrees with itself and with the file's size.
    """
    try:
        size = file.stat().st_size
        header, start = read_header(file)
    except OSError as error:
        check_open_files(error, file)
        raise ModelError(f"{file}: cannot be read ({error.strerror}); download it again") from error
    except ValueError as error:
        raise ModelError(f"{file}: {POINTER if is_pointer(file) else f'{error}; download it again'}") from error
    header.pop("__metadata__", None)
    extents = [_extent(file, start, name, entry) for name, entry in header.items()]
    extents.sort(key=lambda extent: (extent.offset, extent.num_bytes))
    end = start
    for extent in extents:
        if extent.offset < end:
            raise _corrupt(file, extent.name)
        end = extent.offset + extent.num_bytes
    if size != end:
        raise ModelError(f"{file}: {size} bytes, its header promises {end}; download it again")
    return extents


def _extent(file: Path, data_start: int, name: str, entry: Any) -> TensorExtent:
    try:
        (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
            raise ValueError
        if 8 * (end - start) != math.prod(shape) * DTYPES[entry["dtype"]].bits:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _corrupt(file, name) from None
    return TensorExtent(name, file, data_start + start, end - start, entry["dtype"], shape)


def _corrupt(file: Path, name: str) -> ModelError:
    return ModelError(f"{file}: its header is corrupt at tensor {name!r}; download it again")


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, not compared with anything yet, and the offset at which tensors' bytes begin.

    Raises OSError, and ValueError saying what is wrong with a file that has no such header.
    """
    raw = header_bytes(file)
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError("its header is corrupt")
    return header, len(raw)


def header_bytes(file: Path) -> bytes:
    """The header of a file as it is, with the 8 bytes of its length. Raises OSError, and ValueError for none."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        room = os.fstat(stream.fileno()).st_size - 8
        if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, room):
            raise ValueError("not a safetensors file, or cut off")
        return prefix + stream.read(length)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ModelError, which ends in `remedy`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: missing; {remedy}") from None
    except OSError as error:
        check_open_files(error, file)
        raise ModelError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({str(error).splitlines()[0]}); {remedy}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: not a JSON object; {remedy}")
    return content


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `dtype` is a name of `DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].bits // 8

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class SafetensorsWriter:
    """One file, written piece by piece, so that it may be larger than memory.

    Tensors lie in the order of `specs`; their bytes may be written in any order. Written with `pwrite` rather than
    through a memory map: a full disk is then an OSError, not a killed process.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        """metadata: entries for the header beside `format`. starts: where each tensor begins among the tensors'
        bytes, with zeros between them; None: one follows the other. Raises OSError."""
        self.path = path
        self.extents: dict[str, TensorExtent] = {}
        """Where the tensors' bytes lie, by name."""
        header: dict[str, object] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
        if starts is None:
            starts = [0, *accumulate(spec.num_bytes for spec in specs)][:-1]
        ends = [start + spec.num_bytes for spec, start in zip(specs, starts, strict=True)]
        for spec, start, end in zip(specs, starts, ends, strict=True):
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
        first = 8 + len(text)
        for spec, start in zip(specs, starts, strict=True):
            extent = TensorExtent(spec.name, path, first + start, spec.num_bytes, spec.dtype, spec.shape)
            self.extents[spec.name] = extent
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(0, len(text).to_bytes(8, "little") + text)
        os.ftruncate(self._descriptor, first + max(ends, default=0))
        for end, start in zip([0, *ends], starts, strict=False):
            self._write(first + end, bytes(start - end))  # not holes, which would cut the file's extents up

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def write_bytes(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Write `data` from byte `start` of tensor `name` on.

        Raises ValueError when it goes past the tensor's end, OSError when the disk is full.
        """
        extent = self.extents[name]
        if start + len(data) > extent.num_bytes:
            raise ValueError(f"{name}: {len(data)} bytes at {start} go past its {extent.num_bytes}")
        self._write(extent.offset + start, data)

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """What was written at `offset` of the file."""
        return os.pread(self._descriptor, num_bytes, offset)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._descriptor)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view[:MAX_IO_BYTES], offset)
            view, offset = view[written:], offset + written
