"""The chat page: its files, which are part of the package, and its answers' Markdown as HTML.

Files are read once and found by their exact name, so no request reaches the file system. The page needs nothing
from elsewhere, and its policy says so: a browser runs only scripts and styles from these routes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from itertools import pairwise
from typing import Any

from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from pydantic import BaseModel
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmcad_mlx.markdown import NO_MARKER, MarkdownParser
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.limits import read_body
from llmcad_mlx.serve.protocol import read_record

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again with its tag: a newer package shows at once
}
_MOST_COLOURED = 100_000  # characters of code; Pygments' lexers are slower than the rest


class MarkdownText(BaseModel):
    """What the page asks to be rendered."""

    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """One paragraph, list, code block… as HTML with one element around it, and the source it is made from."""

    source: str
    html: str


class _Renderer(RendererHTML):
    """HTML without line breaks of its own: the text of a document is the source's, markers left out."""

    def renderToken(  # noqa: N802
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        return super().renderToken(tokens, idx, options, env).strip("\n")

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        info = tokens[idx].info.strip()
        label = f' data-language="{escapeHtml(info)}"' if info else ""
        code = _coloured(tokens[idx].content, info.partition(" ")[0]).removesuffix("\n")
        return f'<pre tabindex="0"{label}><code>{code}</code></pre>'  # a tab stop, for it scrolls sideways

    code_block = fence


class Markdown(MarkdownParser):
    """Answers as HTML, of which everything is shown that is not a marker."""

    def __init__(self) -> None:
        super().__init__(renderer_cls=_Renderer)

    def blocks(self, text: str) -> list[Block]:
        """The document's outermost elements in order; their sources together are the text."""
        groups = [*_groups(self.parse(text))]
        lines = [0, *(newline.end() for newline in re.finditer(r"\r\n?|\n", text))]
        begins = [lines[group[0].map[0]] if group[0].map else 0 for group in groups]
        begins[:1] = [0] * len(begins[:1])  # blank lines at the beginning go with the first
        sources = [text[begin:end] for begin, end in pairwise([*begins, len(text)])]
        return [Block(source, self._html(source, group)) for source, group in zip(sources, groups, strict=True)]

    def _html(self, source: str, group: Sequence[Token]) -> str:
        # Cells beyond a table's last column are dropped: then the source is shown as it is.
        if len(NO_MARKER.findall(source)) != sum(len(NO_MARKER.findall(t.content + t.info)) for t in group):
            return f"<p>{escapeHtml(source.strip())}</p>"
        return str(self.renderer.render(group, self.options, {}))


def _groups(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each outermost element, as they are to be rendered."""
    group: list[Token] = []
    for token in tokens:
        _adapt(token)
        group.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield group
            group = []


def _adapt(token: Token) -> None:
    """Headings go below the page's own, links open elsewhere, columns are aligned by class, not by style."""
    if token.type.startswith("heading_"):
        token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    elif token.type == "link_open":
        token.attrs |= {"target": "_blank", "rel": "noopener noreferrer"}
    elif style := token.attrs.pop("style", None):
        token.attrs["class"] = str(style).removeprefix("text-align:")
    for inner in token.children or ():
        _adapt(inner)


def _coloured(code: str, language: str) -> str:
    """Code of whole lines as HTML, with Pygments' classes where it knows the language."""
    try:
        if not language or len(code) > _MOST_COLOURED:
            raise ClassNotFound
        tokens = [*get_lexer_by_name(language, stripnl=False, ensurenl=False).get_tokens(code)]
    except ClassNotFound:
        return escapeHtml(code)
    if "".join(text for _, text in tokens) != code:  # some lexers tidy up what they read
        return escapeHtml(code)
    html = StringIO()
    HtmlFormatter(nowrap=True).format(tokens, html)
    return html.getvalue()


def page_routes(settings: ServerSettings) -> list[Route]:
    """Routes for `/`, for `/page/NAME`, and for `/markdown`, which takes {"text"} and gives {"blocks"}.

    A block is {"length", "html"}: how much of the text it is made from, in JavaScript's units, and its HTML.
    Another NAME than a file's is an HTTPException with status 404; a wrong body of `/markdown` an ApiError.
    """
    files = _read_files()
    markdown = Markdown()

    async def page_file(request: Request) -> Response:
        found = files.get(request.path_params.get("name", "index.html"))
        if found is None:
            raise HTTPException(404, "the page has no such file")
        tag = found.headers["ETag"]
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**_HEADERS, "ETag": tag})
        return found

    async def render(request: Request) -> Response:
        text = read_record(MarkdownText, await read_body(request, settings)).text
        blocks = await run_in_threadpool(markdown.blocks, text)
        told = [{"length": len(one.source.encode("utf-16-le")) // 2, "html": one.html} for one in blocks]
        return JSONResponse({"blocks": told})

    return [Route("/", page_file), Route("/page/{name}", page_file), Route("/markdown", render, methods=["POST"])]


def _read_files() -> dict[str, Response]:
    """The answer for each file, with a tag that changes with its bytes."""
    files = {}
    for entry in resources.files("llmcad_mlx.serve").joinpath("page").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _TYPES and entry.is_file():
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = Response(content, headers={**_HEADERS, "ETag": tag}, media_type=_TYPES[suffix])
    return files
