"""Model folders that are fine, and every way in which they are not."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.safetensors import read_tensors
from llmcad_mlx.models.folder import cast_to_fp32, load_model_folder
from tests.support.architecture_configs import build, config_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder: a tiny llama and a tokenizer of words."""
    path = tmp_path / "model"
    path.mkdir()
    weights = dict(tree_flatten(build("llama").parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({**config_of("llama"), "eos_token_id": 1}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def test_loads_model_tokenizer_and_config(folder: Path) -> None:
    loaded = load_model_folder(str(folder))
    assert loaded.path == folder
    assert loaded.config["model_type"] == "llama"
    assert loaded.tokenizer.encode("w5 w7") == [5, 7]
    assert loaded.tokenizer.eos_token_ids == {1}
    expected = build("llama")(mx.array([[5, 7]]))
    assert mx.array_equal(loaded.model(mx.array([[5, 7]])), expected)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value != "GONE"})
        )

    return change


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def name_a_second_file(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_a_tensor(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.norm.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


BROKEN = {
    "config missing": (remove("config.json"), "config.json: missing"),
    "config cut off": (write("config.json", '{"model_type": "qw'), "config.json: not valid JSON"),
    "config a list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "config of something else": (write("config.json", '{"a": 1}'), "no model_type"),
    "unknown architecture": (change_config(model_type="nosuch9"), "unknown architecture 'nosuch9'"),
    "own code": (change_config(model_file="evil.py"), "brings code of its own"),
    "needs a package": (change_config(model_type="olmo"), "'olmo' needs a package"),
    "field missing": (change_config(hidden_size="GONE"), "does not describe a 'llama' model.*hidden_size"),
    "other size": (change_config(hidden_size=64), "weights do not match"),
    "tensor missing": (drop_a_tensor, "weights do not match config.json .Missing 1 parameters"),
    "no weights": (remove("model.safetensors"), "model.safetensors: missing, though the index names it"),
    "index names a missing file": (name_a_second_file, "model-00001-of-00002.safetensors: missing"),
    "index corrupt": (write("model.safetensors.index.json", "{"), "index.json: not valid JSON"),
    "index without map": (write("model.safetensors.index.json", "{}"), "no weight_map"),
    "download unfinished": (write("model.safetensors.incomplete", ""), "not finished"),
    "weights cut off": (truncate_weights, "header promises"),
    "weights foreign": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "not a safe",
    ),
    "weights empty": (write("model.safetensors", ""), "not a safetensors file"),
    "tokenizer missing": (
        lambda folder: (remove("tokenizer.json")(folder), remove("tokenizer_config.json")(folder)),
        "no tokenizer.json",
    ),
    "tokenizer corrupt": (write("tokenizer.json", "{"), "cannot load the tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_told_in_one_line(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    for module in ("hf_olmo", "mlx_lm.models.olmo"):  # another test may have provided what olmo asks for
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModelError, match=message) as caught:
        load_model_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_without_weights_or_index(folder: Path) -> None:
    remove("model.safetensors")(folder)
    remove("model.safetensors.index.json")(folder)
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        load_model_folder(folder)


def test_missing_folder_and_a_file_in_its_place(folder: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_model_folder(folder / "nothing")
    with pytest.raises(ModelError, match="is a file"):
        load_model_folder(folder / "config.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "Q4_K", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"tensor": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelError, match="corrupt at tensor 'tensor'"):
        read_tensors(file)


def _divisible(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % 32 == 0


def test_cast_to_fp32_keeps_values_of_packed_and_plain_weights() -> None:
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, m: _divisible(m))
    before = dict(tree_flatten(model.parameters()))
    cast_to_fp32(model)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert {array.dtype for array in after.values()} == {mx.float32, mx.uint32}
    for name, array in before.items():
        assert np.array_equal(np.array(array.astype(mx.float32)), np.array(after[name].astype(mx.float32))), name
    assert model(mx.array([[1, 2]])).dtype == mx.float32
