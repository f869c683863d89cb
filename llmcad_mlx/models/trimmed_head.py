"""Drafts with a trimmed output vocabulary: a head with some rows of the full one's, and which tokens they are for.

`draft_tokens.safetensors` beside the weights holds `tokens` (V',) int32, full ids in ascending order: row i of the
head is the logit of token tokens[i]. The embedding, the tokenizer and `vocab_size` stay the full ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx_lm.utils import _get_classes

from llmcad_mlx.errors import ModelError

FILE = "draft_tokens.safetensors"

TokenList = npt.NDArray[np.int32]
"""(V',) ascending full ids."""


def read_draft_tokens(file: Path, vocab_size: int | None) -> TokenList:
    """The token list in `file`, a whole safetensors file. vocab_size: of the full model, None: not known.

    Raises ModelError naming the file for anything that is not such a list.
    """
    try:
        array: Any = mx.load(str(file)).get("tokens")  # type: ignore[union-attr]
        if array is None:
            raise ModelError(f"{file}: holds no tensor 'tokens'; make the draft again")
        if array.dtype != mx.int32 or array.ndim != 1 or not array.size:
            shape = f"{str(array.dtype).rpartition('.')[2]} {tuple(array.shape)}"
            raise ModelError(f"{file}: 'tokens' must be a list of int32, not {shape}; make the draft again")
        tokens = np.array(array)
    except RuntimeError as error:
        raise ModelError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]})") from None
    check_token_list(tokens, vocab_size, str(file))
    return tokens


def check_token_list(tokens: TokenList, vocab_size: int | None, where: str) -> None:
    """Raise ModelError, beginning with `where`, unless `tokens` are ascending ids below `vocab_size`."""
    falls = np.flatnonzero(tokens[1:] <= tokens[:-1])
    if len(falls):
        first = int(falls[0])
        raise ModelError(
            f"{where}: token {tokens[first + 1]} comes after {tokens[first]}; the list must ascend: "
            "make the draft again"
        )
    beyond = tokens[0] if tokens[0] < 0 else tokens[-1]
    if beyond < 0 or (vocab_size is not None and beyond >= vocab_size):
        size = "" if vocab_size is None else f" of {vocab_size}"
        raise ModelError(f"{where}: token {beyond} is not in the vocabulary{size}; make the draft for this model")


def head_path(model: Module) -> str | None:
    """Where the model keeps its head, a linear layer: "lm_head" in most; None where it has none of its own."""
    modules: Any = model.named_modules()
    found = [
        path
        for path, module in modules
        if path.rpartition(".")[2] == "lm_head" and isinstance(module, Linear | QuantizedLinear)
    ]
    return found[0] if len(found) == 1 else None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a head of its own."""
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return changed


def untied_head_path(config: Mapping[str, Any]) -> str | None:
    """Where the head would be if it were not the embedding; None where the architecture always ties them."""
    changed = untied(config)
    model_class, args_class = _get_classes(config=changed)
    return head_path(model_class(args_class.from_dict(changed)))  # never evaluated: takes no memory


def give_rows(model: Module, num_rows: int, what: str) -> str:
    """Let a freshly built model's head have `num_rows` rows; returns where it is.

    Raises ModelError, beginning with `what`, where the model has no head of its own.
    """
    path = head_path(model)
    if path is None:
        raise ModelError(
            f"{what}: the model has no head of its own, so its vocabulary cannot be trimmed "
            "(tie_word_embeddings must be false); choose another draft"
        )
    parent, name = parent_of(model, path)
    own = parent[name]
    parent[name] = Linear(own.weight.shape[1], num_rows, bias="bias" in own)
    return path


def parent_of(model: Module, path: str) -> tuple[Any, str]:
    """The module that holds the one at `path`, and its name there."""
    *outer, name = path.split(".")
    parent: Any = model
    for part in outer:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    return parent, name
