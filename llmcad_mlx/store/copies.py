"""Drafts made from other drafts, by name: "4bit:DRAFT" is DRAFT in 4 bits, "trimmed:8192:DRAFT" proposes only the
8192 most usual tokens. DRAFT is whatever else names a draft model, such a copy too: "trimmed:8192:4bit:DRAFT".

Copies of models that are made once and kept in the cache folder.

```
<kind>/<model>-<state>-<what>    model: digest of the folder's path; state: of its files' sizes and times
```

A model folder in fewer bits, made once and kept in the cache folder: what self-drafts and smaller drafts are.

The copy is an mlx-lm folder like any other: affine groups of 32.

On a Linux CPU the host kernels take 4 and 8 bits; copies of 2 and 3 bits run there on MLX's own kernels, which are
right but slow. On Metal and CUDA, MLX's kernels serve all.

`--draft self:4`: the target in fewer bits is its own draft (SubSpec, arXiv 2509.18344).

Drafts with a trimmed output vocabulary, made from drafts with a full one.

A draft step spends much of its time on the head: a row for each of 50,000 to 150,000 tokens, of which a few
thousand make up most of any text. The copy keeps the rows of those; what it cannot propose the target writes
itself, so the text stays the same. The format is that of `models.trimmed_head`. Copies are kept in
`trimmed-drafts/` of the cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.utils import dequantize_model

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files.atomic import check_destination
from llmcad_mlx.files.safetensors import weight_files
from llmcad_mlx.models.draft_folder import (
    TokenList,
    check_token_list,
    head_path,
    parent_of,
    untied,
    untied_head_path,
)
from llmcad_mlx.models.folder import LoadedModel, load_model_folder, read_config
from llmcad_mlx.progress import NoProgress, Progress
from llmcad_mlx.store.cache_folder import home_folder
from llmcad_mlx.store.convert import is_quantised, quantised_weights, weights_of, write_weights
from llmcad_mlx.store.pull import locked
from llmcad_mlx.store.token_counts import usual_tokens


def kept_copy(source: Path, kind: str, what: str, make: Callable[[Path], object]) -> Path:
    """The folder of the copy `what` of the model in `source`; make(folder) writes it where it is not there yet.

    make: lets the folder appear whole or not at all. The same copy of what the model was before it changed is
    removed. Raises ModelError for a source that is no model folder, DiskError, and what `make` raises.
    """
    identity, state = digest(str(source.resolve())), _state(source)
    folder = home_folder() / kind / f"{identity}-{state}-{what}"
    if folder.exists():  # complete, because it got its name last
        return folder
    with locked(folder):
        if not folder.exists():
            for old in folder.parent.glob(f"{identity}-*-{what}"):
                shutil.rmtree(old, ignore_errors=True)
            make(folder)
    return folder


def digest(text: str) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _state(source: Path) -> str:
    """Changes with the weights and the configuration, by sizes and times: hashing them would take minutes."""
    read_config(source)
    files = [source / "config.json", *weight_files(source)]
    stats = [(file.name, file.stat()) for file in files]
    return digest("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))


BITS = (2, 3, 4, 8)
GROUP_SIZE = 32
KIND = "drafts"


def quantised_copy(
    source: Path, bits: int, progress: Progress | None = None, kind: str = KIND, name: str | None = None
) -> Path:
    """The folder of a copy of the model in `source` in `bits` bits, made where it is not there yet.

    kind: the folder of the cache folder it goes to. name: what people have typed for it.

    At most one tensor is in memory at full precision while it is made. A copy of what the model was before it
    changed is removed. Raises UsageError for a model that has no more bits, ModelError for one that cannot be
    read or quantised, DiskError when the copy does not fit the disk.
    """

    def make(folder: Path) -> None:
        loaded = load_model_folder(source, lazy=True, alone=True)
        _check_bits(loaded, bits, name or f"{bits}bit")
        _make(loaded, folder, bits, progress or NoProgress())

    return kept_copy(source, kind, f"{bits}bit", make)


def stored_bits(loaded: LoadedModel) -> int:
    """Bits of most of the weights that can be quantised. Raises ModelError where none can."""
    found: Counter[int] = Counter()
    model: Any = loaded.model
    for _, layer in model.named_modules():
        if "scales" in layer and hasattr(layer, "bits"):
            found[layer.bits] += layer.weight.size * 32 // layer.bits
        elif hasattr(layer, "to_quantized") and layer.weight.shape[-1] % GROUP_SIZE == 0:
            found[8 * layer.weight.dtype.size] += layer.weight.size
    if not found:
        raise ModelError(f"{loaded.path}: no weights divide into groups of {GROUP_SIZE}; choose another draft")
    ((present, _),) = found.most_common(1)
    return present


def _make(loaded: LoadedModel, folder: Path, bits: int, progress: Progress) -> None:
    config = copy.deepcopy(loaded.config)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    model = dequantize_model(loaded.model)  # lazily, as all that follows until the copy is written
    if is_quantised(model):
        raise ModelError(f"{loaded.path}: has layers that mlx-lm cannot dequantise; choose another draft")
    # Nothing counts as unchanged: scales of other bits may have the same shape.
    plain = replace(loaded, model=model, config=config, unchanged=frozenset())
    weights = quantised_weights(plain, bits, GROUP_SIZE)
    progress.note(f"quantising {loaded.path} to {bits} bits, to draft with")
    write_weights(loaded.path, folder, weights, f"{loaded.path.name} in {bits} bits", progress)


def _check_bits(loaded: LoadedModel, bits: int, name: str) -> None:
    """Refuse what would not become smaller."""
    present = stored_bits(loaded)
    if present <= bits:
        fewer = "fewer bits or " if bits > min(BITS) else ""
        raise UsageError(
            f"draft: {name} needs a model of more bits, and {loaded.path} has {present}; "
            f"choose {fewer}another draft"
        )


PREFIX = "self:"
SELF_BITS = (2, 3, 4)
SELF_KIND = "self-drafts"


def self_draft_bits(draft: str) -> int | None:
    """The bits of a draft named like "self:4"; None for every other name. Raises UsageError for other bits."""
    if not draft.startswith(PREFIX):
        return None
    for bits in SELF_BITS:
        if draft == f"{PREFIX}{bits}":
            return bits
    choices = ", ".join(f"{PREFIX}{bits}" for bits in SELF_BITS)
    raise UsageError(f"draft: {draft!r} is not one of {choices}")


def self_draft(target: Path, bits: int, progress: Progress | None = None) -> Path:
    """The folder of the target's copy in `bits` bits (2, 3 or 4), made where it is not there yet.

    Raises the errors of `quantised_copy`.
    """
    return quantised_copy(target, bits, progress, SELF_KIND, f"{PREFIX}{bits}")


TRIMMED_KIND = "trimmed-drafts"


def trimmed_draft(draft: Path, tokens: Iterable[int], progress: Progress | None = None) -> Path:
    """The folder of a copy of the model in `draft` that proposes only `tokens`, made where it is not there yet.

    tokens: full ids in any order. See `token_counts.most_frequent` for a choice of them. What the folder holds is
    as `write_trimmed_draft` writes it; it can be given as a draft. A copy of what the model was before it changed
    is removed. Raises the errors of `write_trimmed_draft`.
    """
    wanted = _token_list(tokens)
    what = f"{len(wanted)}tokens-{digest(str(wanted.tolist()))}"
    return kept_copy(
        draft, TRIMMED_KIND, what, lambda folder: write_trimmed_draft(draft, folder, wanted, progress)
    )


def write_trimmed_draft(
    source: Path, dest: Path, tokens: Iterable[int], progress: Progress | None = None
) -> TokenList:
    """Write a copy of the model in the folder `source` to the new folder `dest`, with the head's rows of `tokens`.

    Where the head is the embedding, its rows are copied from there, quantised ones bit for bit; the embedding
    stays whole. `dest` appears complete or not at all. Returns the tokens in ascending order.
    Raises UsageError for an empty list and a destination that is not free, ModelError for a model that cannot be
    trimmed and tokens it does not have, DiskError when the copy does not fit the disk.
    """
    wanted = _token_list(tokens)
    check_destination(dest)
    loaded = load_model_folder(source, lazy=True, alone=True)
    if loaded.draft_tokens is not None:
        raise ModelError(f"{source}: is trimmed already; trim the model that it was made from")
    config = _trim(loaded, wanted)
    weights = weights_of(replace(loaded, draft_tokens=wanted), loaded.model, config)
    name = f"{source.resolve().name} with {len(wanted)} output tokens"
    del loaded  # its arrays must be in `weights` alone
    write_weights(source, dest, weights, name, progress or NoProgress())
    return wanted


def _token_list(tokens: Iterable[int]) -> TokenList:
    wanted = np.unique(np.array([int(token) for token in tokens], np.int64))
    if not len(wanted):
        raise UsageError("tokens: the list is empty; give the tokens that the draft may propose")
    if wanted[0] < 0 or wanted[-1] > np.iinfo(np.int32).max:
        raise UsageError(f"tokens: {wanted[0] if wanted[0] < 0 else wanted[-1]} is not a token id")
    return wanted.astype(np.int32)


def _trim(loaded: LoadedModel, tokens: TokenList) -> dict[str, Any]:
    """Give the lazily loaded model a head of the rows `tokens`; returns the config that goes with it."""
    real = max(loaded.tokenizer.get_vocab().values(), default=-1) + 1
    check_token_list(tokens, real, str(loaded.path))
    config = copy.deepcopy(loaded.config)
    path = head_path(loaded.model)
    if path is not None:
        parent, name = parent_of(loaded.model, path)
        parent[name] = _rows(parent[name], tokens)
        return config
    path, embedding = untied_head_path(config), loaded.embedding
    if path is None or embedding is None:
        raise ModelError(
            f"{loaded.path}: {config['model_type']!r} has no head of its own, so its vocabulary cannot be "
            "trimmed; choose another draft"
        )
    parent, name = parent_of(loaded.model, path)
    parent[name] = _rows(embedding.module, tokens)
    config = untied(config)
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, dict) and embedding.path in settings:
            settings[path] = settings[embedding.path]
    return config


def _rows(module: Any, tokens: TokenList) -> Module:
    """The arrays of a matrix's rows `tokens`, under their names."""
    num_rows = module["weight"].shape[0]
    chosen = Module()  # type: ignore[no-untyped-call]
    ids = mx.array(tokens)
    for name, value in module.items():
        if isinstance(value, mx.array):
            per_row = value.ndim > 0 and value.shape[0] == num_rows
            chosen[name] = mx.take(value, ids, axis=0) if per_row else value
    return chosen


_BITS = re.compile(r"(\d+)bit:(.+)", re.DOTALL)
_TRIMMED = re.compile(r"trimmed:(\d+):(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CopyName:
    """`draft` in so many `bits`, or with an output vocabulary of so many `tokens`; one of the two is None."""

    draft: str
    bits: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.prefix}{self.draft}"

    @property
    def prefix(self) -> str:
        """What comes before the draft's name."""
        return f"{self.bits}bit:" if self.bits is not None else f"trimmed:{self.tokens}:"

    @classmethod
    def of(cls, name: str) -> CopyName | None:
        """None for a name of another kind. Raises UsageError for bits that cannot be had, here or further in."""
        copy, found = None, _BITS.fullmatch(name)
        if found is not None:
            bits = next((bits for bits in BITS if found[1] == str(bits)), None)
            if bits is None:
                choices = ", ".join(f"{bits}bit:DRAFT" for bits in BITS)
                raise UsageError(f"draft: {name!r} is not one of {choices}")
            copy = cls(found[2], bits=bits)
        elif (found := _TRIMMED.fullmatch(name)) is not None:
            copy = cls(found[2], tokens=int(found[1]))
        if copy is not None:
            cls.of(copy.draft)
        return copy

    def make(self, source: Path, progress: Progress | None = None) -> Path:
        """The copy of the model in `source`, made where it is not there yet.

        Raises the errors of `quantised_copy` and of `write_trimmed_draft`.
        """
        if self.bits is not None:
            return quantised_copy(source, self.bits, progress, name=str(self))
        return kept_copy(
            source, TRIMMED_KIND, f"{self.tokens}usual", lambda dest: self._trim(source, dest, progress)
        )

    def _trim(self, source: Path, dest: Path, progress: Progress | None) -> None:
        tokenizer = load_model_folder(source, lazy=True, alone=True).tokenizer
        tokens = usual_tokens(tokenizer, self.tokens or 0)
        (progress or NoProgress()).note(f"trimming the vocabulary of {source} to {self.tokens} tokens")
        write_trimmed_draft(source, dest, tokens, progress)
