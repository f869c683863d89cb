"""Small GGUF files with random weights and a byte-level tokenizer, written by the `gguf` package's writer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
END = "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TinyGguf:
    """A written file and the float32 weights it was written from, in Hugging Face row order."""

    path: Path
    weights: dict[str, Array]
    num_tokens: int


def write_tiny_gguf(
    path: Path,
    family: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    tied: bool = True,
    seed: int = 0,
    edit: Callable[[GGUFWriter], None] | None = None,
    skip: tuple[str, ...] = (),
) -> TinyGguf:
    """A model of two layers. `edit` may add fields; tensors named in `skip` are left out."""
    writer = GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    num_tokens = add_tokenizer(writer, "qwen2" if family == "qwen2" else "smollm")
    if edit is not None:
        edit(writer)
    weights = _weights(family, num_tokens, tied, seed)
    for name, values in weights.items():
        if name not in skip:
            _add(writer, name, values, family, kind)
    write_out(writer)
    return TinyGguf(path, weights, num_tokens)


def add_tokenizer(writer: GGUFWriter, pre: str) -> int:
    """A byte-level tokenizer and a chat template; returns the number of tokens, padded to whole groups."""
    tokens, types, merges = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index(END))
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def write_out(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair_rows(rows: Array, num_heads: int) -> Array:
    """llama.cpp's `LlamaModel.permute`: rows of halves to rows of neighbours."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add(writer: GGUFWriter, name: str, values: Array, family: str, kind: GGMLQuantizationType) -> None:
    if family == "llama" and ".attn_q." in name:
        values = pair_rows(values, HEADS)
    if family == "llama" and ".attn_k." in name:
        values = pair_rows(values, KV_HEADS)
    if values.ndim == 1 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def _vocabulary() -> tuple[list[str], list[int], list[str]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = [*letters, *("".join(merge.split()) for merge in merges), END, "[PAD0]"]
    tokens += [f"[PAD{number}]" for number in range(1, -len(tokens) % 32 + 1)]
    types = [3 if token == END else 5 if token.startswith("[PAD") else 1 for token in tokens]
    return tokens, types, merges


def _weights(family: str, num_tokens: int, tied: bool, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (random.standard_normal((rows, columns)) * 0.2).astype(np.float32)

    def vector(size: int, around: float) -> Array:
        return (around + random.standard_normal(size) * 0.1).astype(np.float16).astype(np.float32)

    weights = {"token_embd.weight": matrix(num_tokens, HIDDEN), "output_norm.weight": vector(HIDDEN, 1.0)}
    if not tied:
        weights["output.weight"] = matrix(num_tokens, HIDDEN)
    kv = KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        weights |= {
            f"{block}attn_norm.weight": vector(HIDDEN, 1.0),
            f"{block}ffn_norm.weight": vector(HIDDEN, 1.0),
            f"{block}attn_q.weight": matrix(HIDDEN, HIDDEN),
            f"{block}attn_k.weight": matrix(kv, HIDDEN),
            f"{block}attn_v.weight": matrix(kv, HIDDEN),
            f"{block}attn_output.weight": matrix(HIDDEN, HIDDEN),
            f"{block}ffn_gate.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{block}ffn_up.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{block}ffn_down.weight": matrix(HIDDEN, INTERMEDIATE),
        }
        if family == "qwen2":
            for name, size in (("q", HIDDEN), ("k", kv), ("v", kv)):
                weights[f"{block}attn_{name}.bias"] = vector(size, 0.0)
    return weights
