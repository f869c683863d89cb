"""The routes that serve the page: types, policy, tags, and nothing but the page's files."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llmcad_mlx.serve.page_files import page_routes

FOLDER = resources.files("llmcad_mlx.serve").joinpath("page")
NAMES = sorted(entry.name for entry in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = Starlette(routes=page_routes())
    app.router.redirect_slashes = False
    return TestClient(app)


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_served_with_its_type_and_the_policy(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.text == read(name)
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == kinds[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-cache"


def test_the_page_is_at_the_root(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.text == read("index.html")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert client.head("/").status_code == 200
    assert client.post("/").status_code == 405


def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient) -> None:
    tag = client.get("/page/app.js").headers["etag"]
    again = client.get("/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/style.css", headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/", "/page/nothing.js", "/page/../page_files.py", "/page/%2e%2e/page_files.py",
        "/page/..%2fpage_files.py", "/page/%2e%2e%2fpage_files.py", "/page/%2e%2e", "/page/.",
        "/page/%2fetc%2fpasswd", "/page/..%5cpage_files.py",
        "/page/app.js%00", "/page/app.js/", "/page/APP.JS", "/page//app.js",
    ],
)  # fmt: skip
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_names_only_files_that_are_there_and_nothing_inline() -> None:
    index = read("index.html")
    named = re.findall(r'(?:src|href)="([^"]*)"', index)
    assert len(named) >= 4
    assert [name for name in named if name.removeprefix("page/") not in NAMES] == []
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", index)
    for name in NAMES:
        for module in re.findall(r'from "\./([^"]+)"', read(name)):
            assert module in NAMES, f"{name} imports {module}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", read(name)), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", read(name)), name
