"""How far 4-bit groups are from the weights of a GGUF file, by tensor type.

python -m convert.quantisation_error model.gguf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from convert import exit_code_of
from llmcad_mlx.gguf.groups import group_rows, values
from llmcad_mlx.gguf.reader import read_gguf_header, read_rows

BITS, GROUP_SIZE, MAX_ROWS = 4, 32, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    path = parser.parse_args().file
    sums: dict[str, npt.NDArray[np.float64]] = {}  # squares of weights, of our errors, of those of mx.quantize
    for tensor in read_gguf_header(path).tensors.values():
        if len(tensor.shape) < 2:
            continue
        raw = read_rows(path, tensor, 0, min(tensor.rows, MAX_ROWS))
        exact = values(raw, tensor.kind)
        groups = group_rows(raw, tensor.kind, BITS, GROUP_SIZE)
        ours = squared_error(exact, mx.array(groups.codes), mx.array(groups.scales), mx.array(groups.biases))
        theirs = squared_error(exact, *mx.quantize(mx.array(exact), GROUP_SIZE, BITS))
        found = np.array([np.square(exact).sum(), ours, theirs])
        sums[tensor.kind.name] = sums.get(tensor.kind.name, 0.0) + found
    print("type    here     mx.quantize   (root mean square error / root mean square weight)")
    for kind, (weights, *errors) in sums.items():
        here, spanned = (100 * (error / weights) ** 0.5 for error in errors)
        print(f"{kind:6} {here:6.2f} %   {spanned:6.2f} %")


def squared_error(exact: npt.NDArray[np.float32], codes: mx.array, scales: mx.array, biases: mx.array) -> float:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return float(np.square(exact - np.array(mx.dequantize(codes, scales, biases, GROUP_SIZE, BITS))).sum())


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
