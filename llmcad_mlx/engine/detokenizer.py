"""Tokens to text, piece by piece: all pieces together are what the tokenizer decodes from all tokens."""

from __future__ import annotations

import re
from typing import Any

_CONTEXT = 4  # tokens of the past that stay in the window: what a decoder may look back at
_WINDOW = 12  # tokens decoded at once, but for what waits
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
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
