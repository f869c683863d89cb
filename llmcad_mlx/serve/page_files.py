"""The chat page: routes that serve `page/`, which is part of the package.

Files are read once and found by their exact name, so no request reaches the file system. The page needs nothing
from elsewhere, and its policy says so: a browser runs only scripts and styles from these routes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again with its tag: a newer package shows at once
}


@dataclass(frozen=True, slots=True)
class _PageFile:
    """One file: its bytes, its content type and the tag that changes with its bytes."""

    content: bytes
    media_type: str
    tag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 for a browser that has it."""
        headers = {**_HEADERS, "ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_routes() -> list[Route]:
    """Routes for `/` and for `/page/NAME`. Another NAME is an HTTPException with status 404."""
    files = _read_files()

    async def index(request: Request) -> Response:
        return files[INDEX].answer(request)

    async def page_file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "the page has no such file")
        return found.answer(request)

    return [Route("/", index), Route("/page/{name}", page_file)]


def _read_files() -> dict[str, _PageFile]:
    files = {}
    for entry in resources.files("llmcad_mlx.serve").joinpath("page").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _TYPES and entry.is_file():
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = _PageFile(content, _TYPES[suffix], tag)
    return files
