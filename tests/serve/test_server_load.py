"""The command itself, in a process of its own: under load, at its end, and where it may listen."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmcad_mlx import Engine, UsageError, load
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.server import LlmServer
from tests.support.command_line import start

REQUESTS, CLIENTS = 200, 20


pytestmark = pytest.mark.usefixtures("tiny_home")


def served(folder: Path, *arguments: str) -> tuple[str, subprocess.Popen[Any]]:
    """A server's address and its process."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    process: subprocess.Popen[Any] = start(
        "serve", "--target", folder, "--port", "0", *arguments, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving endless at http://127.0.0.1:"), process.communicate()
    return line.split()[3], process


@pytest.mark.parametrize(
    ("first", "second"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("localhost", "localhost")],
)
def test_of_two_that_start_at_once_the_second_is_told_before_it_loads(first: str, second: str) -> None:
    """The first one still loads."""
    loading, told = threading.Event(), threading.Event()

    def load_until_told() -> Engine:
        loading.set()
        told.wait(30)
        raise UsageError("made up")

    def never() -> Engine:
        raise AssertionError("it loads")

    def settings(host: str, port: int) -> ServerSettings:
        return ServerSettings(host=host, port=port, api_key="12345678")

    early = LlmServer(settings(first, 0), load_until_told, "early")
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(early.start)
        assert loading.wait(30)
        port = int(early.url.rpartition(":")[2])
        try:
            with pytest.raises(
                UsageError, match=rf"port: {second}:{port} cannot be used: Address already in use; g"
            ):
                LlmServer(settings(second, port), never, "late").start()
        finally:
            told.set()
        with pytest.raises(UsageError, match="made up"):
            started.result(30)
    # What failed has let go of the port.
    with pytest.raises(AssertionError, match="it loads"):
        LlmServer(settings(second, port), never, "late").start()


def test_where_others_addresses_of_a_port_are_free_it_is_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on macOS, where binding would do."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be used: Address already in use"):
            LlmServer(ServerSettings(port=port), lambda: pytest.fail("it loads"), "late").start()


@pytest.fixture(scope="module")
def url(endless: Path) -> Iterator[str]:
    url, process = served(endless, "--draft", "ngram")
    yield url
    process.kill()
    process.communicate()


def wanted(number: int) -> dict[str, Any]:
    """The request of that number: no two are alike."""
    dice = random.Random(number)
    return {
        "prompt": [2 + (number * 37 + index * 11) % 100 for index in range(dice.randint(4, 40))],
        "max_tokens": dice.randint(4, 24),
        "temperature": dice.choice([0.0, 0.8]),
        "seed": number,
    }


def answer(client: httpx.Client, number: int) -> str | None:
    """The text that answers a request; None for one that is given up, as a third of them are."""
    body, dice = {**wanted(number), "user": f"client {number % CLIENTS}"}, random.Random(number + 10_000)
    gives_up = number % 3 == 0
    if number % 2:
        try:
            timeout = dice.uniform(0.0, 0.1) if gives_up else 120
            return client.post("/v1/completions", json=body, timeout=timeout).json()["choices"][0]["text"]
        except httpx.TimeoutException:
            return None
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        data = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        chunks = [*islice(data, dice.randint(0, 3) if gives_up else None)]
    if chunks[-1:] != ["[DONE]"]:
        assert gives_up
        return None
    return "".join(json.loads(text)["choices"][0]["text"] for text in chunks[:-1])


def answers(url: str, numbers: range) -> tuple[dict[int, str], float]:
    """Answers to requests of clients that all ask at the same time, and the server's memory after it."""
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(CLIENTS) as pool:
        texts = [*pool.map(partial(answer, client), numbers)]
        lines = client.get("/metrics").text.splitlines()
    resident = next(line for line in lines if line.startswith("llmcad_mlx_resident_memory_bytes"))
    answered = {number: text for number, text in zip(numbers, texts, strict=True) if text is not None}
    return answered, float(resident.split()[1])


def test_two_hundred_requests_of_twenty_clients(url: str, endless: Path) -> None:
    first, resident_early = answers(url, range(CLIENTS))
    later, resident_late = answers(url, range(CLIENTS, REQUESTS))
    texts = first | later
    assert len(texts) < REQUESTS * 0.9
    assert set(range(REQUESTS)) - set(texts) <= set(range(0, REQUESTS, 3))
    with load(endless, None) as reference:
        for number, text in texts.items():
            alone = reference.generate(policy="plain", **wanted(number))
            assert text == alone.text, f"request {number} got another one's answer"
    assert resident_late <= resident_early * 1.05
    assert "llmcad_mlx_requests_waiting 0" in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(endless: Path, number: int) -> None:
    url, process = served(endless, "--draft", "none")
    body = {"prompt": "the", "max_tokens": 4000, "stream": True, "policy": "plain"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert '"text"' in first
        process.send_signal(number)
        rest = [line for line in lines if line.startswith("data: ")]
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "shutting_down" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert said == "stopped; 1 running and 0 waiting requests were ended\n"
    shutting_down, broken_off = complained.splitlines()
    assert shutting_down.endswith(" shutting down; once more to leave at once")
    assert " completion: 1 prompt tokens (0 cached), " in broken_off
    assert broken_off.endswith(" per pass, broken off")


def test_what_keeps_it_from_starting(endless: Path, output: Callable[..., tuple[str, str]]) -> None:
    assert output("serve", "--target", endless, "--host", "0.0.0.0", code=2) == (
        "",
        "error: host: 0.0.0.0 can be reached from other machines, so it needs a key; "
        "give --api-key or set LLMCAD_MLX_API_KEY\n",
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = output("serve", "--target", endless, "--port", port, code=2)
    problem = f"127.0.0.1:{port} cannot be used: Address already in use"
    assert said == ("", f"error: port: {problem}; give another --port\n")
    for wrong in ("{", "[1]"):
        for command in ("serve", "chat", "generate hi"):
            words = (*command.split(), "--target", endless)
            said = output(*words, "--chat-template-config", wrong, code=2)
            assert said[1].startswith(f"error: chat-template-config: '{wrong}' is no JSON object; write it like ")
    said = output("serve", "--target", endless, "--chat-template-args", '{"tokenize": true}', code=2)
    assert said[1].startswith("error: chat-template-config.tokenize: is not a variable of the chat template")
    out, line = output("serve", "--target", endless / "nothing", "--port", "0", code=1)
    assert out == ""
    assert line.startswith("error: ")
    assert line.count("\n") == 1
