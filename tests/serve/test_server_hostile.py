"""What nobody should send: the right refusal, no path or traceback in it, and the server lives."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel

from llmcad_mlx.serve.protocol import ChatRequest, CompletionRequest, Message
from tests.support.serving import CHAT as MESSAGES
from tests.support.serving import Live, loader, serving

BODY_LIMIT = 100_000
JSON = {"Content-Type": "application/json"}

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    limits: dict[str, Any] = {"max_body_bytes": BODY_LIMIT, "max_tokens": 8, "body_s": 0.4, "header_s": 0.4}
    with serving(loader(folder, "ngram"), **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def _it_lives(live: Live) -> Iterator[None]:
    yield
    assert live.get("/health").status_code == 200
    assert live.chat(max_tokens=2).status_code == 200


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message of a refusal in OpenAI's form, which tells nothing of the inside."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for secret in ("Traceback", ".py", str(Path.home()), "/tmp", "llmcad_mlx/"):
        assert secret not in response.text
    return str(error["message"])


def send(live: Live, body: bytes | Iterator[bytes], headers: Mapping[str, str] = JSON) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", content=body, headers=headers, timeout=30)


def said(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


INFINITE = b'{"messages": [{"role": "user", "content": ""}], "temperature": 1e999}'
TOO_DEEP = b'{"messages":' + b"[" * 150 + b"]" * 150 + b"}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
NAMED = {"type": "function", "function": {"name": "f"}}
BROKEN_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON: EOF while parsing an object at line 1 column 1"),
        (b"null", "the body: must be a valid object, not null"),
        (b"[]", "the body: must be a valid object, not a list"),
        (b'{"temperature": NaN}', "the body is not valid JSON"),
        (INFINITE, "temperature: must be a finite number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
        (b"\xff\xfe{}", "the body is not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not valid JSON"),
        (b'{"\\uDC00": 1}', "the body is not valid JSON"),
        (b"[" * 50_000, "the body is not valid JSON: recursion limit exceeded"),
        (TOO_DEEP, "messages[0]: must be a valid object, not a list"),
        (b"{}", "messages: is missing"),
        ({"messages": []}, "messages: must have at least 1 item, not 0"),
        ({"messages": [{"content": "x"}]}, "messages[0].role: is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: must be 'system', "),
        (
            {"messages": said([IMAGE])},
            "messages[0].content[0].type: must be 'text', not \"image_url\": text only; im",
        ),
        (
            {"messages": said([{"type": "input_audio"}])},
            "messages[0].content[0].type: must be 'text', not \"input_a",
        ),
        (
            {"messages": said([{"type": "text", "text": None}])},
            "messages[0].content[0].text: must be a valid string",
        ),
        (
            {"messages": [{**MESSAGES[0], "images": ["x"]}]},
            "messages[0].images: is not a field this server knows; im",
        ),
        ({"messages": [{**MESSAGES[0], "function_call": {}}]}, "messages[0].function_call: is not a field this"),
        ({"messages": said("x" * 90_000)}, "the prompt has "),
        ({"messages": [BROKEN_CALL]}, "messages[0].tool_calls[0].function.arguments: is not valid JSON"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type: "),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        ({"top_p": -0.1}, "top_p: must be greater than or equal to 0, not -0.1"),
        ({"max_tokens": 0}, "max_tokens: must be greater than or equal to 1, not 0"),
        ({"max_tokens": -2}, "max_tokens: must be greater than or equal to -1, not -2"),
        ({"max_tokens": 8.5}, "max_tokens: must be a valid integer, not 8.5"),
        ({"n": True}, "n: must be 1, not true"),
        ({"seed": 2**64}, "seed: must be less than or equal to 184467440737095"),
        ({"seed": -(2**63) - 1}, "seed: must be greater than or equal to -9223372036854775808"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens: differs from max_tokens"),
        ({"temperature": 1e-9}, "temperature: 1e-09 is too small; use 0 for greedy decoding"),
        ({"policy": "plain", "tree_nodes": 4}, "tree_nodes: the plain policy has no tree"),
        ({"tool_choice": "required"}, "tool_choice: names none of the tools; give it in tools, or leave it out"),
        ({"tool_choice": NAMED}, "tool_choice: names none of the tools"),
        ({"tool_choice": "any"}, "tool_choice: must be 'auto', 'none' or 'required', not \"any\""),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type: must be 'function', not "),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function: is missing"),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0].type: must be 'function', not \"web_search\": only functions",
        ),
        (
            {"messages": [{"role": "function", "name": "f", "content": "x"}]},
            "messages[0].role: must be 'system', 'developer', 'user', 'assistant' or 'tool', not \"function\"",
        ),
        ({"modalities": ["text", "audio"]}, "modalities[1]: must be 'text', not \"audio\": only text is written"),
        (
            {"audio": {"voice": "a", "format": "mp3"}},
            "audio: is not a field this server knows; only text is written",
        ),
        (
            {"web_search_options": {}},
            "web_search_options: is not a field this server knows; the web is not searched",
        ),
        ({"reasoning": {"effort": "low"}}, "reasoning: is not a field this server knows; use reasoning_effort"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format.type: must be 'text', not \"json_object\": a",
        ),
        ({"n": 2}, "n: must be 1, not 2: one answer is made; send the request again for another"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize: is not a variable of the"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools: is not a variable of the"),
        ({"num_ctx": 8192}, "num_ctx: is not a field this server knows; the context is the server's: serve --con"),
        ({"mirostat": 2}, "mirostat: is not a field this server knows; see /openapi.json"),
        ({"repeat_penalty": 1.1}, "repeat_penalty: is not a field this server knows; use repetition_penalty"),
        ({"functions": []}, "functions: is not a field this server knows; use tools"),
        ({"stop": ["a", 5]}, "stop[1]: must be a valid string, not 5"),
        ({"stop": "x" * 1001}, "stop: must have at most 1000 characters"),
        ({"stop": ["x"] * 17}, "stop: must have at most 16 items, not 17"),
        ({"stop": {}}, "stop: must be a valid string or a valid list, not an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: must match pattern '^[0-9]{1,9}$'"),
        ({"logit_bias": {"5": "1"}}, 'logit_bias.5: must be a valid number, not "1"'),
        ({"speculation": {"x": 1}}, "speculation.x: is not a field"),
        ({"best_of_luck": 1}, "best_of_luck: is not a field this server knows"),
        ({"x" * 500: 1}, f"{'x' * 40}…: is not a field"),
        ({str(key): 1 for key in range(5000)}, "the body: an object may have 4096 keys at most"),
    ],
)
def test_what_a_request_is_refused_for(live: Live, body: bytes | dict[str, Any], message: str) -> None:
    answer = send(live, body if isinstance(body, bytes) else json.dumps({"messages": MESSAGES, **body}).encode())
    assert refused(answer).startswith(message)
    field, colon, _ = message.partition(": ")
    if colon and not message.startswith("the body"):
        assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["a", "b"]}, "prompt: one text per request; send each in a request of its own"),
        ({"prompt": [[5], [6]]}, "prompt: one text per request"),
        ({"prompt": []}, "prompt: must have at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]: must have at least 1 item"),
        ({"prompt": ""}, "prompt: must have at least 1 character"),
        ({"prompt": [""]}, "prompt[0]: must have at least 1 character"),
        ({"prompt": [5, "a"]}, 'prompt[1]: must be a valid integer, not "a"'),
        ({"prompt": [5.5]}, "prompt[0]: must be a valid integer"),
        ({"suffix": "x"}, "suffix: must be '', not \"x\": nothing is filled in between two texts"),
        (
            {"echo": True},
            "echo: must be false, not true: the prompt is not repeated; put it before the answer, or",
        ),
        ({"best_of": 2}, "best_of: must be 1, not 2: one answer is made; send the request again for another"),
    ],
)
def test_what_a_completion_is_refused_for(live: Live, body: dict[str, Any], message: str) -> None:
    assert refused(live.complete(**body)).startswith(message)


def test_the_pages_markdown_is_read_as_strictly(live: Live) -> None:
    assert refused(live.post("/markdown", text=5)) == "text: must be a valid string, not 5"
    assert refused(live.post("/markdown", text="x" * BODY_LIMIT), 413).startswith("the body may have ")
    assert refused(httpx.post(f"{live.url}/markdown", content=b"text=a"), 415).startswith("send the request with ")


def test_whole_surrogate_pairs_are_characters(live: Live) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 2}'
    assert send(live, body).status_code == 200


def test_deep_tools_are_no_danger(live: Live) -> None:
    deep: Any = {}
    for _ in range(150):
        deep = {"properties": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert refused(live.chat(tools=[tool])).startswith("tools: ")


def refused_values(model: type[BaseModel], name: str) -> list[Any]:
    """A value of every JSON type that a field does not take, by the schema that /openapi.json shows."""
    field = model.model_json_schema()["properties"][name]
    forms = [form if "$ref" not in form else {"type": "object"} for form in field.get("anyOf", [field])]
    taken = {form["type"] for form in forms}
    examples = {"object": {"a": 1}, "array": [{}], "string": "text", "boolean": True, "number": 1.5}
    return [value for kind, value in examples.items() if kind not in taken]


MODELS: list[type[BaseModel]] = [ChatRequest, CompletionRequest, Message]
FIELDS = [(model, name) for model in MODELS for name in sorted(model.model_fields)]


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_types_of_a_field(live: Live, model: type[BaseModel], name: str) -> None:
    wrong = refused_values(model, name)
    assert wrong
    for value in wrong:
        if model is Message:
            answer = live.chat(messages=[{**MESSAGES[0], name: value}])
            assert refused(answer).startswith(f"messages[0].{name}")
        else:
            answer = (live.chat if model is ChatRequest else live.complete)(**{name: value})
            assert refused(answer).startswith(f"{name}: must be")


def test_huge_bodies(live: Live) -> None:
    big = json.dumps({"messages": MESSAGES, "user": "x" * BODY_LIMIT}).encode()
    assert refused(send(live, big), 413) == f"the body may have {BODY_LIMIT} bytes at most"

    chunked = (b" " * 4096 for _ in range(100))
    assert refused(send(live, chunked), 413) == f"the body may have {BODY_LIMIT} bytes at most"
    announced = raw(live, HOST, f"Content-Length: {10**15}", "Content-Type: application/json")
    assert announced.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_taken(live: Live, kind: str) -> None:
    """What a foreign web page could send without asking first."""
    response = send(live, json.dumps({"messages": MESSAGES}).encode(), {"Content-Type": kind} if kind else {})
    assert refused(response, 415) == "send the request with Content-Type: application/json"


def raw(live: Live, *headers: str, line: str = "POST /v1/chat/completions HTTP/1.1", body: bytes = b"") -> bytes:
    """Send a request byte by byte as given; all that comes back until the server closes or is silent."""
    head = "\r\n".join([line, *headers, "", ""]).encode("latin-1")
    return talk(live, head + body)


def connected(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def talk(live: Live, data: bytes) -> bytes:
    received = b""
    with connected(live) as connection:
        connection.sendall(data)
        connection.settimeout(2)
        with suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    return received


HOST = "Host: localhost"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Host: localhost", "Host: evil.example"],
        [HOST, "Content-Length: -5"],
        [HOST, "Content-Length: five"],
        [HOST, "Content-Length: 5", "Content-Length: 6"],
        [HOST, "Transfer-Encoding: gzip, chunked"],
        [HOST, "Content Type: x"],
        [HOST, "X: \x00"],
        [HOST, f"X: {'y' * 100_000}"],
        [HOST, *(f"X{number}: {'y' * 100}" for number in range(1000))],
    ],
)
def test_header_tricks(live: Live, headers: list[str]) -> None:
    answer = raw(live, *headers, "Connection: close")
    status = int(answer.split()[1])
    assert 400 <= status < 500 or status == 501
    assert b"Traceback" not in answer


@pytest.mark.parametrize("line", ["GARBAGE", "GET /\x01 HTTP/1.1", "\x16\x03\x01\x02", "GET"])
def test_what_is_no_http(live: Live, line: str) -> None:
    assert raw(live, HOST, line=line).startswith(b"HTTP/1.1 400 ")


FOREIGN = (
    "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil", "[", "host.docker.internal:80",
    "evillocalhost", "192.168.0.5", "0.0.0.0.evil",
)  # fmt: skip
OWN = (
    "localhost", "127.0.0.1:1234", "127.0.0.2", "[::1]:80", "LOCALHOST", "localhost.:80", "a.localhost",
    "0.0.0.0:80", "[::]", "[::ffff:127.0.0.1]",
)  # fmt: skip


@pytest.mark.parametrize("host", [*FOREIGN, *OWN])
def test_other_names_for_this_machine(live: Live, host: str) -> None:
    """A name that somebody's DNS points here must not make their web page one of ours."""
    answer = raw(live, f"Host: {host}", "Connection: close", line="GET /v1/models HTTP/1.1")
    assert int(answer.split()[1]) == (400 if host in FOREIGN else 200)
    assert (b"--api-key" in answer) == (host in FOREIGN)


@pytest.mark.parametrize(
    "path",
    [
        "/page/", "/page/nothing.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/%2e",
        "/page/%2fetc%2fpasswd", "/page/..%5capp.py", "/page/%00", "/page/app.js%00", "/page/app.js/",
        "/page/APP.JS", "/page//app.js", "/page/" + "x" * 5000, "/../../etc/passwd", "//", "/%ff",
    ],
)  # fmt: skip
def test_paths_lead_nowhere(live: Live, path: str) -> None:
    answer = raw(live, HOST, "Connection: close", line=f"GET {path} HTTP/1.1")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer


def test_a_slow_body_is_given_up(live: Live) -> None:
    answer = raw(live, HOST, "Content-Type: application/json", "Content-Length: 50", body=b'{"messages"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"slow_body"' in answer


@pytest.mark.parametrize("start", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_a_slow_head_is_given_up(live: Live, start: bytes) -> None:
    assert talk(live, start).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_ends_early(live: Live) -> None:
    with connected(live) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    # What the server says to it nobody hears; that it lives is seen to after the test.


def test_many_requests_on_one_connection(live: Live) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert talk(live, one * 50 + last).count(b"HTTP/1.1 200 ") == 51


def test_the_documents_own_fuzzing_finds_no_server_error(live: Live) -> None:
    """schemathesis makes up requests, right and wrong ones, from what the server says it accepts."""
    document = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    statuses: Counter[int] = Counter()
    for result in document.get_all_operations():
        operation = result.ok()
        has_body = operation.method.upper() == "POST"
        modes = list(schemathesis.GenerationMode) if has_body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def fuzz(case: Any) -> None:
                if isinstance(case.body, dict):
                    case.body.pop("model", None)  # a made-up name is a 404, and nothing more is looked at
                response = case.call()
                statuses[response.status_code] += 1
                assert response.status_code < 500, response.text

            fuzz()
    assert statuses[200] >= 10
    assert statuses[400] >= 30
