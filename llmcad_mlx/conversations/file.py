"""A saved conversation: what was said, and the caches, so that going on does not mean reading it all again.

One safetensors file. Metadata: `llmcad_mlx` (FORMAT), `conversation` (JSON: whatever the caller keeps there) and
`cache` (JSON: what the caches belong to, their tokens and layers). Tensors: `target.0.keys`, … `draft.3.values`,
each (kv_heads, L, dim), the last L tokens that the layer holds, then `sha256`, 32 bytes, the digest of all bytes
before it.

Saved caches are used only after all of this fits: versions, device, both models' files, token ids, sha256, shapes
and types, and at last the keys and values of the first tokens, computed again: other weights give others. Layers
with a window may hold them no longer; then the other layers' are looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from llmcad_mlx.conversations.snapshot import DRAFT, TARGET, cache_of, cache_parts
from llmcad_mlx.engine.session import Session
from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import full_disk_error, new_file, require_free_space, user_path
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorSpec, dtype_name, header_bytes, read_header
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.machine import package_version
from llmcad_mlx.models.cache import LayerState
from llmcad_mlx.store.names import device_name

FORMAT = "conversation 1"
DIGEST = TensorSpec("sha256", "U8", (32,))

_BLOCK_BYTES = 4 << 20
_COMPARED = 8  # first tokens, computed again
_REMEDY = "choose another disk"


class CacheMismatchError(ValueError):
    """Saved caches that are not those of this conversation with these models."""


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """A file's header. `data` is what was given to `save_conversation`, `cache` None where no cache was saved."""

    path: Path
    data: dict[str, Any]
    cache: dict[str, Any] | None


def save_conversation(path: Path, data: Mapping[str, Any], pair: LoadedPair, tokens: Sequence[int]) -> int:
    """Write `data`, which must be JSON, and the caches that hold `tokens`; returns the file's bytes.

    The file appears whole or not at all, readable by its owner only. An older conversation gives way, another
    file does not. Raises UsageError for a path that cannot be used, DiskError when the disk has no room.
    """
    path = user_path(str(path)).absolute()
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it or choose another")
    if path.exists():
        try:
            read_conversation(path)
        except UsageError:
            raise UsageError(f"{path}: exists and is not a saved conversation; choose another name") from None
    parts = cache_parts(pair, tokens)
    specs: list[TensorSpec] = []
    on_host: dict[str, list[bool]] = {part.model: [] for part in parts}
    for part in parts:  # layer by layer, here and below: under a memory budget there is no room for a copy of all
        for number, layer in enumerate(part.cache.states(part.length)):
            on_host[part.model].append(layer is not None and layer.on_cpu_kernels)
            arrays = _arrays(part.model, number, layer)
            specs += [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in arrays]
    lengths = {part.model: part.length for part in parts}
    read = list(tokens[: lengths.get(TARGET, 0)])
    cache = {"belongs_to": _belongings(pair), "tokens": read, "lengths": lengths, "on_host": on_host}
    texts = {"conversation": json.dumps(data), "cache": json.dumps(cache if parts else None)}
    metadata = {"llmcad_mlx": FORMAT, **texts}
    try:
        require_free_space(path.parent, sum(s.num_bytes for s in specs), f"the conversation {path.name}", _REMEDY)
        with new_file(path, private=True) as file, SafetensorsWriter(file, [*specs, DIGEST], metadata) as writer:
            for part in parts:
                for number, layer in enumerate(part.cache.states(part.length)):
                    for name, array in _arrays(part.model, number, layer):
                        content: Any = np.asarray(array.reshape(-1).view(mx.uint8))
                        writer.write_bytes(name, 0, memoryview(content))
            end = writer.extents[DIGEST.name].offset
            writer.write_bytes(DIGEST.name, 0, _digest(file, end))
            writer.sync()
    except OSError as error:
        raise full_disk_error(error, path, _REMEDY) from None
    return end + DIGEST.num_bytes


def _arrays(model: str, number: int, layer: LayerState | None) -> Iterator[tuple[str, mx.array]]:
    if layer is not None:
        yield f"{model}.{number}.keys", layer.keys
        yield f"{model}.{number}.values", layer.values


def read_conversation(path: Path) -> SavedConversation:
    """Read a file's header. Raises UsageError, one line, for a file that is not a saved conversation."""
    path = user_path(str(path)).absolute()
    try:
        metadata = read_header(path)[0]["__metadata__"]
        if metadata["llmcad_mlx"] != FORMAT:
            raise UsageError(f"{path}: was saved by a version with another format; load it with that one")
        data, cache = json.loads(metadata["conversation"]), json.loads(metadata["cache"])
        if not isinstance(data, dict) or not isinstance(cache, dict | None):
            raise ValueError
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path}: is not a saved conversation, or is damaged; choose another file") from None
    return SavedConversation(path, data, cache)


def restore_caches(saved: SavedConversation, pair: LoadedPair, session: Session) -> list[str]:
    """Put a file's caches into the session where they fit; returns one line for each that is left out, and why.

    Whatever the file holds, the engine works afterwards, and its text is that of a conversation read afresh.
    """
    session.forget()
    if saved.cache is None:
        return []
    try:
        belongs = saved.cache["belongs_to"]
        differing = [name for name, value in _belongings(pair).items() if belongs[name] != value]
        if differing and differing != ["draft"]:
            raise CacheMismatchError(f"it is from another {differing[0]}")
        tokens = _checked_tokens(saved.path, saved.cache, pair)
        _restore(saved.path, saved.cache, TARGET, pair, tokens)
    except Exception as error:  # whatever a damaged or made-up file leads to
        session.forget()
        return [f"the saved cache is not used: {_reason(error)}; the conversation is read again"]
    session.resume(tokens)
    if DRAFT not in saved.cache["lengths"]:
        return []
    try:
        if differing:
            raise CacheMismatchError("it is from another draft")
        _restore(saved.path, saved.cache, DRAFT, pair, tokens)
    except Exception as error:
        for drafter in pair.drafters:
            drafter.truncate(0)
        return [f"the draft's saved cache is not used: {_reason(error)}; the draft reads the conversation again"]
    return []


def _belongings(pair: LoadedPair) -> dict[str, str | None]:
    """What must be the same for a cache to be used; the names end the sentence "it is from another …"."""
    versions = [f"{name} {package_version(name)}" for name in ("llmcad-mlx", "mlx", "mlx-lm")]
    draft = pair.names.draft_path
    return {
        "version": ", ".join(versions),
        "device": device_name(),
        "model": _model_digest(pair.names.target_path),
        "draft": _model_digest(draft) if draft is not None and draft.is_dir() else None,
    }


def _checked_tokens(path: Path, facts: dict[str, Any], pair: LoadedPair) -> list[int]:
    """All else that can be checked before the bytes are looked at, then the bytes' digest."""
    tokens: list[int] = facts["tokens"]
    if not all(type(token) is int and 0 <= token < pair.vocab_size for token in tokens) or not tokens:
        raise CacheMismatchError("its tokens are not the model's")
    if len(tokens) != facts["lengths"][TARGET] or len(tokens) > (pair.context_length or math.inf):
        raise CacheMismatchError("it is longer than the model's context")
    end = path.stat().st_size - DIGEST.num_bytes
    with path.open("rb") as file:
        file.seek(max(end, 0))
        if end <= 0 or file.read() != _digest(path, end):
            raise CacheMismatchError("its checksum is wrong, the file is damaged")
    return tokens


def _restore(path: Path, facts: dict[str, Any], model: str, pair: LoadedPair, tokens: Sequence[int]) -> None:
    length, on_kernels = facts["lengths"][model], facts["on_host"][model]
    if type(length) is not int or not 0 < length <= len(tokens):
        raise CacheMismatchError(f"{length!r} is not a number of tokens")
    cache = cache_of(pair, model)
    first = tokens[: min(_COMPARED, length)]
    if model == TARGET:
        pair.target.prefill(first)
    for drafter in pair.drafters:
        if model == DRAFT and drafter.cache is not None:  # it leaves the last token for its first round
            drafter.prefill([*first, first[-1]])
    computed = list(cache.states(len(first)))
    if len(on_kernels) != len(computed):
        raise CacheMismatchError("it has another number of layers")
    pairs = zip(computed, _saved_layers(path, model, on_kernels), strict=True)
    compared = [_compare(ours, stored, len(first), length) for ours, stored in pairs]
    if not any(compared):
        raise CacheMismatchError("no layer holds the first tokens, to be compared")
    cache.restore(_saved_layers(path, model, on_kernels), length)


def _compare(computed: LayerState | None, stored: LayerState | None, count: int, length: int) -> bool:
    """Raise CacheMismatchError unless `stored` begins with `computed`, but for rounding. False where it lacks the
    first of the `length` tokens, so that only kind and shape are compared."""
    if computed is None or stored is None:
        if computed is not stored:
            raise CacheMismatchError("its layers are of another kind")
        return False
    if not computed.fits(stored):
        raise CacheMismatchError("its layers have other shapes or types")
    if stored.keys.shape[1] != length:
        return False
    for ours, theirs in ((computed.keys, stored.keys), (computed.values, stored.values)):
        tolerance = 1e-3 if ours.dtype == mx.float32 else 5e-2
        a, b = ours.astype(mx.float32), theirs[:, :count].astype(mx.float32)
        if not bool(mx.all(mx.abs(a - b) <= tolerance * mx.max(mx.abs(a))).item()):  # NaN fails, too
            raise CacheMismatchError("the model computes other values")
    return True


def _saved_layers(path: Path, model: str, on_cpu_kernels: Sequence[bool]) -> Iterator[LayerState | None]:
    """The layers of one model, one after the other, each read from the file when it is used and then let go."""
    arrays: Any = mx.load(str(path), format="safetensors")
    for number, on_kernels in enumerate(on_cpu_kernels):
        keys, values = (arrays.pop(f"{model}.{number}.{kind}", None) for kind in ("keys", "values"))
        yield None if keys is None or values is None else LayerState(keys, values, on_kernels)


def _reason(error: Exception) -> str:
    known = isinstance(error, CacheMismatchError)
    return str(error) if known else f"it cannot be read ({type(error).__name__})"


def _model_digest(folder: Path) -> str:
    """Digest of a folder's config and of what lies where in its weight files; the weights' own bytes left out."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(header_bytes(path))
    return digest.hexdigest()


def _digest(path: Path, num_bytes: int) -> bytes:
    digest, left = hashlib.sha256(), num_bytes
    with path.open("rb") as file:
        while left and (block := file.read(min(_BLOCK_BYTES, left))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
