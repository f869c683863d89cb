"""`llmcad-mlx serve`: OpenAI's HTTP API and a page, for one model."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer

from llmcad_mlx.cli import options


def serve(
    target: options.Target = None,
    draft: options.Draft = "auto",
    memory: options.Memory = None,
    pinned: options.Pinned = "auto",
    context: options.Context = None,
    read_bandwidth: options.ReadBandwidth = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check a bundle's bytes at load and on every read.")
    ] = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="LLMCAD_MLX_API_KEY", help="What clients must show.", show_default=False),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="Origin whose pages may call; may be given again."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What the model is called. Default: the target's name.")
    ] = None,
    temp: Annotated[
        float, typer.Option("--temp", help="Sampling temperature of requests that give none; 0 is greedy.")
    ] = 0.0,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-m", help="Most tokens of one answer, and what a request gets that asks for no limit."
        ),
    ] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", help="Most tokens of one prompt. Default: the context.")
    ] = None,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Largest request.")] = "4MB",
    prompt_cache: Annotated[
        str,
        typer.Option(
            "--prompt-cache",
            metavar="SIZE|auto",
            help="Memory for the caches of conversations that wait; 0 keeps none.",
        ),
    ] = "auto",
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Requests that may wait; one client may hold half of the places.")
    ] = 64,
) -> None:
    """Serve OpenAI's HTTP API, and a page to chat on, until Ctrl-C."""
    from llmcad_mlx.api import Engine
    from llmcad_mlx.loader import load_pair
    from llmcad_mlx.serve.limits import ServerSettings
    from llmcad_mlx.serve.prompt_cache import cache_limit
    from llmcad_mlx.serve.server import LlmServer
    from llmcad_mlx.serve.worker import public_name
    from llmcad_mlx.settings import MemoryOptions
    from llmcad_mlx.sizes import parse_size

    where = MemoryOptions.of(memory, pinned, context, read_bandwidth, verify)
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
        prompt_cache_bytes=cache_limit(prompt_cache, where.memory),
    )

    def load_engine() -> Engine:
        reserving = replace(where, reserved=settings.prompt_cache_bytes)
        return Engine(load_pair(target, draft, True, reserving))

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("llmcad_mlx.serve").setLevel(logging.INFO)  # a line for each answer; never what was said
    server = LlmServer(settings, load_engine, name or public_name(target))
    try:
        model = server.start()
        print(f"serving {model.name} at {server.url} (Ctrl-C ends it)", flush=True)
        ending = server.run()
    except KeyboardInterrupt:
        # A thread loads or generates: the interpreter's orderly end would take MLX away from under it.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    print(f"stopped; {ending.broken_off} running and {ending.refused} waiting requests were ended", flush=True)
