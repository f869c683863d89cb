"""GGUF files become mlx-lm folders: exact where they can be, refused in one line where they cannot."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.files import bundle_writer
from llmcad_mlx.files.atomic import DiskError
from llmcad_mlx.gguf import weights as gguf_weights
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.groups import group_rows
from llmcad_mlx.gguf.model import llama3_divisors, read_family
from llmcad_mlx.gguf.reader import read_gguf_header, read_rows
from llmcad_mlx.gguf.tokenizer import read_tokenizer
from llmcad_mlx.gguf.weights import plan_weights
from llmcad_mlx.store.pull import pull_part
from tests.support.tiny_gguf import HEAD_DIM, HIDDEN, TinyGguf, write_tiny_gguf


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").path.read_bytes()


# --- the header -------------------------------------------------------------------------------------------


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", kind=Kind.Q5_0)
    header = read_gguf_header(tiny.path)
    reader = GGUFReader(tiny.path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert [tensor.name for tensor in reader.tensors] == list(header.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.kind, ours.offset, ours.num_bytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert read_rows(tiny.path, ours, 0, ours.rows).tobytes() == tensor.data.tobytes()


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
    header_bytes = tiny_bytes.index(b"blk.1.ffn_down.weight")
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
    for name, content in (("empty", b""), ("text", b"hello, this is no model"), ("short", b"GG")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}: .*GGUF file"):
            convert_gguf(tmp_path / name, tmp_path / "out")
    with pytest.raises(ModelError, match="cannot be read"):
        convert_gguf(tmp_path / "missing.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- blocks to groups -------------------------------------------------------------------------------------


def dequantised(raw: np.ndarray, kind: Kind, bits: int = 4, group_size: int = 32) -> np.ndarray:
    groups = group_rows(raw, kind, bits, group_size)
    scales, biases = (mx.array(part).astype(mx.float32) for part in (groups.scales, groups.biases))
    return np.array(mx.dequantize(mx.array(groups.codes), scales, biases, group_size, bits))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_4_bit_blocks_are_kept_exactly(kind: Kind) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    raw = quantize(weights, kind)
    assert np.array_equal(dequantised(raw, kind), dequantize(raw, kind))


def random_q4_k(rows: int, blocks: int) -> np.ndarray:
    random = np.random.default_rng(1)
    raw = random.integers(0, 256, (rows, blocks, 144), dtype=np.uint8)
    scales = random.uniform(1e-4, 1e-2, (rows, blocks, 2)).astype(np.float16)
    raw[..., :4] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def test_q4_k_codes_are_kept_and_only_scales_are_rounded() -> None:
    raw = random_q4_k(5, 3)
    exact, ours = dequantize(raw, Kind.Q4_K), dequantised(raw, Kind.Q4_K)
    blocks = raw.reshape(5, 3, 144)
    top = 63 * blocks[..., :4].copy().view(np.float16).astype(np.float32).max() * 16
    # Each of scale * code and bias is off by at most half a unit in the last of float16's 11 bits.
    assert np.abs(exact - ours).max() <= top * 2**-11
    assert np.corrcoef(exact.ravel(), ours.ravel())[0, 1] > 0.999999


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_other_blocks_are_quantised_anew_within_a_step(kind: Kind) -> None:
    weights = np.random.default_rng(2).standard_normal((4, 128)).astype(np.float32)
    raw = weights.view(np.uint8) if kind == Kind.F32 else quantize(weights, kind).view(np.uint8)
    exact = dequantize(raw, kind) if kind not in (Kind.F32, Kind.F16) else weights
    groups = exact.reshape(4, -1, 32)
    step = (groups.max(-1) - groups.min(-1)) / 15
    error = np.abs(exact - dequantised(raw, kind)).reshape(groups.shape).max(-1)
    assert (error <= 1.01 * step + 2e-3).all()


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


# --- whole models -----------------------------------------------------------------------------------------


def reference(tiny: TinyGguf, name: str) -> np.ndarray:
    """A weight of the Hugging Face model, in its own row order, after 4-bit quantisation."""
    return dequantised(tiny.weights[name].view(np.uint8), Kind.F32)


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """Dequantised weights by mlx-lm's names, through `mlx_lm.load`."""
    model, _ = mlx_lm.load(str(folder))
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            scales, biases = (module[key].astype(mx.float32) for key in ("scales", "biases"))
            matrix = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
            weights[name] = np.array(matrix)
        elif "norm" in name and "weight" in module:
            weights[name] = np.array(module.weight.astype(mx.float32))
        if "bias" in module:
            weights[f"{name}.bias"] = np.array(module.bias.astype(mx.float32))
    return weights


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)]
)
def test_every_weight_arrives_where_mlx_lm_expects_it(tmp_path: Path, family: str, tied: bool) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", family, tied=tied)
    convert_gguf(tiny.path, tmp_path / "out")
    weights = loaded(tmp_path / "out")
    expected = {
        "model.embed_tokens": reference(tiny, "token_embd.weight"),
        "model.norm": tiny.weights["output_norm.weight"],
        "model.layers.1.self_attn.q_proj": reference(tiny, "blk.1.attn_q.weight"),
        "model.layers.1.self_attn.k_proj": reference(tiny, "blk.1.attn_k.weight"),
        "model.layers.1.self_attn.v_proj": reference(tiny, "blk.1.attn_v.weight"),
        "model.layers.1.self_attn.o_proj": reference(tiny, "blk.1.attn_output.weight"),
        "model.layers.0.mlp.gate_proj": reference(tiny, "blk.0.ffn_gate.weight"),
        "model.layers.0.mlp.up_proj": reference(tiny, "blk.0.ffn_up.weight"),
        "model.layers.0.mlp.down_proj": reference(tiny, "blk.0.ffn_down.weight"),
        "model.layers.0.input_layernorm": tiny.weights["blk.0.attn_norm.weight"],
        "model.layers.0.post_attention_layernorm": tiny.weights["blk.0.ffn_norm.weight"],
    }
    if not tied:
        expected["lm_head"] = reference(tiny, "output.weight")
    if family == "qwen2":
        expected["model.layers.0.self_attn.q_proj.bias"] = tiny.weights["blk.0.attn_q.bias"]
        expected["model.layers.1.self_attn.k_proj.bias"] = tiny.weights["blk.1.attn_k.bias"]
    for name, values in expected.items():
        assert np.array_equal(weights[name], values), name


def test_written_in_pieces_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", kind=Kind.Q5_0)
    convert_gguf(tiny.path, tmp_path / "whole")
    monkeypatch.setattr(gguf_weights, "CHUNK_VALUES", HIDDEN * 7)
    convert_gguf(tiny.path, tmp_path / "pieces")
    whole, pieces = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tiny.path, tmp_path / "one")
    monkeypatch.setattr(bundle_writer, "MAX_FILE_BYTES", 20_000)
    convert_gguf(tiny.path, tmp_path / "many")
    names = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    one, many = loaded(tmp_path / "one"), loaded(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (8, 32), (4, 64)])
def test_other_bits_and_groups(tmp_path: Path, bits: int, group_size: int) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", kind=Kind.Q4_0, skip=())
    if group_size == 64:  # the intermediate size of the tiny model is 96
        with pytest.raises(ModelError, match=r"ffn_down.weight' has rows of 96.*--group-size"):
            convert_gguf(tiny.path, tmp_path / "out", bits, group_size)
        return
    convert_gguf(tiny.path, tmp_path / "out", bits, group_size)
    _, config = mlx_lm.utils.load_model(tmp_path / "out")
    assert config["quantization"]["bits"] == bits


def test_configuration(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tiny.path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert config["vocab_size"] == tiny.num_tokens
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config["head_dim"] == HEAD_DIM
    assert "rope_scaling" not in config


# --- rotary scaling ---------------------------------------------------------------------------------------


def rope_config(tmp_path: Path, edit: Callable[[GGUFWriter], None]) -> dict[str, object]:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", edit=edit)
    convert_gguf(tiny.path, tmp_path / "out")
    mlx_lm.load(str(tmp_path / "out"))
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert isinstance(scaling, dict)
    return scaling


def test_linear_scaling(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    assert rope_config(tmp_path, edit) == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_are_recognised(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(HEAD_DIM, 10000.0, factor).astype(np.float32)
    scaling = rope_config(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    plain = 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert scaling["factor"] == factor
    assert np.allclose(np.array(model.layers[0].self_attn.rope._freqs), plain * divisors, rtol=1e-4)


# --- refused ----------------------------------------------------------------------------------------------


def fields(**values: str | int) -> Callable[[GGUFWriter], None]:
    def edit(writer: GGUFWriter) -> None:
        for key, value in values.items():
            name = key.replace("__", ".")
            if isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_uint32(name, value)

    return edit


def extra(name: str, size: int) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.full(size, 3, np.float32))


def yarn(writer: GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "yarn")
    writer.add_float32("llama.rope.scaling.factor", 4.0)


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("gemma", None, "GGUF family 'gemma' is not supported (llama, qwen2, qwen3, gemma2"),
        ("llama", fields(llama__expert_count=8), "llama with experts is not supported"),
        ("llama", fields(llama__rope__dimension_count=8), "8 rotated dimensions are not supported"),
        ("llama", yarn, "llama.rope.scaling.original_context_length is missing"),
        ("llama", extra("rope_freqs.weight", HEAD_DIM // 2), "not those of a known Llama 3 model"),
        ("llama", extra("blk.0.extra.weight", 4), "'blk.0.extra.weight' has no place in llama"),
        ("qwen2", extra("blk.7.attn_q.bias", 4), "'blk.7.attn_q.bias' has no place in qwen2"),
    ],
)
def test_unsupported_is_refused_by_name(
    tmp_path: Path, family: str, edit: Callable[[GGUFWriter], None] | None, message: str
) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", family, edit=edit)
    with pytest.raises(ModelError) as caught:
        convert_gguf(tiny.path, tmp_path / "out")
    assert message in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.gguf"]


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    missing = write_tiny_gguf(tmp_path / "missing.gguf", skip=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first for model.layers.1.mlp.up_proj"):
        convert_gguf(missing.path, tmp_path / "out")
    shape = write_tiny_gguf(
        tmp_path / "shape.gguf",
        skip=("blk.0.attn_v.weight",),
        edit=lambda writer: writer.add_tensor("blk.0.attn_v.weight", np.ones((5, HIDDEN), np.float32)),
    )
    with pytest.raises(ModelError, match=r"'blk.0.attn_v.weight' is \(5, 64\), expected \(32, 64\)"):
        convert_gguf(shape.path, tmp_path / "out")


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output_norm.weight"])
def test_nan_weights_are_refused_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    offset = read_gguf_header(tiny.path).tensors[name].offset
    with tiny.path.open("r+b") as file:
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(ModelError, match=f"{name}' holds NaN"):
        convert_gguf(tiny.path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.gguf"]


def test_type_without_dequantiser(tmp_path: Path) -> None:
    ones = np.ones((32, HIDDEN), np.int8)
    tiny = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        skip=("blk.0.attn_v.weight",),
        edit=lambda writer: writer.add_tensor("blk.0.attn_v.weight", ones),
    )
    with pytest.raises(ModelError, match=r"'blk.0.attn_v.weight' has type I8, which is not supported"):
        convert_gguf(tiny.path, tmp_path / "out")


def test_existing_destination(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"already exists and is not empty; choose a new or empty folder"):
        convert_gguf(tiny.path, out)
    assert (out / "mine.txt").exists()
    convert_gguf(tiny.path, out, replace=True)
    assert not (out / "mine.txt").exists()
    assert (out / "config.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        convert_gguf(tiny.path, tmp_path / "file", replace=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "out", "tiny.gguf"]


@pytest.mark.parametrize("options", [{"bits": 7}, {"bits": 0}, {"group_size": 48}])
def test_options_are_checked(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="is not one of"):
        convert_gguf(
            tmp_path / "any.gguf", tmp_path / "out", options.get("bits", 4), options.get("group_size", 32)
        )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    real, calls = os.pwrite, iter(range(1000))

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if next(calls) > 5:
            raise error
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    expected = DiskError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="the disk is full" if expected is DiskError else None):
        convert_gguf(tiny.path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.gguf"]


# --- real models ------------------------------------------------------------------------------------------


def greedy(folder: Path, question: str, num_tokens: int) -> str:
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)  # half precision is slow on a CPU
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=num_tokens))


@pytest.mark.embedded
def test_embedded_model_answers() -> None:
    folder = pull_part("smollm2-135m", "target")
    assert greedy(folder, "What is the capital of France?", 8) == "The capital of France is Paris."


@pytest.mark.large
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Write a Python function that reverses a string.", "Python function that reverses a string"),
        ("Translate to German: The weather is nice today.", "Wetter ist heute"),
    ],
)
def test_converted_draft_answers(question: str, answer: str) -> None:
    assert answer in greedy(pull_part("qwen2.5-coder-1.5b", "draft"), question, 16)
