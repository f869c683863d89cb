"""Whether Metal computes what the CPU does. A virtual machine's GPU may say that it is there and give zeros.

``python tests/metal_computes.py``: exit code 0 where it does.
"""

from __future__ import annotations

import sys

import mlx.core as mx


def largest_difference() -> float:
    """Of a quantised product, a rotation and an attention, each with operations of Metal kernels of their own."""
    x = mx.random.normal((1, 4, 8, 64), key=mx.random.key(0))
    weight = mx.quantize(mx.random.normal((64, 64), key=mx.random.key(1)), group_size=32, bits=4)
    found = []
    for device in (mx.cpu, mx.gpu):
        with mx.stream(device):
            rows = mx.quantized_matmul(x, *weight, group_size=32, bits=4)
            turned = mx.fast.rope(rows, 64, traditional=False, base=10000.0, scale=1.0, offset=3)
            found.append(mx.fast.scaled_dot_product_attention(turned, turned, rows, scale=0.125))
    mx.eval(found)
    assert mx.max(mx.abs(found[0])).item() > 0.1
    return float(mx.max(mx.abs(found[0] - found[1])).item())


if __name__ == "__main__":
    if not mx.metal.is_available():
        sys.exit("Metal is not available")
    difference = largest_difference()
    print(f"Metal and the CPU differ by {difference:.2g}")
    sys.exit(0 if difference < 0.01 else 1)
