"""Keeps what `probe` found: probing a streamed model reads its layers many times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from llmcad_mlx.models import positions
from llmcad_mlx.models.host import host_kernels_wanted
from llmcad_mlx.models.probe import ProbeReport

_FORMAT = 1


def cached_probe(
    model: Module, config: Mapping[str, Any], folder: Path, run: Callable[[Module], ProbeReport]
) -> ProbeReport:
    """What `run(model)` found, kept in `folder` for the same model, versions and device.

    A file that is missing or damaged means probing again.
    """
    file = folder / f"{_key(model, config)}.json"
    report = _read(file)
    if report is None:
        report = run(model)
        _write(file, report)
    elif report.capability == "tree":
        positions.install(model)  # as probing does
    return report


def _key(model: Module, config: Mapping[str, Any]) -> str:
    leaves: Any = tree_flatten(model.parameters())
    shapes = [(name, list(value.shape), str(value.dtype)) for name, value in leaves]
    facts = [
        _FORMAT,
        {name: version(name) for name in ("llmcad-mlx", "mlx", "mlx-lm")},
        str(mx.default_device()),
        host_kernels_wanted(),
        sorted(config.items(), key=lambda item: item[0]),
        shapes,
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]


def _read(file: Path) -> ProbeReport | None:
    try:
        report = ProbeReport(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return report if report.capability in ("tree", "chain", "plain") else None


def _write(file: Path, report: ProbeReport) -> None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(report)))
        os.replace(temporary, file)
