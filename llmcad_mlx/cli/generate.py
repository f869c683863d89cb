"""`llmcad-mlx generate`: answer one prompt."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llmcad_mlx.cli import options
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import TEMPLATE_OPTION, template_options, typed_text
from llmcad_mlx.settings import DEFAULT_MAX_TOKENS, GenerationOptions, StopSettings

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine
    from llmcad_mlx.prompt import Prompt

_SHOW_AFTER_S = 0.5


def generate(
    *,
    prompt: Annotated[str | None, Argument(help="The prompt; '-' reads standard input.")] = None,
    prompt_file: Annotated[Path | None, Option(help="Read the prompt from a file.")] = None,
    system: Annotated[str | None, Option(help="System message.")] = None,
    raw: Annotated[
        bool, Option("--raw", help="Give the prompt to the model as it is, without chat template.")
    ] = False,
    chat_template_config: options.TemplateConfig = None,
    pair: options.OptionalPair,
    memory: options.VerifiedMemory,
    speculation: options.Speculation,
    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS,
    sampling: options.PenalisedSampling,
    stop: Annotated[
        list[str] | None, Option(metavar="TEXT", help="End before this text; may be given again.")
    ] = None,
    stats: Annotated[
        bool, Option("--stats", help="End with all figures: passes, acceptance, times, memory.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Answer one prompt; text goes to standard output, a line of figures to standard error."""
    if raw and system is not None:
        raise UsageError("system: a raw prompt takes no system message; leave one of the two out")
    if raw and chat_template_config is not None:
        raise UsageError(f"{TEMPLATE_OPTION}: a raw prompt goes through no template; leave one of the two out")
    variables = template_options(chat_template_config)
    texts = None if stop is None else [typed_text(text, "stop") for text in stop]
    chosen = GenerationOptions(sampling, speculation, StopSettings.of(max_tokens, texts))
    system = None if system is None else typed_text(system, "system")
    text = _read_prompt(prompt, prompt_file)
    # Only now: a mistake in what was typed is told at once.
    from llmcad_mlx.api import Engine
    from llmcad_mlx.loader import load_pair

    with Engine(load_pair(pair.target, pair.draft, not json_output, memory)) as engine:
        asked: Prompt = text
        if not raw and engine.tokenizer.has_chat_template:
            said = {"system": system, "user": text}
            asked = [{"role": role, "content": content} for role, content in said.items() if content is not None]
        elif system is not None:
            raise UsageError("system: this model has no chat template, so it takes no system message")
        elif variables:
            raise UsageError(f"{TEMPLATE_OPTION}: this model has no chat template; leave it out")
        _answer(engine, engine.encode(asked, variables), chosen, json_output, stats)


def _answer(engine: Engine, prompt: Prompt, chosen: GenerationOptions, json_output: bool, in_full: bool) -> None:
    from llmcad_mlx.progress import interruptible
    from llmcad_mlx.report import Answer, closing_lines

    answer = Answer()

    def finish() -> None:
        print(json.dumps(answer.report(engine, chosen)) if json_output else "", flush=True)

    try:
        with interruptible() as check, closing(PromptProgress(enabled=not json_output)) as on_progress:
            for response in engine.stream_generate(prompt, on_progress, options=chosen):
                on_progress.close()
                answer.add(response)
                if not json_output:
                    print(response.text, end="", flush=True)
                check()
    except BrokenPipeError:
        raise
    except BaseException as error:
        # What there is of the text is kept; the line that says what happened comes on a line of its own.
        if answer.tokens and (not json_output or isinstance(error, KeyboardInterrupt)):
            finish()
        raise
    finish()
    if not json_output:
        for line in closing_lines(engine, answer.stats, in_full):
            print(line, file=sys.stderr)


class PromptProgress:
    """A line on a terminal while a long prompt is read, called with the tokens done and in all, until `close`."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._show_at = time.monotonic() + _SHOW_AFTER_S
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if self._enabled and (self._shown or time.monotonic() > self._show_at):
            self._shown = True  # before it is: Ctrl-C may come in between
            print(f"\rprompt: {done}/{total} tokens", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = self._enabled = False


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("prompt: give it as an argument ('-' for standard input) or with --prompt-file")
    option = "prompt" if file is None else f"prompt-file: {file}"
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8-sig")
        else:
            text = (
                sys.stdin.buffer.read().decode("utf-8-sig") if prompt == "-" else typed_text(str(prompt), option)
            )
    except OSError as error:
        raise UsageError(f"{option}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}: is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"{option}: it is empty; give some text")
    return text
