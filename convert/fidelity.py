"""How far a converted model's predictions are from those of the numbers in its GGUF file.

python -m convert.fidelity model.gguf BUNDLE text.txt

Over the text: the mean Kullback-Leibler divergence in nats, the share of tokens after which both find the same one
likeliest, and both perplexities. mlx-lm computes both in float32; the file's numbers are rounded to float16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model

from convert import exit_code_of
from llmcad_mlx.gguf.convert import convert_gguf

CHUNK = 128  # tokens, each chunk with all before it in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("bundle", type=Path, help="what was made of it")
    parser.add_argument("text", type=Path, help="any text, up to some thousand tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert_gguf(given.file, Path(folder) / "dense", bits=16)
        tokens = _load(given.bundle)[1].encode(given.text.read_text(encoding="utf-8"))
        exact = _logprobs(Path(folder) / "dense", tokens)
    ours = _logprobs(given.bundle, tokens)
    divergence = (mx.exp(exact) * (exact - ours)).sum(axis=-1)
    agree = (exact.argmax(axis=-1) == ours.argmax(axis=-1)).mean()
    following = mx.array(tokens[1:])[:, None]
    perplexities = [mx.exp(-mx.take_along_axis(rows[:-1], following, 1).mean()).item() for rows in (exact, ours)]
    print(f"{len(tokens)} tokens: KL {divergence.mean().item():.4f} nats, same best token {agree.item():.1%}, ")
    print(f"perplexity {perplexities[0]:.3f} of the file's numbers, {perplexities[1]:.3f} of the bundle's")


def _load(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(folder), lazy=True)[:2]
    model = dequantize_model(model)  # the same numbers, and many rows are multiplied sooner
    model.set_dtype(mx.float32)
    return model, tokenizer


def _logprobs(folder: Path, tokens: list[int]) -> mx.array:
    """(N, V) after each token."""
    model, _ = _load(folder)
    cache, rows = make_prompt_cache(model), []
    for start in range(0, len(tokens), CHUNK):
        rows.append(_log_softmax(model(mx.array([tokens[start : start + CHUNK]]), cache=cache)[0]))
        mx.eval(rows)
    return mx.concatenate(rows)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
