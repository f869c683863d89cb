"""Who is served when: turns, a full queue, clients that go away, the end. Rounds wait for the test."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmcad_mlx import Engine
from llmcad_mlx.api import Response
from tests.support.serving import Live, events, loader, serving, streaming

pytestmark = pytest.mark.usefixtures("tiny_home")


@dataclass
class Gates:
    """What one server's engine waits for and has done."""

    open: threading.Event = field(default_factory=threading.Event)
    rounds: int = 0
    prompts: list[Any] = field(default_factory=list)
    failure: Exception | None = None
    prompt_steps: int = 0
    hold_prompt: bool = False
    slow_prompt_s: float = 0.0


@pytest.fixture
def gates() -> Gates:
    return Gates()


def gated(folder: Path, gates: Gates) -> Callable[[], Engine]:
    """An engine that ends no round before the gate is open."""

    class Gated(Engine):
        def stream_generate(
            self, prompt: Any, on_progress: Any, on_round: Any, **options: Any
        ) -> Iterator[Response]:
            gates.prompts.append(list(prompt))
            if gates.failure is not None:
                raise gates.failure

            def progress(done: int, total: int) -> None:
                gates.prompt_steps += 1
                time.sleep(gates.slow_prompt_s)
                if gates.hold_prompt:
                    assert gates.open.wait(60)
                on_progress(done, total)

            def wait(done: Any) -> None:
                gates.rounds += 1
                assert gates.open.wait(60)
                on_round(done)

            return super().stream_generate(prompt, progress, wait, **options)

    return loader(folder, None, Gated)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def live(endless: Path, gates: Gates) -> Iterator[Live]:
    with serving(gated(endless, gates), max_queue=4, keepalive_s=0.05) as server:
        yield server
        gates.open.set()  # nothing waits for a test that has failed


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come about")


def queued(live: Live, state: str, count: int) -> None:
    """Wait until so many requests are "waiting" or "running"."""
    until(lambda: live.metric(f"requests_{state}") == count)


def ask(threads: ThreadPoolExecutor, live: Live, first: int, user: str, **more: Any) -> Future[httpx.Response]:
    return threads.submit(live.complete, prompt=[first, 5, 6], user=user, max_tokens=3, policy="plain", **more)


def test_clients_take_turns_and_a_full_queue_is_a_429(
    live: Live, gates: Gates, threads: ThreadPoolExecutor
) -> None:
    answers = [ask(threads, live, 10, "first")]
    queued(live, "running", 1)

    def wait_in_line(first: int, user: str) -> None:
        answers.append(ask(threads, live, first, user))
        queued(live, "waiting", len(answers) - 1)

    wait_in_line(11, "a")
    wait_in_line(12, "a")
    refused = ask(threads, live, 13, "a").result()  # half of the places
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    wait_in_line(14, "b")
    wait_in_line(15, "c")
    assert ask(threads, live, 16, "d", stream=True).result().status_code == 429
    gates.open.set()
    assert [answer.result().status_code for answer in answers] == [200] * 5
    assert [prompt[0] for prompt in gates.prompts] == [10, 11, 14, 15, 12]


@pytest.mark.parametrize("hold_prompt", [False, True], ids=["decoding", "reading a long prompt"])
def test_a_vanished_streams_generation_ends_with_its_round(live: Live, gates: Gates, hold_prompt: bool) -> None:
    gates.hold_prompt = hold_prompt
    prompt = [5, 6, 7] * (1000 if hold_prompt else 1)
    with streaming(live, "/v1/completions", prompt=prompt, max_tokens=200, policy="plain"):
        until(lambda: (gates.prompt_steps if hold_prompt else gates.rounds) == 1)
    # The server has noticed.
    until(lambda: live.metric("requests_total", path="/v1/completions", status="200") == 1)
    gates.open.set()
    queued(live, "running", 0)
    assert gates.rounds == int(not hold_prompt)
    assert gates.prompt_steps == 1 or not hold_prompt
    assert live.complete(max_tokens=3).status_code == 200


def test_a_vanished_request_without_a_stream_ends_too(live: Live, gates: Gates) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/completions", json={"prompt": "the", "policy": "plain"}, timeout=0.5)
    until(lambda: live.metric("requests_total", path="/v1/completions", status="499") == 1)
    gates.open.set()
    queued(live, "running", 0)
    assert gates.rounds == 1
    assert live.complete(max_tokens=3).status_code == 200


def test_who_leaves_the_queue_frees_a_place(live: Live, gates: Gates, threads: ThreadPoolExecutor) -> None:
    first = ask(threads, live, 10, "first")
    queued(live, "running", 1)
    with streaming(live, "/v1/completions", user="a") as response:
        queued(live, "waiting", 1)
        assert next(response.iter_lines()) == ": still working"  # waiting is not silence
    queued(live, "waiting", 0)
    gates.open.set()
    assert first.result().status_code == 200
    assert len(gates.prompts) == 1


@pytest.mark.parametrize("keepalive_s", [0.05, 10.0])
def test_a_stream_has_comments_only_after_a_silence(endless: Path, gates: Gates, keepalive_s: float) -> None:
    gates.open.set()
    gates.slow_prompt_s = 0.03  # a chunk of a prompt is no silence yet, several are
    with serving(gated(endless, gates), keepalive_s=keepalive_s) as live:
        answer = live.complete(prompt=[5, 6, 7] * 2000, max_tokens=3, policy="plain", stream=True)
    assert gates.prompt_steps > 3
    comments = [line for line in answer.text.splitlines() if line.startswith(":")]
    assert set(comments) <= {": still working"}
    assert bool(comments) == (keepalive_s < 1)
    assert len(events(answer)) >= 3


def test_the_end_tells_everybody(endless: Path, gates: Gates, threads: ThreadPoolExecutor) -> None:
    with serving(gated(endless, gates)) as live:
        first = ask(threads, live, 10, "first", stream=True)
        queued(live, "running", 1)
        second = ask(threads, live, 11, "a")
        queued(live, "waiting", 1)
        live.server.stop()
        assert second.result().status_code == 503
        assert second.result().json()["error"]["code"] == "shutting_down"
        *_, last = events(first.result())  # told at once, whatever its round takes
        assert last["error"]["message"] == "the server is shutting down"
        gates.open.set()
    assert gates.rounds == 1


def test_an_internal_error_tells_no_secrets(live: Live, gates: Gates, caplog: pytest.LogCaptureFixture) -> None:
    gates.open.set()
    gates.failure = RuntimeError("/home/me/secret is broken")
    answer = live.complete()
    assert answer.status_code == 500
    told = re.fullmatch(
        r"(internal error \w+); the server's log has the details", answer.json()["error"]["message"]
    )
    assert told is not None
    assert told[1] in caplog.text
    assert "/home/me/secret is broken" in caplog.text
    gates.failure = None
    assert live.complete(max_tokens=3).status_code == 200
