"""`llmcad-mlx generate`: answer one prompt.

What commands print beside the text: a closing line of figures, a prompt progress line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sizes import format_size

if TYPE_CHECKING:
    from llmcad_mlx.memory.plan import MemoryPlan
    from llmcad_mlx.settings import MemoryOptions
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.errors import UsageError

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine, Response
    from llmcad_mlx.prompt import Prompt

_SHOW_AFTER_S = 0.5


def closing_lines(
    stats: GenerationStats, plan: MemoryPlan | None = None, options: MemoryOptions | None = None
) -> list[str]:
    """Tokens/s, tokens per pass, acceptance and passes; under a plan also what was pinned, streamed and hidden."""
    lines = [_speed_line(stats)]
    if plan is not None:
        lines += _streaming_lines(stats, plan, options)
    return lines


def _streaming_lines(stats: GenerationStats, plan: MemoryPlan, options: MemoryOptions | None) -> list[str]:
    from llmcad_mlx.machine import peak_rss_bytes

    budget = f" of {format_size(plan.budget_bytes)}" if plan.budget_bytes is not None else ""
    rate = options.read_bandwidth if options is not None else None
    emulated = f"; reads emulated at {format_size(round(rate))}/s" if rate is not None else ""
    return [
        f"[memory {format_size(peak_rss_bytes())}{budget}; target: {format_size(plan.pinned_bytes)} pinned, "
        f"{format_size(plan.streamed_bytes)} streamed per pass, "
        f"{format_size(stats.streamed_bytes)} in all{emulated}]",
        f"[drafted {stats.drafted}, of them {stats.provisional} while weights loaded; tested {stats.tested}; "
        f"accepted {stats.accepted}; drafting survived {stats.survived} of {stats.target_passes} passes; "
        f"waited {stats.io_wait_s:.1f} of {stats.decode_s:.1f} s]",
    ]


def _speed_line(stats: GenerationStats) -> str:
    return (
        f"[prompt {stats.prompt_tokens} tokens, {stats.prompt_tokens_per_s:.0f} tokens/s; "
        f"generated {stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s; "
        f"{stats.tokens_per_pass:.2f} tokens per pass, {stats.target_passes} target passes, "
        f"acceptance {stats.acceptance_rate:.0%}]"
    )


class PromptProgress:
    """A line on a terminal while a long prompt is processed; gone when the first token comes."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._started = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if self._enabled and (self._shown or time.monotonic() - self._started > _SHOW_AFTER_S):
            self._shown = True  # before it is: Ctrl-C may come in between
            print(f"\rprompt: {done}/{total} tokens", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = self._enabled = False


@contextmanager
def prompt_progress(enabled: bool) -> Iterator[PromptProgress]:
    """A `PromptProgress` that is taken away whatever happens."""
    progress = PromptProgress(enabled)
    try:
        yield progress
    finally:
        progress.finish()


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' reads standard input.", show_default=False)
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="Read the prompt from a file.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt to the model as it is, without chat template.")
    ] = False,
    target: options.Target = None,
    draft: options.Draft = "auto",
    memory: options.Memory = None,
    pinned: options.Pinned = "auto",
    context: options.Context = None,
    read_bandwidth: options.ReadBandwidth = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check a bundle's bytes at load and on every read."),
    ] = False,
    policy: options.Policy = "throughput",
    tree_nodes: options.TreeNodes = None,
    pipeline: options.Pipeline = True,
    tree: options.Tree = True,
    fallback: options.Fallback = True,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Divides logits of recent tokens; 0 is off.")
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Taken off logits of recent tokens.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, for each time a token occurred.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be given again.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Answer one prompt; text goes to standard output, figures to standard error."""
    from llmcad_mlx.api import load
    from llmcad_mlx.settings import GenerationOptions, MemoryOptions

    if raw and system is not None:
        raise UsageError("system: a raw prompt takes no system message; leave one of the two out")
    settings: dict[str, Any] = {
        "policy": policy, "tree_nodes": tree_nodes, "pipeline": pipeline, "tree": tree, "fallback": fallback,
        "max_tokens": max_tokens, "temperature": temp,
        "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "stop": stop or None,
    }  # fmt: skip
    # Checked before anything is downloaded or loaded.
    GenerationOptions.of(**settings)
    where: dict[str, Any] = {
        "pinned": pinned,
        "context": context,
        "read_bandwidth": read_bandwidth,
        "verify": verify,
    }
    MemoryOptions.of(memory, **where)
    text = _read_prompt(prompt, prompt_file)
    with load(target, draft, memory=memory, progress=not json_output, **where) as engine:
        _answer(engine, text if raw else _as_chat(engine, text, system), settings, json_output)


@dataclass
class _Answer:
    """What was generated so far."""

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "interrupted"
    stats: GenerationStats = field(default_factory=GenerationStats)

    def add(self, response: Response) -> None:
        self.tokens.append(response.token)
        self.pieces.append(response.text)
        self.finish_reason = response.finish_reason or self.finish_reason
        self.stats = response.stats or self.stats


def _answer(engine: Engine, prompt: Prompt, settings: dict[str, Any], json_output: bool) -> None:
    answer = _Answer()
    try:
        with prompt_progress(enabled=not json_output) as on_progress:
            for response in engine.stream_generate(prompt, on_progress, **settings):
                on_progress.finish()
                answer.add(response)
                if not json_output:
                    print(response.text, end="", flush=True)
    except BrokenPipeError:
        raise
    except BaseException as error:
        # What there is of the text is kept; the line that says what happened comes on a line of its own.
        if answer.tokens and json_output and isinstance(error, KeyboardInterrupt):
            _print_report(engine, answer, settings)
        elif answer.tokens and not json_output:
            print(flush=True)
        raise
    if json_output:
        _print_report(engine, answer, settings)
    else:
        print(flush=True)
        for line in closing_lines(answer.stats, engine.pair.plan, engine.pair.options):
            print(line, file=sys.stderr)


def _print_report(engine: Engine, answer: _Answer, settings: dict[str, Any]) -> None:
    from llmcad_mlx.report import generation_report

    text = "".join(answer.pieces)
    report = generation_report(engine, text, answer.tokens, answer.finish_reason, answer.stats, settings)
    print(json.dumps(report), flush=True)


def _as_chat(engine: Engine, text: str, system: str | None) -> Prompt:
    """The prompt as messages, or as text for a model without a chat template."""
    if not engine.tokenizer.has_chat_template:
        if system is not None:
            raise UsageError("system: this model has no chat template, so it takes no system message")
        return text
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": text}]


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("prompt: give it as an argument ('-' for standard input) or with --prompt-file")
    option = "prompt" if file is None else f"prompt-file: {file}"
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
    except OSError as error:
        raise UsageError(f"{option}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}: is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"{option}: it is empty; give some text")
    return text
