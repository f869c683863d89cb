"""How answers' Markdown is read, for the terminal and for the page: what a model wrote is shown, markers aside."""

from __future__ import annotations

import re
from typing import Any

from markdown_it import MarkdownIt

_LINKS = ("http:", "https:", "mailto:")
NO_MARKER = re.compile(r"[^\s!-/:-@\[-`{-~]")
"""A character that can be no marker: of those, none may be missing from what is shown."""


class MarkdownParser(MarkdownIt):
    """CommonMark with tables and struck-out text.

    No HTML: what looks like it is text. No images, and links only to the web and to mail. No entities and no link
    definitions, which would show other characters than were written, or none.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("commonmark", {"html": False}, **options)
        self.enable(["table", "strikethrough"])
        self.disable(["entity", "reference", "html_block", "html_inline", "image"])

    def validateLink(self, url: str) -> bool:  # noqa: N802
        return url.lower().startswith(_LINKS)

    def normalizeLinkText(self, link: str) -> str:  # noqa: N802
        return link
