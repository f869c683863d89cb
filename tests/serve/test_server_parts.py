"""Parts of the server alone: the fair queue, tool calls in text, requests, the prompt cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx import Engine, UsageError
from llmcad_mlx.errors import BudgetError
from llmcad_mlx.loader import load_pair
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.jobs import FairQueue, Job, RoundEvent, TokenEvent
from llmcad_mlx.serve.opening import beginning_with_call
from llmcad_mlx.serve.parts import AnswerListener, PartMaker
from llmcad_mlx.serve.protocol import ApiError, GenerationRequest, RequestReader
from llmcad_mlx.serve.worker import PromptCache, cache_limit
from llmcad_mlx.settings import GenerationOptions, MemoryOptions, SamplingSettings
from llmcad_mlx.store.names import public_name

pytestmark = pytest.mark.usefixtures("tiny_home")


def job(client: str) -> Any:
    return SimpleNamespace(client=client)


def taken(queue: FairQueue) -> list[str]:
    return [item.client for _ in range(len(queue)) if (item := queue.take()) is not None]


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_no_client_is_served_twice_while_another_waits(clients: list[str]) -> None:
    queue = FairQueue(100)
    for client in clients:
        queue.put(job(client))
    order = taken(queue)
    assert sorted(order) == sorted(clients)
    for client in set(clients):
        last = len(order) - 1 - order[::-1].index(client)
        for other in set(clients) - {client}:
            # Until a client has everything, the others get at most one more than it.
            assert order[:last].count(other) <= order[:last].count(client) + 1


def test_a_closed_queue_takes_no_more() -> None:
    queue = FairQueue(4)
    queue.close()
    assert queue.take() is None
    with pytest.raises(ApiError, match="shutting down"):
        queue.put(job("a"))


def heard(
    text: str,
    size: int,
    start: str = "<tool_call>",
    end: str = "</tool_call>",
    thinking: bool | None = None,
    one_call: bool = False,
) -> tuple[str, str, list[Any]]:
    """What is text, thinking and calls of an answer that comes in pieces of a size."""

    def parse(text: str, tools: Any) -> Any:
        return json.loads(text)

    tokenizer = SimpleNamespace(
        tool_call_start=start, tool_call_end=end, tool_parser=parse, think_start="<think>", think_end="</think>"
    )
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    listener = AnswerListener(tokenizer, tools, thinking, one_call)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    all_heard = [*(listener.feed(piece) for piece in pieces), listener.finish()]
    calls = [call["function"] for one in all_heard for call in one.calls]
    texts, thoughts = ("".join(getattr(one, name) for one in all_heard) for name in ("text", "reasoning"))
    return texts, thoughts, [(call["name"], call["arguments"]) for call in calls]


JSON = '{"name": "f", "arguments": {"x": "é<"}}'
CALL = f"<tool_call>{JSON}</tool_call>"
FOUND = ("f", '{"x": "é<"}')


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("no call <at all>", "no call <at all>", []),
        (CALL, "", [FOUND]),
        (f"first {CALL}\n {CALL} then\n more", "first then\n more", [FOUND, FOUND]),
        (CALL.removesuffix("</tool_call>"), "", [FOUND]),
        ("a <tool_call>nonsense</tool_call> b", "a <tool_call>nonsense</tool_call> b", []),
        ("a <tool_call>[1]</tool_call>", "a <tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ("cut <tool_call>{", "cut <tool_call>{", []),
        ("cut <tool_c", "cut <tool_c", []),
        # Models trained otherwise than their template says.
        (JSON, "", [FOUND]),
        (f" {JSON}\n{JSON}", " ", [FOUND, FOUND]),
        (f"[{JSON}, {JSON}]", "", [FOUND, FOUND]),
        (JSON.replace("arguments", "parameters"), "", [FOUND]),
        (f"Sure:\n```json\n{JSON}\n```\nDone.", "Sure:\nDone.", [FOUND]),
        (f"```json\n{JSON}```", "", [FOUND]),
        (f"```\n{JSON}\n{JSON}\n```", "", [FOUND, FOUND]),
        (f"{JSON} is what I would call", f"{JSON} is what I would call", []),
        (f"I would say {JSON}", f"I would say {JSON}", []),
        (JSON.replace('"f"', '"h"'), JSON.replace('"f"', '"h"'), []),
        (JSON[:-1], JSON[:-1], []),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('{"name": "f", "arguments": 5}', '{"name": "f", "arguments": 5}', []),
        (f'{{"a": [1, 2]}} and {CALL}', '{"a": [1, 2]} and ', [FOUND]),
        ('```json\n{"a": 1}\n```\nthen', '```json\n{"a": 1}\n```\nthen', []),
        ("```python\nf({})\n```\n", "```python\nf({})\n```\n", []),
        (f"```json\n{CALL}\n```", "```json\n```", [FOUND]),
        ("[" * 3000, "[" * 3000, []),
        ("[{" * 3000, "[{" * 3000, []),
        ("<think>is text</think>", "<think>is text</think>", []),
    ],
)
def test_tool_calls_however_the_text_is_cut(
    text: str, shown: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert heard(text, size) == (shown, "", calls)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "is_open", "shown", "thought", "calls"),
    [
        ("plan</think>Paris", True, "Paris", "plan", []),
        ("<think>\nplan\n</think>\n\nParis", False, "Paris", "\nplan\n", []),
        ("Paris", False, "Paris", "", []),
        ("only a plan", True, "", "only a plan", []),
        ("cut</thi", True, "", "cut</thi", []),
        ("cut<thi", False, "cut<thi", "", []),
        ("a</think>b<think>c</think>d", True, "bd", "ac", []),
        (f"I could {CALL} or {JSON}</think>\n{CALL}", True, "", f"I could {CALL} or {JSON}", [FOUND]),
        (f"plan</think>\n{JSON}", True, "", "plan", [FOUND]),
        (CALL.replace("é<", "<think>"), False, "", "", [("f", '{"x": "<think>"}')]),
    ],
)
def test_thinking_is_told_from_text(
    text: str, is_open: bool, shown: str, thought: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert heard(text, size, thinking=is_open) == (shown, thought, calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        (f"a{CALL}{CALL} and more", "<tool_call>", "</tool_call>"),
        (f"a[CALL]{JSON}[CALL]{JSON}", "[CALL]", ""),
        (f"a```json\n[{JSON}, {JSON}]\n```more", "<tool_call>", "</tool_call>"),
    ],
)
def test_nothing_comes_after_the_one_call_that_is_wanted(text: str, start: str, end: str, size: int) -> None:
    assert heard(text, size, start, end, one_call=True) == ("a", "", [FOUND])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_without_an_end_marker(size: int) -> None:
    text = 'so [CALL]{"name": "f", "arguments": {}}[CALL]{"name": "g", "arguments": {"y": 1}}'
    assert heard(text, size, "[CALL]", "") == ("so ", "", [("f", "{}"), ("g", '{"y": 1}')])


def test_every_token_and_every_tree_is_in_one_part() -> None:
    maker = PartMaker(None)
    trees: list[dict[str, Any]] = [{"index": index} for index in range(3)]
    texts = ["a", "", "b", "", "c"]
    first, held, second, silent, last = (TokenEvent(at, text, False) for at, text in enumerate(texts, 1))
    rounds = [[first, held, second], [silent], [last]]
    parts = [part for event in map(RoundEvent, rounds, trees) for part in maker.round(event)]
    told = [(part.text, [one.token for one in part.tokens], part.tree) for part in [*parts, maker.finish()]]
    assert told == [
        ("a", [1], trees[0]),
        ("b", [2, 3], None),
        ("", [4], trees[1]),  # its round showed nothing, and the next one has a tree of its own
        ("c", [5], trees[2]),
        ("", [], None),
    ]


def test_who_reads_too_slowly_is_cut_off() -> None:
    """What a client has not read yet is kept for it, but not without end."""

    async def fill() -> Job:
        job = Job(GenerationRequest("chat", "", GenerationOptions()), [], "me", asyncio.get_running_loop())
        for _ in range(3000):
            job.send(RoundEvent([TokenEvent(5, "a", False)], None))
            await asyncio.sleep(0)
        return job

    full = asyncio.run(fill())
    assert full.events.qsize() < 1100
    assert full.cancelled is not None
    assert full.cancelled.code == "slow_reader"


MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATES = {
    "json": (
        '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
        '<tool_call>\n{"name": "%s", "arguments": {',
    ),
    "tags": (
        "<tool_call>\n<function=%s>\n<parameter=a>%s</function>",
        "<tool_call>\n<function=%s>\n<parameter=a>{",
    ),
    "brackets": ("[TOOL_CALLS]%s[ARGS]%s", "[TOOL_CALLS]%s[ARGS]{"),
}


@pytest.mark.parametrize(("written", "opening"), TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    ("names", "shared"), [(("get_town",), None), (("get_town", "get_sun", "get"), "get"), (("f", "g"), "")]
)
@pytest.mark.parametrize("is_thinking", [False, True])
def test_an_answer_begins_as_the_template_writes_calls(
    written: str, opening: str, names: tuple[str, ...], shared: str | None, is_thinking: bool
) -> None:
    """A tokenizer whose tokens are letters, and a template that shows the form to the model before it uses it."""

    def rendered(messages: Any, **options: Any) -> str:
        function = messages[-1]["tool_calls"][0]["function"]
        call = written % (function["name"], json.dumps(function["arguments"]))
        return f"{options['tools']} like {written % ('name', '{}')}\nassistant\n{call}<end>"

    tokenizer = SimpleNamespace(
        apply_chat_template=rendered, encode=lambda text, **_: [*map(ord, text)], has_chat_template=True,
        tool_call_start=written.partition("\n" if "\n" in written else "%s")[0], think_end="</think>",
    )  # fmt: skip
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    asked = GenerationRequest("chat", [], GenerationOptions(), tools, must_call=names)
    forced = beginning_with_call(asked, [1, 2], tokenizer, is_thinking).options.sampling.logits_processors
    tokens = [1, 2]
    while True:
        row = mx.zeros((1, 200))
        for process in forced:
            row = process(mx.array(tokens), row)
        if row.min().item() == 0.0:
            break
        assert (row > -mx.inf).sum().item() == 1
        tokens.append(int(row.argmax().item()))
    expected = opening % names[0] if shared is None else f"{opening.partition('%s')[0]}{shared}"
    assert "".join(map(chr, tokens[2:])) == ("</think>\n\n" if is_thinking else "") + expected


@pytest.mark.parametrize("template", ["no calls", "it raises"])
def test_a_template_without_calls_cannot_begin_one(template: str) -> None:
    def rendered(messages: Any, **_: Any) -> str:
        if template == "it raises":
            raise TypeError("no calls here")
        return "f g <tool"

    tokenizer = SimpleNamespace(
        apply_chat_template=rendered, has_chat_template=True, tool_call_start="<tool_call>", encode=None
    )
    asked = GenerationRequest("chat", [], GenerationOptions(), [], must_call=("f",))
    with pytest.raises(ApiError, match="tool_choice: this model's chat template shows no form of calls"):
        beginning_with_call(asked, [1], tokenizer, False)


READER = RequestReader(ServerSettings(max_tokens=100, temperature=0.25), "tiny")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": -1}, {"max_tokens": 100}), ({"max_tokens": 32000}, {"max_tokens": 100}),
        ({"max_completion_tokens": 101.0}, {"max_tokens": 100}), ({"max_tokens": 99}, {"max_tokens": 99}),
        ({"seed": -1}, {"seed": 2**64 - 1}), ({"seed": -(2**63)}, {"seed": 2**63}), ({"seed": 7.0}, {"seed": 7}),
        ({"top_k": -1, "temperature": 1}, {"top_k": 0, "temperature": 1.0}),
        ({"top_p": 0, "temperature": 1}, {"top_p": 1.0, "temperature": 0.0, "top_k": 0}),
    ],
)  # fmt: skip
def test_what_values_of_other_apis_mean(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    reader = RequestReader(ServerSettings(max_tokens=100), "tiny", {"temperature": 0.7, "top_k": 5, "top_p": 0.9})
    options = reader.chat(json.dumps({"messages": MESSAGES, **fields}).encode()).options.keywords()
    assert {name: options[name] for name in expected} == expected


def test_what_a_request_asks_for() -> None:
    asked = READER.chat(json.dumps({
        "messages": [*MESSAGES, {"role": "developer", "content": [{"type": "text", "text": "a"}] * 2}],
        "temperature": 1, "top_p": 0.5, "stop": ["a", "b"], "seed": 2**64 - 1, "n": 1, "logit_bias": {"5": -1},
        "speculation": {"tokens": True}, "max_tokens": None, "max_completion_tokens": 7, "user": "me",
        "tools": None,
    }).encode())  # fmt: skip
    assert asked == GenerationRequest(
        "chat", [*MESSAGES, {"role": "system", "content": "aa"}],
        GenerationOptions.of(
            temperature=1.0, top_p=0.5, stop=["a", "b"], seed=2**64 - 1, logit_bias={5: -1.0}, max_tokens=7
        ),
        show_tokens=True, user="me",
    )  # fmt: skip
    asked = READER.completion(b'{"prompt": [1, 2], "echo": false, "logprobs": 3, "speculation": true}')
    assert (asked.prompt, asked.top_logprobs, asked.show_tokens, asked.show_trees) == ([1, 2], 3, True, True)
    assert (asked.options.sampling.temperature, asked.options.stopping.max_tokens) == (0.25, 100)


OWN = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("server", "asked", "used"),
    [
        (None, {}, OWN),
        (None, {"top_p": 0.5}, {**OWN, "top_p": 0.5}),
        (None, {"temperature": 1.5}, {**OWN, "temperature": 1.5}),
        (None, {"temperature": 0}, {}),
        (None, {"temperature": None}, OWN),
        (0.0, {}, {}),
        (0.0, {"temperature": 0.9}, {**OWN, "temperature": 0.9}),
        (0.3, {}, {**OWN, "temperature": 0.3}),
    ],
)
def test_a_models_own_sampling_is_what_requests_get_that_ask_for_none(
    server: float | None, asked: dict[str, Any], used: dict[str, float]
) -> None:
    reader = RequestReader(ServerSettings(temperature=server), "tiny", OWN)
    body = json.dumps({"messages": MESSAGES, "seed": 3, **asked}).encode()
    assert reader.chat(body).options.sampling == SamplingSettings(seed=3, **used)
    if not asked:
        assert reader.default_sampling.items() >= used.items()


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name(None) == "smollm2-135m"
    assert public_name("qwen3-8b") == "qwen3-8b"
    assert public_name("mlx-community/Qwen3-8B-4bit") == "mlx-community/Qwen3-8B-4bit"
    assert public_name(str(tmp_path / "local")) == public_name("local") == public_name("./local/") == "local"
    assert public_name(f"4bit:{tmp_path / 'local'}") == "4bit:local"
    assert public_name(str(tmp_path / "caf\udce9")) == "caf\ufffd"  # JSON has no place for what is no text


@settings(deadline=None, max_examples=5)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=10))
def test_the_limit_holds_whoever_asks(engine: Engine, order: list[int]) -> None:
    def sizes(limit: int, order: list[int]) -> Iterator[int]:
        cache = PromptCache(limit)
        engine.restore(None)  # what another test has left
        for start in order:
            prompt = [2 + (start * 31 + index * 7) % 100 for index in range(60)]
            cache.switch(engine, prompt)
            engine.generate(prompt, max_tokens=8, policy="chain")
            yield cache.nbytes

    _, of_one = sizes(1 << 30, [90, 91])
    assert of_one > 0
    for limit in (round(of_one * 2.5), 0):
        assert max(sizes(limit, order)) <= limit


def test_room_for_the_cache_is_part_of_the_plan(engine: Engine) -> None:
    folder, budget, reserved = str(engine.pair.names.target_path), 8 << 30, 300 << 20
    plans = []
    for options in (MemoryOptions(memory=budget), MemoryOptions(memory=budget, reserved=reserved)):
        pair = load_pair(folder, "none", False, options)
        plans.append(pair.plan)
        pair.release()
    without, within = plans
    taken = within.runtime_bytes - without.runtime_bytes
    assert abs(taken - reserved) < 50 << 20  # what the process itself takes changes a little meanwhile
    with pytest.raises(BudgetError):
        load_pair(folder, "none", False, MemoryOptions(memory=budget, reserved=budget))


def test_how_much_the_cache_may_take() -> None:
    assert cache_limit("0", None) == 0
    assert cache_limit("200MB", 10**9) == 200 * 10**6
    assert cache_limit("auto", 10**9) == 50 * 10**6
    assert cache_limit("auto", 10**12) == 1 << 30
    assert 0 < cache_limit("auto", None) <= 1 << 30
    with pytest.raises(UsageError, match="prompt-cache"):
        cache_limit("much", None)
