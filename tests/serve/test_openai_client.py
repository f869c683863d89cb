"""What programs really send: the official client through all that it has, and other libraries' request bodies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from tests.support.serving import CHAT, NAME, Live, Scripted, events, loader, serving, streaming
from tests.support.tiny import tiny_llama
from tests.support.tiny_folder import SPECIAL, byte_level_folder, write_folder

pytestmark = pytest.mark.usefixtures("tiny_home")

# A template as thinking models with tools have it.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{% set tool_call = call.function %}<tool_call>"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if spoken != 5 %}six{% endif %}{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if opened %}<think>\n{% elif not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"town": {"type": ["string", "null"], "default": None}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
}
NAMED = {"type": "function", "function": {"name": "weather"}}
JSON_CALL = '{"name": "weather", "arguments": {"town": "Bern"}}'
CALL = f"<tool_call>{JSON_CALL}</tool_call>"


SENTENCES = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tags of thinking are tokens."""
    folder = byte_level_folder(tmp_path_factory.mktemp("models") / "thinker", ("<think>", "</think>"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def live(thinker: Path) -> Iterator[Live]:
    with serving(loader(thinker, kind=Scripted), max_tokens=300, template_options={"spoken": 5}) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    def told(script: str | Sequence[int]) -> None:
        monkeypatch.setattr(Scripted, "script", script)

    return told


def ask(client: openai.OpenAI, **body: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": CHAT, **body})


def put_together(chunks: Sequence[Any]) -> tuple[str, str, list[Any]]:
    """Text, thinking and calls of a stream."""
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [call.function for delta in deltas for call in delta.tool_calls or []]
    return (
        "".join(delta.content or "" for delta in deltas),
        "".join(getattr(delta, "reasoning", None) or "" for delta in deltas),
        [(call.name, json.loads(call.arguments)) for call in calls],
    )


@pytest.mark.parametrize(
    ("script", "is_open", "text", "thought"),
    [
        ("<think>\nplan a\n</think>\n\nParis", False, "Paris", "\nplan a\n"),
        ("plan a</think>Paris", True, "Paris", "plan a"),
        (f"maybe {CALL} no</think>Paris", True, "Paris", f"maybe {CALL} no"),
        ("Paris", False, "Paris", ""),
    ],
)
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["", "tools"])
def test_thinking_has_a_field_of_its_own(
    client: openai.OpenAI, say: Any, script: str, is_open: bool, text: str, thought: str, tools: Any
) -> None:
    say(script)
    body = {"tools": tools, "extra_body": {"chat_template_kwargs": {"opened": is_open}}}
    whole = ask(client, **body).choices[0]
    assert (whole.message.content, getattr(whole.message, "reasoning", "")) == (text, thought)
    assert (whole.finish_reason, whole.message.tool_calls) == ("stop", None)
    assert put_together([*ask(client, **body, stream=True)]) == (text, thought, [])


def test_thinking_that_is_cut_off_is_thinking(client: openai.OpenAI, say: Any) -> None:
    say("a long plan")
    choice = ask(client, max_tokens=6, extra_body={"chat_template_kwargs": {"opened": True}}).choices[0]
    assert (choice.message.content, choice.message.reasoning, choice.finish_reason) == ("", "a long ", "length")


def test_a_question_about_the_tags_is_answered(client: openai.OpenAI, say: Any) -> None:
    say("A tag.")
    answer = ask(client, messages=[{"role": "user", "content": "What is <think>?"}])
    assert answer.choices[0].message.content == "A tag."


def test_plain_completions_are_text_alone(client: openai.OpenAI, say: Any) -> None:
    say("a</think>b")
    assert client.completions.create(model=NAME, prompt="<think>").choices[0].text == "a</think>b"


def test_tokens_show_all_that_was_written(live: Live, say: Any) -> None:
    """The page and other engines of this package read them."""
    say(f"<think>plan</think>\n{CALL}")
    with streaming(live, tools=[WEATHER], speculation={"tokens": True}) as response:
        found = events(response)
    told = [token["text"] for chunk in found for token in chunk.get("speculation", {}).get("tokens", [])]
    assert "".join(told) == f"<think>plan</think>\n{CALL}"


def test_variables_of_the_template(live: Live, say: Any) -> None:
    say("x")

    def tokens(**body: Any) -> int:
        return int(live.chat(**body).json()["usage"]["prompt_tokens"])

    plain = tokens()
    assert tokens(chat_template_kwargs={"enable_thinking": False}) == plain + len("TnnTnn")
    assert tokens(chat_template_kwargs={"unknown": [1, {"a": None}]}) == plain
    assert tokens(chat_template_kwargs=None, reasoning_effort=None) == plain
    assert tokens(chat_template_kwargs={"spoken": 6}) == plain + len("six")
    assert tokens(reasoning_effort="low") == plain + len("effort low")
    assert tokens(messages=[*CHAT, {"role": "assistant", "content": "a"}, *CHAT]) + len("TtT") == tokens(
        messages=[*CHAT, {"role": "assistant", "content": "a", "reasoning": "t"}, *CHAT]
    )


def test_a_conversation_loop_sends_the_clients_own_messages_back(client: openai.OpenAI, say: Any) -> None:
    messages: list[Any] = [*CHAT]
    say(f"<think>plan</think>{CALL}")
    for turn in range(3):
        choice = ask(client, messages=messages, tools=[WEATHER]).choices[0]
        messages.append(choice.message.model_dump() if turn % 2 else choice.message)  # with all that is null
        if turn == 0:
            (call,) = choice.message.tool_calls
            rain = [{"type": "text", "text": "rain"}]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": rain, "name": "weather"})
            say("<think>so</think>It rains.")
        else:
            assert (choice.message.content, choice.message.reasoning) == ("It rains.", "so")
            messages.append({"role": "user", "content": "Really?", "name": None})


REPLAYED = {
    "what the client's dump has": {"refusal": None, "annotations": None, "audio": None, "function_call": None},
    "what OpenAI's answers have": {"refusal": None, "annotations": [], "id": "msg_1"},
    "what DeepSeek's have": {"reasoning_content": "t"},
    "what OpenRouter's have": {"reasoning": "t", "reasoning_details": [{"type": "reasoning.text", "text": "t"}]},
    "what LiteLLM's have": {"provider_specific_fields": {"x": 1}, "thinking_blocks": [], "tool_calls": None},
    "what parsed ones have": {"parsed": None, "tool_calls": []},
}


@pytest.mark.parametrize("fields", REPLAYED.values(), ids=REPLAYED)
def test_answers_of_any_server_are_taken_back(live: Live, say: Any, fields: dict[str, Any]) -> None:
    say("x")
    for content in ("a", None):
        answer = live.chat(messages=[*CHAT, {"role": "assistant", "content": content, **fields}, *CHAT])
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("arguments", ["", None, {"town": None}, '{"town": null}'])
def test_calls_of_any_server_are_taken_back(live: Live, say: Any, arguments: Any) -> None:
    say("x")
    function = {"name": "weather", "arguments": arguments, "parsed_arguments": {"town": None}}
    calls = [{"id": "1", "type": "function", "index": 0, "function": function, "extra_content": {}}]
    turns = [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    answer = live.chat(messages=[*CHAT, *turns], tools=[WEATHER])
    assert answer.status_code == 200, answer.text


def test_a_typed_client_writes_every_field_as_null(live: Live, say: Any) -> None:
    """All that OpenAI's API has, and more."""
    say("x")
    types = openai.types
    for kind, send in (
        (types.chat.completion_create_params.CompletionCreateParamsNonStreaming, live.chat),
        (types.completion_create_params.CompletionCreateParamsNonStreaming, live.complete),
    ):
        names = {name for base in (kind, *kind.__orig_bases__) for name in base.__annotations__}
        names = (names | {"functions", "no_such_field"}) - {"messages", "prompt"}
        assert len(names) > 15
        answer = send(**dict.fromkeys(names))
        assert answer.status_code == 200, answer.text


def test_calls_however_the_model_writes_them(client: openai.OpenAI, say: Any) -> None:
    expected = [("weather", {"town": "Bern"})]
    for script, text in (
        (f"Yes.\n{CALL}", "Yes."),
        (f"Yes.\n```json\n{JSON_CALL}\n```", "Yes."),
        (JSON_CALL, ""),
    ):
        say(script)
        whole = ask(client, tools=[WEATHER], tool_choice="auto").choices[0]
        assert [(c.function.name, json.loads(c.function.arguments)) for c in whole.message.tool_calls] == expected
        assert (whole.finish_reason, whole.message.content or "") == ("tool_calls", text)
        streamed, _, calls = put_together([*ask(client, tools=[WEATHER], stream=True)])
        assert (streamed.strip(), calls) == (text, expected)
        without = ask(client, tool_choice="auto").choices[0]
        assert (without.message.content, without.message.tool_calls) == (script, None)


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_ends_the_answer(client: openai.OpenAI, say: Any, stream: bool) -> None:
    say(f"Yes. {CALL}" * 5)
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(client, tools=[WEATHER], parallel_tool_calls=False, stream=stream, **usage)
    if stream:
        chunks = [*answer]
        text, _, calls = put_together(chunks)
        reason, tokens = chunks[-2].choices[0].finish_reason, chunks[-1].usage.completion_tokens
    else:
        (choice,), tokens = answer.choices, answer.usage.completion_tokens
        text, calls, reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
    assert (text.strip(), len(calls), reason) == ("Yes.", 1, "tool_calls")
    assert tokens < len(f"Yes. {CALL}" * 5)


OTHERS = [{"type": "function", "function": {"name": name}} for name in ("web", "we")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("tools", "choice", "opening"),
    [
        ([WEATHER, *OTHERS], NAMED, CALL.partition('"town"')[0]),
        ([WEATHER], "required", CALL.partition('"town"')[0]),
        ([WEATHER, *OTHERS], "required", CALL.partition("ather")[0]),
    ],
)
def test_a_call_that_is_wanted_is_begun_for_the_model(
    client: openai.OpenAI, say: Any, tools: Any, choice: Any, opening: str, opened: bool, stream: bool
) -> None:
    say(CALL.removeprefix(opening))
    body = {
        "tools": tools, "tool_choice": choice, "stream": stream, "logprobs": True,
        "extra_body": {"chat_template_kwargs": {"opened": opened}, "speculation": {"tokens": True}},
    }  # fmt: skip
    answer = ask(client, **body)
    chunks = [*answer] if stream else []
    if stream:
        text, thought, calls = put_together(chunks)
        reason, written = chunks[-1].choices[0].finish_reason, [c for one in chunks for c in tokens_of(one)]
        logprobs = [entry for one in chunks for entry in getattr(one.choices[0].logprobs, "content", None) or []]
    else:
        (said,) = answer.choices
        text, thought, reason = (
            said.message.content or "",
            getattr(said.message, "reasoning", ""),
            said.finish_reason,
        )
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in said.message.tool_calls]
        written, logprobs = tokens_of(answer), said.logprobs.content
        assert answer.usage.completion_tokens == len(written)  # those that were begun with are of the answer
    assert (text, thought, calls, reason) == ("", "", [("weather", {"town": "Bern"})], "tool_calls")
    whole = ("</think>\n\n" if opened else "") + CALL
    assert "".join(token["text"] for token in written) == whole
    assert "".join(entry.token for entry in logprobs) == whole


def tokens_of(answer: Any) -> list[Any]:
    return list((getattr(answer, "speculation", None) or {}).get("tokens", []))


def test_what_becomes_no_call_comes_back_as_text(client: openai.OpenAI, say: Any) -> None:
    begun = CALL.partition('"town"')[0]
    for script, limit, reason in (("never", None, "stop"), ("never", 12, "length")):
        say(script)
        choice = ask(client, tools=[WEATHER], tool_choice=NAMED, max_tokens=limit).choices[0]
        assert choice.message.tool_calls is None
        assert choice.finish_reason == reason
        assert (begun + script).startswith(choice.message.content)
        assert len(choice.message.content) > 5
    assert choice.message.content != begun + script


def test_only_tools_of_the_request_can_be_wanted(live: Live) -> None:
    for tools in ([], OTHERS):
        answer = live.chat(tools=tools, tool_choice=NAMED)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
STRICT = {**WEATHER["function"], "strict": True}
AGENT: dict[str, Any] = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "You write code.", **EPHEMERAL}]},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}], "name": "me", **EPHEMERAL},
    ],
    "max_tokens": 32000, "temperature": 0, "top_p": 1, "n": 1, "store": True, "reasoning_effort": "medium",
    "tools": [{"type": "function", "function": STRICT, **EPHEMERAL}], "tool_choice": "auto",
    "parallel_tool_calls": False, "prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low",
    "stream_options": {"include_usage": True, "include_obfuscation": False}, "metadata": {"a": "b"},
    "service_tier": "auto", "prediction": {"type": "content", "content": "x"}, "response_format": {"type": "text"},
}  # fmt: skip


def test_a_coding_agents_turn(live: Live, say: Any) -> None:
    say(f"I look.\n{CALL}")
    with streaming(live, **AGENT) as response:
        assert response.status_code == 200
        *chunks, last = events(response)
    (call,) = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert (last["choices"], last["usage"]["completion_tokens"] > 9) == ([], True)
    say("It rains.")
    result = {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": [{"type": "text", "text": "rain", **EPHEMERAL}],
    }
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, result]
    with streaming(live, **{**AGENT, "messages": [*AGENT["messages"], *turns]}) as response:
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(response) if c["choices"])
    assert text == "It rains."


LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LangChain, chat": ("/v1/chat/completions", {
        "messages": [{"content": "Be brief.", "role": "developer"}, {"content": "hi", "role": "user"}],
        "model": NAME, "max_completion_tokens": 1024, "n": 1, "stream": False, "temperature": 0.7, "stop": None,
        "logit_bias": {}, "tools": [{"type": "function", "function": STRICT}], "parallel_tool_calls": True,
    }),
    "Continue": ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "model": NAME,
        "max_tokens": 4096, "temperature": 0, "stream": False, "tools": [{"type": "function", "function": STRICT}],
    }),
    "Cline": ("/v1/chat/completions", {
        "model": NAME, "temperature": 0, "stream": False, "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Code."},
            {"role": "user", "content": [{"type": "text", "text": "<task>"}, {"type": "text", "text": "hi"}]},
        ],
    }),
    "Zed": ("/v1/chat/completions", {
        "model": NAME, "stream": False, "max_completion_tokens": 32000, "stop": [], "temperature": 1, "tools": [],
        "parallel_tool_calls": False, "prompt_cache_key": "k", "reasoning_effort": None,
        "messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
        ]}, {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "1"}],
    }),
    "Open WebUI": ("/v1/chat/completions", {
        "model": NAME, "messages": CHAT, "stream": False, "stream_options": {"include_usage": True}, "user": "me",
        "tools": [{"type": "function", "function": {
            "type": "function", "name": "web", "description": "", "parameters": PARAMETERS,
        }}],
    }),
    "a refusal sent back": ("/v1/chat/completions", {
        "messages": [*CHAT, {"role": "assistant", "content": [
            {"type": "text", "text": "a", "annotations": []}, {"type": "refusal", "refusal": "No."},
        ]}, *CHAT],
    }),
    "LangChain, completion": ("/v1/completions", {
        "model": NAME, "prompt": ["Say hi"], "frequency_penalty": 0, "logit_bias": {}, "logprobs": None,
        "max_tokens": 256, "n": 1, "presence_penalty": 0, "seed": None, "temperature": 0.7, "top_p": 1,
        "best_of": 1,
    }),
    "LiteLLM, chat": ("/v1/chat/completions", {
        "model": NAME, "messages": CHAT, "max_tokens": 64.0, "top_logprobs": 2.0, "logprobs": True, "seed": -1.0,
        "top_k": -1, "user": "", "n": 1.0,
    }),
    "LiteLLM, completion": ("/v1/completions", {"prompt": [[5, 6.0, 7]], "suffix": "", "echo": False}),
    "LM Studio": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": -1, "seed": -1, "stream": False}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), LIBRARIES.values(), ids=LIBRARIES)
def test_what_other_libraries_send(live: Live, say: Any, path: str, body: dict[str, Any]) -> None:
    say("Hello.")
    answer = live.post(path, **body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert (choice["message"]["content"] if "message" in choice else choice["text"]) == "Hello."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wanted", [8192, 32000.0, -1, None])
def test_more_tokens_than_the_server_gives_end_with_length(
    client: openai.OpenAI, say: Any, wanted: float | None, stream: bool
) -> None:
    say("x y " * 200)
    answer = ask(client, max_tokens=wanted, stream=stream)
    (*_, last) = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert last.finish_reason == "length"
    if not stream:
        assert answer.usage.completion_tokens == 300


def sentencepiece_folder(path: Path) -> Path:
    """Words that begin with a blank, and bytes for all other characters."""
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "the", "▁x", "x", "<0x20>x"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = SENTENCES
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    model = tiny_llama(0, vocab=len(words))
    args = {key: value for key, value in vars(model.args).items() if value is not None and key != "layer_types"}
    folder = write_folder(path, model, {**args, "max_position_embeddings": 512})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


TEXTS: dict[Callable[[Path], Path], dict[str, list[str]]] = {
    sentencepiece_folder: {
        "the x x": ["▁the", "▁x", "▁x"],
        " the": ["▁", "▁the"],
        "the😀 x": ["▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁x"],
        "😀": ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"],
        "\ufffd\ufffd x": ["<0xF0>", "<0x9F>", "▁x"],
        "the\n  x": ["the", "<0x0A>", "▁", "▁x"],
    },
    byte_level_folder: {
        " the cat": ["Ġthe", "Ġ", "c", "a", "t"],
        "    return": ["Ġ", "Ġ", "Ġ", "Ġ", "r", "e", "t", "u", "r", "n"],
        "é😀": ["Ã", "©", "ð", "Ł", "ĺ", "Ģ"],
    },
    partial(byte_level_folder, decoder=SENTENCES): {" the a\n x": ["Ġthe", "Ġa", "Ċ", "Ġ", "x"]},  # "tekken"
    partial(byte_level_folder, added=("đem", "ilÖve", "日本é")): {
        "x đem ilÖve日本é": ["x", "Ġ", "đem", "Ġ", "ilÖve", "日本é"]
    },
}


@pytest.mark.parametrize(
    ("make", "text", "words"), [(make, *case) for make, cases in TEXTS.items() for case in cases.items()]
)
def test_text_is_the_tokenizers_own_everywhere(
    tmp_path_factory: pytest.TempPathFactory, say: Any, make: Callable[[Path], Path], text: str, words: list[str]
) -> None:
    """Whole, streamed, with stop strings at the first token, in log probabilities, in what shows single tokens."""
    folder = make(tmp_path_factory.mktemp("models") / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    say([tokenizer.token_to_id(word) for word in words])
    with serving(loader(folder, "ngram", kind=Scripted)) as live:
        chat = live.chat(logprobs=True, top_logprobs=5).json()["choices"][0]
        plain = live.complete(prompt=[5], logprobs=20).json()["choices"][0]
        whole = live.complete(prompt=[5], speculation=True).json()
        stopped = live.complete(prompt=[5], stop=text[:2]).json()["choices"][0]
        with streaming(live, "/v1/completions", prompt=[5]) as response:
            streamed = "".join(chunk["choices"][0]["text"] for chunk in events(response))
    content, shown = chat["logprobs"]["content"], whole["speculation"]
    assert chat["message"]["content"] == plain["text"] == whole["choices"][0]["text"] == streamed == text
    assert "".join(entry["token"] for entry in content) == "".join(plain["logprobs"]["tokens"]) == text
    assert "".join(token["text"] for token in shown["tokens"]) == text
    assert not {"Ġ", "Ċ", "▁"} & set("".join(node["text"] for done in shown["rounds"] for node in done["nodes"]))
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    if "\ufffd" not in text:
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    for entry in content:
        assert all(isinstance(top["bytes"], list) for top in entry["top_logprobs"])
    found = plain["logprobs"]
    starts = [
        text[start:].startswith(token) for start, token in zip(found["text_offset"], found["tokens"], strict=True)
    ]
    assert all(starts)
    for token, chosen, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == chosen
        assert len(top) in (20, 21)
        assert [*top.values()] == sorted(top.values(), reverse=True)
