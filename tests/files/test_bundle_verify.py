"""`verify=True`: an altered byte of a bundle is found wherever it lies, when it is loaded or while it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import load
from llmcad_mlx.cli.main import run
from llmcad_mlx.errors import ModelError, StorageError, UsageError
from llmcad_mlx.files.bundle import read_bundle
from llmcad_mlx.files.safetensors import read_weights
from llmcad_mlx.streaming.build import Prepared
from llmcad_mlx.streaming.storage import FileStorage
from tests.support.tiny_folder import copy_folder, family_folder, make_folder, write_bundle

PROMPT = "then the other one ran in and then the other one"
LAYERS = 5
ALTERED = r"model\.safetensors: {} was altered .*; fetch or convert the model again"


pytestmark = pytest.mark.usefixtures("tiny_home", "streams_small_matrices")


def _bundle(folder: Path) -> Path:
    out = folder.parent / f"{folder.name}-bundle"
    write_bundle(folder, out)
    return out


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "stock", layers=LAYERS)


@pytest.fixture(scope="module")
def bundle(stock: Path) -> Path:
    return _bundle(stock)


@pytest.fixture(scope="module")
def tied(stock: Path) -> Path:
    """A quantised model whose embedding is the head."""
    shape = {"tie_word_embeddings": True, "intermediate_size": 64}
    return _bundle(family_folder(stock.parent / "tied", "qwen2", bits=4, **shape))


@pytest.fixture(scope="module")
def expected(stock: Path) -> list[int]:
    with load(stock, None) as engine:
        return engine.generate(PROMPT, max_tokens=12).tokens


def alter(folder: Path, tensor: str, share: float = 0.5) -> None:
    """Flip a bit of a tensor, as a failing disk would: the file's size and times stay."""
    extent = read_weights(folder)[tensor]
    before = os.stat(extent.file)
    with extent.file.open("r+b") as file:
        at = extent.offset + int(share * extent.num_bytes)
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    os.utime(extent.file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_unaltered_bundle_gives_the_resident_tokens(bundle: Path, expected: list[int]) -> None:
    with load(bundle, None, pinned=0) as engine:
        assert engine.pair.plan is not None
        total = engine.pair.plan.streamed_bytes
    for pinned in (0, total // 3, total):
        with load(bundle, "ngram", pinned=pinned, verify=True) as engine:
            assert engine.generate(PROMPT, max_tokens=12, tree_nodes=6).tokens == expected
            assert engine.generate(PROMPT + " x", max_tokens=12).stats.target_passes > 0
    with load(bundle, None, verify=True) as engine:  # wholly in memory
        assert engine.pair.plan is not None
        assert engine.pair.plan.streamed_bytes == 0
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected


def test_an_unaltered_tied_bundle_gives_the_resident_tokens(tied: Path) -> None:
    with load(tied, None) as engine:
        tokens = engine.generate(PROMPT, max_tokens=12).tokens
    with load(tied, None, pinned=0, verify=True) as engine:
        assert engine.generate(PROMPT, max_tokens=12).tokens == tokens


@pytest.mark.parametrize("pinned", [0, 10**9], ids=["streamed", "pinned"])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        f"model.layers.{LAYERS - 1}.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_byte_altered_before_loading_is_found(
    bundle: Path, tmp_path: Path, tensor: str, pinned: int, share: float
) -> None:
    folder = copy_folder(bundle, tmp_path / "copy")
    alter(folder, tensor, share)
    with pytest.raises(StorageError, match=ALTERED.format(tensor)) as caught:
        load(folder, None, pinned=pinned, verify=True)
    assert str(folder) in str(caught.value)
    with load(folder, None, pinned=pinned):  # nobody asked
        pass


@pytest.mark.parametrize("tensor", ["weight", "scales", "biases"])
def test_every_part_of_a_quantised_head_is_checked(tied: Path, tmp_path: Path, tensor: str) -> None:
    folder = copy_folder(tied, tmp_path / "copy")
    alter(folder, f"model.embed_tokens.{tensor}")
    with pytest.raises(StorageError, match=ALTERED.format(rf"model\.embed_tokens\.{tensor}")):
        load(folder, None, pinned=0, verify=True)


@pytest.mark.parametrize(
    ("tensor", "unit"),
    [("model.layers.3.mlp.up_proj.weight", "layer 3"), ("lm_head.weight", "head rows 0 to [0-9]+")],
)
def test_a_streamed_byte_altered_while_running_is_found(
    bundle: Path, tmp_path: Path, expected: list[int], tensor: str, unit: str
) -> None:
    folder = copy_folder(bundle, tmp_path / "copy")
    tokens = []
    with load(folder, None, pinned=0, verify=True) as engine:
        with pytest.raises(  # noqa: PT012
            StorageError, match=rf"model\.safetensors: the bytes of {unit} are not what they were; fetch the model"
        ):
            for response in engine.stream_generate(PROMPT, max_tokens=12):
                tokens.append(response.token)
                if len(tokens) == 4:
                    alter(folder, tensor)
        assert 4 <= len(tokens) < 12
        assert tokens == expected[: len(tokens)]
        alter(folder, tensor)  # back
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.gate_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_byte_altered_before_it_is_pinned_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """What is kept is checked as it is read to be kept, not only before."""
    folder = copy_folder(bundle, tmp_path / "copy")
    build_target = Prepared.build

    def late(*args: Any, **options: Any) -> Any:
        alter(folder, tensor)
        return build_target(*args, **options)

    monkeypatch.setattr(Prepared, "build", late)
    with pytest.raises(StorageError, match=ALTERED.format(tensor)):
        load(folder, None, pinned=10**9, verify=True)


def test_an_altered_draft_is_found(bundle: Path, stock: Path, tmp_path: Path) -> None:
    folder = copy_folder(bundle, tmp_path / "draft")
    with load(bundle, folder, pinned=0, verify=True) as engine:
        assert len(engine.pair.drafters) == 2
    alter(folder, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(ModelError, match="layer 0 was altered"):
        load(bundle, folder, pinned=0, verify=True)
    with load(bundle, stock, pinned=0, verify=True):  # a draft without checksums changes no token
        pass


@pytest.mark.parametrize("where", [{}, {"pinned": 0}])
def test_a_folder_without_checksums_is_refused(stock: Path, where: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"verify: .* has no checksums; make a bundle with `llmcad-mlx convert "):
        load(stock, None, verify=True, **where)


def test_the_command_line_refuses_and_finds(
    stock: Path, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--raw", PROMPT, "-m", "4", "--verify", "--pinned", "0", "--draft", "none", "--target"]
    assert run([*words, str(stock)]) == 2
    assert "make a bundle with `llmcad-mlx convert" in capfd.readouterr().err
    assert run([*words, str(bundle)]) == 0
    folder = copy_folder(bundle, tmp_path / "copy")
    alter(folder, "lm_head.weight")
    assert run([*words, str(folder)]) == 1
    err = capfd.readouterr().err
    assert "lm_head.weight was altered" in err
    assert "Traceback" not in err


def test_without_verification_each_byte_is_read_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks cost a read of everything, so they come only when they are asked for."""
    read: list[int] = []
    read_into = FileStorage.read_into

    def counting(self: FileStorage, file: Path, offset: int, out: memoryview) -> None:
        read.append(len(out))
        read_into(self, file, offset, out)

    monkeypatch.setattr(FileStorage, "read_into", counting)
    with load(bundle, None, pinned=10**9):
        without = sum(read)
    read.clear()
    with load(bundle, None, pinned=10**9, verify=True):
        found = read_bundle(bundle)
        assert found is not None
        assert sum(read) == without + found.num_bytes
