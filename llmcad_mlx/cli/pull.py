"""`llmcad-mlx pull`: fetch a preset or a hub repository."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcad_mlx.errors import UsageError
from llmcad_mlx.store.presets import NGRAM, FileSource, PackagedSource, Source, list_presets


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
    from llmcad_mlx.progress import progress_for
    from llmcad_mlx.store.pull import pull_preset, pull_repo

    if "/" in name:
        print(pull_repo(name, progress=progress_for(True)))
        return
    pulled = pull_preset(name, progress_for(True), keep_source)
    print(pulled.target)
    if pulled.draft is not None:
        print(pulled.draft)


def _print_presets() -> None:
    for preset in list_presets():
        sources: list[Source] = [preset.target, *([preset.draft] if preset.draft else [])]
        print(f"{preset.name}: {preset.summary}")
        print(f"  target  {_where(preset.target)}")
        print(f"  draft   {_where(preset.draft) if preset.draft else NGRAM}")
        memory = f"{preset.memory_bytes / 1e9:.1f} GB"
        facts = [preset.license, *_download(sources)]
        if preset.machine is None:
            facts.append(f"{memory} memory")
        else:
            facts.append(f"for {preset.machine}: --memory {memory.replace(' ', '')}")
        print(f"  {', '.join(facts)}")


def _where(source: Source) -> str:
    if isinstance(source, PackagedSource):
        return f"{source.name}, which comes with this package"
    return f"{source.repo} {source.file}" if isinstance(source, FileSource) else source.repo


def _download(sources: list[Source]) -> list[str]:
    """Only where the sizes of all are known."""
    sources = [source for source in sources if not isinstance(source, PackagedSource)]
    sizes = [source.num_bytes for source in sources if isinstance(source, FileSource)]
    return [f"{sum(sizes) / 1e6:,.0f} MB to download"] if len(sizes) == len(sources) else []
