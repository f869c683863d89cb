"""mlx-lm's own commands with the plugin, on the embedded model, beside mlx-lm without it."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx_lm
import pytest

from llmcad_mlx import load
from llmcad_mlx.mlx_lm_plugin.__main__ import main
from llmcad_mlx.store.names import DEFAULT_PRESET, resolve_target
from tests.models.test_config import rewrite
from tests.support.tiny_folder import make_folder

SPECULATED = re.compile(r"llmcad-mlx: (\d+) tokens in (\d+) passes of the target, (\d+) drafted tokens accepted")
Loaded = tuple[Any, Any]  # an mlx-lm model and its tokenizer
COUNT = "Say the numbers: 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3."


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_target(DEFAULT_PRESET)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    """In fp32, which changes no weight's value: mlx-lm itself is slow and inexact in fp16 on a CPU."""
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture
def folder_of_tokens(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny folder to change; the command's words and log are put back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    logger = logging.getLogger("llmcad_mlx.mlx_lm_plugin")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, [] if name == "handlers" else getattr(logger, name))
    return make_folder(tmp_path / "model")


COMMAND = [sys.executable, "-m", "llmcad_mlx.mlx_lm_plugin"]


def run(*command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def answer(loaded: Loaded, question: str, max_tokens: int) -> str:
    """mlx-lm's greedy text."""
    prompt = loaded[1].apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    return mlx_lm.generate(*loaded, prompt, max_tokens=max_tokens)


@pytest.mark.embedded
def test_generate_command(loaded: Loaded, folder: Path) -> None:
    done = run(*COMMAND, "generate", "--model", str(folder), "--prompt", COUNT, "-m", "24", "--verbose", "False")
    assert done.stdout == answer(loaded, COUNT, 24) + "\n"
    tokens, passes, accepted = map(int, SPECULATED.findall(done.stderr)[0])
    assert tokens <= 24
    assert passes + accepted in (tokens, tokens + 1)  # the last pass may end on a drafted token


@pytest.mark.embedded
def test_chat_command(loaded: Loaded, folder: Path) -> None:
    """Two turns: the second one builds on the cache that the first one left."""
    done = run(*COMMAND, "chat", "--model", str(folder), "-m", "16", stdin=f"My name is Ada.\n{COUNT}\nq\n")
    assert answer(loaded, "My name is Ada.", 16) in done.stdout
    told = [int(number) for number in re.findall(r"(\d+) tokens · ", done.stdout)]
    assert told == [int(tokens) for tokens, _, _ in SPECULATED.findall(done.stderr)]
    assert len(told) == 2


@pytest.mark.embedded
def test_server_command(loaded: Loaded, folder: Path) -> None:
    """A request that names no seed too: mlx-lm would put it into a batch, without drafting."""
    body = {"messages": [{"role": "user", "content": COUNT}], "max_tokens": 24, "temperature": 0.0}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*COMMAND, "server", "--model", str(folder), "--port", str(port)]
    until_it_listens = httpx.HTTPTransport(retries=7)
    with (
        subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", transport=until_it_listens, timeout=60) as client,
    ):
        try:
            requests = [body | more for more in ({}, {"seed": 4}, {"stream": True})]
            *answers, streamed = [client.post("/chat/completions", json=request) for request in requests]
        finally:
            server.terminate()
        assert server.stderr is not None
        log = server.stderr.read()
    texts = [given.raise_for_status().json()["choices"][0]["message"]["content"] for given in answers]
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    texts.append("".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]))
    assert texts == [answer(loaded, COUNT, 24)] * 3
    assert len(SPECULATED.findall(log)) == 3


def test_a_command_reads_a_config_as_its_publisher_does(
    folder_of_tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary settings where transformers 5 writes them; a field that mlx-lm ignores is one line."""
    words = ["generate", "--model", str(folder_of_tokens), "--prompt", COUNT, "-m", "8", "--verbose", "False"]
    rewrite(folder_of_tokens, ("rope_theta",), rope_parameters={"rope_theta": 300.0, "rope_type": "default"})
    with load(folder_of_tokens, None) as engine:
        expected = engine.generate([{"role": "user", "content": COUNT}], max_tokens=8).text
    assert main(words) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    rewrite(folder_of_tokens, hidden_act="gelu")
    assert main(words) == 1
    assert "hidden_act is 'gelu', which mlx-lm does not heed" in capsys.readouterr().err.splitlines()[-1]


def test_commands_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["lora"]), main([])) == (2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "llmcad_mlx.mlx_lm_plugin: 'lora' is none of the commands generate, chat, server",
        "llmcad_mlx.mlx_lm_plugin: give one of the commands generate, chat, server",
    ]
    assert main(["--help"]) == 0
    assert "{generate,chat,server}" in capsys.readouterr().out
