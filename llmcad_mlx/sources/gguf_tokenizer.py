"""The tokenizer inside a GGUF file as the files transformers reads: tokenizer.json, tokenizer_config.json,
chat_template.jinja, and the token ids for config.json and generation_config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_header import GgufHeader
from llmcad_mlx.sources.gguf_metadata import Metadata

# Split patterns of the models' own tokenizer.json files.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

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
    """A tokenizer and what goes with it. `settings` is tokenizer_config.json."""

    tokenizer: Tokenizer
    settings: dict[str, object]
    chat_template: str | None
    ids: TokenIds

    def save(self, folder: Path) -> None:
        """Write the files transformers loads; the template both as its own file and for older readers."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = dict(self.settings)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id with their types, checked."""

    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        """Token → id without padding entries, which only fill the matrix up."""
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != TokenType.UNUSED
        }

    def added(self) -> list[AddedToken]:
        """Tokens matched in text before it is split; control tokens vanish from decoded text."""
        return [
            AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        ]


def read_tokenizer(header: GgufHeader) -> GgufTokenizer:
    """Build the tokenizer of a file.

    Raises ModelError for a tokenizer kind or pre-tokenizer that is not known, and for damaged fields.
    """
    metadata = Metadata.of(header)
    vocabulary = _vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, vocabulary)
    else:
        raise ModelError(f"{header.path}: tokenizer kind {kind!r} is not supported")
    ids = _token_ids(metadata, vocabulary)
    if ids.bos is not None and metadata.flag("tokenizer.ggml.add_bos_token", adds_bos):
        bos = vocabulary.tokens[ids.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids.bos)]
        )
    template = metadata.text("tokenizer.chat_template", "") or None
    return GgufTokenizer(tokenizer, _settings(metadata, vocabulary, ids), template, ids)
