"""`llmcad-mlx serve`: OpenAI's HTTP API and a page, for one model."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from typing import Annotated

from typer import Option

from llmcad_mlx.cli import options
from llmcad_mlx.prompt import template_options, typed_text
from llmcad_mlx.serve import ServerSettings

_DEFAULT = ServerSettings()


def serve(
    *,
    pair: options.Pair,
    memory: options.VerifiedMemory,
    host: Annotated[
        str, Option(help="Address to listen at; any but this machine's own needs a key.")
    ] = _DEFAULT.host,
    port: Annotated[int, Option(help="Port to listen at; 0 takes a free one.")] = _DEFAULT.port,
    api_key: Annotated[str | None, Option(envvar="LLMCAD_MLX_API_KEY", help="What clients must show.")] = None,
    cors: Annotated[
        list[str] | None, Option(metavar="ORIGIN", help="Origin whose pages may call; may be given again.")
    ] = None,
    name: Annotated[str | None, Option(help="What the model is called. Default: the target's name.")] = None,
    temp: Annotated[
        float | None,
        Option(
            help="Sampling temperature of requests that give none; 0 is greedy. Default: the model's own "
            "sampling, as its generation_config.json has it, else 0."
        ),
    ] = None,
    chat_template_config: options.TemplateConfig = None,
    max_tokens: Annotated[
        int,
        Option(
            "--max-tokens", "-m", help="Most tokens of one answer, and what a request gets that asks for no limit."
        ),
    ] = _DEFAULT.max_tokens,
    max_prompt_tokens: Annotated[
        int | None, Option(help="Most tokens of one prompt. Default: the context.")
    ] = None,
    max_body: Annotated[
        str, Option(metavar="SIZE", help="Largest request.")
    ] = f"{_DEFAULT.max_body_bytes // 10**6}MB",
    prompt_cache: Annotated[
        str, Option(metavar="SIZE|auto", help="Memory for the caches of conversations that wait; 0 keeps none.")
    ] = "auto",
    max_queue: Annotated[
        int, Option(help="Requests that may wait; one client may hold half of the places.")
    ] = _DEFAULT.max_queue,
) -> None:
    """Serve OpenAI's HTTP API, and a page to chat on, until Ctrl-C."""
    from llmcad_mlx.api import Engine
    from llmcad_mlx.loader import load_pair
    from llmcad_mlx.serve.server import LlmServer
    from llmcad_mlx.serve.worker import cache_limit
    from llmcad_mlx.sizes import parse_size
    from llmcad_mlx.store.names import public_name

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=api_key,
        cors=tuple(cors or ()),
        max_queue=max_queue,
        max_body_bytes=parse_size(max_body, "max-body"),
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        temperature=temp,
        template_options=template_options(chat_template_config),
        prompt_cache_bytes=cache_limit(prompt_cache, memory.memory),
    )

    def load_engine() -> Engine:
        reserving = replace(memory, reserved=settings.prompt_cache_bytes)
        return Engine(load_pair(pair.target, pair.draft, True, reserving))

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("llmcad_mlx.serve").setLevel(logging.INFO)  # a line for each answer; never what was said
    name = None if name is None else typed_text(name, "name")
    server = LlmServer(settings, load_engine, name or public_name(pair.target))
    try:
        model = server.start()
        print(f"serving {model.name} at {server.url} (Ctrl-C ends it)", flush=True)
        ending = server.run()
    except KeyboardInterrupt:
        # A thread loads or generates: the interpreter's orderly end would take MLX away from under it.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    print(f"stopped; {ending.broken_off} running and {ending.refused} waiting requests were ended", flush=True)
