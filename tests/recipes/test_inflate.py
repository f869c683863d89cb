"""Inflated models: more layers and bytes, the same logits bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_config, load_model

from convert.inflate import inflate
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files.bundle import read_bundle, verify_bundle
from llmcad_mlx.store.convert import convert_folder
from tests.support.tiny_folder import change_config, family_folder, make_folder, write_folder

TOKENS = mx.array([[3, 17, 5, 40, 2, 9, 3, 3]])
SIZES = {"hidden_size": 64, "intermediate_size": 64}  # all matrices can be quantised


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    first = model(TOKENS, cache=cache)
    return np.array(mx.concatenate([first, model(TOKENS[:, :1], cache=cache)], axis=1))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("added", [1, 2, 7])
def test_logits_are_the_originals_bit_for_bit(tmp_path: Path, family: str, quantised: bool, added: int) -> None:
    name, _, biases = family.partition(" with ")
    source = family_folder(tmp_path / "source", name, **SIZES, attention_bias=bool(biases), mlp_bias=bool(biases))
    if quantised:
        convert_folder(source, tmp_path / "quantised", group_size=32)
        source = tmp_path / "quantised"
    num_old = load_config(source)["num_hidden_layers"]
    assert inflate(source, tmp_path / "out", num_layers=added) == added
    assert np.array_equal(logits(tmp_path / "out"), logits(source))
    assert load_config(tmp_path / "out")["num_hidden_layers"] == num_old + added
    bundle = verify_bundle(tmp_path / "out")
    assert bundle is not None
    assert sum(layer.name.startswith("layer ") for layer in bundle.layers) == num_old + added


def test_added_layers_are_spread_evenly_and_compute_something(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", layers=3)
    inflate(source, tmp_path / "out", num_layers=6)
    old, _ = load_model(source)
    new, _ = load_model(tmp_path / "out")
    silent = [not mx.any(layer.mlp.down_proj.weight).item() for layer in new.layers]
    assert silent == [True, True, False] * 3
    assert silent == [not mx.any(layer.self_attn.o_proj.weight).item() for layer in new.layers]
    for number, layer in enumerate(new.layers):
        assert mx.array_equal(layer.mlp.up_proj.weight, old.layers[number // 3].mlp.up_proj.weight)


def test_size_is_reached_with_the_fewest_layers(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", layers=2)
    before = (source / "model.safetensors").stat().st_size
    added = inflate(source, tmp_path / "out", num_bytes=3 * before)
    inflate(source, tmp_path / "less", num_layers=added - 1)
    sizes = [read_bundle(tmp_path / name).num_bytes for name in ("less", "out")]
    assert sizes[0] < 3 * before <= sizes[1]


def test_lists_with_an_entry_per_layer_grow_along(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", layers=2)
    kinds = ["sliding_attention", "full_attention"]
    change_config(source, layer_types=kinds, sliding_window=4)
    inflate(source, tmp_path / "out", num_layers=2)
    assert load_config(tmp_path / "out")["layer_types"] == [kinds[0], kinds[0], kinds[1], kinds[1]]
    assert np.array_equal(logits(tmp_path / "out"), logits(source))


def test_settings_of_single_modules_go_with_their_layers(tmp_path: Path) -> None:
    model, config = load_model(make_folder(tmp_path / "source", layers=2))
    special = {"group_size": 32, "bits": 8}
    name = "model.layers.1.mlp.up_proj"
    model, config = mlx_lm.utils.quantize_model(
        model, config, 64, 4, quant_predicate=lambda path, _: special if path == name else True
    )
    mixed = write_folder(tmp_path / "mixed", model, {**config, "max_position_embeddings": 512})
    inflate(mixed, tmp_path / "out", num_layers=2)
    quantization = load_config(tmp_path / "out")["quantization"]
    assert [key for key in quantization if "." in key] == [f"model.layers.{n}.mlp.up_proj" for n in (2, 3)]
    assert np.array_equal(logits(tmp_path / "out"), logits(mixed))


def test_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    for numbers in ({}, {"num_bytes": 10**9, "num_layers": 1}, {"num_layers": 0}, {"num_bytes": 1000}):
        with pytest.raises(UsageError):
            inflate(source, tmp_path / "out", **numbers)
    with pytest.raises(UsageError, match="not empty"):
        inflate(source, source, num_layers=1)
    change_config(source, model_type="gemma2")
    with pytest.raises(ModelError, match=r"'gemma2' cannot be inflated.*llama, qwen2, qwen3"):
        inflate(source, tmp_path / "out", num_layers=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_command(tmp_path: Path) -> None:
    source, dest = make_folder(tmp_path / "source"), tmp_path / "out"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convert.inflate", source, dest, *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)

    done, again = run("--size", "1MB"), run("--layers", "1")
    assert (done.returncode, done.stdout) == (0, f"{dest}\n")
    assert read_bundle(dest).num_bytes >= 10**6
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {dest}: already exists")
