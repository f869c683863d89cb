"""What is read at once and where it lies in a buffer: a decoder layer, a piece of the head."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.streaming.modules import Placement
from llmcad_mlx.streaming.stream import Read, Unit
from llmcad_mlx.streaming.weights import Matrix, StoredParameter, StreamParts

_ALIGNMENT = 64  # of a tensor in a buffer
_PIECE_ROWS = 64  # a piece of the head has a multiple of so many rows, as the kernels' blocks do

Placed = tuple[Unit, list[Placement]]


def in_order(parts: StreamParts, layers: Sequence[int], pieces: Sequence[Placed]) -> list[Placed]:
    """The units of one pass."""
    return [*(_placed(f"layer {number}", parts.layers[number]) for number in layers), *pieces]


def _placed(name: str, parameters: Sequence[StoredParameter]) -> Placed:
    """Lay parameters out in a buffer, in the order of the file so that reading is sequential."""
    offset, reads, places = 0, [], []
    for p in sorted(parameters, key=lambda p: (str(p.extent.file), p.extent.offset)):
        reads.append(Read(p.extent.file, p.extent.offset, p.extent.num_bytes, offset))
        places.append(Placement(p.module, p.name, offset, p.extent.num_bytes, p.extent.shape, p.stored, p.wanted))
        offset += -(-p.extent.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return Unit(name, tuple(reads)), places


def pieces_of(matrix: Matrix, count: int) -> list[Placed]:
    """The head's rows in at most `count` pieces."""
    size = -(-matrix.num_rows // count)
    size = -(-size // _PIECE_ROWS) * _PIECE_ROWS
    found = []
    for first in range(0, matrix.num_rows, size):
        rows = min(size, matrix.num_rows - first)
        offset, reads, places = 0, [], []
        for p in matrix.parameters:
            row_bytes = p.extent.num_bytes // matrix.num_rows
            num_bytes = rows * row_bytes
            reads.append(Read(p.extent.file, p.extent.offset + first * row_bytes, num_bytes, offset))
            shape = (rows, *p.extent.shape[1:])
            places.append(Placement(p.module, p.name, offset, num_bytes, shape, p.stored, p.wanted))
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        found.append((Unit(f"head rows {first} to {first + rows}", tuple(reads)), places))
    return found


def pieces_like_layers(parts: StreamParts) -> list[Placed]:
    """The head in pieces no larger than a layer, or a megabyte."""
    head = parts.head_matrix
    if head is None:
        return []
    return pieces_of(head, -(-head.num_bytes // max(max(parts.layer_bytes, default=0), 1 << 20)))
