"""Loading an mlx-lm model folder, with every way it can be broken told in one line."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.utils import _get_classes, load_model, load_tokenizer

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.safetensors import WeightIndex, read_json, read_weights
from llmcad_mlx.models.adapt import Adaptation, adapted_class, restore
from llmcad_mlx.models.draft_folder import (
    DraftParts,
    TokenEmbedding,
    TokenList,
    read_draft_tokens,
    shares_embedding,
    token_embedding,
    vocabulary_size,
)

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "*.tiktoken",
    "tiktoken.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model folder in memory."""

    model: Module
    tokenizer: Any
    """mlx-lm's TokenizerWrapper."""
    config: dict[str, Any]
    path: Path
    weights: WeightIndex = field(default_factory=dict)
    """Where the files hold each tensor."""
    unchanged: frozenset[str] = frozenset()
    """Names of the tensors that the model uses as the files hold them."""
    embedding: TokenEmbedding | None = None
    """Where it looks tokens up; None where that is not a plain embedding, or its target's."""
    draft_tokens: TokenList | None = None
    """Row i of the head is the logit of token draft_tokens[i]; None: of token i."""

    @property
    def drafts_only(self) -> str:
        """Why this can only be a draft; "" where it can also be a target."""
        reasons = []
        if self.draft_tokens is not None:
            size = vocabulary_size(self.config)
            reasons.append(f"its head has {len(self.draft_tokens):,} of {f'{size:,}' if size else 'all'} tokens")
        if shares_embedding(self.config):
            reasons.append("it uses its target's embedding")
        return " and ".join(reasons)


def load_model_folder(
    path: str | Path, lazy: bool = False, like: LoadedModel | None = None, alone: bool = False
) -> LoadedModel:
    """Load the model and tokenizer of an mlx-lm folder; code that a folder brings along is never run.

    lazy: a parameter is read when it is first used. like: the target, for a draft. Its tokenizer is taken where
    the files are the same: a tokenizer takes over 100 MB. Its embedding is taken by a draft that has none, and
    then the tokenizer too where the draft has none either.
    alone: such a draft gets a made-up embedding where there is no target: to examine or copy it.
    Raises ModelError, one line, for a folder that is missing, incomplete, corrupt or of an unknown kind.
    """
    folder = Path(path).expanduser()
    config = read_config(folder)
    weights = read_weights(folder)
    tokens = read_draft_tokens(folder, vocabulary_size(config))
    shared = _shared_embedding(folder, config, like, alone)
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)
    if not has_tokenizer and shared is None and not (alone and shares_embedding(config)):
        raise ModelError(f"{folder}: no tokenizer.json or tokenizer.model; download the folder again")
    parts = DraftParts(folder, config, tokens, shared)
    unchanged: set[str] = set()
    try:
        model, config = load_model(
            folder, lazy=lazy, get_model_classes=lambda config: _classes(config, parts, unchanged)
        )
        restore(model, Adaptation)
    except SystemExit:
        raise ModelError(f"{folder}: architecture {config['model_type']!r} needs a package of its own") from None
    except ModelError:
        raise
    except Exception as error:  # model files raise anything when a config is not what they expect
        raise ModelError(_why_not_built(folder, config, error)) from error
    theirs = like is not None and (not has_tokenizer or _same_tokenizer(folder, like.path))
    tokenizer = like.tokenizer if like is not None and theirs else None
    try:
        if has_tokenizer and tokenizer is None:
            tokenizer = load_tokenizer(folder, {"trust_remote_code": False}, config.get("eos_token_id"))
    except Exception as error:
        raise ModelError(f"{folder}: cannot load the tokenizer: {_first_line(error)}") from error
    return LoadedModel(
        model, tokenizer, config, folder, weights, frozenset(unchanged), token_embedding(model), tokens
    )


def _shared_embedding(
    folder: Path, config: dict[str, Any], like: LoadedModel | None, alone: bool
) -> TokenEmbedding | None:
    """The target's embedding for a draft that uses it; None where it gets a made-up one, or has its own."""
    if not shares_embedding(config) or (like is None and alone):
        return None
    if like is None:
        raise ModelError(f"{folder}: uses its target's embedding, so it can only draft; give it as --draft")
    if like.embedding is None:
        raise ModelError(f"{folder}: uses its target's embedding, and {like.path} has none; choose another draft")
    return like.embedding


def _same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two folders have the same tokenizer.json, which holds all tokens."""
    files = a / "tokenizer.json", b / "tokenizer.json"
    return all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)


def _classes(config: dict[str, Any], parts: DraftParts, unchanged: set[str]) -> tuple[type[Any], type[Any]]:
    """The classes of a config's model and of its arguments, the model's made to fit a draft's folder.

    `unchanged` gets the names of the tensors that the model's own `sanitize` passes through.
    """
    model_class, args_class = _get_classes(config=config)

    class Fitted(Adaptation):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            parts.fit(self)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            before = dict(weights)
            if hasattr(model_class, "sanitize"):
                weights = model_class.sanitize(self, weights)
            unchanged.update(name for name, array in weights.items() if before.get(name) is array)
            parts.check(weights)
            return weights

    return adapted_class(Fitted, model_class), args_class


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError when there is none or it is not a model's."""
    if not folder.exists():
        raise ModelError(f"{folder}: no such model folder; check the path, or pull the model first")
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; give the folder that holds config.json and *.safetensors")
    config = read_json(folder / "config.json", "download the folder again")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: no model_type; this is not a language model's config")
    if config.get("model_file") is not None:
        raise ModelError(
            f"{folder}: the model brings code of its own ({config['model_file']!r}), which is never run; "
            "use a model that mlx-lm supports"
        )
    return config


def _why_not_built(folder: Path, config: dict[str, Any], error: Exception) -> str:
    kind, line = config["model_type"], _first_line(error)
    if "not supported" in line and "Model type" in line:
        return f"{folder}: unknown architecture {kind!r}; a newer mlx-lm may have it"
    if "parameters" in line or "shape" in line:
        return f"{folder}: the weights do not match config.json ({line.rstrip(': ')}); download the folder again"
    return f"{folder}: config.json does not describe a {kind!r} model ({type(error).__name__}: {line})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
