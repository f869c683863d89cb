"""`llmcad-mlx chat`: talk with a model."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from llmcad_mlx.cli import options
from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.prompt import template_options, typed_text
from llmcad_mlx.settings import GenerationOptions, SamplingSettings, StopSettings, sampling_under

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine


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
    chat_template_config: options.TemplateConfig = None,
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
    """Talk with a model. /help lists what else can be typed. Sampling that is not given is the model's own, as its
    generation_config.json has it; --temp 0 is greedy.

    Where input or output is no terminal, each line of standard input is one message and answers are plain text.

    With --json each answer is one JSON object on a line of its own.
    """
    chosen = GenerationOptions(sampling, speculation, StopSettings(max_tokens))
    variables = template_options(chat_template_config)
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
        settings = ChatSettings(chosen, show_accepted).with_values(_own_sampling(engine, command, sampling))
        session = ChatSession(engine, settings, plain or TerminalScreen(), system, variables)
        if saved is not None:  # what was given counts more than what it was saved with
            session.load(saved, keep=tuple(options.given(command)))
        if plain is None:
            from_terminal(session, None if no_history else home_folder() / "chat_history")
            return
        from_pipe(session)
    if count := plain.num_errors:
        raise LlmcadError(f"{count} line{'' if count == 1 else 's'} could not be answered or obeyed; see above")


def _own_sampling(engine: Engine, command: Context, sampling: SamplingSettings) -> dict[str, Any]:
    """The model's own sampling, as far as nothing else was asked for, and then a seed of this chat's own."""
    from llmcad_mlx.models.folder import own_sampling

    given = {name: getattr(sampling, name) for name in options.given(command) if hasattr(sampling, name)}
    used = sampling_under(own_sampling(engine.pair.names.target_path), given)
    own = {name: value for name, value in used.items() if name not in given}
    if own.get("temperature") and "seed" not in given:
        own["seed"] = secrets.randbits(32)
    return own
