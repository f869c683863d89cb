"""The tokens of a GGUF file with their types, checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken

from llmcad_mlx.sources.gguf_metadata import Metadata


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
