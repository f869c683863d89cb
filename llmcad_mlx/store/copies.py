"""Drafts derived from a model, in fewer bits or with a smaller output vocabulary, made once and kept.

"self:4" is the target in 4 bits (SubSpec, arXiv 2509.18344), "4bit:DRAFT" is DRAFT in 4 bits, and
"trimmed:8192:DRAFT" proposes only the 8192 most usual tokens. DRAFT is whatever else names a draft model, a
derived one too: "trimmed:8192:4bit:DRAFT". On the disk they are mlx-lm folders like any other:

```
self-drafts/<model>-<state>-4bit           model: digest of the source folder's path
drafts/<model>-<state>-4bit                state: digest of its files' sizes and times
trimmed-drafts/<model>-<state>-8192usual
```
Fewer bits are affine groups of 32. On a Linux CPU our kernels take 4 and 8 bits; copies of 2 and 3 bits run
there on MLX's own kernels, which are right but slow.

A draft step spends much of its time on the head: a row for each of 50,000 to 150,000 tokens, of which a few
thousand make up most of any text. A trimmed draft keeps the rows of those (`models.folder` has the format);
what it cannot propose the target writes itself, so the text stays the same.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx_lm.utils import _get_classes, dequantize_model

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files import home_folder
from llmcad_mlx.files.safetensors import weight_files
from llmcad_mlx.models.folder import (
    LoadedModel,
    TokenList,
    check_token_list,
    head_path,
    load_model_folder,
    parent_of,
    read_config,
)
from llmcad_mlx.progress import Progress
from llmcad_mlx.store import locked
from llmcad_mlx.store.convert import is_quantised, quantised_weights, weights_of, write_weights

BITS = (2, 3, 4, 8)
SELF_BITS = (2, 3, 4)
GROUP_SIZE = 32

_BITS = re.compile(r"(\d+)bit:(.+)", re.DOTALL)
_TRIMMED = re.compile(r"trimmed:(\d+):(.+)", re.DOTALL)
_SELF = "self:"


@dataclass(frozen=True, slots=True)
class DerivedDraft:
    """`source` (None: the target) in so many `bits`, or with so many output `tokens`; one of the two is None."""

    source: str | None
    bits: int | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, name: str) -> DerivedDraft | None:
        """What `name` stands for; None for a name of another kind.

        Raises UsageError for bits that cannot be had, here or in the name of the source.
        """
        if name.startswith(_SELF):
            return cls(None, bits=_bits(name, name.removeprefix(_SELF), SELF_BITS, "self:{}"))
        if found := _BITS.fullmatch(name):
            draft = cls(found[2], bits=_bits(name, found[1], BITS, "{}bit:DRAFT"))
        elif found := _TRIMMED.fullmatch(name):
            draft = cls(found[2], tokens=int(found[1]))
        else:
            return None
        cls.parse(found[2])
        return draft

    def __str__(self) -> str:
        return f"{self.prefix}{self.source or ''}"

    @property
    def prefix(self) -> str:
        if self.source is None:
            return f"{_SELF}{self.bits}"
        return f"{self.bits}bit:" if self.bits is not None else f"trimmed:{self.tokens}:"

    def renamed(self, rename: Callable[[str], str]) -> str:
        """The name with another one for the source."""
        return str(self if self.source is None else replace(self, source=rename(self.source)))

    def make(self, source: Path, progress: Progress | None = None) -> Path:
        """The folder of the copy of the model in `source`, made where it is not there yet.

        A copy of the model before it changed is removed. Raises UsageError for a model of too few bits or tokens,
        ModelError for one that cannot be read, quantised or trimmed, DiskError when the disk has no room.
        """
        kind = "self-drafts" if self.source is None else "trimmed-drafts" if self.bits is None else "drafts"
        what = f"{self.tokens}usual" if self.bits is None else f"{self.bits}bit"
        identity, state = _digest(str(source.resolve())), _state(source)
        folder = home_folder() / kind / f"{identity}-{state}-{what}"
        if folder.exists():  # complete, because it got its name last
            return folder
        progress = progress or Progress()
        with locked(folder):
            if folder.exists():
                return folder
            for old in folder.parent.glob(f"{identity}-*-{what}"):
                shutil.rmtree(old, ignore_errors=True)
            if self.bits is not None:
                _write_quantised(source, folder, self.bits, str(self), progress)
                return folder
            tokens = usual_tokens(load_model_folder(source, lazy=True, alone=True).tokenizer, self.tokens or 0)
            progress.note(f"trimming the vocabulary of {source} to {self.tokens} tokens")
            write_trimmed_draft(source, folder, tokens, progress)
        return folder


def _bits(name: str, written: str, choices: tuple[int, ...], form: str) -> int:
    for bits in choices:
        if written == str(bits):
            return bits
    raise UsageError(f"draft: {name!r} is not one of {', '.join(form.format(bits) for bits in choices)}")


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def _state(source: Path) -> str:
    """Changes with the weights and the configuration, by sizes and times: hashing them would take minutes."""
    read_config(source)
    stats = [(file.name, file.stat()) for file in (source / "config.json", *weight_files(source))]
    return _digest("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))


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


def _write_quantised(source: Path, folder: Path, bits: int, name: str, progress: Progress) -> None:
    loaded = load_model_folder(source, lazy=True, alone=True)
    present = stored_bits(loaded)
    if present <= bits:
        fewer = "fewer bits or " if bits > min(BITS) else ""
        raise UsageError(
            f"draft: {name} needs a model of more bits, and {source} has {present}; choose {fewer}another draft"
        )
    config = copy.deepcopy(loaded.config)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    model = dequantize_model(loaded.model)  # lazily, as all that follows until the copy is written
    if is_quantised(model):
        raise ModelError(f"{source}: has layers that mlx-lm cannot dequantise; choose another draft")
    # Nothing counts as unchanged: scales of other bits may have the same shape.
    plain = replace(loaded, model=model, config=config, unchanged=frozenset())
    del loaded, model  # their arrays must be in `weights` alone
    weights = quantised_weights(plain, bits, GROUP_SIZE)
    progress.note(f"quantising {source} to {bits} bits, to draft with")
    write_weights(source, folder, weights, f"{source.name} in {bits} bits", progress)


def usual_tokens(tokenizer: Any, num_tokens: int, counts: npt.NDArray[np.int64] | None = None) -> TokenList:
    """The `num_tokens` tokens of mlx-lm's `tokenizer` that are worth a row, ascending; special ones among them.

    counts: (V,) occurrences in a corpus, of the target's own text at best. Of tokens that are equally frequent,
    and without counts of all, the lowest ids are taken: tokenizers number tokens by how frequent they were in
    training. Raises UsageError where `num_tokens` is more than there are or leaves special ones no room.
    """
    counts = np.zeros(num_ids(tokenizer), np.int64) if counts is None else counts.copy()
    special = {int(token) for token in (*tokenizer.eos_token_ids, *tokenizer.all_special_ids)}
    special |= {int(token) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    if not max(len(special), 1) <= num_tokens <= len(counts):
        raise UsageError(
            f"--tokens: {num_tokens} is out of range; the model has {len(counts)} tokens, of which "
            f"{len(special)} special ones are always kept"
        )
    counts[list(special)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:num_tokens]).astype(np.int32)


def num_ids(tokenizer: Any) -> int:
    """One more than the highest id of mlx-lm's `tokenizer`."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def write_trimmed_draft(source: Path, dest: Path, tokens: TokenList, progress: Progress | None = None) -> None:
    """Write a copy of the model in the folder `source` to the new folder `dest`, with the head's rows of `tokens`.

    Where the head is the embedding, its rows are copied from there, quantised ones bit for bit; the embedding
    stays whole. `dest` appears complete or not at all. Raises UsageError for a destination that is not free,
    ModelError for a model that cannot be trimmed or lacks tokens, DiskError when the copy does not fit the disk.
    """
    loaded = load_model_folder(source, lazy=True, alone=True)
    if loaded.draft_tokens is not None:
        raise ModelError(f"{source}: is trimmed already; trim the model that it was made from")
    config = _trim(loaded, tokens)
    weights = weights_of(replace(loaded, draft_tokens=tokens), loaded.model, config)
    del loaded  # its arrays must be in `weights` alone
    name = f"{source.resolve().name} with {len(tokens)} output tokens"
    write_weights(source, dest, weights, name, progress or Progress())


def _trim(loaded: LoadedModel, tokens: TokenList) -> dict[str, Any]:
    """Give the lazily loaded model a head of the rows `tokens`; returns the config that goes with it."""
    check_token_list(tokens, num_ids(loaded.tokenizer), str(loaded.path))
    config = copy.deepcopy(loaded.config)
    path, embedding = head_path(loaded.model), loaded.embedding
    if path is None:  # where would it be if it were not the embedding?
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
        model_class, args_class = _get_classes(config=config)
        path = head_path(model_class(args_class.from_dict(config)))  # never evaluated: takes no memory
        if path is None or embedding is None:
            raise ModelError(
                f"{loaded.path}: {config['model_type']!r} has no head of its own, so its vocabulary cannot be "
                "trimmed; choose another draft"
            )
        parent, name = parent_of(loaded.model, path)
        parent[name] = embedding.module
        for key in ("quantization", "quantization_config"):
            settings = config.get(key)
            if isinstance(settings, dict) and embedding.path in settings:
                settings[path] = settings[embedding.path]
    parent, name = parent_of(loaded.model, path)
    chosen, num_rows = Module(), parent[name]["weight"].shape[0]  # type: ignore[no-untyped-call]
    for part, value in parent[name].items():
        if isinstance(value, mx.array):
            per_row = value.ndim > 0 and value.shape[0] == num_rows
            chosen[part] = mx.take(value, mx.array(tokens), axis=0) if per_row else value
    parent[name] = chosen
    return config
