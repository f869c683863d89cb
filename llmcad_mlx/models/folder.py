"""Loading an mlx-lm model folder, with every way it can be broken told in one line.

A draft's folder may leave out parts of the model that its config.json describes.

Rows of the head: `draft_tokens.safetensors` beside the weights holds `tokens` (V',) int32, full ids in ascending
order, and row i of the head is the logit of token tokens[i]. Embedding, tokenizer and `vocab_size` stay whole.

The embedding: with `"llmcad": {"shares_embedding": true}` in config.json tokens are looked up in the target's,
which is in memory anyway. It is the target's object that is called, so that it works whatever the target does with
it: in memory, or read from the disk row by row. Its bytes count as the target's. Such a folder may also leave the
tokenizer out, and says by `"vocabulary"` beside it, a `vocabulary_hash`, which tokens it was made for.
"""

from __future__ import annotations

import contextlib
import filecmp
import glob
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm.utils import _decode_tagged_floats, _get_classes, load_model

from llmcad_mlx.detokenizer import repair_decoder
from llmcad_mlx.errors import ModelError, UsageError, VocabularyError, first_line
from llmcad_mlx.files import POINTER, is_pointer, read_object, user_path
from llmcad_mlx.files.safetensors import WeightIndex, missing_part, read_json, read_tensors, read_weights
from llmcad_mlx.models.adapt import Adaptation, adapted_class, restore
from llmcad_mlx.models.config import completed, correct_rope
from llmcad_mlx.models.tokenizer import load_tokenizer
from llmcad_mlx.settings import OWN_SAMPLING, SamplingSettings

DRAFT_TOKENS = "draft_tokens.safetensors"

TokenList = npt.NDArray[np.int32]
"""(V',) ascending full ids."""

EMBEDDINGS = Embedding | QuantizedEmbedding
LINEARS = Linear | QuantizedLinear

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "*.tiktoken",
    "tiktoken.model",
)  # fmt: skip

_STAND_IN_ROWS = 64


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """Where a model looks tokens up."""

    module: Any
    path: str
    width: int
    """Kept because a streamed module does not know it."""


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
    config_is_complete: bool = True
    """Whether config.json says all that `config` does."""

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
    path: str | Path,
    lazy: bool = False,
    like: LoadedModel | None = None,
    alone: bool = False,
    tokenizer: bool = True,
) -> LoadedModel:
    """Load the model and tokenizer of an mlx-lm folder; code that a folder brings along is never run.

    lazy: a parameter is read when it is first used. like: the target, for a draft. Its tokenizer is taken where
    the files are the same: a tokenizer takes over 100 MB. Its embedding is taken by a draft that has none, and
    then the tokenizer too where the draft has none either.
    alone: such a draft gets a made-up embedding where there is no target: to examine or copy it.
    tokenizer: False leaves it out.
    Raises ModelError, one line, for a folder that is missing, incomplete, corrupt or of an unknown kind.
    """
    folder = user_path(str(path))
    published, weights = read_config(folder), read_weights(folder)
    config = completed(folder, published, weights)
    is_complete = config == published
    tokens = read_draft_tokens(folder, vocabulary_size(config))
    shared = _shared_embedding(folder, config, like, alone)
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)
    if not has_tokenizer and shared is None and not (alone and shares_embedding(config)):
        raise ModelError(f"{folder}: no tokenizer.json or tokenizer.model; download the folder again")
    parts = DraftParts(folder, config, tokens, shared)
    try:
        with _plain_path(folder) as path:
            model, config = load_model(path, lazy=lazy, model_config=config, get_model_classes=parts.classes)
        restore(model, Adaptation)
        correct_rope(model, config, folder)
    except SystemExit:
        raise ModelError(f"{folder}: architecture {config['model_type']!r} needs a package of its own") from None
    except ModelError:
        raise
    except Exception as error:  # model files raise anything when a config is not what they expect
        raise ModelError(_why_not_built(folder, config, error)) from error
    theirs = like is not None and (not has_tokenizer or _same_tokenizer(folder, like.path))
    text = like.tokenizer if like is not None and theirs else None
    try:
        if tokenizer and has_tokenizer and text is None:
            for file in folder.glob("tokenizer*"):
                if is_pointer(file):
                    raise ModelError(f"{file}: {POINTER}")
            with _plain_path(folder) as path:
                text = load_tokenizer(path, config.get("eos_token_id"))
            repair_decoder(text)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: cannot load the tokenizer: {first_line(error)}") from error
    return LoadedModel(
        model,
        text,
        config,
        folder,
        weights,
        frozenset(parts.unchanged),
        token_embedding(model),
        tokens,
        is_complete,
    )


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Another path to `folder` where its own has characters that mlx-lm takes for a pattern, as in "model[1]", or
    bytes that are not UTF-8, which MLX and tokenizers cannot open."""
    name = str(folder)
    if name == glob.escape(name) == name.encode(errors="ignore").decode():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "model"
        link.symlink_to(folder.resolve())
        yield link


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


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError when there is none or it is not a model's."""
    if not folder.exists():
        raise ModelError(f"{folder}: no such model folder; check the path, or pull the model first")
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; give the folder that holds config.json and *.safetensors")
    if not (folder / "config.json").exists():
        _refuse_other_forms(folder)
    config: dict[str, Any] = _decode_tagged_floats(read_json(folder / "config.json", "download the folder again"))
    ends = read_object(folder / "generation_config.json").get("eos_token_id")
    if ends is not None:  # as mlx-lm and transformers: of the two it is the one for generation
        config["eos_token_id"] = ends
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: no model_type; this is not a language model's config")
    if config.get("model_file") is not None:
        raise ModelError(
            f"{folder}: the model brings code of its own ({config['model_file']!r}), which is never run; "
            "use a model that mlx-lm supports"
        )
    return config


def _refuse_other_forms(folder: Path) -> None:
    """Raise ModelError for a folder without config.json that holds something else than a model in parts."""
    files = sorted(folder.glob("*.gguf"))
    if files:
        command = shlex.join(["llmcad-mlx", "convert", str(files[0]), "NEW_FOLDER"])
        raise ModelError(f"{folder}: holds GGUF files, which must be converted first: {command}")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: holds an adapter, not a model; make one of it and the model it was made for with "
            "mlx_lm.fuse, or merge_and_unload of peft"
        )


def own_sampling(folder: Path) -> dict[str, float]:
    """The sampling that the folder's generation_config.json recommends, as options of a generation; {} where it
    recommends none, or greedy decoding. Values that cannot be are left out."""
    recommended = read_object(folder / "generation_config.json")
    if recommended.get("do_sample") is False:
        return {}
    found: dict[str, Any] = {}
    for name in OWN_SAMPLING:
        value = recommended.get(name)
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        with contextlib.suppress(UsageError):
            if value is not None and SamplingSettings(**{name: value}) != SamplingSettings():
                found[name] = value
    if recommended.get("do_sample") is True and recommended.get("temperature") is None:
        found["temperature"] = 1.0  # transformers' default
    if "temperature" not in found:  # greedy: of the others only the penalty does anything
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
    return found


def _why_not_built(folder: Path, config: dict[str, Any], error: Exception) -> str:
    kind, line = config["model_type"], first_line(error)
    if line.startswith("Missing") and (lacking := missing_part(folder)) is not None:
        return lacking
    if "not supported" in line and "Model type" in line:
        return f"{folder}: unknown architecture {kind!r}; a newer mlx-lm may have it"
    if "parameters" in line or "shape" in line:
        return f"{folder}: the weights do not match config.json ({line.rstrip(': ')}); download the folder again"
    return f"{folder}: config.json does not describe a {kind!r} model ({type(error).__name__}: {line})"


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the full embedding by config.json, None where it does not say."""
    sizes = (place.get("vocab_size") for place in (config, config.get("text_config") or {}))
    return next((size for size in sizes if isinstance(size, int)), None)


def read_draft_tokens(folder: Path, vocab_size: int | None) -> TokenList | None:
    """The token list of a draft's folder; None where it has none. vocab_size: the full model's, if known. Raises
    ModelError naming the file for anything that is not such a list."""
    file = folder / DRAFT_TOKENS
    if not file.exists():
        return None
    read_tensors(file)  # MLX trusts what it says
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


def check_same_tokens(target: Mapping[str, int], draft: Mapping[str, int]) -> None:
    """Raise VocabularyError with the first token whose text differs in two token maps (text -> id), as
    `get_vocab()` gives them. The sizes of the logits may differ: padding has no tokens."""
    if target == draft:
        return
    texts, draft_texts = ({id_: repr(text) for text, id_ in vocabulary.items()} for vocabulary in (target, draft))
    for token in sorted(texts.keys() | draft_texts.keys()):
        ours, theirs = texts.get(token, "missing"), draft_texts.get(token, "missing")
        if ours != theirs:
            raise VocabularyError(
                f"the draft's tokens are not the target's: token {token} is {ours} in the target and {theirs} in "
                "the draft; choose a draft of the same model family"
            )


def head_path(model: Module) -> str | None:
    """Where the model keeps its head, a linear layer: "lm_head" in most; None where it has none of its own."""
    modules: Any = model.named_modules()
    linear = [path for path, module in modules if isinstance(module, LINEARS)]
    found = [path for path in linear if path.rpartition(".")[2] == "lm_head"]
    return found[0] if len(found) == 1 else None


def parent_of(model: Module, path: str) -> tuple[Any, str]:
    """The module that holds the one at `path`, and its name there."""
    outer, _, name = path.rpartition(".")
    return dict(model.named_modules())[outer], name


def shares_embedding(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the model uses its target's embedding."""
    own = config.get("llmcad")
    return isinstance(own, Mapping) and own.get("shares_embedding") is True


def token_embedding(model: Module) -> TokenEmbedding | None:
    """The model's embedding with the most rows (others are of positions or token types); None: it has none."""
    modules: Any = model.named_modules()
    found = [(path, module) for path, module in modules if isinstance(module, EMBEDDINGS)]
    if not found:
        return None
    path, module = max(found, key=lambda entry: entry[1].weight.shape[0])
    return TokenEmbedding(
        module, path, module.dims if isinstance(module, QuantizedEmbedding) else module.weight.shape[1]
    )


class _Lookup(Module):
    """Looks tokens up in something that is no part of this model: nothing prepares, counts or writes it twice."""

    def __init__(self, look_up: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        # Out of sight in a function. A module's class is looked up at each call, because streaming changes it.
        self._look_up = lambda ids: look_up(ids)

    def __call__(self, ids: mx.array) -> mx.array:
        return self._look_up(ids)


@dataclass(slots=True)
class DraftParts:
    """Makes a freshly built model fit the weights of a draft's folder."""

    folder: Path
    config: Mapping[str, Any]
    tokens: TokenList | None
    """Of a trimmed head."""
    shared: TokenEmbedding | None
    """The target's embedding, for a draft that uses it; None: a made-up one, enough to examine the model."""

    unchanged: set[str] = field(default_factory=set)
    """Gets the names of the tensors that the model's own `sanitize` passes through."""
    _head: str = ""

    def classes(self, config: dict[str, Any]) -> tuple[type[Any], type[Any]]:
        """The classes of a config's model and of its arguments, the model's made to fit the folder."""
        model_class, args_class = _get_classes(config=config)
        parts = self

        class Fitted(Adaptation):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                if shares_embedding(parts.config):
                    parts._share_embedding(self)
                if parts.tokens is not None:
                    parts._trim_head(self, len(parts.tokens))

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                before = dict(weights)
                if hasattr(model_class, "sanitize"):
                    weights = model_class.sanitize(self, weights)
                parts.unchanged.update(name for name, array in weights.items() if before.get(name) is array)
                parts.check(weights)
                return weights

        return adapted_class(Fitted, model_class), args_class

    def check(self, weights: Mapping[str, mx.array]) -> None:
        """Raise ModelError unless the head has as many rows as there are tokens."""
        head = weights.get(f"{self._head}.weight")
        if self.tokens is not None and head is not None and head.shape[0] != len(self.tokens):
            raise ModelError(
                f"{self.folder / DRAFT_TOKENS}: lists {len(self.tokens)} tokens for a head of {head.shape[0]} "
                "rows; make the draft again"
            )

    def _share_embedding(self, model: Module) -> None:
        own, shared = token_embedding(model), self.shared
        if own is None:
            raise ModelError(
                f"{self.folder}: the model has no embedding that could be shared; choose another draft"
            )
        if shared is not None and shared.width != own.width:
            raise ModelError(
                f"{self.folder}: uses its target's embedding and needs one {own.width} wide, not {shared.width}; "
                "choose the target that it was made for"
            )
        parent, name = parent_of(model, own.path)
        if shared is not None:
            parent[name] = _Lookup(shared.module)
            return
        rows = mx.random.normal((_STAND_IN_ROWS, own.width), key=mx.random.key(0))
        mx.eval(rows)
        parent[name] = _Lookup(lambda ids: rows[ids % _STAND_IN_ROWS])

    def _trim_head(self, model: Module, num_rows: int) -> None:
        path = head_path(model)
        if path is None:
            raise ModelError(
                f"{self.folder / DRAFT_TOKENS}: the model has no head of its own, so its vocabulary cannot be "
                "trimmed (tie_word_embeddings must be false); choose another draft"
            )
        parent, name = parent_of(model, path)
        own = parent[name]
        parent[name] = Linear(own.weight.shape[1], num_rows, bias="bias" in own)
        self._head = path
