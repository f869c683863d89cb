"""`llmcad-mlx convert`: a GGUF file, a model folder or a hub repository becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file (llama, qwen2/3, gemma2/3, phi3, smollm3), an mlx-lm or HF folder, a hub repository."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="The folder to make; new or empty.")],
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            help="Bits per weight: 4 or 8; GGUF also 2, 3, 5, 6. Default: 4. Not for what is quantised already.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Weights that share a scale: 32, 64 or 128. Default: 32 for GGUF, 64 for folders.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a bundle: a folder that this program and mlx-lm open, ordered for streaming, with checksums."""
    from llmcad_mlx.store.convert import convert as make_bundle

    make_bundle(source, dest, bits, group_size, show_progress=True)
    print(dest)
