"""The tokenizer inside a GGUF file as the files transformers reads: tokenizer.json, tokenizer_config.json,
chat_template.jinja, and the token ids for config.json and generation_config.json.

The tokens of a GGUF file with their types, checked.

GPT-2 style byte-level BPE from a GGUF file: tokens, merges, and a split pattern known by name.

Patterns and normalisers are those of the models' own tokenizer.json files; llama.cpp's table of names is in
`llama-vocab.cpp`.

SentencePiece BPE ("llama" tokenizers) from a GGUF file: tokens with scores instead of merges.

A piece's score is its rank, so every way to join two pieces into a third is a merge, best score first: what
transformers' `SentencePieceExtractor` does with the original model file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.reader import Metadata


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens[id]` is a token's text and `types[id]` its TokenType."""

    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        """Token → id without the padding entries, which only fill the embedding matrix up."""
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != TokenType.UNUSED
        }

    def added(self) -> list[AddedToken]:
        """Tokens found in text before it is split; control tokens vanish from decoded text."""
        return [
            AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        ]


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Raises ModelError when tokens are missing, repeated, or do not match their types."""
    key = "tokenizer.ggml.tokens"
    tokens = metadata.texts(key)
    types = [int(TokenType.NORMAL)] * len(tokens)
    if metadata.has("tokenizer.ggml.token_type"):
        types = metadata.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise metadata.wrong(key, f"{len(types)} types for {len(tokens)} tokens")
    vocabulary = Vocabulary(tokens, types)
    if not tokens or len(vocabulary.ids()) != sum(kind != TokenType.UNUSED for kind in types):
        raise metadata.wrong(key, "no tokens, or one that occurs twice")
    return vocabulary


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


SPACE = "▁"


def build_sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without bos. Raises ModelError when scores are missing or too few."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise metadata.wrong("tokenizer.ggml.scores", f"{len(scores)} for {len(vocabulary.tokens)} tokens")
    unknown = next((t for t, kind in _typed(vocabulary) if kind == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == TokenType.BYTE for kind in vocabulary.types),
        )
    )
    prefixed = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    begin = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def _typed(vocabulary: Vocabulary) -> list[tuple[str, int]]:
    return list(zip(vocabulary.tokens, vocabulary.types, strict=True))


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """All (left, right) whose parts and whole are pieces, by falling score of the whole."""
    pieces = {
        token: number
        for number, (token, kind) in enumerate(_typed(vocabulary))
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[number], pieces[left], pieces[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


# Tokens that end a turn in chat models, though a file names only one of them as its end.
_END_TEXTS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids for config.json. `ends` holds every token that ends a turn, the file's own first."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer and what goes with it. `settings` is tokenizer_config.json without the chat template."""

    tokenizer: Tokenizer
    settings: dict[str, object]
    chat_template: str | None
    ids: TokenIds

    def save(self, folder: Path) -> None:
        """Write the files transformers loads; the template as its own file and, for older readers, inside."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = dict(self.settings)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def read_tokenizer(metadata: Metadata) -> GgufTokenizer:
    """Build the tokenizer of a file.

    Raises ModelError for a tokenizer kind or pre-tokenizer that is not known, and for damaged fields.
    """
    vocabulary = read_vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = build_byte_level(metadata, vocabulary), byte_level_adds_bos(metadata)
    elif kind == "llama":
        tokenizer, adds_bos = build_sentencepiece(metadata, vocabulary), True
    else:
        raise ModelError(f"{metadata.path}: tokenizer kind {kind!r} is not supported (gpt2 and llama are)")
    tokenizer.add_tokens(vocabulary.added())
    ids = _token_ids(metadata, vocabulary)
    adds_bos = ids.bos is not None and metadata.flag("tokenizer.ggml.add_bos_token", adds_bos)
    if adds_bos and ids.bos is not None:
        bos = vocabulary.tokens[ids.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids.bos)]
        )
    template = metadata.text("tokenizer.chat_template", "") or None
    return GgufTokenizer(tokenizer, _settings(metadata, vocabulary, ids, adds_bos), template, ids)


def _token_ids(metadata: Metadata, vocabulary: Vocabulary) -> TokenIds:
    def named(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if not metadata.has(key):
            return None
        number = metadata.integer(key)
        if not 0 <= number < len(vocabulary.tokens):
            raise metadata.wrong(key, number)
        return number

    ids = vocabulary.ids()
    control = [ids[text] for text in _END_TEXTS if text in ids]
    control = [number for number in control if vocabulary.types[number] == TokenType.CONTROL]
    found = [named("eos"), named("eot"), named("eom"), *control]
    ends = tuple(dict.fromkeys(number for number in found if number is not None))
    if not ends:
        raise metadata.wrong("tokenizer.ggml.eos_token_id", None)
    return TokenIds(bos=named("bos"), ends=ends, pad=named("padding"))


def _settings(metadata: Metadata, vocabulary: Vocabulary, ids: TokenIds, adds_bos: bool) -> dict[str, object]:
    def text(number: int | None) -> str | None:
        return None if number is None else vocabulary.tokens[number]

    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "bos_token": text(ids.bos),
        "eos_token": text(ids.ends[0]),
        "pad_token": text(ids.pad),
        "model_max_length": metadata.positive(".context_length"),
    }
    return {key: value for key, value in settings.items() if value is not None}
