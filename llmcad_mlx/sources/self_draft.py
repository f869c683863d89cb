"""`--draft self:4`: the target in fewer bits is its own draft (SubSpec, arXiv 2509.18344).

The copy is an mlx-lm folder like any other: affine groups of 32, made once and kept in the cache folder.
```
self-drafts/<target>-<state>-<bits>bit    target: digest of the folder's path; state: of its files' sizes and times
```
On a Linux CPU the host kernels take 4 bits; copies of 2 and 3 bits run there on MLX's own kernels, which are right
but slow. On Metal and CUDA, MLX's kernels serve all three.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.utils import dequantize_model

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.models.loading import LoadedModel, check_weight_files, load_model_folder, read_config
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.mlx_folder import is_quantised, quantised_weights, write_weights
from llmcad_mlx.sources.progress import NoProgress, Progress
from llmcad_mlx.sources.pull import locked

PREFIX = "self:"
BITS = (2, 3, 4)
GROUP_SIZE = 32


def self_draft_bits(draft: str) -> int | None:
    """The bits of a draft named like "self:4"; None for every other name. Raises UsageError for other bits."""
    if not draft.startswith(PREFIX):
        return None
    for bits in BITS:
        if draft == f"{PREFIX}{bits}":
            return bits
    choices = ", ".join(f"{PREFIX}{bits}" for bits in BITS)
    raise UsageError(f"draft: {draft!r} is not one of {choices}")


def self_draft(target: Path, bits: int, progress: Progress | None = None) -> Path:
    """The folder of the target's copy in `bits` bits (2, 3 or 4), made where it is not there yet.

    At most one tensor is in memory at full precision while it is made. A copy of what the target was before it
    changed is removed. Raises UsageError for a target that has no more bits, ModelError for one that cannot be
    read or quantised, DiskError when the copy does not fit the disk.
    """
    identity, state = _digest(str(target.resolve())), _state(target)
    folder = home_folder() / "self-drafts" / f"{identity}-{state}-{bits}bit"
    if folder.exists():  # complete, because it got its name last
        return folder
    loaded = load_model_folder(target, lazy=True)
    _check_bits(loaded, bits)
    with locked(folder):
        if not folder.exists():
            for old in folder.parent.glob(f"{identity}-*-{bits}bit"):
                shutil.rmtree(old, ignore_errors=True)
            _make(loaded, folder, bits, progress or NoProgress())
    return folder


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
    progress.note(f"quantising {loaded.path} to {bits} bits, to be its own draft")
    write_weights(loaded.path, folder, weights, f"{loaded.path.name} in {bits} bits", progress)


def _check_bits(loaded: LoadedModel, bits: int) -> None:
    """Refuse what would not become smaller: most weights decide."""
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
    if present <= bits:
        fewer = "fewer bits or " if bits > min(BITS) else ""
        raise UsageError(
            f"draft: {PREFIX}{bits} needs a target of more bits, and {loaded.path} has {present}; "
            f"choose {fewer}another draft"
        )


def _state(target: Path) -> str:
    """Changes with the weights and the configuration, by sizes and times: hashing them would take minutes."""
    read_config(target)
    files = [target / "config.json", *check_weight_files(target)]
    stats = [(file.name, file.stat()) for file in files]
    return _digest("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
