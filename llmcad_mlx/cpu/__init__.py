"""Kernels of our own for Linux CPUs, and what prepares a loaded model for the device it will run on. numba, a
dependency on Linux only, is not imported before a model is prepared on such a CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from llmcad_mlx.errors import UsageError

SWITCH = "LLMCAD_MLX_KERNELS"
"""The environment variable that takes MLX's own operations where the CPU kernels would compute."""


def chosen_kernels() -> str:
    """What `SWITCH` says: "auto", also where it is not set, or "mlx". Raises UsageError for anything else."""
    chosen = os.environ.get(SWITCH) or "auto"
    if chosen not in ("auto", "mlx"):
        raise UsageError(f"LLMCAD_MLX_KERNELS: {chosen!r} is neither auto nor mlx; unset it, or set one of them")
    return chosen


def cpu_kernels_wanted() -> bool:
    """True where MLX would run on a CPU without Apple's Accelerate, and `SWITCH` does not say otherwise."""
    return chosen_kernels() == "auto" and mx.default_device() == mx.cpu and platform.system() == "Linux"


def prepare_for_device(model: Module) -> None:
    """On a Linux CPU: float32 activations and the CPU kernels. Evaluates all arrays, for use in any thread."""
    use_cpu_linears(model)
    mx.eval(model.parameters(), unlisted_arrays(model))
    use_cpu_blocks(model)


def use_cpu_linears(model: Module) -> None:
    """The first half of `prepare_for_device`: linear layers. Evaluates nothing."""
    if not cpu_kernels_wanted():
        return
    _check_temporary_folder()
    # Waiting threads spin for about 0.1 ms, then sleep. By default they spin for milliseconds: where something
    # else runs on the machine that keeps their partner off the core, and a forward takes thirty times as long.
    # Without any spinning, waking up costs a small model half its speed. Read when the threads start.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from llmcad_mlx.cpu.linear import install_cpu_linears

    install_cpu_linears(model)


def _check_temporary_folder() -> None:
    """Raise UsageError where MLX, which compiles in it, would fail with a message about a file system."""
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):  # the first that is set counts, also where it is empty
        if (folder := os.environ.get(name)) is not None:
            if not os.access(os.path.join(folder, ""), os.W_OK | os.X_OK):
                raise UsageError(f"{name}: {folder!r} is no folder for temporary files; name another, or unset it")
            return


def use_cpu_blocks(model: Module, loaded: Callable[[int], AbstractContextManager[None]] | None = None) -> None:
    """The second half: whole decoder blocks, where they agree with MLX's. loaded(i): a context in which layer i's
    weights are in memory. With it one layer of each kind is compared, without it every layer."""
    if not cpu_kernels_wanted():
        return
    from llmcad_mlx.cpu.block import install_cpu_blocks

    install_cpu_blocks(model, loaded)


def unlisted_arrays(model: Module) -> list[mx.array]:
    """Arrays that modules keep besides their parameters, such as a rope's frequencies. Not evaluated on the
    thread that made them, they cannot be used in another."""
    leaves: Any = tree_flatten(model.parameters())
    seen = {id(array) for _, array in leaves}
    return list(_arrays_in(model, seen))


def _arrays_in(value: Any, seen: set[int]) -> Iterator[mx.array]:
    """The arrays in modules, containers and plain objects, `seen` left out."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, mx.array):
        yield value
    inside = list(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ())
    if not isinstance(value, type | ModuleType) and hasattr(value, "__dict__"):
        inside += vars(value).values()
    for inner in inside:
        yield from _arrays_in(inner, seen)
