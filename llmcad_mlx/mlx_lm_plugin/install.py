"""Puts this package's `stream_generate` where mlx-lm's own code calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from llmcad_mlx.mlx_lm_plugin.generation import stream_generate

COMMANDS = ("generate", "chat", "server")


@contextmanager
def installed() -> Iterator[None]:
    """While this is open, mlx-lm's functions and commands generate with token trees.

    mlx_lm.server batches requests that name no seed, and batches have no trees; while this is open it serves every
    request by itself, in turn.
    """
    package = import_module("mlx_lm")
    modules = {name: import_module(f"mlx_lm.{name}") for name in COMMANDS}  # mlx_lm.generate names a function too
    places: list[tuple[Any, str, Any]] = [
        (module, "stream_generate", stream_generate) for module in modules.values()
    ]
    places.append((package, "stream_generate", stream_generate))
    places.append((modules["server"].ResponseGenerator, "_is_batchable", _never))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _never(generator: Any, arguments: Any) -> bool:
    return False
