"""OpenAI's HTTP API and a chat page for one model; here its options, whose defaults the command line reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmcad_mlx.errors import UsageError
from llmcad_mlx.network import is_loopback
from llmcad_mlx.prompt import TEMPLATE_OPTION, check_template_options
from llmcad_mlx.settings import check_integer


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server listens, who may use it and how much one request may ask for.

    `host`: loopback needs no key, any other address needs `api_key`. `port`: 0 takes a free one. `cors`: origins
    whose pages may call the server; none by default. `max_queue`: requests that may wait; one client may hold half
    of the places. `max_body_bytes`, `max_prompt_tokens` (None: the model's context), `max_tokens`: limits of one
    request. `temperature`: of requests that name none (None: the model's own sampling). `template_options`:
    variables of the chat template, where a request does not give others. `prompt_cache_bytes`: for the caches of
    conversations that wait. `body_s`: seconds in which a request's body must have arrived, `header_s`: its head.
    `keepalive_s`: silence after which a stream gets a comment, so that nobody in between takes it for dead.

    Raises UsageError naming the option.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 4_000_000
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    temperature: float | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_cache_bytes: int = 256 << 20
    body_s: float = 30.0
    header_s: float = 10.0
    keepalive_s: float = 10.0

    def __post_init__(self) -> None:
        check_integer("port", self.port, 0, 65535)
        check_integer("max-queue", self.max_queue, 1, 100_000)
        check_integer("max-body", self.max_body_bytes, 1024, 1 << 40)
        check_integer("max-tokens", self.max_tokens, 1, 2**31 - 1)
        if self.max_prompt_tokens is not None:
            check_integer("max-prompt-tokens", self.max_prompt_tokens, 1, 2**31 - 1)
        check_integer("prompt-cache", self.prompt_cache_bytes, 0, 1 << 50)
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise UsageError(f"temp: {self.temperature} is out of range; it must be from 0 to 100")
        check_template_options(TEMPLATE_OPTION, self.template_options)
        key = self.api_key
        if key is not None and (len(key) < 8 or not all("!" <= letter <= "~" for letter in key)):
            raise UsageError("api-key: give at least 8 printable ASCII characters without spaces")
        for origin in self.cors:
            parts = urlsplit(origin)
            if origin != "*" and not (
                parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}"
            ):
                raise UsageError(f"cors: {origin!r} is no origin; give one like https://example.org, or *")
        if not is_loopback(self.host) and self.api_key is None:
            raise UsageError(
                f"host: {self.host} can be reached from other machines, so it needs a key; "
                "give --api-key or set LLMCAD_MLX_API_KEY"
            )
