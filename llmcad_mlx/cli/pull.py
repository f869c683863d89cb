"""`llmcad-mlx pull`: fetch a preset or a hub repository."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcad_mlx.errors import UsageError
from llmcad_mlx.sources.presets import NGRAM, list_presets


def pull(
    name: Annotated[
        str | None, typer.Argument(help="A preset, or a hub repository with an mlx-lm model (org/name).")
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="Print the presets and stop.")] = False,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Keep a preset's GGUF files after conversion.")
    ] = False,
) -> None:
    """Fetch a model, check it, and make it ready. Run again to continue a download that was cut off."""
    if list_names:
        _print_presets()
        return
    if name is None:
        raise UsageError("pull: name a preset or a hub repository; `llmcad-mlx pull --list` prints the presets")
    from llmcad_mlx.sources.progress import progress_for
    from llmcad_mlx.sources.pull import pull_preset, pull_repo

    if "/" in name:
        print(pull_repo(name, progress=progress_for(True)))
        return
    pulled = pull_preset(name, progress_for(True), keep_source)
    print(pulled.target)
    if pulled.draft is not None:
        print(pulled.draft)


def _print_presets() -> None:
    for preset in list_presets():
        files = [preset.target] + ([preset.draft] if preset.draft else [])
        megabytes = sum(file.num_bytes for file in files) / 1e6
        print(f"{preset.name}: {preset.summary}")
        print(f"  target  {preset.target.repo} {preset.target.file}")
        print(f"  draft   {f'{preset.draft.repo} {preset.draft.file}' if preset.draft else NGRAM}")
        print(f"  {preset.license}, {megabytes:,.0f} MB to download, {preset.memory_bytes / 1e9:.1f} GB memory")
