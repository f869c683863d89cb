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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_cursor import Cursor, DamageError, Value

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MIN_FIELD_BYTES = 13  # empty key, value type, one byte
MIN_TENSOR_BYTES = 24  # empty name, no dimensions, type, offset

MAX_FIELDS = 1 << 16  # far above any real model
MAX_TENSORS = 1 << 16

# Types ggml once had and has given up; files with them are still about.
_WITHDRAWN_KINDS = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
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


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of `path`.

    Raises ModelError: not a GGUF file, a version or byte order this cannot read, a header that contradicts
    the file's size, an unknown tensor type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, Cursor(data))
    except DamageError as damage:
        raise ModelError(f"{path}: damaged or cut-off GGUF file: {damage}; fetch it again") from None
    except ValueError as error:  # mmap of an empty file
        raise ModelError(f"{path}: not a GGUF file ({error})") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def _parse(path: Path, cursor: Cursor) -> GgufHeader:
    magic = struct.pack("<I", cursor.integer("I"))
    if magic != MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, not {MAGIC!r})")
    version = cursor.integer("I")
    if version not in VERSIONS:
        raise ModelError(f"{path}: GGUF version {version:#x} is not supported (little-endian 2 and 3 are)")
    num_tensors = cursor.count("Q", MIN_TENSOR_BYTES, "tensors")
    num_fields = cursor.count("Q", MIN_FIELD_BYTES, "metadata fields")
    if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
        raise DamageError(f"it claims {num_tensors} tensors and {num_fields} metadata fields")
    metadata: dict[str, Value] = {}
    for _ in range(num_fields):
        key = cursor.name()
        if key in metadata:
            raise DamageError(f"metadata field {key!r} occurs twice")
        metadata[key] = cursor.value()
    listed = [_tensor(path, cursor) for _ in range(num_tensors)]
    start = _data_start(cursor.at, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    return GgufHeader(path, metadata, _placed(listed, start, cursor.size))


def _tensor(path: Path, cursor: Cursor) -> GgufTensor:
    """A tensor's entry; `offset` still counts from the start of the data."""
    name = cursor.name()
    num_dimensions = cursor.integer("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise DamageError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.integer("Q") for _ in range(num_dimensions))[::-1]
    kind = _tensor_kind(path, name, cursor.integer("I"))
    offset = cursor.integer("Q")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise DamageError(f"tensor {name!r} of type {kind.name} has shape {shape}")
    return GgufTensor(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _tensor_kind(path: Path, name: str, number: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        kind = _WITHDRAWN_KINDS.get(number, f"number {number}")
        raise ModelError(
            f"{path}: tensor {name!r} has type {kind}, which is not supported; quantise the model anew"
        ) from None


def _data_start(at: int, alignment: Value) -> int:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise DamageError(f"its alignment is {alignment!r}")
    return (at + alignment - 1) // alignment * alignment


def _placed(listed: list[GgufTensor], start: int, size: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for entry in listed:
        offset = start + entry.offset
        if offset + entry.num_bytes > size:
            raise DamageError(
                f"tensor {entry.name!r} ends at byte {offset + entry.num_bytes} of a file of {size} bytes"
            )
        if entry.name in tensors:
            raise DamageError(f"tensor {entry.name!r} occurs twice")
        tensors[entry.name] = GgufTensor(entry.name, entry.kind, entry.shape, offset, entry.num_bytes)
    return tensors


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
