"""An engine on another machine: what it shares with a local one, what the network does to it, and without MLX."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from llmcad_mlx import (
    ContextLengthError,
    Engine,
    GenerationStats,
    RemoteError,
    Result,
    UsageError,
    load,
)
from tests.support.scripted_server import CARD, DONE, ScriptedServer, Step, chunk, event, refusal
from tests.support.serving import Live, loader, serving
from tests.support.tiny_folder import make_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "then the other one ran in and then the other one"
CHAT = [{"role": "user", "content": "tell me of the cat"}]
KEY = "a-key-of-some-length"
USAGE = event({"choices": [], "usage": {
    "prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4},
    "speculation": {
        "target_passes": 2, "drafted": 9, "tested": 6, "accepted": 1, "acceptance_rate": 0.25,
        "streamed_bytes": 10, "prompt_s": 0.5, "decode_s": 2.0, "draft_s": 0.25, "verify_s": 1.0, "io_wait_s": 0.5,
    },
}})  # fmt: skip
ANSWER: list[Step] = [
    chunk([("a", False), ("b", True)]), chunk([("", False)], finish_reason="stop"), USAGE, DONE
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def the_server() -> Iterator[ScriptedServer]:
    with ScriptedServer().running() as scripted:
        yield scripted


@pytest.fixture
def server(the_server: ScriptedServer) -> ScriptedServer:
    """A server that gives ANSWER, again and again."""
    fresh = ScriptedServer([ANSWER], url=the_server.url)
    vars(the_server).update(vars(fresh))
    return the_server


# What stands in between

SOCKS = "socks5://127.0.0.1:9"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"), ("ALL_PROXY", "http://127.0.0.1:9"), ("ALL_PROXY", SOCKS),
        ("HTTP_PROXY", "odd://x"), ("NO_PROXY", "[::1]"), ("SSL_CERT_FILE", "/nowhere"),
    ],
)  # fmt: skip
def test_nothing_stands_between_a_machine_and_itself(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "LOCALHOST", "0.0.0.0"):
        server.scripts = [ANSWER]
        with load(server.url.replace("127.0.0.1", host)) as engine:
            assert engine.generate(TEXT).text == "ab"


@pytest.mark.parametrize(
    ("name", "value", "error", "line"),
    [
        ("HTTP_PROXY", "http://me:secret@127.0.0.1:9", RemoteError,
         r"no connection \(.*\) through the proxy http://127\.0\.0\.1:9 \(NO_PROXY=mac\.test goes .*\); is"),
        ("HTTP_PROXY", "{server}", RemoteError,
         r"no llmcad-mlx server answers there through the proxy {server} \(NO_PROXY=mac\.test goes .*\); check"),
        ("ALL_PROXY", SOCKS, UsageError, r"cannot be reached with the proxy .*socksio.*unset ALL_PROXY"),
        ("HTTP_PROXY", "odd://x", UsageError, r"cannot be reached with the proxy .*scheme.*unset ALL_PROXY"),
        ("SSL_CERT_FILE", "/nowhere", UsageError, "cannot be reached with the .* certificates .*No such file"),
    ],
)  # fmt: skip
def test_a_proxy_that_does_not_serve_is_named(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str, error: type, line: str
) -> None:
    server.models = Response("<html>no such host</html>", 502)
    monkeypatch.setenv(name, value.format(server=server.url))
    with pytest.raises(error, match=rf"\Ahttp://mac\.test:8080: {line.format(server=server.url)}") as caught:
        load("http://mac.test:8080")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


# What is sent and what is made of the answer


def test_what_is_asked_for(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_MLX_API_KEY", "from-the-environment")
    load(server.url).close()
    with load(server.url, api_key="abcdefgh") as engine:
        engine.generate(TEXT)
        engine.generate(
            CHAT, max_tokens=9, stop="x", temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=8, policy="chain",
            tree_nodes=3, logit_bias={4: 1.5}, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3,
        )  # fmt: skip
        engine.generate([3, 4], max_tokens=-1, stop=["x", "y"])
    always = {
        "model": "tiny", "stream": True, "stream_options": {"include_usage": True},
        "speculation": {"tokens": True}, "temperature": 0.0,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 0.0, "seed": 0,
    }  # fmt: skip
    paths = ("models", "completions", "chat/completions", "completions")
    assert server.seen == [
        ("/v1/models", "Bearer from-the-environment"), *((f"/v1/{path}", "Bearer abcdefgh") for path in paths)
    ]  # fmt: skip
    assert server.requests == [
        {**always, "prompt": TEXT, "max_tokens": 256},
        always | {
            "messages": CHAT, "max_tokens": 9, "stop": ["x"], "temperature": 0.5, "top_p": 0.9, "top_k": 4,
            "min_p": 0.1, "seed": 8, "policy": "chain", "tree_nodes": 3, "logit_bias": {"4": 1.5},
            "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        },
        {**always, "prompt": [3, 4], "stop": ["x", "y"]},
    ]  # fmt: skip


def test_responses_and_figures(server: ScriptedServer) -> None:
    without_token = [chunk([("a", False)]), chunk(finish_reason="length"), USAGE, DONE]
    server.scripts = [[b": waiting\n\n", *ANSWER], without_token, ANSWER]
    with load(server.url) as engine:
        assert (engine.model, engine.context_length) == (CARD["id"], CARD["context_length"])
        found = list(engine.stream_generate(TEXT))
        ended = list(engine.stream_generate(TEXT))
        result = engine.generate(TEXT)
    assert [(r.text, r.finish_reason) for r in ended] == [("a", "length")]
    assert [(r.text, r.token, r.from_draft, r.finish_reason) for r in found] == [
        ("a", 5, False, None), ("b", 6, True, None), ("", 5, False, "stop"),
    ]  # fmt: skip
    assert (result.text, result.tokens, result.finish_reason) == ("ab", [5, 6, 5], "stop")
    assert result.stats == found[-1].stats == GenerationStats(
        prompt_tokens=7, reused_tokens=4, generated_tokens=3, target_passes=2, drafted=9, tested=6, accepted=1,
        path_tested=4, streamed_bytes=10, prompt_s=0.5, decode_s=2.0, draft_s=0.25, verify_s=1.0, io_wait_s=0.5,
    )  # fmt: skip
    assert result.stats.tokens_per_s == 1.5
    assert result.stats.acceptance_rate == 0.25


# What goes wrong


NOBODY = "http://127.0.0.1:9"
STRANGER = "URL: no llmcad-mlx server answers there; check address and port"
WENT_AWAY = "URL: the server went away after 1 tokens; start it again and repeat"


@pytest.mark.parametrize(
    ("script", "error", "line"),
    [
        (refusal(400, "top_p: must be above 0"), UsageError, "top_p: must be above 0"),
        (refusal(400, "the prompt is long", "context_length_exceeded"), ContextLengthError, "the prompt is long"),
        (refusal(413, "the body is too large"), UsageError, "the body is too large"),
        (refusal(429, "queue", **{"Retry-After": "7"}), RemoteError,
         "URL: the server is busy; try again in 7 seconds"),
        (refusal(503, "the server is shutting down"), RemoteError, "URL: the server is shutting down"),
        (refusal(500, "internal error 1"), RemoteError, "URL: internal error 1"),
        ([chunk([("a", False)]), None], RemoteError, WENT_AWAY),
        ([chunk([("a", False)])], RemoteError, WENT_AWAY),
        ([event({"error": {"message": "the target broke"}})], RemoteError, "URL: the target broke"),
        ([b"data: {\n\n"], RemoteError, STRANGER),
        (Response("<html>bad gateway</html>", 502), RemoteError, STRANGER),
        (Response("<html>welcome</html>"), RemoteError, STRANGER),
    ],
)  # fmt: skip
def test_each_trouble_in_one_line(server: ScriptedServer, script: Any, error: type, line: str) -> None:
    server.scripts = [script, ANSWER]
    with load(server.url) as engine:
        with pytest.raises(error) as caught:
            engine.generate(TEXT)
        assert str(caught.value) == line.replace("URL", server.url)
        assert type(caught.value) is error
        assert engine.generate(TEXT).text == "ab"


@pytest.mark.parametrize(
    ("models", "error", "line"),
    [
        (refusal(401, "the key is wrong"), UsageError,
         "api_key: URL refuses it (the key is wrong); give the key of that server"),
        (JSONResponse({"data": [{"id": "x", "owned_by": "me"}]}), RemoteError, STRANGER),
        (JSONResponse({"data": []}), RemoteError, STRANGER),
        (JSONResponse([1]), RemoteError, STRANGER),
        (Response("not here", 404), RemoteError, STRANGER),
    ],
)  # fmt: skip
def test_a_server_that_is_not_ours(server: ScriptedServer, models: Response, error: type, line: str) -> None:
    server.models = models
    with pytest.raises(error) as caught:
        load(server.url, api_key="12345678")
    assert str(caught.value) == line.replace("URL", server.url)
    assert "12345678" not in str(caught.value)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            RemoteError, match=rf"^{url}: no connection .*; is `llmcad-mlx serve` running there\?$"
        ):
            load(url)


@pytest.mark.parametrize(
    ("target", "options", "line"),
    [
        *[(url, {}, "target: .* is not a server's address")
          for url in ("http://", "http://:80", "http://user@mac.local", "http://mac.local/?a=b")],
        (NOBODY, {"draft": "ngram"}, "draft: the server at"),
        (NOBODY, {"memory": "6GB"}, "memory: the server at"),
        (NOBODY, {"progress": True}, "progress: the server at"),
        (NOBODY, {"api_key": "with space"}, "api_key: give printable ASCII"),
        (NOBODY, {"api_key": ""}, "api_key: give printable ASCII"),
        ("/a/folder", {"api_key": "12345678"}, "api_key: only a server asks for one"),
    ],
)  # fmt: skip
def test_what_load_refuses(target: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=f"^{line}"):
        load(target, **options)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        *[(name, None, "an engine on another machine does not take it")
          for name in ("on_round", "on_progress", "logits_processors", "pipeline")],
        ("temperature", float("nan"), "nan cannot be sent"),
        ("temperature", object, ".* cannot be sent"),
        ("seed", None, "None is not a value"),
    ],
)  # fmt: skip
def test_options_that_do_not_travel(server: ScriptedServer, name: str, value: Any, complaint: str) -> None:
    with load(server.url) as engine, pytest.raises(UsageError, match=f"^{name}: {complaint}"):
        engine.stream_generate(TEXT, **{name: value})
    assert server.requests == []


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("\ud83d", "it is not UTF-8 text"),
        ([{"role": "user", "content": "\ud83d"}], "it is not UTF-8 text"),
        ([{"role": "user", "content": object()}], "cannot be sent as JSON"),
    ],
)
def test_prompts_that_do_not_travel(server: ScriptedServer, prompt: Any, line: str) -> None:
    with load(server.url) as engine, pytest.raises(UsageError, match=f"^prompt: {line}"):
        engine.generate(prompt)


# Without MLX

BLOCKED = (
    "mlx", "mlx_lm", "numpy", "transformers", "tokenizers", "numba", "huggingface_hub", "gguf", "rich", "typer",
    "psutil", "pydantic", "prometheus_client", "starlette", "uvicorn", "markdown_it", "pygments",
)  # fmt: skip
_BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def without_mlx(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BLOCKER + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_where_mlx_is_absent(server: ScriptedServer) -> None:
    done = without_mlx(
        """
from llmcad_mlx import GenerationStats, LlmcadError, RemoteEngine, RemoteError, Result, UsageError, load
with load(sys.argv[1]) as engine:
    print([response.text for response in engine.stream_generate("x")], engine.generate("x").tokens)
try:
    load("smollm2-135m")
except UsageError as error:
    print(error)
""",
        server.url,
    )
    answers, refused = done.stdout.split("\n", 1)
    assert (answers, done.stderr) == ("['a', 'b', ''] [5, 6, 5]", "")
    assert refused.startswith("target: models cannot run on this device (No module named 'mlx")
    assert 'load("http://mac.local:8080")' in refused


def test_the_example_for_an_ipad(server: ScriptedServer) -> None:
    source = (EXAMPLES / "ipad_client.py").read_text()
    done = without_mlx(f"sys.argv = ['ipad_client.py', {server.url!r}, 'hello']\n" + source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ab\n")
    assert "3 tokens in 2 passes" in done.stdout


# What a local engine does too, against a real server


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[Engine]:
    with loader(folder)() as engine:
        yield engine


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Live]:
    with serving(loader(folder), api_key=KEY) as live:
        yield live


@pytest.fixture(params=["local", "remote"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    """A fresh engine of either kind."""
    if request.param == "local":
        made: Any = loader(folder)()
    else:
        made = load(request.getfixturevalue("served").url, api_key=KEY)
    with made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (TEXT, {}),
        (CHAT, {"temperature": 0.9, "seed": 11}),
        ([5, 6, 7, 5, 6], {"policy": "throughput", "tree_nodes": 8}),
        (TEXT, {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3}),
        (TEXT, {"repetition_penalty": 1.3, "presence_penalty": 0.1, "frequency_penalty": 0.2, "policy": "plain"}),
        (TEXT, {"logit_bias": {9: 5.0, 11: 4.0}}),
        (TEXT, {"stop": ["a", "b"], "logit_bias": {1: -100.0}}),
        (TEXT, {"logit_bias": {1: 100.0}}),
        (TEXT, {"max_tokens": 1}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_same_answer(engine: Any, local: Engine, prompt: Any, options: dict[str, Any]) -> None:
    options = {"max_tokens": 24} | options
    expected = local.generate(prompt, **options)
    result = engine.generate(prompt, **options)
    assert type(result) is Result
    for name in ("text", "tokens", "finish_reason"):
        assert getattr(result, name) == getattr(expected, name)
    assert result.stats.prompt_tokens == expected.stats.prompt_tokens
    assert result.stats.generated_tokens == len(result.tokens) == expected.stats.generated_tokens


def test_one_response_for_each_token(engine: Any) -> None:
    found = list(engine.stream_generate(TEXT, max_tokens=20, tree_nodes=8, logit_bias={20: 60.0}))
    assert len(found) == 20
    assert [response.finish_reason for response in found] == [None] * 19 + ["length"]
    stats = found[-1].stats
    assert sum(response.from_draft for response in found) == stats.accepted > 0
    # The last pass may have ended on a drafted token, without one of the target's own.
    assert stats.generated_tokens == 20
    assert stats.target_passes + stats.accepted in (20, 21)


def test_an_answer_that_is_left_and_the_next_one(engine: Any, local: Engine) -> None:
    running = engine.stream_generate(TEXT, max_tokens=200)
    next(running)
    running.close()
    assert engine.generate(CHAT, max_tokens=9).tokens == local.generate(CHAT, max_tokens=9).tokens


def test_a_newer_generation_ends_a_running_one(engine: Any) -> None:
    older = engine.stream_generate(TEXT, max_tokens=200)
    next(older)
    newer = engine.stream_generate(CHAT, max_tokens=3)
    next(newer)
    with pytest.raises(UsageError, match="this generation ended when a newer one began"):
        list(older)
    assert list(newer)[-1].finish_reason == "length"


def test_a_closed_engine(engine: Any) -> None:
    running = engine.stream_generate(TEXT, max_tokens=200)
    next(running)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        list(running)
    with pytest.raises(UsageError, match="this engine is closed"):
        engine.generate(TEXT)


@pytest.mark.parametrize(
    ("prompt", "options", "name"),
    [
        (TEXT, {"max_tokens": 0}, "max_tokens"), (TEXT, {"policy": "other"}, "policy"),
        (TEXT, {"tree_nodes": 0}, "tree_nodes"), (TEXT, {"stop": [""]}, "stop"),
        (TEXT, {"temperature": "hot"}, "temperature"), (TEXT, {"top_p": 1.5}, "top_p"),
        (TEXT, {"logit_bias": {10_000: 1.0}}, "logit_bias"), (TEXT, {"temprature": 0.5}, "temprature: unknown"),
        *[(prompt, {}, "prompt") for prompt in ("", [], [1, "a"], [True], [10_000], 5, b"bytes")],
        (TEXT * 40, {}, "(the )?prompt"),
        ([{"role": "user"}], {}, r"(prompt|messages\[0\]\.content)"),
    ],
)  # fmt: skip
def test_the_same_refusals(engine: Any, prompt: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ContextLengthError if prompt == TEXT * 40 else UsageError, match=f"^{name}"):
        list(engine.stream_generate(prompt, **options))


def test_leaving_ends_the_generation_on_the_server(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "long", context=8192)
    with serving(loader(folder)) as live, load(live.url) as engine:
        running = engine.stream_generate(TEXT, max_tokens=4000, logit_bias={1: -100.0})
        next(running)
        assert live.metric("requests_running") == 1
        running.close()
        begun = time.monotonic()
        while live.metric("requests_running"):
            assert time.monotonic() - begun < 30
            time.sleep(0.01)
        assert live.metric("generated_tokens_total") < 2000
