"""A GGUF file becomes a bundle: an mlx-lm folder with checksums."""

from __future__ import annotations

import json
from pathlib import Path

from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import new_folder
from llmcad_mlx.gguf.model import FamilyModel, read_family
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.gguf.tokenizer import TokenIds, read_tokenizer
from llmcad_mlx.gguf.weights import plan_weights, write_weights
from llmcad_mlx.progress import Progress

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def convert_gguf(
    source: Path,
    dest: Path,
    bits: int = 4,
    group_size: int = 32,
    *,
    progress: Progress | None = None,
) -> None:
    """Write the model in `source` to the bundle `dest`: weights in MLX groups, tokenizer, chat template.

    The folder appears complete or not at all. `bits` is one of 2, 3, 4, 5, 6, 8 and `group_size` of 32, 64,
    128; with 4 and 32, blocks that already are 4-bit keep their codes (see `groups`). `dest` must be new or empty.

    Raises UsageError for an option or a destination that cannot be used, ModelError for a file that is not a
    GGUF model of a supported family or is damaged, DiskError when it does not fit the disk.
    """
    for name, value, choices in (("bits", bits, BITS), ("group-size", group_size, GROUP_SIZES)):
        if value not in choices:
            raise UsageError(f"{name}: {value} is not one of {', '.join(map(str, choices))}")
    header = read_gguf_header(source)
    model = read_family(header)
    tokenizer = read_tokenizer(header)
    plan = plan_weights(header, model, bits, group_size)
    num_source_bytes = sum(tensor.source.num_bytes for tensor in plan)
    with new_folder(dest, sum(tensor.num_bytes for tensor in plan)) as folder:
        with (progress or Progress()).stage(f"converting to {bits}-bit groups", num_source_bytes) as advance:
            write_weights(header, plan, folder, bits, group_size, advance)
        tokenizer.save(folder)
        _write_configs(folder, model, tokenizer.ids, bits, group_size)


def _write_configs(folder: Path, model: FamilyModel, ids: TokenIds, bits: int, group_size: int) -> None:
    quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
    tokens: dict[str, object] = {"eos_token_id": list(ids.ends)}
    if ids.bos is not None:
        tokens["bos_token_id"] = ids.bos
    if ids.pad is not None:
        tokens["pad_token_id"] = ids.pad
    forms = {"torch_dtype": "float16", "quantization": quantization, "quantization_config": quantization}
    for name, content in (("generation_config.json", tokens), ("config.json", model.config | tokens | forms)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
