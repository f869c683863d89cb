"""A live server on loopback with a tiny model, for tests: the real thing, on a thread."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
from httpx_sse import EventSource
from prometheus_client.parser import text_string_to_metric_families

from llmcad_mlx import Engine
from llmcad_mlx.api import Response
from llmcad_mlx.loader import load_pair
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.server import LlmServer
from llmcad_mlx.settings import MemoryOptions

NAME = "tiny"
CHAT = [{"role": "user", "content": "tell me of the cat"}]


@dataclass(frozen=True)
class Live:
    """A running server."""

    url: str
    server: LlmServer

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", **{"messages": CHAT, **body})

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **{"prompt": "the other one", **body})

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """One number of /metrics; 0 where there is none yet."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = [one.value for one in samples if (one.name, one.labels) == (f"llmcad_mlx_{name}", labels)]
        return sum(found)


def loader(
    folder: Path, draft: Path | str | None = "ngram", kind: type[Engine] = Engine, **options: Any
) -> Callable[[], Engine]:
    """Loads on the worker's thread, where numba's number of threads is its own: one is best for tiny matrices."""

    def load_there() -> Engine:
        if importlib.util.find_spec("numba") is not None:
            import numba

            numba.set_num_threads(1)
        pair = load_pair(str(folder), str(draft or "none"), False, MemoryOptions.of(**options))
        return kind(pair)

    return load_there


@contextlib.contextmanager
def serving(load_engine: Callable[[], Engine], **settings: Any) -> Iterator[Live]:
    """Run a server until the block ends."""
    server = LlmServer(ServerSettings(port=0, **settings), load_engine, NAME)
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait_for(server)
        yield Live(server.url, server)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


def _wait_for(server: LlmServer) -> None:
    # The socket is bound but does not listen yet: a connection is refused until it does.
    with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:
        assert client.get(f"{server.url}/health").json() == {"status": "ok"}


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, [DONE] checked and left out."""
    *data, last = [event.data for event in EventSource(response).iter_sse()]
    assert last == "[DONE]"
    return [json.loads(text) for text in data]


@contextlib.contextmanager
def streaming(live: Live, path: str = "/v1/chat/completions", **body: Any) -> Iterator[httpx.Response]:
    wanted = {"messages": CHAT, **body} if "chat" in path else {"prompt": "the other one", **body}
    with httpx.stream("POST", f"{live.url}{path}", json={**wanted, "stream": True}, timeout=60) as response:
        yield response


class Scripted(Engine):
    """An engine whose target wants to say what a class attribute says, text or tokens, and then ends."""

    script: str | Sequence[int] = ""

    def stream_generate(self, prompt: Any, *callbacks: Any, options: Any) -> Iterator[Response]:
        script = self.script
        tokens = self.tokenizer.encode(script, add_special_tokens=False) if isinstance(script, str) else script
        (eos, *_) = self.tokenizer.eos_token_ids
        wanted = iter([*tokens, eos])

        def only_the_next(_: mx.array, logits: mx.array) -> mx.array:
            if forced and (logits > -mx.inf).sum().item() == 1:
                return logits  # what the request wants comes first
            return mx.where(mx.arange(logits.shape[-1]) == next(wanted), logits, -mx.inf)

        forced = options.sampling.logits_processors
        sampling = replace(options.sampling, logits_processors=(*forced, only_the_next))
        return super().stream_generate(prompt, *callbacks, options=replace(options, sampling=sampling))
