"""A trained student becomes a draft: an mlx-lm folder whose head has rows for some tokens only.

    draft_tokens.safetensors   "tokens" (V',) int32, ascending: row i of the head is for token tokens[i]

The kept layers and the embedding are the target's own bytes. What was trained gets groups of 32 in 8 or 4 bits,
norms float16; or all of it stays in float32. mlx-lm finds the bits of each matrix from its shape. Training moves
weights by less than the step of 4-bit codes, and they began on such codes: groups fitted by least squares are the
old codes again. On SmolLM2-135M, 18.9 % agreement of one trained layer became 0.6 % that way, is 17.4 % in 4 bits
spanned by `mx.quantize`, and 18.9 % in 8.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config

from distill.checkpoint import TrainingSettings
from distill.corpus import Ids
from distill.student import Student
from llmcad_mlx.drafting.table import vocabulary_hash
from llmcad_mlx.files import new_folder
from llmcad_mlx.models.folder import LoadedModel
from llmcad_mlx.store.convert import copy_side_files

DRAFT_TOKENS = "draft_tokens.safetensors"
BITS = (8, 4)
_KEPT_BITS = 4
GROUP_SIZE = 32

Arrays = dict[str, mx.array]


def export_student(
    loaded: LoadedModel,
    student: Student,
    settings: TrainingSettings,
    tokens: Ids,
    dest: Path,
    *,
    bits: int | None = 8,
    share_embedding: bool = False,
) -> int:
    """Write the folder `dest`; returns the bytes of its weights.

    loaded: the target. tokens: (V',) the head's. bits: 8 or 4, of what was trained; None: float32.
    share_embedding: the draft has neither embedding nor tokenizer and is given the target's. Raises UsageError for
    a destination that is not free, DiskError when it does not fit the disk.
    """
    arrays = {} if share_embedding else _named("model.embed_tokens", loaded.model.model.embed_tokens)
    for number, layer in enumerate(loaded.model.layers[: settings.depth]):
        arrays |= _named(f"model.layers.{number}", layer)
    trained = {"model.norm.weight": student.norm.weight, "lm_head.weight": student.whole_head}
    for number, layer in enumerate(student.layers, settings.depth):
        trained |= _named(f"model.layers.{number}", layer)
    for name, array in trained.items():
        arrays |= _packed(name, array, bits)
    config = _config(loaded, settings, share_embedding, quantised=any(name.endswith(".scales") for name in arrays))
    mx.eval(arrays)
    num_bytes = sum(array.nbytes for array in arrays.values())
    with new_folder(dest, num_bytes) as folder:
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
        mx.save_safetensors(str(folder / DRAFT_TOKENS), {"tokens": mx.array(tokens)})
        save_config(config, folder / "config.json")
        if not share_embedding:
            copy_side_files(loaded.path, folder)
    return num_bytes


def _named(prefix: str, module: Any) -> Arrays:
    leaves: Any = tree_flatten(module.parameters())
    return {f"{prefix}.{name}": array for name, array in leaves}


def _packed(name: str, array: mx.array, bits: int | None) -> Arrays:
    """A matrix whose rows divide into groups in so many bits, anything else in float16; as it is for None."""
    if bits is None:
        return {name: array}
    module, _, kind = name.rpartition(".")
    if kind != "weight" or array.ndim != 2 or array.shape[1] % GROUP_SIZE:
        return {name: array.astype(mx.float16)}
    packed = mx.quantize(array, GROUP_SIZE, bits)
    codes, scales, biases = packed[0], packed[1].astype(mx.float16), packed[2].astype(mx.float16)
    return {f"{module}.weight": codes, f"{module}.scales": scales, f"{module}.biases": biases}


def _config(loaded: LoadedModel, settings: TrainingSettings, share: bool, quantised: bool) -> dict[str, Any]:
    config = copy.deepcopy(loaded.config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    if quantised:
        config["quantization"] = {"bits": _KEPT_BITS, "group_size": GROUP_SIZE, "mode": "affine"}
    layers = [*range(settings.depth), *settings.sources]
    config |= {"num_hidden_layers": len(layers), "tie_word_embeddings": False}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][number] for number in layers]
    if share:
        vocabulary = vocabulary_hash(loaded.tokenizer.get_vocab())
        config["llmcad"] = {"shares_embedding": True, "vocabulary": vocabulary}
    return config
