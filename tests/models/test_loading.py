"""Model folders that are fine, and every way in which they are not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from llmcad_mlx import load
from llmcad_mlx.errors import ModelError
from llmcad_mlx.models.folder import load_model_folder, own_sampling
from llmcad_mlx.store.convert import convert_folder
from tests.support.tiny import tiny_llama
from tests.support.tiny_folder import EOS, VOCAB, change_config, copy_folder, token_ids


@pytest.fixture
def folder(folder: Path, tmp_path: Path) -> Path:
    """A complete model folder to damage, with an index."""
    path = copy_folder(folder, tmp_path / "model")
    names = mx.load(str(path / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_loads_model_tokenizer_and_config(folder: Path) -> None:
    loaded = load_model_folder(str(folder))
    assert loaded.path == folder
    assert loaded.config["model_type"] == "llama"
    assert loaded.tokenizer.encode("the") == [token_ids()["the"]]
    assert loaded.tokenizer.eos_token_ids == {EOS}
    assert mx.array_equal(loaded.model(mx.array([[5, 7]])), tiny_llama(vocab=VOCAB)(mx.array([[5, 7]])))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def change(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def forget_hidden_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BROKEN = {
    "config missing": (remove("config.json"), "config.json: missing"),
    "config cut off": (write("config.json", '{"model_type": "qw'), "config.json: not valid JSON"),
    "config a list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "config of something else": (write("config.json", '{"a": 1}'), "no model_type"),
    "unknown architecture": (change(model_type="nosuch9"), "unknown architecture 'nosuch9'"),
    "own code": (change(model_file="evil.py"), "brings code of its own"),
    "needs a package": (change(model_type="olmo"), "'olmo' needs a package"),
    "field missing": (forget_hidden_size, "does not describe a 'llama' model.*hidden_size"),
    "other size": (change(hidden_size=32), "weights do not match"),
    "tensor missing": (drop_a_tensor, "weights do not match config.json .Missing 1 parameters"),
    "no weights": (remove("model.safetensors"), "model.safetensors: missing, though the index names it"),
    "no weights, no index": (
        lambda folder: (remove("model.safetensors")(folder), remove("model.safetensors.index.json")(folder)),
        r"no model\*\.safetensors",
    ),
    "index names a missing file": (
        lambda folder: (drop_a_tensor(folder), name_a_second_file(folder)),
        "model-00001-of-00002.safetensors: missing",
    ),
    "download unfinished": (
        lambda folder: (drop_a_tensor(folder), write("model.safetensors.incomplete", "")(folder)),
        "not finished",
    ),
    "a tensor in two files": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        "model.safetensors: holds lm_head.weight, as model-00001-of-00002.safetensors does; delete",
    ),
    "weights cut off": (truncate_weights, "header promises"),
    "weights foreign": (write("model.safetensors", "GIF89a" * 50), "not a safetensors file"),
    "weights a pointer": (
        write("model.safetensors", POINTER),
        r"model.safetensors: is a pointer of git-lfs.*`git lfs",
    ),
    "tokenizer a pointer": (write("tokenizer.json", POINTER), "tokenizer.json: is a pointer of git-lfs"),
    "an adapter": (
        lambda folder: (remove("config.json")(folder), write("adapter_config.json", "{}")(folder)),
        "holds an adapter, not a model; make one of it",
    ),
    "GGUF files": (
        lambda folder: (remove("config.json")(folder), write("a b.gguf", "GGUF")(folder)),
        "holds GGUF files, which must be converted first: llmcad-mlx convert '.*/a b.gguf' NEW_FOLDER",
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


def leave_traces_of_a_download(folder: Path) -> None:
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "x.abc.incomplete").touch()


def put_other_forms_beside(folder: Path) -> None:
    """As Mistral's and Meta's repositories have them, and as mlx-lm leaves an adapter."""
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "adapters.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    for name in ("adapter_config.json", "params.json", "original/params.json"):
        (folder / name).write_text("{}")


def link_into_a_cache(folder: Path) -> None:
    """As the hub's client lays a snapshot out: every file is a link to one that is named by its hash."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(Path("..") / "blobs" / f"{number:064x}")


ODD = {
    "other forms beside": put_other_forms_beside,
    "links into a cache": link_into_a_cache,
    "path with blanks and letters of all kinds": lambda folder: None,
    "index of another build": name_a_second_file,
    "index corrupt": write("model.safetensors.index.json", "{"),
    "index without map": write("model.safetensors.index.json", "{}"),
    "leftover": write("model.safetensors.incomplete", ""),
    "leftover of the hub's client": leave_traces_of_a_download,
    "path like a pattern": lambda folder: None,
    "path that is no text": lambda folder: None,
}
PATHS = {
    "path with blanks and letters of all kinds": "Größe (2) – 模型 'a' & b; #%$~",
    "path like a pattern": "my model[1]*",
    "path that is no text": "caf\udce9",
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.usefixtures("own_home")
def test_odd_folders_that_hold_all_weights_are_loaded(case: str, folder: Path, output: Any) -> None:
    ODD[case](folder)
    if case in PATHS:
        folder = folder.rename(folder.parent / PATHS[case])
    assert mx.array_equal(
        load_model_folder(folder).model(mx.array([[5]])), tiny_llama(vocab=VOCAB)(mx.array([[5]]))
    )
    convert_folder(folder, folder.parent / "converted", bits=8, group_size=32)
    with load(folder, None, memory="8GB", pinned=0) as engine:
        assert engine.generate([5], max_tokens=2).tokens
    assert output("doctor", folder)[1] == ""
    assert json.loads(output("plan", folder, "--json")[0])["estimated"] is False


def test_a_path_as_people_write_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    for text in ("~/model", "~/model/", f"{folder}/", f"{folder}/../model//"):
        assert load_model_folder(text).config["model_type"] == "llama"
        with load(text, None) as engine:
            assert engine.generate([5], max_tokens=1).tokens


@pytest.mark.parametrize(
    ("own", "for_generation", "ends"),
    [(EOS, None, set()), (EOS, [EOS, 7], {7}), (None, 7, {7}), ([5], [EOS, 7], {7}), (7, 0, {0})],
)
def test_the_end_tokens_are_those_for_generation(
    folder: Path, own: Any, for_generation: Any, ends: set[int]
) -> None:
    """As mlx-lm and transformers: generation_config.json wins, as in Gemma 2, where config.json lacks one. The
    tokenizer's own is always among them."""
    change_config(folder, eos_token_id=own)
    if for_generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": for_generation}))
    assert load_model_folder(folder).tokenizer.eos_token_ids == ends | {EOS}
    convert_folder(folder, folder.parent / "converted", bits=8, group_size=32)
    assert load_model_folder(folder.parent / "converted").tokenizer.eos_token_ids == ends | {EOS}


def test_missing_folder_and_a_file_in_its_place(folder: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_model_folder(folder / "nothing")
    with pytest.raises(ModelError, match="is a file"):
        load_model_folder(folder / "config.json")


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        (None, {}),
        ("{", {}),
        ("[]", {}),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
         {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}),
        ({"temperature": 0.6, "top_k": 64.0, "min_p": 0.05}, {"temperature": 0.6, "top_k": 64, "min_p": 0.05}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {}),
        ({"top_p": 0.9}, {}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"temperature": 0.7, "top_p": None, "top_k": 0, "min_p": "x", "repetition_penalty": -1},
         {"temperature": 0.7}),
        ({"do_sample": None, "temperature": "hot", "top_p": 0, "top_k": 2.5}, {}),
    ],
)  # fmt: skip
def test_the_sampling_a_folder_recommends(tmp_path: Path, content: Any, sampling: dict[str, float]) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text)
    assert own_sampling(tmp_path) == sampling
