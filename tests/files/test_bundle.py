"""Bundles: what is in them, and that nothing altered, cut off or foreign is taken for one, loaded or used."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from llmcad_mlx import __version__, load
from llmcad_mlx.errors import ModelError, StorageError, UsageError
from llmcad_mlx.files.bundle import (
    FILE,
    Bundle,
    BundleWriter,
    layer_index,
    plan_layers,
    read_bundle,
    verify_bundle,
)
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorSpec, read_weights
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.streaming.build import Prepared
from llmcad_mlx.streaming.storage import BLOCK_BYTES, FileStorage
from tests.support.tiny_folder import copy_folder, family_folder, make_folder, write_bundle

LAYERS = 4

pytestmark = pytest.mark.usefixtures("tiny_home", "streams_small_matrices")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "stock", layers=LAYERS)


@pytest.fixture(scope="module")
def bundle_folder(stock: Path) -> Path:
    convert_folder(stock, stock.parent / "bundle")
    return stock.parent / "bundle"


@pytest.fixture
def damaged(bundle_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_folder(bundle_folder, tmp_path / "bundle")


def known(folder: Path) -> Bundle:
    bundle = read_bundle(folder)
    assert bundle is not None
    return bundle


def array_dict(file: str) -> dict[str, mx.array]:
    loaded = mx.load(file)
    assert isinstance(loaded, dict)
    return loaded


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_every_layer_is_one_aligned_run_of_bytes_in_order_with_its_checksums(bundle_folder: Path) -> None:
    bundle = known(bundle_folder)
    content = (bundle_folder / "model.safetensors").read_bytes()
    numbered = [f"layer {number}" for number in range(LAYERS)]
    assert [layer.name for layer in bundle.layers] == ["embedding", *numbered, "rest", "head"]
    position = 0
    for layer in bundle.layers:
        assert layer.offset % 16384 == 0
        assert 0 <= layer.offset - position < 16384 or position == 0
        position = layer.offset
        assert layer.sha256 == sha256(content[position : position + layer.num_bytes])
        for extent, checksum in layer.tensors.items():
            assert 0 <= extent.offset - position < 64
            assert extent.dtype in ("U32", "F32")
            assert extent.offset % 64 == 0
            assert checksum == sha256(content[extent.offset : extent.offset + extent.num_bytes])
            position = extent.offset + extent.num_bytes
    assert position == len(content)
    assert bundle.tensor_sha256.keys() == read_weights(bundle_folder).keys()


def test_tensors_that_are_streamed_begin_at_pages_and_the_model_opens(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a large model. mlx-lm takes what lies between them for nothing; the Rust library refuses it."""
    monkeypatch.setattr("llmcad_mlx.files.bundle.SMALL_BYTES", 1000)
    write_bundle(stock, tmp_path / "bundle")
    bundle = verify_bundle(tmp_path / "bundle")
    assert bundle is not None
    for layer in bundle.layers:
        extents = list(layer.tensors)
        large = [extent for extent in extents if extent.num_bytes > 1000]
        assert extents[: len(large)] == large
        assert all(extent.offset % 16384 == 0 for extent in large)
    file = tmp_path / "bundle" / "model.safetensors"
    theirs, ours = array_dict(str(stock / "model.safetensors")), array_dict(str(file))
    assert theirs.keys() == ours.keys()
    assert all(mx.array_equal(theirs[name], ours[name]) for name in theirs)
    model, _ = mlx_lm.load(str(tmp_path / "bundle"))
    assert model(mx.array([[1, 2]])).shape[1] == 2
    with pytest.raises(SafetensorError), safe_open(file, "np"):
        pass


def test_a_bundle_of_format_1_is_read_checked_and_streamed(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gaps, the widest items first, data from a multiple of 4096 on."""
    folder = tmp_path / "bundle"
    write_bundle(stock, folder)
    content = json.loads((folder / FILE).read_text())
    index = read_weights(folder)
    specs = [
        TensorSpec(t["name"], t["dtype"], tuple(t["shape"]))
        for layer in content["layers"]
        for t in layer["tensors"]
    ]
    weights = {spec.name: index[spec.name] for spec in specs}
    data = {n: e.file.read_bytes()[e.offset : e.offset + e.num_bytes] for n, e in weights.items()}
    monkeypatch.setattr("llmcad_mlx.files.safetensors.DATA_ALIGNMENT", 4096)
    with SafetensorsWriter(folder / "model.safetensors", specs) as writer:
        for name, num_bytes in data.items():
            writer.write_bytes(name, 0, num_bytes)
    content["format"] = 1
    for layer in content["layers"]:
        for tensor in layer["tensors"]:
            tensor["offset"] = writer.extents[tensor["name"]].offset
        run = b"".join(data[tensor["name"]] for tensor in layer["tensors"])
        layer |= {"bytes": len(run), "sha256": sha256(run)}
    (folder / FILE).write_text(json.dumps(content))
    assert verify_bundle(folder) == known(folder)
    with load(stock, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=12).tokens
    with load(folder, None, pinned=0, verify=True) as engine:
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected
    content["format"] = 2
    (folder / FILE).write_text(json.dumps(content))
    assert verify_bundle(folder) is not None  # no gaps are as good as small ones
    content["layers"][1]["tensors"][1]["offset"] += 1
    content["format"] = 1
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="of layer 0 does not lie in"):
        read_bundle(folder)


def test_what_else_the_file_says(bundle_folder: Path) -> None:
    content = json.loads((bundle_folder / FILE).read_text())
    assert set(content) == {"format", "layers", "draft", "profile", "source", "created_by"}
    assert (content["format"], content["draft"], content["profile"]) == (2, None, {})
    assert (content["source"], content["created_by"]) == ("stock", f"llmcad-mlx {__version__}")
    layer = content["layers"][1]
    assert set(layer) == {"name", "tensors", "bytes", "sha256"}
    assert set(layer["tensors"][0]) == {"name", "file", "offset", "bytes", "dtype", "shape", "sha256"}
    assert known(bundle_folder).num_bytes == sum(layer["bytes"] for layer in content["layers"])


def test_verification_reports_every_byte(bundle_folder: Path, stock: Path) -> None:
    assert read_bundle(stock) is verify_bundle(stock) is None
    reports: list[int] = []
    assert verify_bundle(bundle_folder, reports.append) == known(bundle_folder)
    assert sum(reports) == known(bundle_folder).num_bytes


@settings(deadline=None, max_examples=30)
@given(number=st.integers(0, LAYERS + 2), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_altered_bit_is_found_and_its_layer_named(
    tmp_path_factory: pytest.TempPathFactory, bundle_folder: Path, number: int, share: float, bit: int
) -> None:
    folder = copy_folder(bundle_folder, tmp_path_factory.mktemp("altered") / "bundle")
    bundle = known(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    altered = bundle.layers[number]
    content[altered.offset + int(share * altered.num_bytes)] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {altered.name} was altered") as caught:
        verify_bundle(folder)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def tensor(content: Any, number: int = 0) -> Any:
    return content["layers"][1]["tensors"][number]


FOREIGN: dict[str, tuple[Callable[[Any], object], str]] = {
    "newer format": (lambda c: c.update(format=3), "bundle format 3 is not 2 or older"),
    "no format": (lambda c: c.pop("format"), "'format' of the file"),
    "format true": (lambda c: c.update(format=True), "'format' of the file"),
    "no layers": (lambda c: c.update(layers=None), "'layers' of the file"),
    "layer of text": (lambda c: c["layers"].append("x"), "a layer is not a JSON object"),
    "empty layer": (lambda c: c["layers"][1].update(tensors=[]), "'bytes' of layer 0"),
    "wrong bytes": (lambda c: c["layers"][1].update(bytes=7), "'bytes' of layer 0"),
    "short checksum": (lambda c: c["layers"][1].update(sha256="ab"), "'sha256' of layer 0"),
    "tensor of nothing": (lambda c: c["layers"][1].update(tensors=[None]), "a tensor of layer 0 is not a JSON"),
    "tensor without file": (lambda c: tensor(c).pop("file"), "'file' of a tensor of layer 0"),
    "tensor without shape": (lambda c: tensor(c).pop("shape"), "of layer 0 does not lie in"),
    "other name": (lambda c: tensor(c).update(name="x"), "x of layer 0 does not lie in model.safetensors"),
    "other dtype": (lambda c: tensor(c).update(dtype="F16"), "does not lie in"),
    "moved": (lambda c: tensor(c, 1).update(offset=1), "of layer 0 does not lie in"),
    "other order": (lambda c: c["layers"][1]["tensors"].reverse(), "layer 0 is not one run of bytes"),
    "other file": (lambda c: [t.update(file="../x") for t in c["layers"][1]["tensors"]], "does not lie in ../x|x"),
    "twice": (lambda c: c["layers"].append(c["layers"][1]), "of layer 0 does not lie in"),
    "not listed": (lambda c: c["layers"].pop(), "is not listed in llmcad.json"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_by_name(damaged: Path, kind: str) -> None:
    edit, message = FOREIGN[kind]
    content = json.loads((damaged / FILE).read_text())
    edit(content)
    (damaged / FILE).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message) as caught:
        read_bundle(damaged)
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"GIF89a", b"[" * 100_000])
def test_what_is_not_json_is_refused_by_name(damaged: Path, content: bytes) -> None:
    (damaged / FILE).write_bytes(content)
    with pytest.raises(ModelError, match=r"llmcad\.json: .*make the bundle again"):
        read_bundle(damaged)


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, bundle_folder: Path, share: float
) -> None:
    for name in (FILE, "model.safetensors"):
        folder = copy_folder(bundle_folder, tmp_path_factory.mktemp("cut") / "bundle")
        content = (folder / name).read_bytes().rstrip()
        (folder / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ModelError, match=name):
            read_bundle(folder)


def test_a_file_that_shrinks_while_it_is_verified(damaged: Path) -> None:
    def cut(num_bytes: int) -> None:
        with (damaged / "model.safetensors").open("r+b") as file:
            file.truncate(known_offset + 10)

    known_offset = known(damaged).layers[2].offset
    with pytest.raises(ModelError, match=r"model\.safetensors: layer 1 is cut off"):
        verify_bundle(damaged, cut)


# --- verify=True: while a model is loaded and used ------------------------------------------------------------

PROMPT = "then the other one ran in and then the other one"
ALTERED = r"model\.safetensors: {} was altered .*; fetch or convert the model again"


@pytest.fixture(scope="module")
def tied(stock: Path) -> Path:
    """A quantised model whose embedding is the head."""
    shape = {"tie_word_embeddings": True, "intermediate_size": 64}
    folder = family_folder(stock.parent / "tied", "qwen2", bits=4, **shape)
    write_bundle(folder, stock.parent / "tied-bundle")
    return stock.parent / "tied-bundle"


def alter(folder: Path, tensor: str, share: float = 0.5) -> None:
    """Flip a bit of a tensor, as a failing disk would: the file's size and times stay."""
    extent = read_weights(folder)[tensor]
    before = os.stat(extent.file)
    with extent.file.open("r+b") as file:
        at = extent.offset + int(share * extent.num_bytes)
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    os.utime(extent.file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("which", ["bundle_folder", "tied"])
def test_an_unaltered_bundle_gives_the_resident_tokens(request: pytest.FixtureRequest, which: str) -> None:
    folder = request.getfixturevalue(which)
    with load(folder, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=12).tokens
    with load(folder, None, pinned=0) as engine:
        assert engine.pair.plan is not None
        total = engine.pair.plan.streamed_bytes
    for options in ({"pinned": 0}, {"pinned": total // 3}, {"pinned": total}, {}):  # {}: wholly in memory
        with load(folder, "ngram", verify=True, **options) as engine:
            assert engine.pair.plan is not None
            assert (engine.pair.plan.streamed_bytes == 0) == (options in ({"pinned": total}, {}))
            assert engine.generate(PROMPT, max_tokens=12, tree_nodes=6).tokens == expected


@pytest.mark.parametrize("pinned", [0, 10**9], ids=["streamed", "pinned"])
@pytest.mark.parametrize(
    ("which", "tensor"),
    [
        ("bundle_folder", "model.embed_tokens.weight"),
        ("bundle_folder", "model.layers.0.self_attn.q_proj.weight"),
        ("bundle_folder", f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"),
        ("bundle_folder", "model.layers.2.input_layernorm.weight"),
        ("bundle_folder", "model.norm.weight"),
        ("bundle_folder", "lm_head.weight"),
        *(("tied", f"model.embed_tokens.{part}") for part in ("weight", "scales", "biases")),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_byte_altered_before_loading_is_found(
    request: pytest.FixtureRequest, tmp_path: Path, which: str, tensor: str, pinned: int, share: float
) -> None:
    folder = copy_folder(request.getfixturevalue(which), tmp_path / "copy")
    alter(folder, tensor, share)
    with pytest.raises(StorageError, match=ALTERED.format(tensor)) as caught:
        load(folder, None, pinned=pinned, verify=True)
    assert str(folder) in str(caught.value)
    with load(folder, None, pinned=pinned):  # nobody asked
        pass


@pytest.mark.parametrize(
    ("tensor", "unit"),
    [("model.layers.3.mlp.up_proj.weight", "layer 3"), ("lm_head.weight", "head rows 0 to [0-9]+")],
)
def test_a_streamed_byte_altered_while_running_is_found(damaged: Path, tensor: str, unit: str) -> None:
    with load(damaged, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=12).tokens
    tokens = []
    with load(damaged, None, pinned=0, verify=True) as engine:
        with pytest.raises(  # noqa: PT012
            StorageError, match=rf"model\.safetensors: the bytes of {unit} are not what they were; fetch the model"
        ):
            for response in engine.stream_generate(PROMPT, max_tokens=12):
                tokens.append(response.token)
                if len(tokens) == 4:
                    alter(damaged, tensor)
        assert 4 <= len(tokens) < 12
        assert tokens == expected[: len(tokens)]
        alter(damaged, tensor)  # back
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.gate_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_byte_altered_before_it_is_pinned_is_found(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """What is kept is checked as it is read to be kept, not only before."""
    build_target = Prepared.build

    def late(*args: Any, **options: Any) -> Any:
        alter(damaged, tensor)
        return build_target(*args, **options)

    monkeypatch.setattr(Prepared, "build", late)
    with pytest.raises(StorageError, match=ALTERED.format(tensor)):
        load(damaged, None, pinned=10**9, verify=True)


def test_an_altered_draft_is_found(bundle_folder: Path, stock: Path, damaged: Path) -> None:
    with load(bundle_folder, damaged, pinned=0, verify=True) as engine:
        assert len(engine.pair.drafters) == 2
    alter(damaged, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(ModelError, match="layer 0 was altered"):
        load(bundle_folder, damaged, pinned=0, verify=True)
    with load(bundle_folder, stock, pinned=0, verify=True):  # a draft without checksums changes no token
        pass


@pytest.mark.parametrize("where", [{}, {"pinned": 0}])
def test_a_folder_without_checksums_is_refused(stock: Path, where: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"verify: .* has no checksums; make a bundle with `llmcad-mlx convert "):
        load(stock, None, verify=True, **where)


def test_the_command_line_finds_it_too(damaged: Path, output: Any) -> None:
    words = ["generate", "--raw", PROMPT, "-m", "4", "--verify", "--pinned", "0", "--draft", "none", "--target"]
    output(*words, damaged)
    alter(damaged, "lm_head.weight")
    (line,) = output(*words, damaged, code=1)[1].splitlines()
    assert "lm_head.weight was altered" in line


def test_without_verification_each_byte_is_read_once(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks cost a read of everything, so they come only when they are asked for."""
    read: list[int] = []
    read_into = FileStorage.read_into

    def counting(self: FileStorage, file: Path, offset: int, out: memoryview) -> None:
        read.append(len(out))
        read_into(self, file, offset, out)

    monkeypatch.setattr(FileStorage, "read_into", counting)
    with load(bundle_folder, None, pinned=10**9):
        without = sum(read)
    read.clear()
    with load(bundle_folder, None, pinned=10**9, verify=True):
        bundle = known(bundle_folder)
        tensors = [extent for layer in bundle.layers for extent in layer.tensors]
        assert 0 <= sum(read) - without - sum(t.num_bytes for t in tensors) < 2 * len(tensors) * BLOCK_BYTES


# --- writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "layer 12"),
        ("language_model.model.layers.3.mlp.up_proj.scales", "layer 3"),
        ("transformer.h.7.attn.c_attn.weight", "layer 7"),
        ("transformer.blocks.0.ffn.weight", "layer 0"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("model.tok_embeddings.weight", "embedding"),
        ("lm_head.biases", "head"),
        ("output.weight", "head"),
        ("embed_out.weight", "head"),
        ("model.norm.weight", "rest"),
        ("blocks.weight", "rest"),
    ],
)
def test_layers_are_found_by_name(name: str, group: str) -> None:
    (plan,) = plan_layers([TensorSpec(name, "F16", (2,))])
    assert plan.name == group
    assert layer_index(name) == (int(group[6:]) if group.startswith("layer ") else None)


DTYPES = {"U8": 1, "F16": 2, "BF16": 2, "U32": 4, "F32": 4, "I64": 8}


@settings(deadline=None, max_examples=50)
@given(
    tensors=st.lists(
        st.tuples(st.integers(-2, 12), st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    max_bytes=st.sampled_from([1, 200, 1 << 30]),
    order=st.randoms(use_true_random=False),
)
def test_any_tensors_in_any_order_come_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], max_bytes: int, order: Any
) -> None:
    """Written in pieces, in any order, into one file or several; the whole is a bundle that verifies."""
    folder = tmp_path_factory.mktemp("written")
    specs, contents = [], {}
    for number, (layer, dtype, shape) in enumerate(tensors):
        name = f"model.layers.{layer}.t{number}.weight" if layer >= 0 else f"t{number}.weight"
        specs.append(TensorSpec(name, dtype, tuple(shape)))
        contents[name] = order.randbytes(specs[-1].num_bytes)
    pieces = [
        (name, start, data[start : start + 50])
        for name, data in contents.items()
        for start in range(0, len(data), 50)
    ]
    order.shuffle(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcad_mlx.files.bundle.MAX_FILE_BYTES", max_bytes)
        with BundleWriter(folder, specs) as writer:
            for name, start, data in pieces:
                writer.write_bytes(name, start, data)
            writer.finish("a test")
    bundle = verify_bundle(folder)
    assert bundle is not None
    assert all(extent.offset % 64 == 0 for layer in bundle.layers for extent in layer.tensors)
    index = read_weights(folder)
    assert index.keys() == contents.keys()
    for name, extent in index.items():
        assert extent.file.read_bytes()[extent.offset : extent.offset + extent.num_bytes] == contents[name]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert listed == {name: extent.file.name for name, extent in index.items()}
    for file in files:
        assert (8 + struct.unpack("<Q", file.read_bytes()[:8])[0]) % 16384 == 0
        mx.load(str(file))


def test_missing_bytes_and_bytes_too_many_are_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path, [TensorSpec("a", "U8", (4,))]) as writer:
        with pytest.raises(ValueError, match="past"):
            writer.write_bytes("a", 2, b"123")
        writer.write_bytes("a", 0, b"123")
        with pytest.raises(ValueError, match="1 bytes were not written"):
            writer.finish("a test")
    assert not (tmp_path / FILE).exists()
