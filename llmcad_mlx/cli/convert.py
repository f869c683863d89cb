"""`llmcad-mlx convert`: a GGUF file becomes an mlx-lm folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file of the llama or qwen2 family.")],
    dest: Annotated[Path, typer.Argument(help="The folder to make.")],
    bits: Annotated[int, typer.Option("--bits", help="Bits per weight: 2, 3, 4, 5, 6 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128.")
    ] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST where it exists.")] = False,
) -> None:
    """Convert a GGUF file into a folder that this program and mlx-lm open."""
    from llmcad_mlx.sources.gguf import convert_gguf
    from llmcad_mlx.sources.progress import progress_for

    convert_gguf(source, dest, bits, group_size, force=force, progress=progress_for(True))
    print(dest)
