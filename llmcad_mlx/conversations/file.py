"""A saved conversation: what was said, and the caches, so that going on does not mean reading it all again.

One safetensors file. Metadata: `llmcad_mlx` (FORMAT), `conversation` (JSON: whatever the caller keeps there) and
`cache` (JSON: what the caches belong to, their tokens and layers). Tensors: `target.0.keys`, … `draft.3.values`,
each (kv_heads, L, dim), then `sha256`, 32 bytes, the digest of all bytes before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from llmcad_mlx.conversations.snapshot import TARGET, CachePart, cache_parts
from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import full_disk_error, new_file, require_free_space
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorSpec, dtype_name, header_bytes, read_header
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.machine import package_version
from llmcad_mlx.models.cache import LayerState
from llmcad_mlx.store.names import device_name

FORMAT = "conversation 1"
DIGEST = TensorSpec("sha256", "U8", (32,))

_BLOCK_BYTES = 4 << 20
_REMEDY = "make room or choose another disk"


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
    path = path.expanduser().absolute()
    _check_destination(path)
    parts = cache_parts(pair, tokens)
    specs = [spec for part in parts for spec in _specs(part)]
    cache = _cache_facts(pair, parts, tokens) if parts else None
    metadata = {"llmcad_mlx": FORMAT, "conversation": json.dumps(data), "cache": json.dumps(cache)}
    try:
        require_free_space(path.parent, sum(s.num_bytes for s in specs), f"the conversation {path.name}", _REMEDY)
        with new_file(path, private=True) as file, SafetensorsWriter(file, [*specs, DIGEST], metadata) as writer:
            for part in parts:  # layer by layer: under a memory budget there is no room for a copy of all
                for name, array in _arrays(part.model, part.cache.states(part.length)):
                    content: Any = np.asarray(array.reshape(-1).view(mx.uint8))
                    writer.write_bytes(name, 0, memoryview(content))
            end = writer.extent(DIGEST).offset
            writer.write_bytes(DIGEST.name, 0, _digest(file, end))
            writer.sync()
    except OSError as error:
        raise full_disk_error(error, path, _REMEDY) from None
    return end + DIGEST.num_bytes


def _check_destination(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it or choose another")
    if path.exists():
        try:
            read_conversation(path)
        except UsageError:
            raise UsageError(f"{path}: exists and is not a saved conversation; choose another name") from None


def _arrays(model: str, layers: Iterable[LayerState | None]) -> Iterator[tuple[str, mx.array]]:
    """The arrays of a model's layers and their names in the file."""
    for number, layer in enumerate(layers):
        if layer is not None:
            yield f"{model}.{number}.keys", layer.keys
            yield f"{model}.{number}.values", layer.values


def _specs(part: CachePart) -> Iterator[TensorSpec]:
    for name, array in _arrays(part.model, part.cache.states(1)):
        yield TensorSpec(name, dtype_name(array.dtype), (array.shape[0], part.length, array.shape[2]))


def _cache_facts(pair: LoadedPair, parts: Sequence[CachePart], tokens: Sequence[int]) -> dict[str, Any]:
    lengths = {part.model: part.length for part in parts}
    on_kernels = {
        part.model: [first is not None and first.on_cpu_kernels for first in part.cache.states(1)]
        for part in parts
    }
    read = list(tokens[: lengths[TARGET]])
    return {"belongs_to": belongings(pair), "tokens": read, "lengths": lengths, "on_host": on_kernels}


def read_conversation(path: Path) -> SavedConversation:
    """Read a file's header. Raises UsageError, one line, for a file that is not a saved conversation."""
    path = path.expanduser().absolute()
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


def saved_layers(path: Path, model: str, on_cpu_kernels: Sequence[bool]) -> Iterator[LayerState | None]:
    """The layers of one model, one after the other, each read from the file when it is used and then let go."""
    arrays: Any = mx.load(str(path), format="safetensors")
    for number, on_kernels in enumerate(on_cpu_kernels):
        keys, values = (arrays.pop(f"{model}.{number}.{kind}", None) for kind in ("keys", "values"))
        yield None if keys is None or values is None else LayerState(keys, values, on_kernels)


def belongings(pair: LoadedPair) -> dict[str, str | None]:
    """What must be the same for a cache to be used; the names end the sentence "it is from another …"."""
    versions = [f"{name} {package_version(name)}" for name in ("llmcad-mlx", "mlx", "mlx-lm")]
    kernels = "host kernels" if cpu_kernels_wanted() else "MLX"
    return {
        "version": ", ".join(versions),
        "device": f"{device_name()}, {kernels}",
        "model": _model_digest(pair.target_path),
        "draft": draft_digest(pair),
    }


def draft_digest(pair: LoadedPair) -> str | None:
    """The draft model's digest; None where no model drafts."""
    path = pair.draft_path
    return _model_digest(path) if path is not None and path.is_dir() else None


def _model_digest(folder: Path) -> str:
    """Digest of a folder's config and of what lies where in its weight files; the weights' own bytes left out."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(header_bytes(path))
    return digest.hexdigest()


def has_right_digest(path: Path) -> bool:
    """Whether a file's bytes are those that were written."""
    end = path.stat().st_size - DIGEST.num_bytes
    with path.open("rb") as file:
        file.seek(max(end, 0))
        return end > 0 and file.read() == _digest(path, end)


def _digest(path: Path, num_bytes: int) -> bytes:
    """sha256 of a file's first `num_bytes` bytes."""
    digest, left = hashlib.sha256(), num_bytes
    with path.open("rb") as file:
        while left and (block := file.read(min(_BLOCK_BYTES, left))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
