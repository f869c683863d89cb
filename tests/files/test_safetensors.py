"""Headers of safetensors files: what contradicts itself is refused, and each is read once for a load."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import load
from llmcad_mlx.errors import ModelError
from llmcad_mlx.files import safetensors
from llmcad_mlx.files.safetensors import read_tensors
from tests.support.tiny_folder import write_bundle


def write_header(file: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "Q4_K", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [0], "data_offsets": [-8, -8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, entry: object) -> None:
    with pytest.raises(ModelError, match="corrupt at tensor 'tensor'"):
        read_tensors(write_header(tmp_path / "a.safetensors", {"tensor": entry}))


def test_tensors_that_overlap_and_sizes_that_differ(tmp_path: Path) -> None:
    def tensor(start: int) -> dict[str, Any]:
        return {"dtype": "U8", "shape": [5], "data_offsets": [start, start + 5]}

    file = write_header(tmp_path / "a.safetensors", {"a": tensor(3), "b": tensor(0)})
    with pytest.raises(ModelError, match="corrupt at tensor 'a'"):
        read_tensors(file)
    write_header(file, {"a": tensor(5), "b": tensor(0), "__metadata__": {"a": "b"}}, bytes(10))
    assert [extent.name for extent in read_tensors(file)] == ["b", "a"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match=r"a\.safetensors: \d+ bytes, its header promises \d+; download it again"):
        read_tensors(file)


@pytest.mark.parametrize("content", [b"[]", b"[" * 10**5, b"\xff\xfe", b'{"a"'])
def test_headers_that_are_no_objects(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(ModelError, match=r"its header is corrupt; download it again"):
        read_tensors(file)


@pytest.mark.parametrize("options", [{}, {"pinned": 0}, {"pinned": 0, "verify": True}])
def test_a_load_reads_each_header_once(
    folder: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    write_bundle(folder, tmp_path / "bundle")
    read: Counter[str] = Counter()
    header_bytes = safetensors.header_bytes

    def counting(file: Path) -> bytes:
        read[file.name] += 1
        return header_bytes(file)

    monkeypatch.setattr(safetensors, "header_bytes", counting)
    with load(tmp_path / "bundle", None, **options):
        assert read == {"model.safetensors": 1}
