"""GGUF's blocks as MLX's groups, for every type people's files hold, against the `gguf` package's dequantisers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten

from llmcad_mlx.gguf import convert as gguf_convert
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.groups import group_rows, kept_bits
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.models.folder import read_config
from llmcad_mlx.progress import Progress
from tests.gguf.test_model import dense
from tests.gguf.test_reader import little_memory
from tests.support.tiny_gguf import Family, random_blocks, write_family_gguf

KINDS = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K,
    Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S,
    Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ1_S, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4,
)  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # rows of whole superblocks


def dequantised(raw: np.ndarray, kind: Kind, bits: int = 4, group_size: int = 32) -> np.ndarray:
    groups = group_rows(raw, kind, bits, group_size)
    scales, biases = (mx.array(part).astype(mx.float32) for part in (groups.scales, groups.biases))
    return np.array(mx.dequantize(mx.array(groups.codes), scales, biases, group_size, bits))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_blocks_of_equal_form_are_kept_exactly(kind: Kind) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    raw = quantize(weights, kind)
    assert np.array_equal(dequantised(raw, kind, kept_bits(kind) or 0), dequantize(raw, kind))


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_K, 4), (Kind.Q5_K, 5)])
def test_codes_of_superblocks_are_kept_and_only_scales_are_rounded(kind: Kind, bits: int) -> None:
    raw = random_blocks(kind, (5, 768), np.random.default_rng(1))
    exact, ours = dequantize(raw, kind), dequantised(raw, kind, bits)
    blocks = raw.reshape(5, 3, -1)
    top = 63 * blocks[..., :4].copy().view(np.float16).astype(np.float32).max() * 2**bits
    # Each of scale * code and bias is off by at most half a unit in the last of float16's 11 bits.
    assert np.abs(exact - ours).max() <= top * 2**-11
    assert np.corrcoef(exact.ravel(), ours.ravel())[0, 1] > 0.999999


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_fitted_groups_are_better_than_spanning_each_group(bits: int, group_size: int) -> None:
    weights = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    spanned = mx.dequantize(*mx.quantize(mx.array(weights), group_size, bits), group_size, bits)
    ours = dequantised(weights.view(np.uint8), Kind.F32, bits, group_size)
    assert np.square(weights - ours).sum() < 0.95 * np.square(weights - np.array(spanned)).sum()


def test_constant_and_zero_groups() -> None:
    weights = np.repeat(np.array([[0.0, 0.5, -3.0, 2.0**-20]], np.float32), 32, axis=1)
    assert np.array_equal(dequantised(weights.view(np.uint8), Kind.F32), weights)


def require_within_a_step(found: np.ndarray, exact: np.ndarray, bits: int) -> None:
    groups = exact.reshape(exact.shape[0], -1, 32)
    steps = np.ptp(groups, axis=-1, keepdims=True) / (2**bits - 1)  # what one code is worth
    rounding = 2.0**-10 * np.abs(exact).max()  # of scale and bias to float16
    # Fitted by least squares: a group's extremes may be further than a code from what they were.
    assert (np.abs(found.reshape(groups.shape) - groups) <= 1.25 * steps + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_one_type_becomes_a_model(tmp_path: Path, kind: Kind) -> None:
    """Through rows put back in order, files and mlx-lm's loader; 8 bits are near enough to tell rows apart."""
    family = Family("llama", "llama", WIDE, kind=kind)
    original = dict(tree_flatten(write_family_gguf(tmp_path / "tiny.gguf", family).parameters()))
    assert read_gguf_header(tmp_path / "tiny.gguf").tensors["blk.0.attn_q.weight"].kind == kind
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", bits=8)
    for name, array in tree_flatten(dense(tmp_path / "out").parameters()):
        found, exact = np.array(array), np.array(original[name])
        if exact.ndim == 1:
            assert np.array_equal(found, exact), name
        else:
            require_within_a_step(found, exact, 8)


@pytest.mark.parametrize(
    ("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q5_0, 5), (Kind.Q8_0, 8), (Kind.Q6_K, 6), (Kind.F16, 4)]
)
def test_matrices_keep_their_precision(tmp_path: Path, kind: Kind, bits: int) -> None:
    """The configuration says so in the way of mlx-lm, which then computes with the same numbers."""
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    write_family_gguf(tmp_path / "tiny.gguf", Family("llama", "llama", WIDE, kind=kind))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=progress)
    assert read_config(tmp_path / "out")["quantization"]["bits"] == bits
    assert notes[0] == f"weights: 100% {kind.name} in {bits} bits"


def test_memory_is_that_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 8 MB as float32 in steps of 256 KB: no part of the way holds a whole one."""
    wide = WIDE | {"intermediate_size": 1 << 13}
    write_family_gguf(tmp_path / "tiny.gguf", Family("llama", "llama", wide, kind=Kind.Q6_K))
    monkeypatch.setattr(gguf_convert, "CHUNK_VALUES", 1 << 16)
    with little_memory(8 << 20):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
