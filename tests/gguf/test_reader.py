"""GGUF headers: read as the `gguf` package reads them; damaged ones and those made to fill memory are refused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.errors import LlmcadError, ModelError
from llmcad_mlx.gguf.convert import convert_gguf, plan_weights
from llmcad_mlx.gguf.model import read_family
from llmcad_mlx.gguf.reader import read_gguf_header, read_rows
from llmcad_mlx.gguf.tokenizer import read_tokenizer
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", Kind.Q5_0)
    header = read_gguf_header(tiny)
    reader = GGUFReader(tiny)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert [tensor.name for tensor in reader.tensors] == list(header.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.kind, ours.offset, ours.num_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert read_rows(tiny, ours, 0, ours.rows).tobytes() == tensor.data.tobytes()


def parse_all(path: Path) -> None:
    """Everything a conversion does before it writes."""
    header = read_gguf_header(path)
    model = read_family(header)
    read_tokenizer(header)
    plan_weights(header, model, 4, 32)


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny_bytes: bytes, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(tiny_bytes[: int(share * len(tiny_bytes))])
    with pytest.raises(ModelError, match=r"cut\.gguf: (damaged or cut-off|not a) GGUF file") as caught:
        parse_all(path)
    assert "\n" not in str(caught.value)


EXTREMES = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=200)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([1, 4, 8]), EXTREMES), min_size=1, max_size=3))
def test_a_hostile_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, tiny_bytes: bytes, edits: list[tuple[float, int, int]]
) -> None:
    """Numbers anywhere in the header are replaced. Nothing but our own one-line errors may come out."""
    header_bytes = tiny_bytes.index(b"output_norm.weight")  # the last tensor listed
    damaged = bytearray(tiny_bytes)
    for share, size, value in edits:
        at = 4 + int(share * header_bytes)
        damaged[at : at + size] = (value % 256**size).to_bytes(size, "little")
    path = tmp_path_factory.mktemp("hostile") / "hostile.gguf"
    path.write_bytes(damaged)
    try:
        parse_all(path)
    except LlmcadError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello, this is no model")
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for name, message in (
        ("text", "text: .*GGUF file"),
        ("lfs", "lfs: is a pointer of git-lfs, not the file"),
        ("missing", "missing: cannot be read"),
    ):
        with pytest.raises(ModelError, match=message):
            convert_gguf(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [31, 999])
def test_types_that_are_gone_or_unknown_are_named(tmp_path: Path, number: int) -> None:
    data = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    entry = data.index(b"blk.0.attn_v.weight") + len("blk.0.attn_v.weight")
    at = entry + 4 + 2 * 8  # the number of dimensions and both of them
    (tmp_path / "tiny.gguf").write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ModelError, match=rf"tensor 'blk.0.attn_v.weight' has type number {number}, which is not"):
        read_gguf_header(tmp_path / "tiny.gguf")


HUGE_FILE = 1 << 30  # sparse: it takes no room on the disk


@contextmanager
def little_memory(limit: int = 64 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
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


def array(kind: GGUFValueType, count: int) -> bytes:
    return start(0, 1) + field(GGUFValueType.ARRAY) + struct.pack("<IQ", kind, count)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (start(1 << 20, 1), "1048576 tensors and 1 metadata fields"),
        (start(1, 1 << 22), "1 tensors and 4194304 metadata fields"),
        (start(1 << 60, 1), "tensors cannot fit"),
        (start(0, 1) + field(GGUFValueType.STRING) + struct.pack("<Q", 1 << 29), "characters of text cannot fit"),
        (start(0, 1) + struct.pack("<Q", 1 << 20), "takes 1048576 bytes"),
        (array(GGUFValueType.UINT8, 1 << 25), "arrays hold more than 4194304 values"),
        (array(GGUFValueType.UINT64, 1 << 26), "67108864 values cannot fit"),
        (array(GGUFValueType.STRING, (1 << 22) + 1), "arrays hold more than 4194304 texts"),
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
    values = struct.pack("<IQ", GGUFValueType.UINT8, 1 << 21) + bytes(1 << 21)
    fields = (field(GGUFValueType.ARRAY, name) + values for name in (b"a", b"b", b"c"))
    path = sparse(tmp_path / "huge.gguf", start(0, 3) + b"".join(fields))
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
        ("llama.attention.head_count", list(range(100_000)), "head_count is missing or unusable"),
    ],
)
def test_sizes_no_tensor_bears_out(tmp_path: Path, key: str, value: Any, message: str) -> None:
    """With the frequencies of Llama 3 in the file, which are computed for as many dimensions as it claims."""

    def frequencies(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf", edit=frequencies))
    header.metadata[key] = value
    with little_memory(), pytest.raises(ModelError, match=message) as caught:
        read_family(header)
    assert len(str(caught.value)) < 300
