"""One engine, many callers: threads, event loops, forked processes, callbacks."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from llmcad_mlx import Engine, UsageError, cpu
from llmcad_mlx.engine.turns import Turn, Turns
from tests.support.real_text import PROMPTS, chat, default_engine

TEXTS = ("then the other one ran in", "the cat and the hen", "on the other hand", "in the an", "the " * 9)


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.embedded)])
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, list[Any]]]:
    """An engine that all of a test's threads call, and prompts for it."""
    if request.param == "tiny":
        yield request.getfixturevalue("engine"), list(TEXTS)
        return
    with default_engine() as loaded:
        yield loaded, [chat(prompt) for prompt in PROMPTS[:5]]


def run_together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call returns or raises, all begun at once in threads of their own."""
    ready = threading.Barrier(len(calls))

    def call(work: Callable[[], Any]) -> Any:
        ready.wait()
        try:
            return work()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


@pytest.mark.parametrize("num_threads", [2, 4, 8])
def test_threads_wait_for_each_other_and_get_their_own_texts(
    shared: tuple[Engine, list[Any]], num_threads: int
) -> None:
    engine, prompts = shared
    prompts = [prompts[number % len(prompts)] for number in range(num_threads)]
    expected = [engine.generate(prompt, max_tokens=12).tokens for prompt in prompts]

    def whole(prompt: Any) -> list[int]:
        return engine.generate(prompt, max_tokens=12).tokens

    def streamed(prompt: Any) -> list[int]:
        return [response.token for response in engine.stream_generate(prompt, max_tokens=12)]

    ways = [whole, streamed]
    calls = [lambda way=ways[i % 2], prompt=prompt: way(prompt) for i, prompt in enumerate(prompts)]  # type: ignore[misc]
    assert run_together(calls) == expected


def test_event_loops_may_step_from_any_thread(shared: tuple[Engine, list[Any]]) -> None:
    """Each step in whichever thread the pool gives it, as web frameworks do."""
    engine, prompts = shared
    expected = [engine.generate(prompt, max_tokens=10).tokens for prompt in prompts[:3]]

    async def generate(prompt: Any) -> list[int]:
        stream, tokens = engine.stream_generate(prompt, max_tokens=10), []
        while (response := await asyncio.to_thread(next, stream, None)) is not None:
            tokens.append(response.token)
        return tokens

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*map(generate, prompts[:3]))

    assert asyncio.run(all_at_once()) == expected


def test_what_a_response_holds_can_be_read_in_any_thread(shared: tuple[Engine, list[Any]]) -> None:
    engine, prompts = shared
    for response in run_together([lambda: list(engine.stream_generate(prompts[0], max_tokens=4))])[0]:
        logprobs = np.asarray(mx.exp(response.logprobs))
        assert logprobs.sum() == pytest.approx(1.0, abs=1e-3)
        assert int(logprobs.argmax()) == response.token


def test_a_turn_may_move_from_thread_to_thread(shared: tuple[Engine, list[Any]]) -> None:
    """Caches, snapshots and the next turn, wherever they are asked for."""
    engine, prompts = shared
    engine.restore(None)
    (first,) = run_together([lambda: engine.generate(prompts[1], max_tokens=8)])
    (snapshot,) = run_together([engine.snapshot])
    engine.generate(prompts[2], max_tokens=3)
    (none,) = run_together([lambda: engine.restore(snapshot)])
    assert none is None
    again = engine.generate(prompts[1], max_tokens=8)
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens > 0


def test_a_forked_engine_says_so(shared: tuple[Engine, list[Any]]) -> None:
    engine, prompts = shared
    engine.generate(prompts[0], max_tokens=1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # it must neither compute nor run pytest's end
        try:
            engine.generate(prompts[0], max_tokens=1)
        except UsageError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said == "this engine was loaded before the process forked; load the model in this process"
    assert engine.generate(prompts[0], max_tokens=1).tokens


@pytest.mark.parametrize("callback", ["on_progress", "on_round", "processor"])
def test_calls_from_inside_a_generation_are_refused_or_wait(engine: Engine, callback: str) -> None:
    def call(*_: Any) -> Any:
        engine.generate("the", max_tokens=1)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        call()
        return logits

    options = {"logits_processors": [process]} if callback == "processor" else {callback: call}
    with pytest.raises(UsageError, match=r"from inside its own generation|ended when a newer one began"):
        list(engine.stream_generate(TEXTS[0], max_tokens=4, **options))
    assert engine.generate(TEXTS[0], max_tokens=2).tokens


def test_a_generation_left_standing_by_a_thread_that_ended_blocks_nobody(engine: Engine) -> None:
    left: list[Any] = []

    def begin() -> None:
        left.append(engine.stream_generate(TEXTS[0], max_tokens=9))
        next(left[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    newer = engine.generate(TEXTS[1], max_tokens=9).tokens
    with pytest.raises(UsageError, match="ended when a newer one began"):
        list(left[0])
    assert engine.generate(TEXTS[1], max_tokens=9, policy="plain").tokens == newer


def test_without_kernels_of_our_own_threads_work_as_well(
    folder: Any, draft: Any, tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: MLX's own operations, whose unfinished arrays belong to a thread."""
    monkeypatch.setenv(cpu.SWITCH, "mlx")
    from llmcad_mlx import load

    with load(folder, draft) as own:
        expected = [own.generate(text, max_tokens=40, tree_nodes=12).tokens for text in TEXTS]
        for _ in range(3):
            calls = [lambda text=text: own.generate(text, max_tokens=40, tree_nodes=12).tokens for text in TEXTS]
            assert run_together(calls) == expected  # type: ignore[arg-type]
        stream, stepped = own.stream_generate(TEXTS[0], max_tokens=200, tree_nodes=12), []
        while (response := run_together([lambda: next(stream, None)])[0]) is not None:  # a new thread each time
            stepped.append(response.token)
        assert stepped == own.generate(TEXTS[0], max_tokens=200, policy="plain").tokens


# -- the rule alone ------------------------------------------------------------------------------------------


def test_closing_waits_for_a_step_but_not_for_its_generation() -> None:
    turns, turn, order = Turns(), Turn(), []
    stepping, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def generate() -> None:
        with turns.step(turn, first=True):
            stepping.set()
            go_on.wait()
            order.append("stepped")
        closed.wait()
        with pytest.raises(UsageError, match="newer one"), turns.step(turn):
            pass

    def close() -> None:
        with turns.closing():
            order.append("closed")
        closed.set()

    first, second = threading.Thread(target=generate), threading.Thread(target=close)
    first.start()
    stepping.wait()
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert order == ["stepped", "closed"]
