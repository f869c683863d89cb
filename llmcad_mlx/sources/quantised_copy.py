"""A model folder in fewer bits, made once and kept in the cache folder: what self-drafts and smaller drafts are.

The copy is an mlx-lm folder like any other: affine groups of 32.

On a Linux CPU the host kernels take 4 and 8 bits; copies of 2 and 3 bits run there on MLX's own kernels, which are
right but slow. On Metal and CUDA, MLX's kernels serve all.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.utils import dequantize_model

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.models.loading import LoadedModel, load_model_folder
from llmcad_mlx.sources.kept_copy import kept_copy
from llmcad_mlx.sources.mlx_folder import is_quantised, quantised_weights, write_weights
from llmcad_mlx.sources.progress import NoProgress, Progress

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
