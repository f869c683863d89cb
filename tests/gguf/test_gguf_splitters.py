"""Pre-tokenizers of the newer GGUF families cut text as their own tokenizer.json does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer

from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.gguf.tokenizer import read_tokenizer
from tests.support.tiny_gguf import add_tokenizer, write_out


def tokenizer_named(tmp_path: Path, pre: str) -> Tokenizer:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(256)
    writer.add_bos_token_id(5)
    add_tokenizer(writer, pre)
    write_out(writer)
    return read_tokenizer(read_gguf_header(tmp_path / "tiny.gguf")).tokenizer


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("deepseek-r1-qwen", ["He", "'s", "Ġin", "ĠNewYork", "Ġ", "1", "2", "3", "4", "/Ċ"]),
        ("smaug-bpe", ["He", "'s", "Ġin", "ĠNewYork", "Ġ", "123", "4", "/Ċ"]),
        ("dbrx", ["He", "'s", "Ġin", "ĠNewYork", "Ġ", "123", "4", "/Ċ"]),
        ("gpt-4o", ["He's", "Ġin", "ĠNew", "York", "Ġ", "123", "4", "/Ċ"]),
    ],
)
def test_text_is_cut_as_each_family_does(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_named(tmp_path, pre)
    found = tokenizer.pre_tokenizer.pre_tokenize_str("He's in NewYork 1234/\n")
    assert [piece for piece, _ in found] == pieces
    assert tokenizer.encode("He").ids[0] != 5  # none of them begins with bos unless the file says so
