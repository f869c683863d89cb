"""GGUF headers made to fill the memory are refused while little of it is in use."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.model import read_family
from llmcad_mlx.gguf.reader import read_gguf_header
from tests.support.tiny_gguf import write_tiny_gguf

HUGE_FILE = 1 << 30  # sparse: it takes no room on the disk
LITTLE = 64 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def sparse(path: Path, start: bytes) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(HUGE_FILE)
    return path


def start(num_tensors: int, num_fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields)


def field(kind: GGUFValueType, name: bytes = b"a") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


ARRAY = field(GGUFValueType.ARRAY)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (start(1 << 20, 1), "1048576 tensors and 1 metadata fields"),
        (start(1, 1 << 22), "1 tensors and 4194304 metadata fields"),
        (start(1 << 60, 1), "tensors cannot fit"),
        (start(0, 1) + field(GGUFValueType.STRING) + struct.pack("<Q", 1 << 29), "characters of text cannot fit"),
        (start(0, 1) + struct.pack("<Q", 1 << 20), "takes 1048584 bytes"),
        (
            start(0, 1) + ARRAY + struct.pack("<IQ", GGUFValueType.UINT8, 1 << 25),
            "arrays hold more than 4194304 values",
        ),
        (
            start(0, 1) + ARRAY + struct.pack("<IQ", GGUFValueType.UINT64, 1 << 26),
            "67108864 values cannot fit",
        ),
        (
            start(0, 1) + ARRAY + struct.pack("<IQ", GGUFValueType.STRING, (1 << 22) + 1),
            "arrays hold more than 4194304 texts",
        ),
    ],
    ids=["tensors", "fields", "more tensors than bytes", "text", "name", "bytes", "numbers", "texts"],
)
def test_counts_past_any_model(tmp_path: Path, head: bytes, message: str) -> None:
    path = sparse(tmp_path / "huge.gguf", head)
    with little_memory(), pytest.raises(ModelError, match=message) as caught:
        read_gguf_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_array_items_are_counted_over_all_fields(tmp_path: Path) -> None:
    parts = [start(0, 3)]
    for name in (b"a", b"b", b"c"):
        parts += [
            field(GGUFValueType.ARRAY, name),
            struct.pack("<IQ", GGUFValueType.UINT8, 1 << 21),
            bytes(1 << 21),
        ]
    path = sparse(tmp_path / "huge.gguf", b"".join(parts))
    with pytest.raises(ModelError, match="arrays hold more than"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**32 - 1, "llama.block_count is missing or unusable"),
        ("llama.embedding_length", 2**31, "'token_embd.weight' is .*, but the header asks for rows of 2147483648"),
        ("llama.feed_forward_length", 2**31, "'blk.0.ffn_down.weight' is .*, but the header asks for rows of"),
        ("llama.attention.head_count", 2**31, "'blk.0.attn_output.weight' is .*, but the header asks for"),
        ("llama.attention.key_length", 2**31, "'blk.0.attn_output.weight' is .*, but the header asks for"),
        ("llama.attention.head_count_kv", 2**31, "head_count_kv is missing or unusable"),
        ("llama.rope.dimension_count", 2**31, "2147483648 rotated dimensions are not supported"),
        ("llama.rope.freq_base", 0.0, "rope.freq_base is missing or unusable"),
        ("general.architecture", "x" * 5000, "without general.architecture"),
    ],
)
def test_sizes_no_tensor_bears_out(tmp_path: Path, key: str, value: float | str, message: str) -> None:
    """With the frequencies of Llama 3 in the file, which are computed for as many dimensions as it claims."""

    def frequencies(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf", edit=frequencies).path)
    header.metadata[key] = value
    with little_memory(), pytest.raises(ModelError, match=message) as caught:
        read_family(header)
    assert len(str(caught.value)) < 300


def test_frequencies_for_other_heads(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(1 << 16, np.float32))

    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf", edit=edit).path)
    with pytest.raises(ModelError, match=r"'rope_freqs.weight' is \(65536,\), expected \(8,\)"):
        read_family(header)


def test_a_long_list_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf").path)
    header.metadata["llama.attention.head_count"] = list(range(100_000))
    with pytest.raises(ModelError, match="head_count is missing or unusable") as caught:
        read_family(header)
    assert len(str(caught.value)) < 300
