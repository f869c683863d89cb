"""GPT-2 style byte-level BPE from a GGUF file: tokens, merges, and a split pattern known by name.

Patterns and normalisers are those of the models' own tokenizer.json files; llama.cpp's table of names is in
`llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_metadata import Metadata
from llmcad_mlx.sources.gguf_vocabulary import Vocabulary

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words that begin with capitals or have none, with an English ending.
_CASED_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitter:
    """How a named pre-tokenizer cuts text. `adds_bos`: its texts begin with bos unless the file says no."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by_pattern(digits: str, split: str = _SPLIT) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Words, runs of at most `digits` numerals, punctuation, line ends, spaces."""

    def build() -> pre_tokenizers.PreTokenizer:
        pattern = Regex(split.replace("{DIGITS}", digits))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_QWEN2 = _Splitter(_by_pattern(""), nfc=True)
_LLAMA3 = _Splitter(_by_pattern("{1,3}"), ignore_merges=True, adds_bos=True)
_SPLITTERS = {
    "gpt-2": _Splitter(_gpt2),
    "smollm": _Splitter(_digits_then_gpt2),
    "starcoder": _Splitter(_digits_then_gpt2),
    "refact": _Splitter(_digits_then_gpt2),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _Splitter(_by_pattern("{1,3}"), ignore_merges=True),  # SmolLM3
    "dbrx": _Splitter(_by_pattern("{1,3}")),  # Phi 4
    "gpt-4o": _Splitter(_by_pattern("{1,3}", _CASED_SPLIT)),  # Phi 4 mini
}


def build_byte_level(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without bos.

    Raises ModelError for a pre-tokenizer whose split pattern is not known, and for a merge of tokens that
    are not there.
    """
    splitter = _splitter(metadata)
    ids = vocabulary.ids()
    merges = [_merge(metadata, text, ids) for text in metadata.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitter.ignore_merges))
    if splitter.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level_adds_bos(metadata: Metadata) -> bool:
    """Whether texts begin with bos when the file does not say."""
    return _splitter(metadata).adds_bos


def _splitter(metadata: Metadata) -> _Splitter:
    name = metadata.text("tokenizer.ggml.pre", "gpt-2")
    if name not in _SPLITTERS:
        known = ", ".join(_SPLITTERS)
        raise ModelError(f"{metadata.path}: pre-tokenizer {name!r} is not supported (supported: {known})")
    return _SPLITTERS[name]


def _merge(metadata: Metadata, text: str, ids: dict[str, int]) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if left not in ids or right not in ids or left + right not in ids:
        raise metadata.wrong("tokenizer.ggml.merges", text)
    return left, right
