"""The tokenizer inside a GGUF file as the files transformers reads: tokenizer.json, tokenizer_config.json,
chat_template.jinja, and the token ids for config.json and generation_config.json.

There are two kinds. GPT-2 style byte-level BPE has merges and a split pattern known by name; patterns and
normalisers are those of the models' own tokenizer.json files, llama.cpp's table of names is in
`llama-vocab.cpp`. SentencePiece BPE ("llama") has scores instead of merges. A piece's score is its rank, so
every way to join two pieces into a third is a merge, best score first: what transformers'
`SentencePieceExtractor` does with the original model file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmcad_mlx.gguf.reader import GgufHeader

SPACE = "▁"

# Tokens that end a turn in chat models, though a file names only one of them as its end.
_END_TEXTS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "</s>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """settings: tokenizer_config.json. ids: for config.json and generation_config.json, with every token that ends
    a turn, the file's own first. assumed: the pre-tokenizer where the file does not name its own."""

    tokenizer: Tokenizer
    settings: dict[str, Any]
    ids: Mapping[str, object]
    assumed: str | None = None

    def save(self, folder: Path) -> None:
        """Write the files transformers loads; the template inside and, for newer readers, as its own file."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if "chat_template" in self.settings:
            (folder / "chat_template.jinja").write_text(self.settings["chat_template"], encoding="utf-8")
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def read_tokenizer(header: GgufHeader) -> GgufTokenizer:
    """The tokenizer of a file. Raises ModelError for an unknown kind or pre-tokenizer, and for damaged fields."""
    vocabulary = _read_vocabulary(header)
    kind = header.field("tokenizer.ggml.model", str)
    assumed = None
    if kind == "gpt2":
        name = header.field("tokenizer.ggml.pre", str, "")
        if name in _UNNAMED:
            name = assumed = _likely_splitter(header, vocabulary)
        tokenizer, adds_bos = _byte_level(header, vocabulary, name)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(header, vocabulary), True
    else:
        raise header.refused(f"tokenizer kind {kind!r} is not supported (gpt2 and llama are)")
    tokenizer.add_tokens(vocabulary.added())
    ends = _ends(header, vocabulary)
    bos, pad = (_token_id(header, vocabulary, name) for name in ("bos", "padding"))
    named = {"bos": bos, "eos": ends[0], "pad": pad}
    known = {name: number for name, number in named.items() if number is not None}
    texts = {f"{name}_token": vocabulary.tokens[number] for name, number in known.items()}
    adds_bos = bos is not None and header.field("tokenizer.ggml.add_bos_token", bool, adds_bos)
    if adds_bos:
        text = texts["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", f"{text}:1", "$B:1"], special_tokens=[(text, bos)]
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        **texts,
        "model_max_length": header.positive(".context_length"),
    }
    template = header.field("tokenizer.chat_template", str, "")
    if template:
        settings["chat_template"] = template
    ids = {**{f"{name}_token_id": number for name, number in known.items()}, "eos_token_id": ends}
    return GgufTokenizer(tokenizer, settings, ids, assumed)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """`tokens[id]` is a token's text and `types[id]` its TokenType."""

    tokens: list[str]
    types: list[int]

    def ids(self, *types: TokenType) -> dict[str, int]:
        """Token → id of the tokens of these types; of none: of all but those that only fill the embedding up."""
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if (kind in types if types else kind != TokenType.UNUSED)
        }

    def added(self) -> list[AddedToken]:
        """Tokens found in text before it is split; control tokens vanish from decoded text."""
        found = self.ids(TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        special = {token: self.types[number] != TokenType.USER_DEFINED for token, number in found.items()}
        return [AddedToken(token, special=special[token], normalized=False) for token in found]


def _read_vocabulary(header: GgufHeader) -> _Vocabulary:
    """Raises ModelError when tokens are missing, repeated, or do not match their types."""
    key = "tokenizer.ggml.tokens"
    tokens = header.items(key, str)
    types = [int(TokenType.NORMAL)] * len(tokens)
    if header.has("tokenizer.ggml.token_type"):
        types = header.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise header.wrong(key, f"{len(types)} types for {len(tokens)} tokens")
    vocabulary = _Vocabulary(tokens, types)
    if not tokens or len(vocabulary.ids()) != sum(kind != TokenType.UNUSED for kind in types):
        raise header.wrong(key, "no tokens, or one that occurs twice")
    return vocabulary


def _token_id(header: GgufHeader, vocabulary: _Vocabulary, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not header.has(key):
        return None
    number = header.integer(key)
    if not 0 <= number < len(vocabulary.tokens):
        raise header.wrong(key, number)
    return number


def _ends(header: GgufHeader, vocabulary: _Vocabulary) -> list[int]:
    control = vocabulary.ids(TokenType.CONTROL)
    named = [_token_id(header, vocabulary, name) for name in ("eos", "eot", "eom")]
    found = [*named, *(control.get(text) for text in _END_TEXTS)]
    ends = list(dict.fromkeys(number for number in found if number is not None))
    if not ends:
        raise header.wrong("tokenizer.ggml.eos_token_id", None)
    return ends


@dataclass(frozen=True, slots=True)
class _Splitter:
    """How a named pre-tokenizer cuts text: by `pattern`, or as GPT-2 does, single digits first where it says so.

    adds_bos: its texts begin with bos unless the file says no.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        if self.pattern is not None:
            words = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            return pre_tokenizers.Sequence([words, letters])
        if self.single_digits:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters])
        return letters


def _words(digits: str) -> str:
    """Words, runs of so many numerals, punctuation, line ends, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits +
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip


# Words that begin with capitals or have none, with an English ending.
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNNAMED = ("", "default")
_DIGITS = _Splitter(single_digits=True)
_QWEN2 = _Splitter(_words(""), nfc=True)
_LLAMA3 = _Splitter(_words("{1,3}"), ignore_merges=True, adds_bos=True)
_SPLITTERS = {
    "gpt-2": _Splitter(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _Splitter(_words("{1,3}"), ignore_merges=True),  # SmolLM3
    "dbrx": _Splitter(_words("{1,3}")),  # Phi 4
    "gpt-4o": _Splitter(_CASED_WORDS),  # Phi 4 mini
}


def _likely_splitter(header: GgufHeader, vocabulary: _Vocabulary) -> str:
    """For a file of the time before pre-tokenizers had names, or one whose maker did not know it."""
    if header.family in ("qwen2", "qwen3"):
        return "qwen2"
    return "llama-bpe" if "<|begin_of_text|>" in vocabulary.tokens else "gpt-2"


def _byte_level(header: GgufHeader, vocabulary: _Vocabulary, name: str) -> tuple[Tokenizer, bool]:
    """The tokenizer with the named pre-tokenizer, without bos, and whether its texts begin with bos where the file
    does not say. Raises ModelError for an unknown name, and for a merge of tokens that are not there."""
    splitter = _SPLITTERS.get(name)
    if splitter is None:
        known = ", ".join(_SPLITTERS)
        raise header.refused(f"pre-tokenizer {name!r} is not supported (supported: {known})")
    ids = vocabulary.ids()
    merges = []
    for text in header.items("tokenizer.ggml.merges", str):
        left, _, right = text.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise header.wrong("tokenizer.ggml.merges", text)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitter.ignore_merges))
    if splitter.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitter.adds_bos


def _sentencepiece(header: GgufHeader, vocabulary: _Vocabulary) -> Tokenizer:
    """The tokenizer, without bos. Raises ModelError when scores are missing or too few."""
    scores = header.items("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise header.wrong("tokenizer.ggml.scores", f"{len(scores)} for {len(vocabulary.tokens)} tokens")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges(vocabulary.ids(TokenType.NORMAL, TokenType.USER_DEFINED), scores),
            unk_token=next(iter(vocabulary.ids(TokenType.UNKNOWN)), None),
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    prefixed = header.field("tokenizer.ggml.add_space_prefix", bool, True)
    begin = [normalizers.Prepend(SPACE)] if prefixed else []
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def _merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All (left, right) whose parts and whole are `pieces`, by falling score of the whole."""
    found = sorted(
        (-scores[number], pieces[left], pieces[right], left, right)
        for token, number in pieces.items()
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in pieces and right in pieces
    )
    return [(left, right) for _, _, _, left, right in found]
