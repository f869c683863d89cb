"""The student: the target's own first layers, kept as they are, and a few trained ones on top of them.

What the first layers say is in the corpus or computed once a batch, so only the trained layers and the head are
differentiated. The head has rows for the tokens that the target uses most; they start as the target's own, and the
trained layers as copies of chosen layers of it.

A head made for the last layer's activations reads early ones badly. A lens, a matrix between norm and head, is
the least-squares map from the student's first activations to the target's last ones, and is trained on from there
(the tuned lens, arXiv 2303.08112). It costs nothing when the student drafts: it becomes part of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx_lm.utils import dequantize_model

from distill.corpus import Ids
from distill.exponentials import numpy_exponentials


def dense(module: Module) -> Any:
    """A copy of a module in float32, nothing in it quantised."""
    found = dequantize_model(copy.deepcopy(module))
    found.set_dtype(mx.float32)
    mx.eval(found.parameters())
    return found


def target_head(model: Any) -> Any:
    """The module whose rows are the target's head; a tied embedding is one."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def head_rows(model: Any, tokens: Ids | slice) -> mx.array:
    """(len(tokens), H) float32: the target's head for these tokens."""
    head = target_head(model)
    rows = mx.array(tokens) if isinstance(tokens, np.ndarray) else tokens
    found: mx.array = head["weight"][rows]
    if "scales" in head:
        biases = head["biases"][rows] if head.get("biases") is not None else None
        found = mx.dequantize(found, head["scales"][rows], biases, head.group_size, head.bits, head.mode)
    return found.astype(mx.float32)


class Student(Module):
    """The trained layers, the last norm, the lens and the head.

    `head` (V', H) float32 are the target's rows, trained or not. `lens` (H, H) float32 begins as the target's last
    norm's weights, until `fit_lens`.
    """

    def __init__(self, model: Any, sources: Sequence[int], tokens: Ids, train_head: bool = False) -> None:
        """model: the target. sources: its layers that the trained ones start from.
        tokens: (V',) the head's vocabulary. train_head: whether the head's rows are trained, too."""
        super().__init__()
        self.layers = [dense(model.layers[number]) for number in sources]
        self.norm = dense(model.model.norm)
        self.head = head_rows(model, tokens)
        self.lens, self.norm.weight = mx.diag(self.norm.weight), mx.ones_like(self.norm.weight)
        mx.eval(self.parameters())
        if not train_head:
            self.freeze(recurse=False, keys=["head"])

    def features(self, hidden: mx.array, rows: mx.array | None = None) -> mx.array:
        """What the head is applied to, (B, T, H), or (M, H) for `rows` (M,), places in (B * T).

        hidden: (B, T, H), from the target's first layers."""
        for layer in self.layers:
            hidden = layer(hidden, "causal", None)
        hidden = self.norm(hidden)
        if rows is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
        return hidden @ self.lens

    @property
    def whole_head(self) -> mx.array:
        """(V', H) float32: what a head without a lens before it needs for the same logits."""
        return self.head @ self.lens.T


class FrozenTarget:
    """The target over whole texts, for corpora without activations."""

    def __init__(self, model: Any, depth: int) -> None:
        """depth: how many of the target's layers the student keeps; 0 means its embedding alone."""
        self._model, self._depth = model, depth

    def __call__(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """After the first layers, and before the head: (B, T, H) float32 each, for `tokens` (B, T)."""
        body = self._body
        states = hidden = body.embed_tokens(tokens).astype(mx.float32)
        with numpy_exponentials(body.layers[0]):
            for number, layer in enumerate(body.layers, 1):
                states = layer(states, "causal", None)
                if number == self._depth:
                    hidden = states
        return hidden, body.norm(states)

    @cached_property
    def _body(self) -> Any:
        # MLX's quantised products are slow on a CPU: there it is worth the memory to have plain ones.
        return dense(self._model.model) if mx.default_device() == mx.cpu else self._model.model


def frequent_tokens(counts: npt.NDArray[np.int64], size: int) -> Ids:
    """The `size` most frequent token ids, ascending; of equally frequent ones the lower ids."""
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
