"""From whatever holds a model to a bundle."""

from __future__ import annotations

from pathlib import Path

from llmcad_mlx.sources.gguf import convert_gguf
from llmcad_mlx.sources.mlx_folder import convert_folder
from llmcad_mlx.sources.new_folder import check_destination
from llmcad_mlx.sources.progress import progress_for
from llmcad_mlx.sources.resolve import resolve_target


def convert(
    source: str, dest: Path, bits: int | None = None, group_size: int | None = None, show_progress: bool = False
) -> None:
    """Make the bundle `dest` from a GGUF file, a model folder, a preset or a hub repository, fetched where needed.

    Without `bits` and `group_size`: 4 bits, groups of 32 for GGUF files, whose 4-bit blocks have that size, and of
    64 for folders. Errors as for `convert_gguf`, `convert_folder` and `resolve_target`.
    """
    check_destination(dest)  # before anything is fetched
    path = Path(source).expanduser()
    progress = progress_for(show_progress)
    if path.is_file() or path.suffix == ".gguf":
        convert_gguf(
            path, dest, 4 if bits is None else bits, 32 if group_size is None else group_size, progress=progress
        )
        return
    folder = resolve_target(source, show_progress)
    name = folder.resolve().name if path.is_dir() else source
    convert_folder(folder, dest, bits, group_size, name=name, progress=progress)
