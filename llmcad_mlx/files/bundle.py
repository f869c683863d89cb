"""What was measured with a bundle, kept in its `llmcad.json` under "profile".

Bundles: mlx-lm model folders with `llmcad.json`, which says where each layer lies and what its checksum is.

```
{"format": 1,
 "layers": [{"name": "embedding" | "layer 0" | … | "rest" | "head",
             "tensors": [{"name", "file", "offset", "bytes", "dtype", "shape", "sha256"}, …],
             "bytes": …, "sha256": …}, …],
 "draft": {…} or null, "profile": {…}, "source": "…", "created_by": "llmcad-mlx 0.1.0"}
```
Tensors are listed in the order in which they lie in their file, one after the other, so that a layer is one run
of bytes. `sha256` of a layer is that of this run. `offset` counts from the start of the file; dtypes are those of
safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmcad_mlx.errors import ModelError
from llmcad_mlx.streaming.weights import TensorExtent, WeightIndex

FILE = "llmcad.json"
FORMAT = 1

_SHA256 = re.compile("[0-9a-f]{64}")
_BLOCK_BYTES = 4 << 20

OnProgress = Callable[[int, int], None]
"""Called with the bytes done and all bytes."""


@dataclass(frozen=True, slots=True)
class BundleTensor:
    """A tensor's place, and the sha256 of its bytes in hexadecimal."""

    extent: TensorExtent
    sha256: str


@dataclass(frozen=True, slots=True)
class BundleLayer:
    """A run of tensors; `sha256` is that of their bytes, one after the other."""

    name: str
    tensors: tuple[BundleTensor, ...]
    sha256: str

    @property
    def file(self) -> Path:
        """The file that holds the whole layer."""
        return self.tensors[0].extent.file

    @property
    def offset(self) -> int:
        """Where the layer begins in its file."""
        return self.tensors[0].extent.offset

    @property
    def num_bytes(self) -> int:
        return sum(tensor.extent.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What `llmcad.json` says. `draft`: the draft that goes with the target; `profile`: what was measured."""

    folder: Path
    layers: tuple[BundleLayer, ...]
    draft: Mapping[str, Any] | None
    profile: Mapping[str, Any]
    source: str
    created_by: str

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def tensor_sha256(self) -> dict[str, str]:
        """The checksum of every tensor, by name."""
        return {tensor.extent.name: tensor.sha256 for layer in self.layers for tensor in layer.tensors}


def read_bundle(folder: Path, index: WeightIndex | None = None) -> Bundle | None:
    """The bundle in `folder`, None when there is no llmcad.json. Reads headers, not weights.

    index: the folder's, where it was made already. Raises ModelError naming the file for one that is truncated,
    altered, or does not belong to the weights beside it.
    """
    file = folder / FILE
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error}); make the bundle again") from None
    bundle = _parse(folder, text)
    _check_extents(bundle, WeightIndex.of(folder) if index is None else index)
    return bundle


def verify_bundle(folder: Path, on_progress: OnProgress = lambda done, total: None) -> Bundle | None:
    """Read every byte of the weights and compare it with the checksums; None when there are none.

    Raises ModelError naming file and layer for bytes that were altered, and what `read_bundle` raises.
    """
    bundle = read_bundle(folder)
    if bundle is None:
        return None
    done, total = 0, bundle.num_bytes
    for layer in bundle.layers:
        digest = hashlib.sha256()
        for block in _blocks(layer):
            digest.update(block)
            done += len(block)
            on_progress(done, total)
        if digest.hexdigest() != layer.sha256:
            raise ModelError(
                f"{layer.file}: {layer.name} was altered (its sha256 is not the one in {FILE}); "
                "fetch or convert the model again"
            )
    return bundle


def write_manifest(bundle: Bundle) -> None:
    """Write `llmcad.json` into the bundle's folder. Raises OSError."""
    content = {
        "format": FORMAT,
        "layers": [_layer_entry(layer) for layer in bundle.layers],
        "draft": bundle.draft,
        "profile": bundle.profile,
        "source": bundle.source,
        "created_by": bundle.created_by,
    }
    (bundle.folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _layer_entry(layer: BundleLayer) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.extent.name,
            "file": tensor.extent.file.name,
            "offset": tensor.extent.offset,
            "bytes": tensor.extent.num_bytes,
            "dtype": tensor.extent.dtype,
            "shape": list(tensor.extent.shape),
            "sha256": tensor.sha256,
        }
        for tensor in layer.tensors
    ]
    return {"name": layer.name, "tensors": tensors, "bytes": layer.num_bytes, "sha256": layer.sha256}


def _blocks(layer: BundleLayer) -> Iterator[bytes]:
    left = layer.num_bytes
    try:
        with layer.file.open("rb", buffering=0) as stream:
            stream.seek(layer.offset)
            while left:
                block = stream.read(min(_BLOCK_BYTES, left))
                if not block:
                    raise ModelError(f"{layer.file}: {layer.name} is cut off; fetch or convert the model again")
                left -= len(block)
                yield block
    except OSError as error:
        raise ModelError(f"{layer.file}: cannot be read ({error.strerror or error}); check the disk") from None


# --- reading llmcad.json ------------------------------------------------------------------------------------


def _parse(folder: Path, text: bytes) -> Bundle:
    file = folder / FILE
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: cut off, or not valid JSON; make the bundle again") from None
    entry = _Entry(file, "the file", content)
    version = entry.take("format", int)
    if version != FORMAT:
        raise ModelError(
            f"{file}: bundle format {version} is not {FORMAT}; install the llmcad-mlx that wrote it, "
            "or make the bundle again"
        )
    layers = tuple(_layer(folder, file, content) for content in entry.take("layers", list))
    draft = entry.content.get("draft")
    if draft is not None and not isinstance(draft, dict):
        entry.refuse("draft")
    return Bundle(
        folder=folder,
        layers=layers,
        draft=draft,
        profile=entry.take("profile", dict),
        source=entry.take("source", str),
        created_by=entry.take("created_by", str),
    )


def _layer(folder: Path, file: Path, content: object) -> BundleLayer:
    entry = _Entry(file, "a layer", content)
    entry.where = name = entry.take("name", str)
    tensors = tuple(_tensor(folder, file, name, content) for content in entry.take("tensors", list))
    layer = BundleLayer(name, tensors, entry.sha256())
    if not tensors or entry.take("bytes", int) != layer.num_bytes:
        entry.refuse("bytes")
    end = layer.offset
    for tensor in tensors:
        if tensor.extent.file != layer.file or tensor.extent.offset != end:
            raise ModelError(f"{file}: {name} is not one run of bytes; make the bundle again")
        end += tensor.extent.num_bytes
    return layer


def _tensor(folder: Path, file: Path, layer: str, content: object) -> BundleTensor:
    entry = _Entry(file, f"a tensor of {layer}", content)
    extent = TensorExtent(
        name=entry.take("name", str),
        file=folder / entry.take("file", str),
        offset=entry.take("offset", int),
        num_bytes=entry.take("bytes", int),
        dtype=entry.take("dtype", str),
        shape=tuple(entry.take("shape", list)),
    )
    return BundleTensor(extent, entry.sha256())


class _Entry:
    """A JSON object of the file; what is missing or of another type is refused by name."""

    def __init__(self, file: Path, where: str, content: object) -> None:
        self.where = where
        self._file = file
        if not isinstance(content, dict):
            raise ModelError(f"{file}: {where} is not a JSON object; make the bundle again")
        self.content = content

    def take(self, key: str, kind: type[Any]) -> Any:
        value = self.content.get(key)
        if type(value) is not kind:
            self.refuse(key)
        return value

    def sha256(self) -> str:
        value: str = self.take("sha256", str)
        if not _SHA256.fullmatch(value):
            self.refuse("sha256")
        return value

    def refuse(self, key: str) -> NoReturn:
        raise ModelError(f"{self._file}: {key!r} of {self.where} is missing or wrong; make the bundle again")


def _check_extents(bundle: Bundle, index: WeightIndex) -> None:
    """Every tensor of the weight files must be listed once, as the files' own headers have it."""
    seen: set[str] = set()
    for layer in bundle.layers:
        for tensor in layer.tensors:
            extent = tensor.extent
            if extent.name in seen or index.get(extent.name) != extent:
                raise ModelError(
                    f"{bundle.folder / FILE}: {extent.name} of {layer.name} does not lie in {extent.file.name} "
                    "as it says; make the bundle again"
                )
            seen.add(extent.name)
    left = next((name for name in index if name not in seen), None)
    if left is not None:
        raise ModelError(f"{index[left].file}: {left} is not listed in {FILE}; make the bundle again")


def read_profile(folder: Path) -> dict[str, Any] | None:
    """The profile of the bundle in `folder`; None where there is no bundle, or its file cannot be read: then the
    loader has its own words for it."""
    content = _read(folder)
    profile = None if content is None else content.get("profile")
    return profile if isinstance(profile, dict) else None


def write_profile(folder: Path, profile: Mapping[str, Any]) -> bool:
    """Put `profile` in the place of the bundle's, whole or not at all; the rest of the file stays as it is.

    False where there is no bundle, or its folder cannot be written.
    """
    content = _read(folder)
    if content is None:
        return False
    text = json.dumps({**content, "profile": dict(profile)}, indent=1) + "\n"
    try:
        mode = (folder / FILE).stat().st_mode
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, mode & 0o777)
        os.replace(name, folder / FILE)
    except OSError:
        os.unlink(name)
        return False
    except BaseException:
        os.unlink(name)
        raise
    return True


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("profile"), dict) else None
