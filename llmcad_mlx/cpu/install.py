"""Prepare a loaded model for the device it will run on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

LoadedLayer = Callable[[int], AbstractContextManager[None]]


class HostLayer:
    """Marks a layer that runs on the host kernels, in float32 whatever its weights are stored in."""


def forget_views(module: Module) -> None:
    """Drop the views of a layer's weights that the host kernels have kept."""
    if isinstance(module, HostLayer):
        weights: Any = module._host
        weights.source = weights.arrays = None


def forget_block_views(model: Module) -> None:
    """Drop the views of weights that whole decoder blocks have kept."""
    for block in getattr(model, "layers", []):
        state = getattr(block, "_host_block", None)
        if state is not None:
            state.forget()


def host_kernels_wanted() -> bool:
    """True where MLX would run on a CPU without Apple's Accelerate."""
    return mx.default_device() == mx.cpu and platform.system() == "Linux"


def prepare_for_host(model: Module) -> None:
    """On a Linux CPU: float32 activations and the host kernels. Elsewhere nothing changes.

    Evaluates the model's parameters.
    """
    use_host_kernels(model)
    mx.eval(model.parameters())
    use_host_blocks(model)


def use_host_kernels(model: Module) -> None:
    """The first half of `prepare_for_host`: linear layers. Evaluates nothing."""
    if not host_kernels_wanted():
        return
    # Waiting threads spin for about 0.1 ms, then sleep. By default they spin for milliseconds: where something
    # else runs on the machine that keeps their partner off the core, and a forward takes thirty times as long.
    # Without any spinning, waking up costs a small model half its speed. Read when the threads start.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Imported here because numba is a dependency on Linux only.
    from llmcad_mlx.cpu.linear import install_host_kernels

    install_host_kernels(model)


def use_host_blocks(model: Module, loaded: LoadedLayer | None = None) -> None:
    """The second half: whole decoder blocks, where they agree with MLX's.

    loaded(i): a context in which layer i's weights are in memory. With it one layer of each kind is compared,
    without it every layer.
    """
    if not host_kernels_wanted():
        return
    from llmcad_mlx.cpu.block import install_host_blocks

    install_host_blocks(model, loaded)
