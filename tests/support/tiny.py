"""Tiny random models for tests: fp32 unless told otherwise, built in milliseconds, nothing downloaded."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import llama

from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.tree_model import TreeModel

VOCAB = 40
WEIGHTS: mx.Dtype = getattr(mx, os.environ.get("LLMCAD_MLX_TEST_WEIGHTS", "float32"))
"""What tiny models keep their weights in."""


def tiny_llama(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    vocab: int = VOCAB,
    scale: float = 6.0,
    noise: float = 0.0,
) -> nn.Module:
    """A random llama. `scale` sharpens the logits, so that greedy text is not one token for ever; `noise` moves
    the weights, which makes an imperfect draft of the model of the same seed."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    model = llama.Model(args)
    model.update(tree_map(lambda p: p * scale if p.ndim == 2 else p, model.parameters()))
    if noise:
        mx.random.seed(seed + 1000)
        model.update(tree_map(lambda p: p + noise * mx.random.normal(p.shape), model.parameters()))
    model.set_dtype(WEIGHTS)
    mx.eval(model.parameters())
    return model


def tiny_tree_model(seed: int = 0, *, cpu_kernels: bool = True, **options: Any) -> TreeModel:
    """A tiny model ready for trees; options as for `tiny_llama`."""
    model = tiny_llama(seed, **options)
    if cpu_kernels:
        prepare_for_device(model)
    return TreeModel(model, {"model_type": "llama", "max_position_embeddings": 4096}, probe(model))
