"""`llmcad-mlx generate`: answer one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcad_mlx.cli import options
from llmcad_mlx.errors import UsageError


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
    policy: options.Policy = "throughput",
    tree_nodes: options.TreeNodes = None,
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
        list[str] | None, typer.Option("--stop", help="End before this text; may be given again.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Answer one prompt; text goes to standard output, figures to standard error."""
    from llmcad_mlx.api import GenerationOptions

    text = _read_prompt(prompt, prompt_file)
    if raw and system is not None:
        raise UsageError("system: a raw prompt takes no system message; leave one of the two out")
    settings: dict[str, Any] = {
        "policy": policy, "tree_nodes": tree_nodes, "max_tokens": max_tokens, "temperature": temp,
        "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "stop": stop or None,
    }  # fmt: skip
    GenerationOptions.of(settings)  # before anything is downloaded or loaded
    _answer(text, system, raw, target, draft, settings, json_output)


def _answer(
    text: str,
    system: str | None,
    raw: bool,
    target: str | None,
    draft: str,
    settings: dict[str, Any],
    json_output: bool,
) -> None:
    from llmcad_mlx.api import load
    from llmcad_mlx.cli.figures import closing_line, prompt_progress
    from llmcad_mlx.report import generation_report
    from llmcad_mlx.stats import GenerationStats

    with load(target, draft, progress=not json_output) as engine:
        prompt: Any = text
        if not raw and getattr(engine.tokenizer, "chat_template", None):
            prompt = [{"role": "user", "content": text}]
            if system is not None:
                prompt.insert(0, {"role": "system", "content": system})
        elif system is not None:
            raise UsageError("system: this model has no chat template, so it takes no system message")
        stats, tokens, pieces, reason = GenerationStats(), [], [], "interrupted"
        try:
            with prompt_progress(enabled=not json_output) as on_progress:
                for response in engine.stream_generate(prompt, on_progress, **settings):
                    stats = response.stats or stats
                    pieces.append(response.text)
                    tokens.append(response.token)
                    reason = response.finish_reason or reason
                    if not json_output:
                        on_progress.finish()
                        sys.stdout.write(response.text)
                        sys.stdout.flush()
        finally:
            # Also after Ctrl-C or a failure: what was produced is kept and accounted for.
            if json_output and tokens:
                print(json.dumps(generation_report(engine, "".join(pieces), tokens, reason, stats, settings)))
            elif tokens:
                print(flush=True)
                print(closing_line(stats), file=sys.stderr)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("prompt: give it as an argument ('-' for standard input) or with --prompt-file")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"prompt-file: {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"prompt-file: {file} is not UTF-8 text") from None
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise UsageError("prompt: it is empty")
    return text
