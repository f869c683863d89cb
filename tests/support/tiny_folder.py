"""A tiny random llama as a real mlx-lm folder, tokenizer and chat template included: fp32, nothing downloaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.progress import Progress
from llmcad_mlx.store.convert import weights_of, write_weights
from tests.support.tiny import tiny_llama

SPECIAL = ("<|im_start|>", "<|im_end|>")
EOS = 1
_LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
_BYTES = ["Ġ", "Ċ", "Ã", "©", "ð", "Ł", "ĺ", "Ģ"]  # space, newline, the bytes of é and of the emoji U+1F600
_MERGES = [("t", "h"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a"), ("o", "n"), ("th", "e"), ("Ġ", "the")]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def tiny_environment(home: Path) -> Iterator[None]:
    """A home of its own for profiles, and one thread for the kernels: on tiny matrices more only wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCAD_MLX_HOME", str(home))
        if importlib.util.find_spec("numba") is None:
            yield
            return
        import numba

        before = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def token_ids() -> dict[str, int]:
    """The vocabulary: special tokens, ASCII, a few bytes, a few merges."""
    tokens = [*SPECIAL, *_LETTERS, *_BYTES, *("".join(pair) for pair in _MERGES)]
    return {token: number for number, token in enumerate(tokens)}


VOCAB = len(token_ids())


def make_folder(
    path: Path,
    *,
    seed: int = 0,
    context: int = 512,
    template: bool = True,
    bits: int | None = None,
    **options: Any,
) -> Path:
    """Write a llama folder and return it.

    `context`: max_position_embeddings. `bits`: quantised. Further options as for `tiny_llama`.
    """
    model = tiny_llama(seed, vocab=VOCAB, **options)
    args = {key: value for key, value in vars(model.args).items() if value is not None and key != "layer_types"}
    return write_folder(path, model, {**args, "max_position_embeddings": context}, template, bits)


def byte_level_folder(path: Path, added: Sequence[str] = (), decoder: Any = None) -> Path:
    """`make_folder` with `added` tokens, each in place of a letter, and another decoder where given."""
    folder = make_folder(path, context=4096)
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    for letter, token in zip("^~`", added, strict=False):
        vocabulary[token] = vocabulary.pop(letter)
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.save(str(file))
    return folder


def write_folder(
    path: Path, model: Any, config: dict[str, Any], template: bool = True, bits: int | None = None
) -> Path:
    """Write any model with this module's tokenizer; the model may have fewer tokens."""
    path.mkdir(parents=True)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config = {**config, "quantization": {"group_size": 32, "bits": bits}}
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": EOS}))
    make_tokenizer().save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[EOS],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if template:
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


def without_end(folder: Path) -> Path:
    """Let the model never end a text by itself."""
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = json.loads((folder / name).read_text())
        del values[key]
        (folder / name).write_text(json.dumps(values))
    return folder


def family_folder(path: Path, family: str, bits: int | None = None, **changes: Any) -> Path:
    """Write a tiny random model of another family, with as many tokens as the tokenizer has."""
    from tests.support.architecture_configs import build, config_of

    changes = {"vocab_size": VOCAB, **changes}
    return write_folder(path, build(family, **changes), {**config_of(family), **changes}, bits=bits)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE, as most models of today have it."""
    tokenizer = Tokenizer(models.BPE(vocab=token_ids(), merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def copy_folder(folder: Path, path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, path))


def write_bundle(source: Path, dest: Path) -> None:
    """The model in the folder `source` as a bundle, its weights as they are."""
    loaded = load_model_folder(source, lazy=True, alone=True)
    write_weights(source, dest, weights_of(loaded, loaded.model, None), None, Progress())


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def poison(folder: Path, name: str = "lm_head.weight") -> None:
    """Put a NaN into one row of a weight: the logits of one token become NaN."""
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    array = weights[name] * 1
    array[7] = float("nan")
    weights[name] = array
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
