"""A GGUF file's rotary scaling as mlx-lm's `rope_scaling`.

Llama 3 files carry no scaling fields: a tensor divides each frequency instead. mlx-lm computes the same
numbers from four parameters, so those are found again by trying the published ones.
Formula: `Llama3RoPE` in mlx-lm's `rope_utils.py`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_groups import values
from llmcad_mlx.sources.gguf_header import GgufHeader, read_rows
from llmcad_mlx.sources.gguf_metadata import Metadata

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0


def read_rope_scaling(header: GgufHeader, metadata: Metadata, head_dim: int) -> dict[str, object] | None:
    """mlx-lm's `rope_scaling` record for the file, None when positions are not scaled.

    Raises ModelError for scaling other than linear and Llama 3's.
    """
    if ROPE_FACTORS in header.tensors:
        return _llama3_scaling(header, metadata, head_dim)
    kind = metadata.text(".rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = metadata.number(".rope.scaling.factor")
    if kind != "linear" or factor <= 0:
        raise ModelError(f"{header.path}: rotary scaling {kind!r} by {factor:g} is not supported (linear is)")
    return {"type": "linear", "factor": factor}


def _llama3_scaling(header: GgufHeader, metadata: Metadata, head_dim: int) -> dict[str, object]:
    tensor = header.tensors[ROPE_FACTORS]
    divisors = values(read_rows(header.path, tensor, 0, 1), tensor.kind).reshape(-1)
    base = metadata.number(".rope.freq_base", 10000.0)
    for factor in LLAMA3_FACTORS:
        expected = llama3_divisors(head_dim, base, factor)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    raise ModelError(f"{header.path}: the frequencies in {ROPE_FACTORS} are not those of a known Llama 3 model")


def llama3_divisors(head_dim: int, base: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each of its head_dim / 2 frequencies by: (head_dim / 2,) float64."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
