"""`llmcad-mlx convert`: folders and repositories become bundles, in bounded memory, completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from llmcad_mlx import files
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files import DiskError
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.names import convert
from tests.support.architecture_configs import build, config_of
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny_folder import change_config, copy_folder, make_folder, poison, write_bundle, write_folder
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "stock", layers=3)


@pytest.fixture(autouse=True)
def _plenty_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESERVE_BYTES", 0)


def parameters(folder: Path) -> dict[str, mx.array]:
    model, _ = load_model(folder)
    return dict(tree_flatten(model.parameters()))


def quantised_by_mlx_lm(folder: Path, bits: int, group_size: int) -> tuple[dict[str, mx.array], dict[str, object]]:
    model, config = load_model(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group_size, bits)
    return dict(tree_flatten(model.parameters())), config


def assert_equal(ours: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype
        assert mx.array_equal(ours[name], array), name


# --- what comes out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), [(None, None), (4, 32), (8, 64), (None, 32)])
def test_weights_are_quantised_as_mlx_lm_does_it(
    stock: Path, tmp_path: Path, bits: int | None, group_size: int | None
) -> None:
    convert_folder(stock, tmp_path / "out", bits, group_size)
    expected, config = quantised_by_mlx_lm(stock, bits or 4, group_size or 64)
    assert_equal(parameters(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == config["quantization"]
    assert verify_bundle(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", mx.bfloat16), ("llama", mx.float16)]
    + [(family, mx.float32) for family in ("mixtral", "phi3", "internlm2", "qwen2_moe")],  # named or stacked anew
)
def test_half_precision_and_other_families(tmp_path: Path, family: str, dtype: mx.Dtype) -> None:
    model = build(family)
    model.set_dtype(dtype)
    source = write_folder(tmp_path / "source", model, {**config_of(family), "max_position_embeddings": 512})
    convert_folder(source, tmp_path / "out", group_size=32)
    assert_equal(parameters(tmp_path / "out"), quantised_by_mlx_lm(source, 4, 32)[0])
    convert_folder(tmp_path / "out", tmp_path / "again")
    assert_equal(parameters(tmp_path / "again"), parameters(tmp_path / "out"))
    write_bundle(source, tmp_path / "copy")
    assert_equal(parameters(tmp_path / "copy"), parameters(source))


def test_experts_are_stacked(tmp_path: Path) -> None:
    """A Mixtral as Hugging Face has it: experts one by one."""
    model = build("mixtral")
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        if ".switch_mlp." not in name:
            weights[name] = array
            continue
        stem, _, rest = name.partition(".switch_mlp.")
        short = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[rest.split(".")[0]]
        for expert in range(array.shape[0]):
            weights[f"{stem}.experts.{expert}.{short}.weight"] = array[expert]
    source = write_folder(tmp_path / "source", model, {**config_of("mixtral"), "max_position_embeddings": 512})
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    write_bundle(source, tmp_path / "out")
    assert_equal(parameters(tmp_path / "out"), dict(tree_flatten(model.parameters())))


def test_tensors_that_the_model_does_not_use_are_left_out(stock: Path, tmp_path: Path) -> None:
    source = copy_folder(stock, tmp_path / "source")
    weights = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((4,))}
    mx.save_safetensors(str(source / "model.safetensors"), weights | unused)
    write_bundle(source, tmp_path / "out")
    assert mx.load(str(tmp_path / "out" / "model.safetensors")).keys() == weights.keys()


@pytest.mark.parametrize(
    ("family", "group_size", "kind", "message"),
    [
        # Its router wants groups of 64 whatever the option says, and this one has rows of 32.
        ("gpt_oss", 32, ModelError, r"source: mlx-lm cannot quantise it \(\[quantize\] The last dim.*\)"),
        ("llama", None, UsageError, "--group-size: no rows of .*source divide into groups of 64; choose .*"),
    ],
)
def test_what_cannot_be_quantised_is_told_in_one_line(
    tmp_path: Path, family: str, group_size: int | None, kind: type[Exception], message: str
) -> None:
    source = write_folder(tmp_path / "source", build(family), config_of(family))
    with pytest.raises(kind, match=rf"{message}\Z"):
        convert_folder(source, tmp_path / "out", group_size=group_size)


@pytest.mark.parametrize("method", ["mxfp4", "awq"])
def test_other_quantisations_are_kept_as_mlx_lm_repacks_them(tmp_path: Path, method: str) -> None:
    model = build("llama", hidden_size=64, intermediate_size=128)
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    source = write_folder(tmp_path / "source", model, {**config_of("llama"), **shape})
    if method == "mxfp4":
        model, _ = quantize_model(model, config_of("llama"), 32, 4, mode="mxfp4")
        settings: dict[str, object] = {"quant_method": "mxfp4"}
        weights = dict(tree_flatten(model.parameters()))
    else:
        settings = {"quant_method": "awq", "bits": 4, "group_size": 32}
        weights = {}
        for name, array in tree_flatten(model.parameters()):
            if "_proj.weight" not in name:
                weights[name] = array
                continue
            stem, (rows, columns) = name.removesuffix("weight"), array.shape
            weights[f"{stem}qweight"] = mx.random.randint(0, 2**31, (columns, rows // 8)).astype(mx.int32)
            weights[f"{stem}qzeros"] = mx.random.randint(0, 2**31, (columns // 32, rows // 8)).astype(mx.int32)
            weights[f"{stem}scales"] = mx.random.normal((columns // 32, rows))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    change_config(source, quantization_config=settings)
    with pytest.raises(UsageError, match=r"--bits: .*source is quantised already"):
        convert_folder(source, tmp_path / "out", bits=4)
    convert_folder(source, tmp_path / "out")
    assert_equal(parameters(tmp_path / "out"), parameters(source))
    assert "quantization" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_is_quantised_is_copied_byte_for_byte(stock: Path, tmp_path: Path) -> None:
    convert_folder(stock, tmp_path / "first")
    convert_folder(tmp_path / "first", tmp_path / "second")
    first, second = (tmp_path / name for name in ("first", "second"))
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for options, word in (({"bits": 4}, "--bits"), ({"group_size": 64}, "--group-size")):
        with pytest.raises(UsageError, match=rf"{word}: .*first is quantised already"):
            convert_folder(first, tmp_path / "third", **options)


def test_side_files_are_copied_and_code_is_neither_run_nor_copied(stock: Path, tmp_path: Path) -> None:
    source = copy_folder(stock, tmp_path / "source")
    for name in ("LICENSE", "merges.txt", "generation_config.json", "llmcad_source.json", "README.md"):
        (source / name).write_text("{}")
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    change_config(source, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    convert_folder(source, tmp_path / "out")
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert copied == {
        "config.json", "model.safetensors", "llmcad.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "merges.txt", "generation_config.json",
    }  # fmt: skip
    change_config(source, model_file="modeling_evil.py")
    with pytest.raises(ModelError, match="brings code of its own"):
        convert_folder(source, tmp_path / "other")


@pytest.mark.parametrize("quantised", [False, True])
def test_memory_stays_far_below_the_models_size(tmp_path: Path, quantised: bool) -> None:
    source = make_folder(tmp_path / "source", layers=24, hidden=256, heads=4)
    if quantised:
        convert_folder(source, tmp_path / "quantised", bits=8)
        source = tmp_path / "quantised"
    num_bytes = (source / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_folder(source, tmp_path / "out")
    assert mx.get_peak_memory() - before < num_bytes / 8


def test_gguf_on_the_command_line(tmp_path: Path, output: Any) -> None:
    out, err = output("convert", write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    assert out == f"{tmp_path / 'out'}\n"
    assert "weights: 100% F32 in 4 bits" in err
    bundle = verify_bundle(tmp_path / "out")
    assert bundle is not None
    assert '"source": "tiny.gguf"' in (tmp_path / "out" / "llmcad.json").read_text()
    assert bundle.layers[1].name == "layer 0"
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model.layers[0].mlp.up_proj.group_size == 32


# --- the hub --------------------------------------------------------------------------------------------------


def test_hub_repository(hub: HubStandIn, stock: Path, tmp_path: Path) -> None:
    hub.repos["org/model"] = {file.name: file.read_bytes() for file in stock.iterdir()}
    convert("org/model", tmp_path / "out")
    assert_equal(parameters(tmp_path / "out"), quantised_by_mlx_lm(stock, 4, 64)[0])
    assert '"source": "org/model"' in (tmp_path / "out" / "llmcad.json").read_text()


def test_a_used_destination_is_refused_before_anything_is_fetched(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        convert("org/model", tmp_path / "out")
    assert not hub.requests


# --- completely or not at all ---------------------------------------------------------------------------------


def left_over(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_destinations(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file: is a file; choose a new or empty folder"):
        convert_folder(stock, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    convert_folder(stock, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"empty: already exists and is not empty; choose a new or empty folder"):
        convert_folder(stock, tmp_path / "empty")
    convert_folder(stock, tmp_path / "some" / "where" / "else")
    assert left_over(tmp_path) == ["empty", "file", "some"]


def test_sources_that_cannot_be_used(stock: Path, tmp_path: Path, output: Any) -> None:
    cut = copy_folder(stock, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    spoilt = copy_folder(stock, tmp_path / "spoilt")
    poison(spoilt)
    for source, message in (
        ("nowhere", "no such folder"),
        (str(tmp_path / "no.gguf"), "no.gguf"),
        (str(cut), "model.safetensors"),
        (str(spoilt), "lm_head.scales holds NaN"),
    ):
        line = output("convert", source, tmp_path / "out", code=1)[1].splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line
    assert left_over(tmp_path) == ["cut", "spoilt"]


@pytest.mark.parametrize("options", [["--bits", "5"], ["--group-size", "48"], ["--force"]])
def test_options_are_checked(stock: Path, tmp_path: Path, output: Any, options: list[str]) -> None:
    assert options[0] in output("convert", stock, tmp_path / "out", *options, code=2)[1]


def test_a_full_disk_is_said_beforehand(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(DiskError, match=r"are needed for the model out, .* choose a folder on another disk"):
        convert_folder(stock, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_failed_write_leaves_nothing_behind(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    real, calls = os.pwrite, iter(range(1000))

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if next(calls) >= after:
            raise error
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    expected, advice = (
        (DiskError, r"out: the disk is full; make room or choose a folder on another disk")
        if isinstance(error, OSError)
        else (KeyboardInterrupt, None)
    )
    with pytest.raises(expected, match=advice):
        convert_folder(stock, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_of_two_conversions_to_one_destination_the_first_wins(tmp_path: Path) -> None:
    def both() -> None:
        with files.new_folder(tmp_path / "out", 0) as second:
            with files.new_folder(tmp_path / "out", 0) as first:
                (first / "a").touch()
            (second / "b").touch()

    with pytest.raises(UsageError, match="already exists"):
        both()
    assert left_over(tmp_path) == ["out"]
    assert left_over(tmp_path / "out") == ["a"]
