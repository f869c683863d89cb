"""`llmcad-mlx pull`, `convert` and `doctor`: fetch a model, make a bundle of it, and see what it can do here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from llmcad_mlx.cli import options
from llmcad_mlx.errors import UsageError
from llmcad_mlx.store.presets import NGRAM, FileSource, PackagedSource, Source, list_presets

if TYPE_CHECKING:
    from llmcad_mlx.doctor import Diagnosis

_NO_CHECKSUMS = "none: not a bundle; `llmcad-mlx convert` makes one"


def pull(
    name: Annotated[
        str | None, Argument(help="A preset, or a hub repository with an mlx-lm model (org/name).")
    ] = None,
    list_names: Annotated[bool, Option("--list", help="Print the presets and stop.")] = False,
    keep_source: Annotated[
        bool, Option("--keep-source", help="Keep a preset's GGUF files after conversion.")
    ] = False,
) -> None:
    """Fetch a model, check it, and make it ready. Run again to continue a download that was cut off."""
    if list_names:
        _print_presets()
        return
    if name is None:
        raise UsageError("pull: name a preset or a hub repository; `llmcad-mlx pull --list` prints the presets")
    from llmcad_mlx.progress import progress_for
    from llmcad_mlx.store.names import pull_preset, pull_repo

    if "/" in name:
        print(pull_repo(name, progress=progress_for(True)))
        return
    for folder in pull_preset(name, progress_for(True), keep_source):
        print(folder)


def _print_presets() -> None:
    for preset in list_presets():
        print(f"{preset.name}: {preset.summary}")
        print(f"  target  {_where(preset.target)}")
        print(f"  draft   {_where(preset.draft) if preset.draft else NGRAM}")
        facts = [preset.license]
        fetched = [part for part in (preset.target, preset.draft) if part and not isinstance(part, PackagedSource)]
        sizes = [part.num_bytes for part in fetched if isinstance(part, FileSource)]
        if len(sizes) == len(fetched):  # only where the sizes of all are known
            facts.append(f"{sum(sizes) / 1e6:,.0f} MB to download")
        size = preset.memory_bytes / 1e9
        facts.append(f"for {preset.machine}: --memory {size:.1f}GB" if preset.machine else f"{size:.1f} GB memory")
        print(f"  {', '.join(facts)}")


def _where(source: Source) -> str:
    if isinstance(source, PackagedSource):
        return f"{source.name}, which comes with this package"
    return f"{source.repo} {source.file}" if isinstance(source, FileSource) else source.repo


def convert(
    source: Annotated[
        str,
        Argument(
            help="A GGUF file (llama, qwen2/3, gemma2/3, phi3, smollm3), an mlx-lm or HF folder, a hub repository."
        ),
    ],
    dest: Annotated[Path, Argument(help="The folder to make; new or empty.")],
    bits: Annotated[
        int | None,
        Option(
            help="Bits per weight: 4 or 8; for GGUF also 2, 3, 5, 6, 16. Default: what a GGUF file has, else 4. "
            "Not for folders that are quantised already."
        ),
    ] = None,
    group_size: Annotated[
        int | None, Option(help="Weights that share a scale: 32, 64 or 128. Default: 32 for GGUF, 64 for folders.")
    ] = None,
) -> None:
    """Make a bundle: a folder that this program and mlx-lm open, ordered for streaming, with checksums."""
    from llmcad_mlx.store.names import convert as make_bundle

    make_bundle(source, dest, bits, group_size, show_progress=True)
    print(dest)


def doctor(
    model: Annotated[
        str | None, Argument(help="Model folder, hub repository or preset to load and probe.")
    ] = None,
    self_test: Annotated[
        bool, Option("--self-test", help="Also try what the engine relies on, in two minutes; run it first.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Show platform, versions, back end, memory, and what a model can do; check every byte of a bundle.

    --self-test proves on this machine that kernels, disk, memory and text are as they must be, and keeps what it
    measures. What is printed names no folder of yours. Exit code 1 if something is broken.
    """
    if self_test:
        _self_test(model, json_output)
        return
    from llmcad_mlx.doctor import diagnose

    found = diagnose(model, show_progress=not json_output)
    if json_output:
        print(json.dumps(found.to_dict()))
    else:
        lines = list(_lines(found))
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"{name:<{width}}  {value}")
        for problem in found.problems:
            print(f"problem: {problem}", file=sys.stderr)
    if found.problems:
        raise Exit(1)


def _self_test(model: str | None, json_output: bool) -> None:
    """A line for each check as soon as it is there, after those of the installation, to paste into a report."""
    from llmcad_mlx.doctor import diagnose
    from llmcad_mlx.measure.selftest import self_test

    found = diagnose()
    lines = [(name, value) for name, value in _lines(found) if name != "models folder"]
    if not json_output:
        for name, value in lines:
            print(f"{name}: {value}")
    checks = []
    for check in self_test(model):
        checks.append(check)
        if not json_output:
            word = {True: "ok", False: "FAILED", None: "skipped"}[check.passed]
            print(f"{word:<8}{check.name} ({check.seconds:.1f} s): {check.finding}", flush=True)
    if json_output:
        print(json.dumps({"installation": dict(lines), "checks": [asdict(check) for check in checks]}))
    for problem in found.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if found.problems or any(check.passed is False for check in checks):
        raise Exit(1)


def _lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    machine, model = found.machine, found.model
    yield "platform", machine.platform
    yield "processor", f"{machine.cpu}, {machine.num_cores} cores"
    yield "memory", f"{_gigabytes(machine.memory_bytes)}, {_gigabytes(machine.available_bytes)} available"
    yield "Python", machine.python
    for name, version in machine.versions.items():
        tested = f" (tested: {found.mlx_lm_tested})" if name == "mlx-lm" else ""
        yield name, f"{version or 'not installed'}{tested}"
    yield "back end", found.device or "none"
    switched = " (LLMCAD_MLX_KERNELS=mlx)" if found.kernels == "mlx" else ""
    yield "host kernels", "on" if found.host_kernels else f"off{switched}"
    yield "models folder", f"{found.models_folder}, {_gigabytes(found.models_folder_free_bytes)} free"
    if model is None:
        return
    yield "model", model.path
    if model.drafts_only:
        yield "kind", f"a draft, not a target: {model.drafts_only}"
    yield "checksums", "verified: every byte is as it was written" if model.checksums_verified else _NO_CHECKSUMS
    yield "capability", f"{model.capability}: {model.reason}" if model.reason else model.capability
    exact = " (bit for bit)" if model.max_difference == 0.0 else ""
    yield "largest difference", f"{model.max_difference:.2g}{exact}, to the logits of mlx-lm's own cache"
    yield "vocabulary", f"{model.vocab_size} logits"
    yield "context", f"{model.context_length} tokens" if model.context_length else "unknown"
    yield "layers", f"{model.num_layers}, {model.num_host_layers} on host kernels"
    yield "weights", _gigabytes(model.weight_bytes)
    yield "loading", f"{model.load_s:.1f} s, then {model.probe_s:.1f} s to probe"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"
