"""`llmcad-mlx doctor`: what is installed, what it runs on, and what a model can do here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llmcad_mlx.cli import options

if TYPE_CHECKING:
    from llmcad_mlx.doctor import Diagnosis, ModelFindings

Line = tuple[str, str]

_NO_CHECKSUMS = "none: not a bundle; `llmcad-mlx convert` makes one"


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, hub repository or preset to load and probe.", show_default=False),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Show platform, versions, back end, memory, and what a model can do; check every byte of a bundle.

    Exit code 1 if something is broken.
    """
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
        raise typer.Exit(1)


def _lines(found: Diagnosis) -> Iterator[Line]:
    machine = found.machine
    yield "platform", machine.platform
    yield "processor", f"{machine.cpu}, {machine.num_cores} cores"
    yield "memory", f"{_gigabytes(machine.memory_bytes)}, {_gigabytes(machine.available_bytes)} available"
    yield "Python", machine.python
    for name, version in machine.versions.items():
        tested = f" (tested: {found.mlx_lm_tested})" if name == "mlx-lm" else ""
        yield name, f"{version or 'not installed'}{tested}"
    yield "back end", found.device or "none"
    yield "host kernels", "on" if found.host_kernels else "off"
    yield "models folder", f"{found.models_folder}, {_gigabytes(found.models_folder_free_bytes)} free"
    if found.model is not None:
        yield from _model_lines(found.model)


def _model_lines(model: ModelFindings) -> Iterator[Line]:
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
