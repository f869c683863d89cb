"""The HTTP API on a live server, driven by the official openai client and httpx."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llmcad_mlx import Engine, UsageError, load
from llmcad_mlx.serve import ServerSettings
from tests.support.serving import CHAT, NAME, Live, Scripted, events, loader, serving, streaming
from tests.support.tiny_folder import copy_folder, make_folder

SPECULATION = {
    "seed", "policy", "device", "emulated", "target_passes", "drafted", "tested", "accepted", "tokens_per_pass",
    "acceptance_rate", "prompt_s", "decode_s", "tokens_per_s", "draft_s", "verify_s", "io_wait_s", "other_s",
    "streamed_bytes", "near_ties", "budget_bytes", "pinned_bytes", "peak_rss_bytes", "peak_mlx_bytes",
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{% set tool_call = call.function %}<tool_call>"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def live(folder: Path, draft: Path) -> Iterator[Live]:
    with serving(loader(folder, draft)) as server:
        yield server


def connected(live: Live, key: str = "none needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with connected(live) as made:
        yield made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """The same model, in this process: the reference."""
    with loader(folder, None)() as loaded:
        yield loaded


def chat(client: openai.OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": CHAT, **body})


def test_the_client_gets_the_engines_text(client: openai.OpenAI, engine: Engine) -> None:
    answer = chat(client, max_tokens=24)
    expected = engine.generate(CHAT, max_tokens=24)
    (choice,), usage = answer.choices, answer.usage
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert (answer.object, answer.model) == ("chat.completion", NAME)
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.stats.prompt_tokens, len(expected.tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 5}
    whole = chat(client, **wanted)
    chunks = list(chat(client, **wanted, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    *pieces, last = [chunk.model_dump(exclude_unset=True) for chunk in chat(client, **wanted, stream=True)]
    assert all(chunk.keys().isdisjoint({"usage", "speculation"}) for chunk in [*pieces, last])
    assert all(chunk["choices"][0]["delta"].get("content") for chunk in pieces[1:])


def test_completions_by_the_client(client: openai.OpenAI, engine: Engine) -> None:
    expected = engine.generate("the other one", max_tokens=16)
    whole = client.completions.create(model=NAME, prompt="the other one", max_tokens=16)
    ids = client.completions.create(model=NAME, prompt=engine.encode("the other one"), max_tokens=16)
    stream = client.completions.create(model=NAME, prompt="the other one", max_tokens=16, stream=True)
    assert whole.choices[0].text == ids.choices[0].text == expected.text
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text
    assert whole.object == "text_completion"


def test_usage_has_the_figures_of_speculation(live: Live) -> None:
    usage = live.chat(max_tokens=16, seed=11, policy="chain").json()["usage"]
    figures = usage["speculation"]
    assert set(figures) == SPECULATION
    assert (figures["seed"], figures["policy"], figures["emulated"]) == (11, "chain", False)
    assert figures["tokens_per_pass"] == usage["completion_tokens"] / figures["target_passes"]
    assert figures["drafted"] >= figures["tested"] >= figures["accepted"]
    again = live.chat(max_tokens=16, seed=11, policy="chain").json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_seed_is_drawn_and_told(live: Live) -> None:
    first, second = (live.chat(max_tokens=12, temperature=1.0).json() for _ in range(2))
    seeds = [answer["usage"]["speculation"]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    again = live.chat(max_tokens=12, temperature=1.0, seed=seeds[0]).json()
    assert again["choices"][0]["message"] == first["choices"][0]["message"]


def test_options_reach_the_engine(live: Live, engine: Engine) -> None:
    options: dict[str, Any] = {
        "max_tokens": 16, "temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "policy": "paper",
    }  # fmt: skip
    bias = {7: 4.0, 9: -50.0}
    full = engine.generate(CHAT, **options, logit_bias=bias).text
    options["stop"] = ["no such text", full[5:8]]
    (answer,) = live.chat(**options, logit_bias={str(token): value for token, value in bias.items()}).json()[
        "choices"
    ]
    assert answer["message"]["content"] == full[: full.find(full[5:8])]
    assert answer["finish_reason"] == "stop"


def test_logprobs_are_the_targets(client: openai.OpenAI, engine: Engine) -> None:
    answer = chat(client, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0)
    content = answer.choices[0].logprobs.content
    expected = list(engine.stream_generate(CHAT, max_tokens=6))
    assert len(content) == len(expected)
    for said, wanted in zip(content, expected, strict=True):
        assert said.logprob == pytest.approx(float(wanted.logprobs[wanted.token]), abs=1e-4)
        assert said.token == wanted.text
        tops = [top.logprob for top in said.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert said.top_logprobs[0].token == said.token  # greedy
    text = answer.choices[0].message.content
    assert bytes(byte for said in content for byte in said.bytes).decode(errors="replace") == text


def test_logprobs_in_a_stream_and_in_completions(client: openai.OpenAI) -> None:
    stream = chat(client, max_tokens=6, logprobs=True, stream=True, temperature=0)
    found = [chunk.choices[0].logprobs for chunk in stream]
    streamed = [entry.logprob for logprobs in found if logprobs is not None for entry in logprobs.content]
    whole = chat(client, max_tokens=6, logprobs=True, temperature=0)
    assert streamed == [entry.logprob for entry in whole.choices[0].logprobs.content]
    older = client.completions.create(model=NAME, prompt="the one", max_tokens=5, logprobs=2).choices[0]
    assert len(older.logprobs.tokens) == len(older.logprobs.text_offset) == 5
    assert older.logprobs.text_offset[0] == 0


def test_a_stream_shows_tokens_and_trees(live: Live, engine: Engine) -> None:
    body: dict[str, Any] = {"max_tokens": 32, "policy": "throughput", "tree_nodes": 8}
    with streaming(live, **body, speculation={"tokens": True, "trees": True}) as response:
        chunks = [chunk for chunk in events(response) if "speculation" in chunk]
    expected = engine.generate(CHAT, max_tokens=32)
    tokens = [token for chunk in chunks for token in chunk["speculation"].get("tokens", [])]
    assert [token["id"] for token in tokens] == expected.tokens
    assert "".join(token["text"] for token in tokens) == expected.text
    rounds = [chunk["speculation"]["round"] for chunk in chunks if "round" in chunk["speculation"]]
    assert [done["index"] for done in rounds] == list(range(len(rounds)))
    assert sum(token["from_draft"] for token in tokens) == sum(
        node["state"] == "accepted" for done in rounds for node in done["nodes"]
    )
    assert any(token["from_draft"] for token in tokens)
    for done in rounds:
        assert set(done) == {
            "index", "nodes", "bonus", "tokens_per_s", "tokens_per_pass", "peak_rss_bytes", "budget_bytes"
        }  # fmt: skip
        root, *others = done["nodes"]
        assert (root["parent"], root["state"], root["source"]) == (-1, "root", "target")
        for index, node in enumerate(others, 1):
            assert 0 <= node["parent"] < index
            assert 0 <= node["confidence"] <= 1
            assert node["source"] in ("model", "ngram", "table")
            assert node["state"] in ("accepted", "rejected", "provisional")
            if node["state"] == "accepted":
                assert done["nodes"][node["parent"]]["state"] in ("accepted", "root")


def test_a_whole_answer_shows_them_too(live: Live) -> None:
    answer = live.chat(max_tokens=12, speculation=True).json()
    assert len(answer["speculation"]["tokens"]) == answer["usage"]["completion_tokens"]
    assert len(answer["speculation"]["rounds"]) == answer["usage"]["speculation"]["target_passes"]
    only_tokens = live.chat(max_tokens=12, speculation={"tokens": True}).json()
    assert set(only_tokens["speculation"]) == {"tokens"}


def test_trees_show_what_was_drafted_while_the_target_waited_for_weights(
    folder: Path, draft: Path, streams_small_matrices: None
) -> None:
    """Also nodes added after the pass had begun: the target was never given those."""
    with serving(loader(folder, draft, pinned="0", read_bandwidth="20MB/s", context=128)) as streamed:
        answer = streamed.chat(max_tokens=12, tree_nodes=4, policy="throughput", speculation=True).json()
        refused = streamed.complete(prompt="!" * 200).json()["error"]["message"]
    assert "room for 127; shorten it, or start the server anew: --context asks for more, up to 512" in refused
    rounds = answer["speculation"]["rounds"]
    states = [[node["state"] for node in done["nodes"]] for done in rounds]
    assert max(map(len, states)) > 4
    assert max(of_round.count("provisional") for of_round in states) > 0
    assert all(len(of_round) - of_round.count("provisional") <= 4 for of_round in states)


def test_models(client: openai.OpenAI, live: Live) -> None:
    (card,) = live.get("/v1/models").json()["data"]
    assert card.pop("created") > 0
    assert card == {
        "id": NAME, "object": "model", "owned_by": "llmcad-mlx", "context_length": 512, "draft": "draft",
        "sampling": {},
    }  # fmt: skip
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="only tiny is served here"):
        client.models.retrieve("gpt-4o")


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match='"gpt-4o" is not served here'):
        chat(client, model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="n: must be 1") as refused:
        chat(client, n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="tools: tiny has no chat template for tools") as refused:
        chat(client, tools=[TOOL])
    assert refused.value.param == "tools"
    too_long = "prompt has 600 tokens, and there is room for 511"
    with pytest.raises(openai.BadRequestError, match=too_long) as refused:
        client.completions.create(model=NAME, prompt=[5] * 600)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="unknown role tool"):
        chat(client, messages=[*CHAT, {"role": "tool", "content": "x", "tool_call_id": "1"}])


def test_an_option_the_engine_refuses_is_a_400_in_a_stream_too(live: Live) -> None:
    bias = {"5000": 1.0}
    whole = live.chat(logit_bias=bias)
    with streaming(live, logit_bias=bias) as response:
        response.read()
    assert (whole.status_code, response.status_code) == (400, 400)
    assert whole.json() == response.json()
    assert whole.json()["error"]["message"] == "logit_bias: token 5000 is not in the vocabulary of 112"


def test_conversations_in_turns_read_only_what_is_new(live: Live, engine: Engine) -> None:
    """Two of the three begin alike."""
    alike, first, second, third = ([2 + (start * 31 + at * 7) % 100 for at in range(60)] for start in range(4))
    prompts, read_before = [alike + first, second, alike + third], [0, 0, len(alike)]
    for _ in range(3):
        for index, prompt in enumerate(prompts):
            answer = live.complete(prompt=prompt, max_tokens=8).json()
            expected = engine.generate(prompt, max_tokens=8, policy="plain")
            assert answer["choices"][0]["text"] == expected.text
            # The last generated token was fed only if the draft had it.
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= read_before[index]
            read_before[index] = len(prompt) + len(expected.tokens) - 1
            prompts[index] = [*prompt, *expected.tokens, 9, 8, 7]


def test_metrics_count(live: Live) -> None:
    def figures() -> list[float]:
        counters = ("generated_tokens_total", "target_passes_total", "prompt_tokens_total")
        by_status = [live.metric("requests_total", path="/v1/chat/completions", status=s) for s in ("200", "400")]
        return [*by_status, *map(live.metric, counters)]

    before = figures()
    usage = live.chat(max_tokens=10).json()["usage"]
    assert live.chat(n=3).status_code == 400
    counted = [after - earlier for after, earlier in zip(figures(), before, strict=True)]
    passes = usage["speculation"]["target_passes"]
    assert counted == [1, 1, usage["completion_tokens"], passes, usage["prompt_tokens"]]
    assert live.metric("resident_memory_bytes") > 1e6
    assert live.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_unknown_places(live: Live) -> None:
    assert live.get("/nowhere").json()["error"]["message"] == "there is nothing here; see /openapi.json"
    for path, near in (
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/engines/tiny/completions", "/v1/completions"),
        ("/openai/deployments/tiny/chat/completions/", "/v1/chat/completions"),
        ("/v1/responses", "/v1/chat/completions"),
        ("/api/tags", "/v1/models"),
    ):
        said = live.post(path).json()["error"]["message"]
        assert said == f"there is nothing here; try {near}, or see /openapi.json"
    wrong = live.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path", ["/v1//chat/completions", "/v1/chat/completions/", "/chat/completions", "//chat//completions/"]
)
def test_base_addresses_as_users_write_them(live: Live, path: str) -> None:
    assert live.post(path, messages=CHAT, max_tokens=2).status_code == 200
    assert live.post(path.replace("chat", ""), prompt="a", max_tokens=2).status_code == 200
    assert live.get(path.replace("chat/completions", "models").replace("chat//completions", "models")).json()[
        "data"
    ]


def test_models_are_found_there_too(live: Live) -> None:
    for path in ("/v1/models/tiny/", "/models/tiny", "/v1//models//tiny"):
        assert live.get(path).json()["id"] == NAME


SAME: list[dict[str, Any]] = [
    {"max_tokens": 24.0}, {"seed": -1}, {"seed": -(2**63)}, {"seed": 2**64 - 1}, {"top_k": -1}, {"store": True},
    {"reasoning_effort": "high"}, {"verbosity": "low"}, {"prediction": {"type": "content", "content": "x"}},
    {"parallel_tool_calls": False}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tool_choice": "auto"},
    {"tools": [], "tool_choice": "none"}, {"functions": None}, {"temperature": 0.9, "top_p": 0, "seed": 3},
    {"stream_options": {"include_usage": True}}, {"stop": ""}, {"stop": ["", "no such text", ""]}, {"stop": []},
    {"audio": None, "web_search_options": None, "modalities": ["text"], "logprobs": False, "top_logprobs": 0},
    {"service_tier": "flex", "metadata": {"a": "b"}, "user": "me", "safety_identifier": "a", "logit_bias": {}},
    {"mirostat": 0, "typical_p": 1.0, "repeat_penalty": 1, "ignore_eos": False, "xtc_probability": 0.0},
    {"prompt_cache_key": "a", "cache_prompt": True, "max_completion_tokens": 24, "n": 1, "stop": None},
    {"messages": [{**CHAT[0], "content": [{"type": "text", "text": CHAT[0]["content"]}]}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", SAME, ids=str)
def test_what_changes_no_greedy_answer(live: Live, engine: Engine, fields: dict[str, Any]) -> None:
    answer = live.chat(**{"max_tokens": 24, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == engine.generate(CHAT, max_tokens=24).text


def test_a_byte_order_mark_is_no_part_of_the_body(live: Live) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"messages": CHAT, "max_tokens": 2}).encode()
    sent = {"content": body, "headers": {"Content-Type": "application/json"}}
    assert httpx.post(f"{live.url}/v1/chat/completions", **sent).status_code == 200


def test_seeds_may_be_negative(live: Live) -> None:
    def text(seed: int) -> str:
        answer = live.chat(max_tokens=24, temperature=1.0, seed=seed).json()
        assert answer["usage"]["speculation"]["seed"] == seed % 2**64
        return str(answer["choices"][0]["message"]["content"])

    assert text(-1) == text(-1) == text(2**64 - 1) != text(-2)


def test_cors_is_off_unless_asked(live: Live) -> None:
    answer = httpx.get(f"{live.url}/v1/models", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_key_opens_everything_but_health_and_the_page(folder: Path) -> None:
    key = "a-secret-key"
    with serving(loader(folder), api_key=key, cors=("https://example.org",)) as live:
        assert live.get("/health").status_code == 200
        assert live.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            refused = live.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert live.post("/markdown", text="a").status_code == 401
        for wrong in ("wrong-key", key + "x", key[:-1], "é"):
            sent = httpx.get(f"{live.url}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
            assert sent.status_code == 401
        with connected(live, key) as client:
            assert chat(client, max_tokens=2).choices
        with connected(live, "other") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        preflight = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-stainless-lang",
            "Access-Control-Request-Private-Network": "true",
        }
        url, ours = f"{live.url}/v1/chat/completions", {"Origin": "https://example.org"}
        allowed = httpx.options(url, headers={**ours, **preflight})
        refused = httpx.get(f"{live.url}/v1/models", headers=ours)
        sent = httpx.get(f"{live.url}/v1/models", headers={**ours, "Authorization": f"Bearer {key}"})
        assert [answer.status_code for answer in (allowed, refused, sent)] == [200, 401, 200]
        assert allowed.headers["access-control-allow-private-network"] == "true"
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        for answer in (allowed, refused, sent):
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(url, headers={"Origin": "https://evil.example", **preflight})
        assert "access-control-allow-origin" not in other.headers
        document = httpx.get(f"{live.url}/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
        assert document["security"] == [{"key": []}]


def test_localhost_is_every_family_that_it_has(folder: Path) -> None:
    with serving(loader(folder), host="localhost") as live:
        assert live.url.startswith("http://localhost:")
        port = live.url.rpartition(":")[2]
        for *_, address in socket.getaddrinfo("localhost", int(port), type=socket.SOCK_STREAM):
            name = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
            assert httpx.get(f"http://{name}:{port}/health").status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": "short"}, "api-key: give at least 8"),
        ({"api_key": "with a space"}, "api-key"),
        ({"port": 70000}, "port: 70000 is out of range"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"temperature": -1.0}, "temp: -1.0 is out of range"),
        ({"cors": ("example.org",)}, "cors: 'example.org' is no origin"),
        ({"cors": ("https://example.org/",)}, "cors"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        ServerSettings(**options)


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = make_folder(tmp_path_factory.mktemp("models") / "tools", context=2048)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    with serving(loader(folder, kind=Scripted)) as live, connected(live) as client:
        yield client


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(Scripted, "script", text)


CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Bern"}}</tool_call>'


def test_tool_calls_by_the_client(tool_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, f"Let me see.\n{CALL}\n{CALL}")
    answer = chat(tool_client, tools=[TOOL])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) == 2
    for call in calls:
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"town": "Bern"}
    # The client sends back what it got, and the tool's answer.
    say(monkeypatch, "It rains.")
    messages: list[Any] = [
        *CHAT,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"},
    ]
    second = chat(tool_client, messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "It rains."
    assert second.choices[0].finish_reason == "stop"


def test_tool_calls_in_a_stream(tool_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, f"Yes. {CALL} {CALL}")
    chunks = list(chat(tool_client, tools=[TOOL], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Yes. "
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    for call in calls:
        assert json.loads(call.function.arguments or "") == {"town": "Bern"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_no_call_stays_text(tool_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, CALL)
    unheard = chat(tool_client, tools=[TOOL], tool_choice="none").choices[0]
    assert (unheard.message.content, unheard.message.tool_calls) == (CALL, None)
    cut = chat(tool_client, tools=[TOOL], max_tokens=20).choices[0]
    assert cut.finish_reason == "length"
    assert CALL.startswith(cut.message.content)


def test_tools_are_shown_to_the_model(tool_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "Yes.")

    def prompt_tokens(**more: Any) -> int:
        return chat(tool_client, **more).usage.prompt_tokens

    bare = prompt_tokens()
    assert prompt_tokens(tools=[TOOL]) > bare + 40
    assert prompt_tokens(tools=[TOOL], tool_choice="none") == bare
    assert prompt_tokens(tools=[TOOL], tool_choice="required") == prompt_tokens(tools=[TOOL]) > bare


def test_requests_get_the_models_own_sampling(folder: Path, tmp_path: Path) -> None:
    sampled = copy_folder(folder, tmp_path / "sampled")
    own = {"temperature": 0.9, "top_p": 0.8}
    (sampled / "generation_config.json").write_text(json.dumps({"do_sample": True, **own}))
    with loader(sampled, None)() as reference, serving(loader(sampled, None)) as live:
        assert live.get("/v1/models").json()["data"][0]["sampling"] == own
        for asked, used in (({}, own), ({"top_p": 1}, {"temperature": 0.9}), ({"temperature": 0}, {})):
            answer = live.chat(max_tokens=12, seed=5, **asked).json()
            expected = reference.generate(CHAT, max_tokens=12, seed=5, **used)
            assert answer["choices"][0]["message"]["content"] == expected.text
        with load(live.url) as remote:  # which is an engine like any other
            assert remote.generate(CHAT, max_tokens=12).text == reference.generate(CHAT, max_tokens=12).text
            used = {"max_tokens": 12, "temperature": 0.9, "seed": 5}
            assert remote.generate(CHAT, **used).text == reference.generate(CHAT, **used).text
