"""From mlx-lm's and Hugging Face's folders to bundles.

Tensors that the model uses as the files hold them are copied as bytes. The others (quantised now, or renamed and
stacked by mlx-lm) are computed one by one from lazily loaded arrays: never is more than a layer in memory.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import quantize_model, save_config

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files import check_destination, new_folder
from llmcad_mlx.files.bundle import FILE as MANIFEST
from llmcad_mlx.files.bundle import BundleWriter
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorExtent, TensorSpec, dtype_name
from llmcad_mlx.gguf.groups import check_groups
from llmcad_mlx.models.folder import DRAFT_TOKENS, LoadedModel, TokenList, load_model_folder, read_config
from llmcad_mlx.progress import Advance, Progress
from llmcad_mlx.streaming.storage import FileStorage

BITS = (4, 8)

_SIDE_FILES = (
    "*.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
_OF_THE_OLD_FOLDER = ("config.json", MANIFEST, "llmcad_source.json", "hf_quant_config.json")
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class NewWeights:
    """What will be written: `copied` lie in the files as they are; `computed` are lazy, taken out one by one."""

    specs: tuple[TensorSpec, ...]
    copied: dict[str, TensorExtent]
    computed: dict[str, mx.array]
    config: dict[str, Any] | None
    """None: config.json stays as it is."""
    draft_tokens: TokenList | None = None
    """Of a trimmed head; None: the head is whole."""


def convert_folder(
    source: Path,
    dest: Path,
    bits: int | None = None,
    group_size: int | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model in the folder `source` to the bundle `dest`, quantised with mlx-lm where it is not yet.

    bits: 4 (default) or 8. group_size: 32, 64 (default) or 128. name: what the bundle says it was made from. Code
    that the folder brings along is neither run nor copied.
    Raises UsageError for options or a destination that cannot be used, ModelError for a folder that cannot,
    DiskError when the bundle does not fit the disk.
    """
    check_destination(dest)
    check_groups(bits, group_size, BITS)
    loaded = load_model_folder(source, lazy=True, alone=True)
    if not is_quantised(loaded.model):
        weights = quantised_weights(loaded, bits or 4, group_size or 64)
    elif bits is not None or group_size is not None:
        option = "bits" if bits is not None else "group-size"
        raise UsageError(f"--{option}: {source} is quantised already; leave the option out")
    else:
        as_it_is = _quantisation_is_mlx(loaded) and loaded.config_is_complete
        weights = weights_of(loaded, loaded.model, None if as_it_is else loaded.config)
    del loaded  # its arrays must be in `weights` alone
    write_weights(source, dest, weights, name, progress or Progress())


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates and licence; neither config.json nor weights, and never code. Raises OSError."""
    for file in _side_files(source):
        shutil.copyfile(file, folder / file.name)


def copy_extent(
    storage: FileStorage, extent: TensorExtent, writer: BundleWriter, name: str, advance: Advance
) -> None:
    """Copy a tensor's bytes to the tensor `name` of a bundle. Raises StorageError, OSError."""
    for start in range(0, extent.num_bytes, _BLOCK_BYTES):
        block = memoryview(bytearray(min(_BLOCK_BYTES, extent.num_bytes - start)))
        storage.read_into(extent.file, extent.offset + start, block)
        writer.write_bytes(name, start, block)
        advance(len(block))


def is_quantised(model: Any) -> bool:
    """Whether some parameters are packed. Partly quantised models are left as they are, too."""
    leaves: Any = tree_flatten(model.parameters())
    return any(array.dtype in (mx.uint8, mx.uint32) for _, array in leaves)


def quantised_weights(loaded: LoadedModel, bits: int, group_size: int) -> NewWeights:
    """Weights in so many bits; quantised ones stay. Raises ModelError or UsageError where that cannot be."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports there
            model, config = quantize_model(loaded.model, loaded.config, group_size, bits)
    except ValueError as error:
        raise ModelError(f"{loaded.path}: mlx-lm cannot quantise it ({str(error).splitlines()[0]})") from None
    if not is_quantised(model):
        raise UsageError(
            f"--group-size: no rows of {loaded.path} divide into groups of {group_size}; choose a smaller one"
        )
    return weights_of(loaded, model, config)


def _quantisation_is_mlx(loaded: LoadedModel) -> bool:
    """False where mlx-lm has repacked weights of another quantisation after `sanitize`."""
    return "quantization" in read_config(loaded.path) or "quantization" not in loaded.config


def weights_of(loaded: LoadedModel, model: Any, config: dict[str, Any] | None) -> NewWeights:
    """What is to be written of `model`, whose arrays are let go; what is as in `loaded`'s files is copied."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # lets go of them
    unchanged = loaded.unchanged if _quantisation_is_mlx(loaded) else frozenset()
    specs: list[TensorSpec] = []
    copied: dict[str, TensorExtent] = {}
    for name, array in list(parameters.items()):
        spec = TensorSpec(name, dtype_name(array.dtype), tuple(array.shape))
        specs.append(spec)
        extent = loaded.weights.get(name) if name in unchanged else None
        if extent is not None and (extent.dtype, extent.shape) == (spec.dtype, spec.shape):
            copied[name] = extent
            del parameters[name]
    return NewWeights(tuple(specs), copied, parameters, config, loaded.draft_tokens)


def write_weights(source: Path, dest: Path, weights: NewWeights, name: str | None, progress: Progress) -> None:
    """Write `weights`, of the model in the folder `source`, to the bundle `dest`."""
    num_bytes = sum(spec.num_bytes for spec in weights.specs)
    num_side_bytes = sum(file.stat().st_size for file in _side_files(source))
    with new_folder(dest, num_bytes + num_side_bytes) as folder, contextlib.ExitStack() as undo:
        storage = undo.enter_context(contextlib.closing(FileStorage()))
        undo.callback(mx.set_cache_limit, mx.set_cache_limit(0))  # MLX gives freed memory back at once
        advance = undo.enter_context(progress.stage(f"writing {dest.name}", num_bytes))
        with BundleWriter(folder, weights.specs) as writer:
            for spec in weights.specs:
                if spec.name in weights.copied:
                    copy_extent(storage, weights.copied[spec.name], writer, spec.name, advance)
                else:
                    _write_array(source, writer, spec, weights.computed.pop(spec.name))
                    advance(spec.num_bytes)
            writer.finish(name or source.resolve().name)
        if weights.config is None:
            shutil.copyfile(source / "config.json", folder / "config.json")
        else:
            save_config(weights.config, folder / "config.json")
        copy_side_files(source, folder)
        if weights.draft_tokens is not None:
            spec = TensorSpec("tokens", "I32", weights.draft_tokens.shape)
            with SafetensorsWriter(folder / DRAFT_TOKENS, [spec]) as file:
                file.write_bytes("tokens", 0, weights.draft_tokens.astype("<i4").tobytes())
                file.sync()


def _write_array(source: Path, writer: BundleWriter, spec: TensorSpec, array: mx.array) -> None:
    try:
        finite = not mx.issubdtype(array.dtype, mx.floating) or mx.all(mx.isfinite(array)).item()
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        mx.eval(flat)
    except RuntimeError as error:
        what = f"{source}: {spec.name} cannot be read ({str(error).splitlines()[0]})"
        raise ModelError(f"{what}; download the folder again") from None
    if not finite:
        raise ModelError(f"{source}: {spec.name} holds NaN or infinity; download the folder again")
    writer.write_bytes(spec.name, 0, memoryview(flat))  # type: ignore[arg-type]


def _side_files(source: Path) -> list[Path]:
    found = {file for pattern in _SIDE_FILES for file in source.glob(pattern) if file.is_file()}
    return sorted(
        file for file in found if file.name not in _OF_THE_OLD_FOLDER and not file.name.endswith(".index.json")
    )
