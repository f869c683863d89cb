"""SentencePiece BPE ("llama" tokenizers) from a GGUF file: tokens with scores instead of merges.

A piece's score is its rank, so every way to join two pieces into a third is a merge, best score first: what
transformers' `SentencePieceExtractor` does with the original model file.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

from llmcad_mlx.sources.gguf_metadata import Metadata
from llmcad_mlx.sources.gguf_vocabulary import TokenType, Vocabulary

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
