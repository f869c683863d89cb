"""`llmcad-mlx chat`: talk with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.errors import LlmcadError

if TYPE_CHECKING:
    from llmcad_mlx.chat.screen import PlainScreen
    from llmcad_mlx.chat.session import ChatSession
    from llmcad_mlx.conversations.file import SavedConversation

_HISTORY_FILE = "chat_history"


def chat(
    context_: typer.Context,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    load_file: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep what is typed for the next run.")
    ] = False,
    show_accepted: Annotated[
        bool, typer.Option("--show-accepted", help="Colour the tokens that the draft wrote; no Markdown then.")
    ] = False,
    target: options.Target = None,
    draft: options.Draft = "auto",
    memory: options.Memory = None,
    pinned: options.Pinned = "auto",
    context: options.Context = None,
    read_bandwidth: options.ReadBandwidth = None,
    policy: options.Policy = "throughput",
    tree_nodes: options.TreeNodes = None,
    pipeline: options.Pipeline = True,
    tree: options.Tree = True,
    fallback: options.Fallback = True,
    max_tokens: options.MaxTokens = 1024,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    json_output: options.Json = False,
) -> None:
    """Talk with a model. /help lists what else can be typed.

    Where input or output is no terminal, each line of standard input is one message and answers are plain text.

    With --json each answer is one JSON object on a line of its own.
    """
    from llmcad_mlx.api import load
    from llmcad_mlx.chat.conversation import Conversation
    from llmcad_mlx.chat.screen import JsonScreen, PlainScreen, TerminalScreen
    from llmcad_mlx.chat.session import ChatSession
    from llmcad_mlx.chat.settings import ChatSettings
    from llmcad_mlx.conversations.file import read_conversation
    from llmcad_mlx.settings import GenerationOptions, MemoryOptions

    settings: dict[str, Any] = {
        "policy": policy, "tree_nodes": tree_nodes, "pipeline": pipeline, "tree": tree, "fallback": fallback,
        "max_tokens": max_tokens, "temperature": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "seed": seed,
    }  # fmt: skip
    # Checked before anything is downloaded or loaded.
    GenerationOptions.of(**settings)
    where: dict[str, Any] = {"pinned": pinned, "context": context, "read_bandwidth": read_bandwidth}
    MemoryOptions.of(memory, **where)
    saved = None if load_file is None else read_conversation(load_file)
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not json_output
    with load(target, draft, memory=memory, progress=not json_output, **where) as engine:
        chosen = ChatSettings(lambda changed: _check(engine, changed), settings, show_accepted)
        chosen.take_over({})  # what only a loaded engine can check
        if interactive:
            session = ChatSession(engine, chosen, TerminalScreen(), Conversation(system))
            _load(session, saved, context_)
            _talk(session, None if no_history else _HISTORY_FILE)
            return
        screen = JsonScreen() if json_output else PlainScreen()
        session = ChatSession(engine, chosen, screen, Conversation(system))
        _load(session, saved, context_)
        _read_lines(session, screen)


def _check(engine: Any, changed: Any) -> None:
    engine.check_options(**changed)


def _load(session: ChatSession, saved: SavedConversation | None, context: typer.Context) -> None:
    """Load a conversation; what was given on the command line counts more than what it was saved with."""
    if saved is None:
        return
    names = {"temp": "temperature"}
    given = [
        names.get(name, name)
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    session.load(saved, keep=tuple(given))


def _talk(session: ChatSession, history: str | None) -> None:
    """At a terminal, until /quit or Ctrl-D."""
    from llmcad_mlx.chat.commands import PromptLine
    from llmcad_mlx.chat.screen import status_line
    from llmcad_mlx.store.cache_folder import home_folder

    line = PromptLine(
        None if history is None else home_folder() / history, lambda: status_line(session.engine, session.stats)
    )
    pair = session.engine.pair
    session.screen.note(f"[{pair.target_path.name}, draft {pair.draft_name}; /help lists the commands]")
    going = True
    while going:
        try:
            going = session.handle(line.ask())
        except EOFError:
            return
        except KeyboardInterrupt:
            session.screen.note("[stopped; /quit or Ctrl-D ends the chat]")


def _read_lines(session: ChatSession, screen: PlainScreen) -> None:
    """From a pipe or file: one message or command a line, to the end of the input."""
    for number, data in enumerate(sys.stdin.buffer, 1):
        try:
            line = data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            screen.error(f"line {number}: is not UTF-8 text")
            continue
        if not session.handle(line):
            break
    if screen.num_errors:
        count = screen.num_errors
        raise LlmcadError(f"{count} line{'' if count == 1 else 's'} could not be answered or obeyed; see above")
