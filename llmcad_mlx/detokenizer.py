"""Tokens to text, piece by piece: all pieces together are what the tokenizer decodes from all tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import count
from typing import Any

from tokenizers import Regex, decoders
from tokenizers.pre_tokenizers import ByteLevel

_CONTEXT = 4  # tokens of the past that stay in the window: what a decoder may look back at
_WINDOW = 12  # tokens decoded at once, but for what waits
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_CLEANED = 8  # characters from a blank to where cleaning up decides about it: " n ' t"


def cleans_up(tokenizer: Any) -> bool:
    """Whether the tokenizer takes away blanks before punctuation."""
    return " ," not in tokenizer.decode(tokenizer.encode("a ,b", add_special_tokens=False))


class Detokenizer:
    """The text of one sequence of tokens. What a later token could still change waits.

    Decoders look around: the first token of a text may lose its blank, a character may take several tokens, a run
    of byte tokens is valid as a whole or not at all, and cleaning up takes away blanks before punctuation. So the
    last tokens are decoded again with each new one.
    """

    def __init__(self, tokenizer: Any, cleans_up: bool) -> None:
        """`tokenizer`: of transformers, or mlx-lm's TokenizerWrapper of one; cleans_up: see `cleans_up`."""
        self._tokenizer = tokenizer
        self._cleans_up = cleans_up
        self._window: list[int] = []
        self._told = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """Take the next token; the text that is certain now."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = max(self._certain(text), self._told)
        piece, self._told = text[self._told : certain], certain
        if len(self._window) > _WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What waited, at the end."""
        text = self._decode(self._window)
        piece, self._told = text[self._told :], len(text)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def _certain(self, text: str) -> int:
        """How many characters of the window's text no later token changes."""
        whole = len(self._window)
        while whole and _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._window[whole - 1]) or ""):
            whole -= 1
        if whole < len(self._window):
            text = self._decode(self._window[:whole])
        length = len(text.rstrip("\ufffd"))
        blank = text.find(" ", max(length - _CLEANED, 0), length) if self._cleans_up else -1
        return length if blank < 0 else blank

    def _shorten(self, text: str) -> None:
        """Forget the oldest tokens if the others alone have the same text, and all that waits is theirs."""
        kept = self._window[-_CONTEXT:]
        rest, waiting = self._decode(kept), len(text) - self._told
        if text.endswith(rest) and waiting <= len(rest) and not rest.startswith("\ufffd"):
            self._window, self._told = kept, len(rest) - waiting


# --- tokens one by one ------------------------------------------------------------------------------------------


class TokenTexts:
    """What single tokens stand for, whatever comes before them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_level = writes_byte_glyphs(tokenizer)
        self._added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self.text = cache(self._text)

    def _text(self, token: int) -> str:
        """Its text with the blanks that it loses where it comes first; U+FFFD for a part of a character."""
        decode = self._tokenizer.decode
        return str(decode([token, token])).removeprefix(decode([token]))

    def bytes_of(self, token: int) -> bytes:
        """Its bytes, those of a part of a character too."""
        written = self._tokenizer.convert_ids_to_tokens(token) or ""
        if found := _BYTE.fullmatch(written):
            return bytes([int(found[1], 16)])
        if self._byte_level and token not in self._added:
            return bytes(_glyphs().index(glyph) for glyph in written if glyph in _glyphs())
        return self.text(token).encode()


def writes_byte_glyphs(tokenizer: Any) -> bool:
    """Whether tokens are written in GPT-2's glyphs, one for each byte."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(_LETTER, add_special_tokens=False))
    return "".join(map(str, tokens)).endswith(_LETTER_IN_GLYPHS)


def repair_decoder(tokenizer: Any) -> None:
    """Let a fast tokenizer that writes byte glyphs read them, and added tokens as they are.

    Some published ones (Mistral's "tekken", converted) have the decoder of SentencePiece, which leaves Ġ for a
    blank and Ċ for the end of a line. And the decoder takes the letters of an added token for glyphs where it can:
    "đem" would be a control character and "em" (tokenizers 1392).
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or not writes_byte_glyphs(tokenizer):
        return
    letter = tokenizer.decode(tokenizer.encode(_LETTER, add_special_tokens=False))
    misread = _LETTER_IN_GLYPHS in letter
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isascii()}
    steps = [
        decoders.Replace(Regex(f"^{re.escape(text)}$"), "".join(_glyphs()[byte] for byte in text.encode()))
        for text in sorted(added)
        if set(text) <= set(_glyphs())
    ]
    if steps or misread:
        fast.decoder = decoders.Sequence([*steps, decoders.ByteLevel() if misread else fast.decoder])


_LETTER, _LETTER_IN_GLYPHS = "\u00e9", "\u00c3\u00a9"


@cache
def _glyphs() -> tuple[str, ...]:
    """GPT-2's glyph of each byte: Latin-1 where that can be printed, for the others what comes from U+0100 on."""
    known, others = set(ByteLevel.alphabet()), count(256)
    return tuple(chr(byte) if chr(byte) in known else chr(next(others)) for byte in range(256))
