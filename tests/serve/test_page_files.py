"""What the server does for the page: its files, and answers' Markdown as HTML."""

from __future__ import annotations

import re
from html import unescape
from importlib import resources
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pygments.lexers import get_all_lexers
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.page import Markdown, page_routes

FOLDER = resources.files("llmcad_mlx.serve").joinpath("page")
NAMES = sorted(entry.name for entry in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = Starlette(routes=page_routes(ServerSettings()))
    app.router.redirect_slashes = False
    return TestClient(app)


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("path", "name"), [("/", "index.html"), *((f"/page/{name}", name) for name in NAMES)])
def test_every_file_is_served_with_its_type_and_the_policy(client: TestClient, path: str, name: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.text == read(name)
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == kinds[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-cache"
    assert [client.head(path).status_code, client.post(path).status_code] == [200, 405]


def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient) -> None:
    tag = client.get("/page/app.js").headers["etag"]
    again = client.get("/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/style.css", headers={"If-None-Match": tag}).status_code == 200


def test_the_page_names_only_files_that_are_there_and_nothing_inline() -> None:
    index = read("index.html")
    named = re.findall(r'(?:src|href)="([^"]*)"', index)
    assert len(named) >= 4
    assert [name for name in named if name.removeprefix("page/") not in NAMES] == []
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", index)
    for name in NAMES:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", read(name)), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", read(name)), name


def shown(html: str) -> str:
    """The text of HTML."""
    return unescape(re.sub("<br />|<[^>]*>", "", html))


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A *b*\n##### c", "<h3>A <em>b</em></h3><h6>c</h6>"),
        ("**b** _i_ ~~s~~ `c *x*` \\*x", "<p><strong>b</strong> <em>i</em> <s>s</s> <code>c *x*</code> *x</p>"),
        ("- a\n- b\n  - c\n\nd", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>"),
        ("3. a\n4. b\n\n   more", '<ol start="3"><li><p>a</p></li><li><p>b</p><p>more</p></li></ol>'),
        ("~~~x <b>\nopen <b>", '<pre tabindex="0" data-language="x &lt;b&gt;"><code>open &lt;b&gt;</code></pre>'),
        ("```py\nx = 1\n```", '<pre tabindex="0" data-language="py"><code><span class="n">x</span> '
         '<span class="o">=</span> <span class="mi">1</span></code></pre>'),
        ("> a\n\n---", "<blockquote><p>a</p></blockquote><hr />"),
        ("| a |\n|--:|\n| b |", '<table><thead><tr><th class="right">a</th></tr></thead><tbody><tr>'
         '<td class="right">b</td></tr></tbody></table>'),
        ("| a |\n|--:|\n| b | lost", "<p>| a |\n|--:|\n| b | lost</p>"),
        ("<b>no</b> & &amp; <!-- x -->", "<p>&lt;b&gt;no&lt;/b&gt; &amp; &amp;amp; &lt;!-- x --&gt;</p>"),
        ("[a]: http://b", "<p>[a]: http://b</p>"),
        ("[a](javascript:b) [c](data:d) [e](//f) [g](h)", "<p>[a](javascript:b) [c](data:d) [e](//f) [g](h)</p>"),
        ("![a](MAILTO:b@c)", '<p>!<a href="MAILTO:b@c" target="_blank" rel="noopener noreferrer">a</a></p>'),
        ("<https://a/%20>", '<p><a href="https://a/%20" target="_blank" rel="noopener noreferrer">'
         "https://a/%20</a></p>"),
    ],
)  # fmt: skip
def test_markdown(source: str, html: str) -> None:
    blocks = Markdown().blocks(source)
    assert "".join(block.html for block in blocks) == html
    assert "".join(block.source for block in blocks) == source


@given(st.text(st.sampled_from("abé1 \n\t\r*_`~#>-+|:.[]()!<&;\\'\"=/"), max_size=60))
def test_nothing_that_was_written_is_lost(text: str) -> None:
    for block in Markdown().blocks(text):
        parts = shown(block.html) + "".join(
            re.findall(r'(?:href|title|data-language|start)="([^"]*)"', block.html)
        )
        for letter in "abé":
            assert parts.count(letter) + parts.count(quote(letter)) >= block.source.count(letter)


@settings(deadline=None)  # a lexer's module is imported at its first use
@given(
    st.text(st.sampled_from("ab'\"#=(){}<>/*\n\t \\%$@:;-"), max_size=60), st.sampled_from(list(get_all_lexers()))
)
def test_code_keeps_every_character(code: str, lexer: tuple[str, tuple[str, ...], object, object]) -> None:
    (block,) = Markdown().blocks(f"~~~~~~{(lexer[1] or ('none',))[0]}\n{code}\n~~~~~~")
    assert shown(block.html) == code


@pytest.mark.parametrize("source", ["*a " * 5_000, "`a" * 10_000, "> " * 5_000, "- " * 5_000, "**_`" * 5_000,
                                    "[" * 20_000, "[a](" * 5_000, "a|" * 5_000 + "\n" + "-|" * 5_000])  # fmt: skip
def test_long_and_deep_text_comes_to_an_end(source: str) -> None:
    assert "".join(block.source for block in Markdown().blocks(source)) == source


def test_lengths_are_those_of_javascript(client: TestClient) -> None:
    answer = client.post("/markdown", json={"text": "👍\n\nb"})
    assert answer.json() == {"blocks": [{"length": 4, "html": "<p>👍</p>"}, {"length": 1, "html": "<p>b</p>"}]}
