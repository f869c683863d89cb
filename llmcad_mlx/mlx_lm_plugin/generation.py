"""`stream_generate` and `generate` with mlx-lm's signatures, and how to put them in the place of mlx-lm's own."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from llmcad_mlx.errors import UsageError
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModels, LeftToMlxLmError
from llmcad_mlx.mlx_lm_plugin.loading import Place, load_model, most_tokens, replaced
from llmcad_mlx.mlx_lm_plugin.speculation import OPTIONS, Request, Speculation, encoded

COMMANDS = ("generate", "chat", "server")

_LOG = logging.getLogger("llmcad_mlx.mlx_lm_plugin")
_MODELS = AdaptedModels()  # the functions' signatures have no other place for it; dropped with the models


def stream_generate(
    model: Module,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model: Module | None = None,
    stream: Any = generation_stream,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """As mlx_lm's function of that name, verifying token trees; see the package for what each option does.

    `from_draft` tells which tokens were drafted, without a draft model too. A first call prepares the model, which
    takes about twenty forwards of a token. A model of `load` gives no text beyond the tokens up to which mlx-lm
    computes it as its publisher's code does. Raises UsageError naming an option, for a prompt beyond those, or for
    a model that mlx-lm has not loaded as its publisher's code would (`load` does), VocabularyError for a draft
    model with too few tokens, and what mlx-lm raises where its function runs.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    _MODELS.check(model, tokenizer)
    if (most := most_tokens(model)) is not None:
        max_tokens = _within(most, encoded(tokenizer, prompt), max_tokens, kwargs.get("prompt_cache"))
    speculation: Speculation | None = None
    try:
        for unknown in sorted(kwargs.keys() - OPTIONS):
            raise LeftToMlxLmError(f"{unknown} is not an option this plugin knows")
        request = Request(model, tokenizer, prompt, max_tokens, draft_model, stream, **kwargs)
        with mx.stream(stream):
            speculation = Speculation(request, _MODELS)
    except LeftToMlxLmError as reason:
        _LOG.info("left to mlx-lm: %s", reason)
    if speculation is None:
        yield from mlx_lm_stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, draft_model=draft_model, stream=stream, **kwargs
        )
    else:
        with wired_limit(model, [stream]):
            yield from speculation.run()


def _within(most: int, prompt: Sequence[int], max_tokens: int, prompt_cache: Any) -> int:
    """How many tokens a model that computes only `most` as it should may give. Raises UsageError for none."""
    before = getattr(prompt_cache[0], "offset", 0) if prompt_cache else 0
    room = most - before - len(prompt)
    if room < 1:
        raise UsageError(
            f"prompt: {before + len(prompt)} tokens, but mlx-lm computes as the model's publisher does only up to "
            f"{most}; give a shorter one"
        )
    return room if max_tokens < 0 else min(max_tokens, room)


def generate(model: Module, tokenizer: Any, prompt: str | list[int], verbose: bool = False, **kwargs: Any) -> str:
    """As mlx_lm's function of that name: the whole text; `verbose` prints it and mlx-lm's figures."""
    text = ""
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{'=' * 10}")
    if verbose and not text:
        print("No text generated for this prompt")
    elif verbose:
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return text


@contextmanager
def installed() -> Iterator[None]:
    """While this is open, mlx-lm's functions and commands load models as `load` does and generate with trees.

    mlx_lm.server batches requests that name no seed; as batches have no trees, it then serves them one by one.
    """
    modules = {name: import_module(f"mlx_lm.{name}") for name in COMMANDS}  # mlx_lm.generate names a function too
    owners = [*modules.values(), import_module("mlx_lm")]
    places: list[Place] = [(owner, "stream_generate", stream_generate) for owner in owners]
    places.append((import_module("mlx_lm.utils"), "load_model", load_model))
    places.append((modules["server"].ResponseGenerator, "_is_batchable", lambda generator, arguments: False))
    with replaced(places):
        yield
