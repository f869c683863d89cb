"""Bundles: mlx-lm model folders with `llmcad.json`, which says where each layer lies and what its checksum is.

```
{"format": 1,
 "layers": [{"name": "embedding" | "layer 0" | … | "rest" | "head",
             "tensors": [{"name", "file", "offset", "bytes", "dtype", "shape", "sha256"}, …],
             "bytes": …, "sha256": …}, …],
 "draft": {…} or null, "profile": {…}, "source": "…", "created_by": "llmcad-mlx 0.1.0"}
```
Tensors are listed in the order in which they lie in their file, one after the other, so that a layer is one run
of bytes. `sha256` of a layer is that of this run. `offset` counts from the start of the file; dtypes are those of
safetensors. `profile` is what was measured with the bundle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import ModelError
from llmcad_mlx.files.atomic import write_text
from llmcad_mlx.files.safetensors import TensorExtent, WeightIndex, read_weights

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
    _check_extents(bundle, read_weights(folder) if index is None else index)
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
            "name": extent.name,
            "file": extent.file.name,
            "offset": extent.offset,
            "bytes": extent.num_bytes,
            "dtype": extent.dtype,
            "shape": list(extent.shape),
            "sha256": sha256,
        }
        for extent, sha256 in ((tensor.extent, tensor.sha256) for tensor in layer.tensors)
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

_BUNDLE_KEYS = {"layers": list, "profile": dict, "source": str, "created_by": str}
_LAYER_KEYS = {"name": str, "tensors": list, "sha256": str, "bytes": int}
_TENSOR_KEYS = {
    "name": str, "file": str, "offset": int, "bytes": int, "dtype": str, "shape": list, "sha256": str
}  # fmt: skip


def _parse(folder: Path, text: bytes) -> Bundle:
    file = folder / FILE
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: cut off, or not valid JSON; make the bundle again") from None
    version = _checked(file, "the file", content, {"format": int})["format"]
    if version != FORMAT:
        raise ModelError(
            f"{file}: bundle format {version} is not {FORMAT}; install the llmcad-mlx that wrote it, "
            "or make the bundle again"
        )
    entry = _checked(file, "the file", content, _BUNDLE_KEYS)
    draft = entry.get("draft")
    if draft is not None and not isinstance(draft, dict):
        raise _wrong(file, "draft", "the file")
    layers = tuple(_layer(file, layer) for layer in entry["layers"])
    return Bundle(folder, layers, draft, entry["profile"], entry["source"], entry["created_by"])


def _layer(file: Path, content: Any) -> BundleLayer:
    name = content.get("name") if isinstance(content, dict) else None
    where = name if isinstance(name, str) else "a layer"
    entry = _checked(file, where, content, _LAYER_KEYS)
    tensors = tuple(_tensor(file, f"a tensor of {where}", tensor) for tensor in entry["tensors"])
    layer = BundleLayer(where, tensors, entry["sha256"])
    if not tensors or entry["bytes"] != layer.num_bytes:
        raise _wrong(file, "bytes", where)
    end = layer.offset
    for tensor in tensors:
        if tensor.extent.file != layer.file or tensor.extent.offset != end:
            raise ModelError(f"{file}: {where} is not one run of bytes; make the bundle again")
        end += tensor.extent.num_bytes
    return layer


def _tensor(file: Path, where: str, content: Any) -> BundleTensor:
    entry = _checked(file, where, content, _TENSOR_KEYS)
    place, shape = file.parent / entry["file"], tuple(entry["shape"])
    extent = TensorExtent(entry["name"], place, entry["offset"], entry["bytes"], entry["dtype"], shape)
    return BundleTensor(extent, entry["sha256"])


def _checked(file: Path, where: str, content: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of the file; what is missing or of another type is refused by name."""
    if not isinstance(content, dict):
        raise ModelError(f"{file}: {where} is not a JSON object; make the bundle again")
    for key, kind in kinds.items():
        value = content.get(key)
        if type(value) is not kind or (key == "sha256" and not _SHA256.fullmatch(str(value))):
            raise _wrong(file, key, where)
    return content


def _wrong(file: Path, key: str, where: str) -> ModelError:
    return ModelError(f"{file}: {key!r} of {where} is missing or wrong; make the bundle again")


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
    try:
        write_text(folder / FILE, json.dumps({**content, "profile": dict(profile)}, indent=1) + "\n")
    except OSError:
        return False
    return True


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("profile"), dict) else None
