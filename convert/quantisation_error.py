"""How far 4-bit groups are from the weights of a GGUF file, by tensor type.

python convert/quantisation_error.py model.gguf
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from llmcad_mlx.gguf.groups import group_rows, values
from llmcad_mlx.gguf.reader import read_gguf_header, read_rows

BITS, GROUP_SIZE, MAX_ROWS = 4, 32, 2048


@dataclass(slots=True)
class Squares:
    """Sums over the tensors of one type."""

    weights: float = 0.0
    ours: float = 0.0
    spanned: float = 0.0


def main(path: Path) -> None:
    sums: defaultdict[str, Squares] = defaultdict(Squares)
    for tensor in read_gguf_header(path).tensors.values():
        if len(tensor.shape) < 2:
            continue
        raw = read_rows(path, tensor, 0, min(tensor.rows, MAX_ROWS))
        exact = values(raw, tensor.kind)
        groups = group_rows(raw, tensor.kind, BITS, GROUP_SIZE)
        ours = (mx.array(groups.codes), mx.array(groups.scales), mx.array(groups.biases))
        total = sums[tensor.kind.name]
        total.weights += float(np.square(exact).sum())
        total.ours += squared_error(exact, *ours)
        total.spanned += squared_error(exact, *mx.quantize(mx.array(exact), GROUP_SIZE, BITS))
    print("type    here     mx.quantize   (root mean square error / root mean square weight)")
    for kind, total in sums.items():
        here, spanned = (100 * (part / total.weights) ** 0.5 for part in (total.ours, total.spanned))
        print(f"{kind:6} {here:6.2f} %   {spanned:6.2f} %")


def squared_error(exact: np.ndarray, codes: mx.array, scales: mx.array, biases: mx.array) -> float:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return float(np.square(exact - np.array(mx.dequantize(codes, scales, biases, GROUP_SIZE, BITS))).sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
