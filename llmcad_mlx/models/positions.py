"""Per-node positions for mlx-lm models: siblings in a token tree share a position.

mlx-lm models rotate with ``self.rope(x, offset=cache.offset)``, row i of ``x`` being at position ``offset + i``.
For a tree our cache answers with a `NodePositions` instead of an int, and `install` teaches the model's rope
modules what it means: rows move to the batch axis, where ``mx.fast.rope`` takes one offset each. Anything else a
model might do with the offset stays right or raises: a model we do not understand fails in the load-time probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module

from llmcad_mlx.models.adapt import Adaptation, adapt, own_class, restore


@dataclass(eq=False)
class NodePositions:
    """What ``cache.offset`` is while a real tree is forwarded: one position per row.

    Supports no arithmetic on purpose. As an MLX array it is the int32 vector, shape (N,), that must be added
    to ``arange(N)`` to give the positions, which is how models use a scalar offset.
    """

    positions: npt.NDArray[np.int32]
    """(N,) the position (depth in the sequence) of each row."""

    @cached_property
    def absolute(self) -> mx.array:
        """(N,) int32, the positions."""
        return mx.array(self.positions)

    @cached_property
    def _relative(self) -> mx.array:
        return mx.array(self.positions - np.arange(len(self.positions), dtype=np.int32))

    def __mlx_array__(self) -> mx.array:
        return self._relative


def install(model: Module) -> None:
    """Teach the rope modules of ``model`` to take a `NodePositions`; other offsets take the module's own code, so
    mlx-lm can go on using the same model object. Installing twice is harmless; `uninstall` undoes it."""
    for module in _rope_modules(model):
        adapt(module, PerNodeRope)


def uninstall(model: Module) -> None:
    """Let the rope modules of ``model`` take numbers only, as they did before `install`."""
    for module in _rope_modules(model):
        restore(module, PerNodeRope)


def _rope_modules(model: Module) -> list[Module]:
    """Modules called as ``module(x, offset)``: nn.RoPE, mlx-lm's rope_utils and the ones in its model files. Other
    layers may take an offset too, but never as the argument right after ``x``."""
    modules: list[Module] = model.modules()
    signatures = ((module, inspect.signature(own_class(module).__call__)) for module in modules)
    return [module for module, signature in signatures if list(signature.parameters)[2:3] == ["offset"]]


class PerNodeRope(Adaptation):
    """A rope module that gives each row of a tree its own offset."""

    def __call__(self, x: mx.array, offset: Any = 0, *args: Any, **kwargs: Any) -> mx.array:
        rope: Callable[..., mx.array] = super().__call__
        if isinstance(offset, int):
            return rope(x, offset, *args, **kwargs)
        num_rows = x.shape[-2]
        if isinstance(offset, NodePositions):
            absolute = offset.absolute
        elif isinstance(offset, mx.array) and offset.shape == (num_rows,) and x.shape[0] == 1 < num_rows:
            # A NodePositions that the model turned into an array (gemma4): see __mlx_array__.
            absolute = offset + mx.arange(num_rows)
        else:
            return rope(x, offset, *args, **kwargs)
        rows = x.swapaxes(0, -2)  # to the batch axis, where each has its own offset
        try:
            rotated = rope(rows, absolute, *args, **kwargs)
        except (TypeError, ValueError):
            # The module needs a number (dynamic NTK compares it with a length): one call for each position.
            places = enumerate(np.array(absolute).tolist())
            rotated = mx.concatenate([rope(rows[i : i + 1], p, *args, **kwargs) for i, p in places])
        return rotated.swapaxes(0, -2)
