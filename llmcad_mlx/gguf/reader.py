"""What a GGUF file says about itself, read with every count, length and offset checked against the file.

The `gguf` package's own reader trusts the header: a hostile or cut-off file makes it allocate without bound
or fail somewhere in numpy. It also keeps each of 300,000 token strings as two arrays, which costs seconds.
So the header is parsed here; the type tables and the dequantisers are the package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import reprlib
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import POINTER, check_open_files, is_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MIN_FIELD_BYTES = 13  # empty key, value type, one byte
MIN_TENSOR_BYTES = 24  # empty name, no dimensions, type, offset

# Far above any real model; a header past them is hostile and would only fill the memory.
MAX_HEADER_BYTES = 1 << 26  # tokens, scores and merges of the largest vocabularies: 20 MB
MAX_ARRAY_ITEMS = 1 << 22  # over the whole header; 262,144 tokens with their merges: 1.3 million
MAX_ENTRIES = 1 << 16  # fields, tensors
MAX_NAME_BYTES = 1 << 10
MAX_FAMILY_LENGTH = 64  # errors repeat it

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]
T = TypeVar("T", str, int, float, bool)

_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


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
    """Metadata and tensors of one file; every tensor lies inside it.

    The methods that read a field take its key, with the family's name in front where the key starts with a dot.
    They raise ModelError naming the field when it is missing, without a default, or is not what it should be.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def family(self) -> str:
        """The architecture's name. Raises ModelError when the file does not say."""
        family = self.metadata.get("general.architecture")
        if not isinstance(family, str) or len(family) > MAX_FAMILY_LENGTH:
            raise self.refused("GGUF file without general.architecture; it is not a model")
        return family

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def field(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of exactly this type."""
        value = self.metadata.get(self._full(key), default)
        if type(value) is not kind:
            raise self.wrong(key, value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. A per-layer array of equal numbers counts as that number."""
        value = self.metadata.get(self._full(key))
        if isinstance(value, list) and value and type(value[0]) is int and value.count(value[0]) == len(value):
            return value[0]
        return self.field(key, int, default)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 field as the shortest decimal that is the same float32: 1e-06, not 9.99999997e-07."""
        value = self.field(key, float, default)
        if not math.isfinite(value):
            raise self.wrong(key, value)
        return shortest_float32(value)

    def above_zero(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value)
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        """An array whose items are all of the type `kind`."""
        value = self.metadata.get(self._full(key))
        found = [item for item in value if type(item) is kind] if isinstance(value, list) else []
        if not isinstance(value, list) or len(found) != len(value):
            raise self.wrong(key, type(value).__name__)
        return found

    def refused(self, why: str) -> ModelError:
        """The error for a file that cannot become a model here."""
        return ModelError(f"{self.path}: {why}")

    def wrong(self, key: str, value: object) -> ModelError:
        """The error for a field that is missing or cannot be used."""
        short = reprlib.Repr()  # one line, even where a file holds a list of millions
        short.maxstring = short.maxother = 80
        shown = short.repr(value)
        return self.refused(f"GGUF field {self._full(key)} is missing or unusable ({shown})")

    def _full(self, key: str) -> str:
        return self.family + key if key.startswith(".") else key


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same float32; `value` itself where it is none."""
    if abs(value) > np.finfo(np.float32).max:
        return value
    return float(str(np.float32(value)))


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of `path`. Raises ModelError: not a GGUF file, a version or byte order this cannot read, a header
    that contradicts the file's size, an unknown tensor type."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data))
    except ValueError as error:  # mmap of an empty file
        raise ModelError(f"{path}: not a GGUF file ({error})") from None
    except OSError as error:
        check_open_files(error, path)
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_rows(path: Path, tensor: GgufTensor, first: int, count: int) -> npt.NDArray[np.uint8]:
    """Raw bytes of `count` rows from row `first`: (count, bytes per row) uint8. Raises ModelError when the file
    has become shorter than its header said."""
    row_bytes = tensor.num_bytes // tensor.rows
    with path.open("rb") as file:
        file.seek(tensor.offset + first * row_bytes)
        raw = np.fromfile(file, np.uint8, count * row_bytes)
    if raw.size != count * row_bytes:
        raise ModelError(f"{path}: the file became shorter while it was read; fetch it again")
    return raw.reshape(count, row_bytes)


def _parse(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    if is_pointer(path):
        raise ModelError(f"{path}: {POINTER}")
    magic = struct.pack("<I", cursor.integer("I"))
    if magic != MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, not {MAGIC!r})")
    version = cursor.integer("I")
    if version not in VERSIONS:
        raise ModelError(f"{path}: GGUF version {version:#x} is not supported (little-endian 2 and 3 are)")
    num_tensors = cursor.count(MIN_TENSOR_BYTES, "tensors")
    num_fields = cursor.count(MIN_FIELD_BYTES, "metadata fields")
    if max(num_tensors, num_fields) > MAX_ENTRIES:
        raise cursor.damage(f"it claims {num_tensors} tensors and {num_fields} metadata fields")
    metadata: dict[str, Value] = {}
    for _ in range(num_fields):
        key = cursor.text(MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.damage(f"metadata field {key!r} occurs twice")
        metadata[key] = cursor.value()
    listed = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damage(f"its alignment is {alignment!r}")
    start = (cursor.at + alignment - 1) // alignment * alignment
    tensors: dict[str, GgufTensor] = {}
    for entry in listed:
        tensor = replace(entry, offset=start + entry.offset)
        end = tensor.offset + tensor.num_bytes
        if end > cursor.size:
            raise cursor.damage(f"tensor {entry.name!r} ends at byte {end} of a file of {cursor.size} bytes")
        if entry.name in tensors:
            raise cursor.damage(f"tensor {entry.name!r} occurs twice")
        tensors[entry.name] = tensor
    return GgufHeader(path, metadata, tensors)


def _tensor(cursor: _Cursor) -> GgufTensor:
    """A tensor's entry; `offset` still counts from the start of the data."""
    name = cursor.text(MAX_NAME_BYTES)
    num_dimensions = cursor.integer("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.damage(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.integer("Q") for _ in range(num_dimensions))[::-1]
    number = cursor.integer("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ModelError(
            f"{cursor.path}: tensor {name!r} has type number {number}, which is not supported; "
            "quantise the model anew"
        ) from None
    offset = cursor.integer("Q")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.damage(f"tensor {name!r} of type {kind.name} has shape {shape}")
    return GgufTensor(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


class _Cursor:
    """Reads forward through the mapped file, never past its end or what a header may hold: ModelError for one that
    contradicts the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._items_left = MAX_ARRAY_ITEMS
        self.at = 0
        self.size = len(data)

    def damage(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: damaged or cut-off GGUF file: {what}; fetch it again")

    def _left(self) -> int:
        return min(self.size, MAX_HEADER_BYTES) - self.at

    def scalar(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        if size > self._left():
            raise self.damage(f"it ends where a value is expected, at byte {self.at}")
        (value,) = struct.unpack_from("<" + code, self._data, self.at)
        self.at += size
        result: int | float | bool = value
        return result

    def integer(self, code: str) -> int:
        return int(self.scalar(code))

    def count(self, min_bytes: int, what: str) -> int:
        """A number of things that take at least `min_bytes` each: more than fit in the file is damage."""
        number = self.integer("Q")
        if number * min_bytes > self._left():
            raise self.damage(f"{number} {what} cannot fit")
        return number

    def text(self, most: int = MAX_HEADER_BYTES) -> str:
        """Errors repeat the name of a field or tensor, so `most` of its bytes is little."""
        length = self.count(1, "characters of text")
        if length > most:
            raise self.damage(f"a name at byte {self.at} takes {length} bytes")
        raw = self._data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damage(f"text at byte {self.at - length} is not UTF-8") from None

    def value(self) -> Value:
        kind = self._value_type()
        if kind == GGUFValueType.ARRAY:
            return self._array(self._value_type())
        return self.text() if kind == GGUFValueType.STRING else self.scalar(_SCALAR_FORMATS[kind])

    def _value_type(self) -> GGUFValueType:
        number = self.integer("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.damage(f"metadata type {number} is unknown") from None

    def _array(self, kind: GGUFValueType) -> list[Scalar]:
        if kind == GGUFValueType.ARRAY:
            raise self.damage("it holds nested metadata arrays")
        code, what = _SCALAR_FORMATS.get(kind, "Q"), "texts" if kind == GGUFValueType.STRING else "values"
        size = struct.calcsize(code)
        number = self.count(size, what)
        if number > self._items_left:
            raise self.damage(f"its metadata arrays hold more than {MAX_ARRAY_ITEMS} {what}")
        self._items_left -= number
        if kind == GGUFValueType.STRING:  # each begins with its length
            return [self.text() for _ in range(number)]
        values = list(struct.unpack_from(f"<{number}{code}", self._data, self.at))
        self.at += number * size
        return values
