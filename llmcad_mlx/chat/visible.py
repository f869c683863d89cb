"""Text of a model as it may go to a terminal."""

from __future__ import annotations

_KEPT = "\n\t"
# C0, DEL and C1: with them a text could move the cursor, change colours or answer in the user's place.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in _KEPT}


def visible(text: str) -> str:
    """`text` without control characters, line ends and tabs left in."""
    return text.translate(_CONTROLS)
