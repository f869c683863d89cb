"""The embedded model's real GGUF file against its converted folder, by means that share no code with the
converter: the `gguf` package's dequantisation, a plain numpy llama, and byte-pair merging by the book."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import numpy.typing as npt
import pytest
import regex
from transformers import AutoTokenizer

from llmcad_mlx.progress import Progress
from llmcad_mlx.store.download import fetch_file
from llmcad_mlx.store.names import pull_part
from llmcad_mlx.store.presets import FileSource, get_preset
from tests.gguf.test_tokenizer import CORPUS

pytestmark = pytest.mark.embedded

Floats = npt.NDArray[np.float32]

EMBEDDING = "token_embd.weight"
TOKENS = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
# The split of llama.cpp's "smollm" pre-tokenizer: single digits, then GPT-2's words.
WORDS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    source = get_preset("smollm2-135m").target
    assert isinstance(source, FileSource)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCAD_MLX_HOME", str(tmp_path_factory.mktemp("home")))
        return gguf.GGUFReader(fetch_file(source, Progress()))


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull_part("smollm2-135m", "target")


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.get_field(name).contents()  # type: ignore[union-attr]


def weights_of(reader: gguf.GGUFReader) -> dict[str, Floats]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}


def reference_logits(reader: gguf.GGUFReader, embedding: Floats, tokens: list[int]) -> Floats:
    """(T, V): a llama as its paper has it, on the file's own values and order but for the embedding."""
    w, eps = weights_of(reader) | {EMBEDDING: embedding}, field(reader, "llama.attention.layer_norm_rms_epsilon")
    heads, kv_heads = (field(reader, f"llama.attention.{name}") for name in ("head_count", "head_count_kv"))
    base = field(reader, "llama.rope.freq_base")
    x = w["token_embd.weight"][tokens].astype(np.float64)
    dim = x.shape[1] // heads
    angles = np.arange(len(tokens))[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * angles)[:, None]

    def norm(x: Any, weight: Floats) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def rotated(x: Any, count: int) -> Any:
        pairs = x.reshape(len(tokens), count, dim // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(len(tokens), count, dim)

    hidden = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for block in (f"blk.{i}." for i in range(field(reader, "llama.block_count"))):
        y = norm(x, w[block + "attn_norm.weight"])
        q, k, v = (y @ w[f"{block}attn_{part}.weight"].T for part in "qkv")
        q, k = rotated(q, heads), rotated(k, kv_heads).repeat(heads // kv_heads, axis=1)
        v = v.reshape(len(tokens), kv_heads, dim).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim) + hidden
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", shares, v).reshape(x.shape) @ w[block + "attn_output.weight"].T
        y = norm(x, w[block + "ffn_norm.weight"])
        gate = y @ w[block + "ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[block + "ffn_up.weight"].T)) @ w[block + "ffn_down.weight"].T
    return np.asarray(norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T, np.float32)


def test_logits_are_those_of_a_plain_llama_on_dequantised_weights(reader: gguf.GGUFReader, folder: Path) -> None:
    """But for the embedding, which the file has in 8 bits: it is rounded to 4, mostly by half a step at most."""
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    module = model.model.embed_tokens
    embedding = np.array(
        mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
    )
    rounding = np.abs(embedding - weights_of(reader)[EMBEDDING])
    assert np.mean(rounding <= 0.5001 * np.abs(np.array(module.scales)).repeat(module.group_size, axis=1)) > 0.99
    ours = np.array(model(mx.array([TOKENS]))[0])
    expected = reference_logits(reader, embedding, TOKENS)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert (ours.argmax(1) == expected.argmax(1)).all()


class ReferenceTokenizer:
    """Byte-level byte-pair encoding by the book, from the file's own lists."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self.ids = {token: i for i, token in enumerate(field(reader, "tokenizer.ggml.tokens"))}
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(field(reader, "tokenizer.ggml.merges"))}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for word in regex.findall(WORDS, text) for piece in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        pieces = [self.letters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self.rank.get(pair, 1 << 30))
            if best not in self.rank:
                break
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
        return pieces


def test_the_tokenizer_is_the_files_own(reader: gguf.GGUFReader, folder: Path) -> None:
    ours, reference = AutoTokenizer.from_pretrained(folder), ReferenceTokenizer(reader)
    assert field(reader, "tokenizer.ggml.pre") == "smollm"
    for text in (*CORPUS, "x = [i**2 for i in range(1024)]  # Quadrate\n\t\treturn None\n"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        assert ours.decode(ids) == text
    assert ours.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
