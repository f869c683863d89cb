"""The command itself, in a process of its own: under load, at its end, and where it may listen."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmcad_mlx import Engine, load
from tests.support.tiny_folder import make_folder

REQUESTS, CLIENTS = 200, 20


pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", context=8192)


@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen[str]

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal; exit code, standard output and error."""
        self.process.send_signal(number)
        said, complained = self.process.communicate(timeout=60)
        return self.process.returncode, said, complained


def command(*arguments: str | Path) -> list[str]:
    run = "import sys; from llmcad_mlx.cli.main import main; sys.argv[0] = 'llmcad-mlx'; main()"
    return [sys.executable, "-c", run, "serve", *map(str, arguments)]


def start(folder: Path, *arguments: str) -> Running:
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("--target", folder, "--port", "0", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving target at http://127.0.0.1:"), process.communicate()
    return Running(line.split()[3], process)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    server = start(folder, "--draft", "ngram")
    yield server
    server.process.kill()
    server.process.communicate()


def wanted(number: int) -> dict[str, Any]:
    """The request of that number: no two are alike."""
    dice = random.Random(number)
    return {
        "prompt": [2 + (number * 37 + index * 11) % 100 for index in range(dice.randint(4, 40))],
        "max_tokens": dice.randint(4, 24),
        "temperature": dice.choice([0.0, 0.8]),
        "seed": number,
    }


class Crowd:
    """Clients that ask at the same time, a third of whose requests they give up."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[int, str] = {}
        self.given_up = 0
        self.resident: dict[int, float] = {}
        self._asked = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(CLIENTS)))

    async def _client(self, number: int) -> None:
        limits = httpx.Limits(max_connections=4)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            for request in range(number, REQUESTS, CLIENTS):
                await self._ask(client, request, f"client {number}")
                self._asked += 1
                asked = self._asked  # others go on while this one asks for the memory
                if asked in (20, REQUESTS):
                    self.resident[asked] = await _resident(client)

    async def _ask(self, client: httpx.AsyncClient, number: int, user: str) -> None:
        body, dice = {**wanted(number), "user": user}, random.Random(number + 10_000)
        gives_up, is_stream = number % 3 == 0, number % 2 == 0
        try:
            async with asyncio.timeout(dice.uniform(0.0, 0.1) if gives_up and not is_stream else None):
                if is_stream:
                    self.answers[number] = await self._streamed(
                        client, body, dice.randint(0, 3) if gives_up else None
                    )
                else:
                    answer = await client.post("/v1/completions", json=body)
                    self.answers[number] = answer.json()["choices"][0]["text"]
        except TimeoutError:
            self.given_up += 1

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any], most: int | None) -> str:
        """The text of a stream. Raises TimeoutError when there are more chunks than `most`."""
        chunks: list[str] = []
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    if len(chunks) == most:
                        raise TimeoutError
                    chunks.append(line[6:])
        *texts, end = chunks
        assert end == "[DONE]"
        return "".join(json.loads(text)["choices"][0]["text"] for text in texts)


async def _resident(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("llmcad_mlx_resident_memory_bytes")))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Engine]:
    with load(folder, None) as engine:
        yield engine


def test_two_hundred_requests_of_twenty_clients(running: Running, reference: Engine) -> None:
    crowd = Crowd(running.url)
    asyncio.run(crowd.run())
    assert len(crowd.answers) + crowd.given_up == REQUESTS
    assert crowd.given_up > REQUESTS // 10
    assert set(range(REQUESTS)) - set(crowd.answers) <= set(range(0, REQUESTS, 3))
    for number, text in crowd.answers.items():
        options = wanted(number)
        alone = reference.generate(options.pop("prompt"), policy="plain", **options)
        assert text == alone.text, f"request {number} got another one's answer"
    assert crowd.resident[REQUESTS] <= crowd.resident[20] * 1.05
    metrics = httpx.get(f"{running.url}/metrics").text
    assert "llmcad_mlx_requests_waiting 0" in metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(folder: Path, number: int) -> None:
    server = start(folder, "--draft", "none")
    body = {"prompt": "the", "max_tokens": 4000, "stream": True, "policy": "plain", "logit_bias": {"1": -1000}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert '"text"' in first
        server.process.send_signal(number)
        rest = [line for line in lines if line.startswith("data: ")]
    said, complained = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "shutting_down" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert said == "stopped; 1 running and 0 waiting requests were ended\n"
    shutting_down, broken_off = complained.splitlines()
    assert shutting_down.endswith(" shutting down; once more to leave at once")
    assert " completion: 1 prompt tokens (0 cached), " in broken_off
    assert broken_off.endswith(" per pass, broken off")


def run_to_the_end(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_what_keeps_it_from_starting(folder: Path) -> None:
    code, line = run_to_the_end("--target", folder, "--host", "0.0.0.0")
    assert code == 2
    assert line == (
        "error: host: 0.0.0.0 can be reached from other machines, so it needs a key; "
        "give --api-key or set LLMCAD_MLX_API_KEY\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = run_to_the_end("--target", folder, "--port", port)
    assert code == 2
    assert line == f"error: port: 127.0.0.1:{port} cannot be used: Address already in use; give another --port\n"
    code, line = run_to_the_end("--target", folder / "nothing", "--port", "0")
    assert code != 0
    assert line.startswith("error: ")
    assert line.count("\n") == 1
