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
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.reader import GgufHeader

SPACE = "▁"

# Tokens that end a turn in chat models, though a file names only one of them as its end.
_END_TEXTS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "</s>",
)  # fmt: skip


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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


def read_tokenizer(header: GgufHeader) -> GgufTokenizer:
    """Build the tokenizer of a file.

    Raises ModelError for a tokenizer kind or pre-tokenizer that is not known, and for damaged fields.
    """
    vocabulary = _read_vocabulary(header)
    kind = header.text("tokenizer.ggml.model")
    if kind == "gpt2":
        splitter = _splitter(header)
        tokenizer, adds_bos = _byte_level(header, vocabulary, splitter), splitter.adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(header, vocabulary), True
    else:
        raise ModelError(f"{header.path}: tokenizer kind {kind!r} is not supported (gpt2 and llama are)")
    tokenizer.add_tokens(vocabulary.added())
    ids = _token_ids(header, vocabulary)
    adds_bos = ids.bos is not None and header.flag("tokenizer.ggml.add_bos_token", adds_bos)
    if adds_bos and ids.bos is not None:
        bos = vocabulary.tokens[ids.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids.bos)]
        )
    template = header.text("tokenizer.chat_template", "") or None
    return GgufTokenizer(tokenizer, _settings(header, vocabulary, ids, adds_bos), template, ids)


# --- vocabulary -----------------------------------------------------------------------------------------------


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
        return [
            AddedToken(token, special=self.types[number] != TokenType.USER_DEFINED, normalized=False)
            for token, number in found.items()
        ]


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


def _token_ids(header: GgufHeader, vocabulary: _Vocabulary) -> TokenIds:
    def named(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if not header.has(key):
            return None
        number = header.integer(key)
        if not 0 <= number < len(vocabulary.tokens):
            raise header.wrong(key, number)
        return number

    control = vocabulary.ids(TokenType.CONTROL)
    found = [named("eos"), named("eot"), named("eom"), *(control.get(text) for text in _END_TEXTS)]
    ends = tuple(dict.fromkeys(number for number in found if number is not None))
    if not ends:
        raise header.wrong("tokenizer.ggml.eos_token_id", None)
    return TokenIds(bos=named("bos"), ends=ends, pad=named("padding"))


def _settings(header: GgufHeader, vocabulary: _Vocabulary, ids: TokenIds, adds_bos: bool) -> dict[str, object]:
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
        "model_max_length": header.positive(".context_length"),
    }
    return {key: value for key, value in settings.items() if value is not None}


# --- byte-level BPE -------------------------------------------------------------------------------------------


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


def _splitter(header: GgufHeader) -> _Splitter:
    name = header.text("tokenizer.ggml.pre", "gpt-2")
    if name not in _SPLITTERS:
        known = ", ".join(_SPLITTERS)
        raise ModelError(f"{header.path}: pre-tokenizer {name!r} is not supported (supported: {known})")
    return _SPLITTERS[name]


def _byte_level(header: GgufHeader, vocabulary: _Vocabulary, splitter: _Splitter) -> Tokenizer:
    """The tokenizer, without bos. Raises ModelError for a merge of tokens that are not there."""
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
    return tokenizer


# --- SentencePiece BPE ----------------------------------------------------------------------------------------


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
    prefixed = header.flag("tokenizer.ggml.add_space_prefix", True)
    begin = [normalizers.Prepend(SPACE)] if prefixed else []
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def _merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All (left, right) whose parts and whole are `pieces`, by falling score of the whole."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[number], pieces[left], pieces[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]
