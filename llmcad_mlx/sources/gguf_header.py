"""What a GGUF file says about itself, read with every count, length and offset checked against the file.

The `gguf` package's own reader trusts the header: a hostile or cut-off file makes it allocate without bound
or fail somewhere in numpy. It also keeps each of 300,000 token strings as two arrays, which costs seconds.
So the header is parsed here; the type tables and the dequantisers are the package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llmcad_mlx.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MIN_FIELD_BYTES = 13  # empty key, value type, one byte
MIN_TENSOR_BYTES = 24  # empty name, no dimensions, type, offset

Kind = TypeVar("Kind")
Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file. `shape` is (rows, columns) as in numpy, or (length,) for a vector."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of one file; every tensor lies inside it."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


class _DamageError(Exception):
    """The header contradicts the file; the message says where."""


class _Cursor:
    """Reads forward through the mapped file and never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0
        self.size = len(data)

    def left(self) -> int:
        return self.size - self.at

    def scalar(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        self._need(size, "a value")
        (value,) = struct.unpack_from("<" + code, self._data, self.at)
        self.at += size
        result: int | float | bool = value
        return result

    def integer(self, code: str) -> int:
        return int(self.scalar(code))

    def count(self, code: str, min_bytes: int, what: str) -> int:
        """A number of things that take at least `min_bytes` each: more than fit in the file is damage."""
        number = self.integer(code)
        if number * min_bytes > self.left():
            raise _DamageError(f"{number} {what} cannot fit")
        return number

    def text(self) -> str:
        length = self.count("Q", 1, "characters of text")
        raw = self._data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"text at byte {self.at - length} is not UTF-8") from None

    def value(self) -> Value:
        kind = _member(GGUFValueType, self.integer("I"), "metadata type")
        if kind != GGUFValueType.ARRAY:
            return self._single(kind)
        item = _member(GGUFValueType, self.integer("I"), "metadata type")
        if item == GGUFValueType.ARRAY:
            raise _DamageError("it holds nested metadata arrays")
        return self._array(item)

    def _single(self, kind: GGUFValueType) -> Scalar:
        return self.text() if kind == GGUFValueType.STRING else self.scalar(_SCALAR_FORMATS[kind])

    def _array(self, kind: GGUFValueType) -> list[Scalar]:
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(self.count("Q", 8, "texts"))]
        code = _SCALAR_FORMATS[kind]
        size = struct.calcsize("<" + code)
        number = self.count("Q", size, "values")
        values = list(struct.unpack_from(f"<{number}{code}", self._data, self.at))
        self.at += number * size
        return values

    def _need(self, size: int, what: str) -> None:
        if size > self.left():
            raise _DamageError(f"it ends where {what} is expected, at byte {self.at}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of `path`.

    Raises ModelError: not a GGUF file, a version or byte order this cannot read, a header that contradicts
    the file's size, an unknown tensor type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except _DamageError as damage:
        raise ModelError(f"{path}: damaged or cut-off GGUF file: {damage}; fetch it again") from None
    except ValueError as error:  # mmap of an empty file
        raise ModelError(f"{path}: not a GGUF file ({error})") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    magic = struct.pack("<I", cursor.integer("I"))
    if magic != MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, not {MAGIC!r})")
    version = cursor.integer("I")
    if version not in VERSIONS:
        raise ModelError(f"{path}: GGUF version {version:#x} is not supported (little-endian 2 and 3 are)")
    num_tensors = cursor.count("Q", MIN_TENSOR_BYTES, "tensors")
    num_fields = cursor.count("Q", MIN_FIELD_BYTES, "metadata fields")
    metadata: dict[str, Value] = {}
    for _ in range(num_fields):
        key = cursor.text()
        if key in metadata:
            raise _DamageError(f"metadata field {key!r} occurs twice")
        metadata[key] = cursor.value()
    listed = [_tensor(cursor) for _ in range(num_tensors)]
    start = _data_start(cursor.at, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    return GgufHeader(path, metadata, _placed(listed, start, cursor.size))


def _tensor(cursor: _Cursor) -> GgufTensor:
    """A tensor's entry; `offset` still counts from the start of the data."""
    name = cursor.text()
    num_dimensions = cursor.integer("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _DamageError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.integer("Q") for _ in range(num_dimensions))[::-1]
    kind = _member(GGMLQuantizationType, cursor.integer("I"), f"type of tensor {name!r},")
    offset = cursor.integer("Q")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise _DamageError(f"tensor {name!r} of type {kind.name} has shape {shape}")
    return GgufTensor(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _data_start(at: int, alignment: Value) -> int:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamageError(f"its alignment is {alignment!r}")
    return (at + alignment - 1) // alignment * alignment


def _placed(listed: list[GgufTensor], start: int, size: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for entry in listed:
        offset = start + entry.offset
        if offset + entry.num_bytes > size:
            raise _DamageError(
                f"tensor {entry.name!r} ends at byte {offset + entry.num_bytes} of a file of {size} bytes"
            )
        if entry.name in tensors:
            raise _DamageError(f"tensor {entry.name!r} occurs twice")
        tensors[entry.name] = GgufTensor(entry.name, entry.kind, entry.shape, offset, entry.num_bytes)
    return tensors


def _member(enum: Callable[[int], Kind], number: int, what: str) -> Kind:
    try:
        return enum(number)
    except ValueError:
        raise _DamageError(f"{what} {number} is unknown") from None


def read_rows(path: Path, tensor: GgufTensor, first: int, count: int) -> npt.NDArray[np.uint8]:
    """Raw bytes of `count` rows from row `first`: (count, bytes per row) uint8.

    Raises ModelError when the file has become shorter than its header said.
    """
    row_bytes = tensor.num_bytes // tensor.rows
    with path.open("rb") as file:
        file.seek(tensor.offset + first * row_bytes)
        raw = np.fromfile(file, np.uint8, count * row_bytes)
    if raw.size != count * row_bytes:
        raise ModelError(f"{path}: the file became shorter while it was read; fetch it again")
    return raw.reshape(count, row_bytes)
