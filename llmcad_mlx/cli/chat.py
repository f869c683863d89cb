"""`llmcad-mlx chat`: talk with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from llmcad_mlx.cli import options
from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.prompt import typed_text
from llmcad_mlx.settings import GenerationOptions, StopSettings


def chat(
    *,
    command: Context,
    system: Annotated[str | None, Option(help="System message.")] = None,
    load_file: Annotated[
        Path | None, Option("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    no_history: Annotated[
        bool, Option("--no-history", help="Do not keep what is typed for the next run.")
    ] = False,
    show_accepted: Annotated[
        bool, Option("--show-accepted", help="Colour the tokens that the draft wrote; no Markdown then.")
    ] = False,
    pair: options.Pair,
    memory: options.Memory,
    speculation: options.Speculation,
    max_tokens: options.MaxTokens = 1024,
    sampling: options.Sampling,
    json_output: options.Json = False,
) -> None:
    """Talk with a model. /help lists what else can be typed.

    Where input or output is no terminal, each line of standard input is one message and answers are plain text.

    With --json each answer is one JSON object on a line of its own.
    """
    chosen = GenerationOptions(sampling, speculation, StopSettings(max_tokens))
    system = None if system is None else typed_text(system, "system")
    from llmcad_mlx.api import Engine
    from llmcad_mlx.chat.commands import ChatSettings
    from llmcad_mlx.chat.lines import from_pipe, from_terminal
    from llmcad_mlx.chat.screen import PlainScreen, TerminalScreen
    from llmcad_mlx.chat.session import ChatSession
    from llmcad_mlx.conversations.file import read_conversation
    from llmcad_mlx.files import home_folder
    from llmcad_mlx.loader import load_pair

    saved = None if load_file is None else read_conversation(load_file)
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not json_output
    plain = None if interactive else PlainScreen(json_output)
    with Engine(load_pair(pair.target, pair.draft, not json_output, memory)) as engine:
        settings = ChatSettings(chosen, show_accepted)
        session = ChatSession(engine, settings, plain or TerminalScreen(), system)
        if saved is not None:  # what was given counts more than what it was saved with
            session.load(saved, keep=tuple(options.given(command)))
        if plain is None:
            from_terminal(session, None if no_history else home_folder() / "chat_history")
            return
        from_pipe(session)
    if count := plain.num_errors:
        raise LlmcadError(f"{count} line{'' if count == 1 else 's'} could not be answered or obeyed; see above")
