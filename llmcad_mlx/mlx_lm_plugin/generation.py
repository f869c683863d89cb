"""`stream_generate` and `generate` with mlx-lm's signatures, and how to put them in the place of mlx-lm's own."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from llmcad_mlx.errors import UsageError, VocabularyError
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModel, AdaptedModels
from llmcad_mlx.mlx_lm_plugin.prompt_caches import ModelRows
from llmcad_mlx.mlx_lm_plugin.request import OPTIONS, Request
from llmcad_mlx.mlx_lm_plugin.speculation import Speculation

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
    takes about twenty forwards of a token. Raises UsageError naming an option, VocabularyError for a draft model
    with too few tokens, and what mlx-lm raises where its function runs.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    unknown = sorted(kwargs.keys() - OPTIONS)
    speculation: Speculation | str = f"{unknown[0]} is not an option this plugin knows" if unknown else ""
    if not unknown:
        with mx.stream(stream):
            speculation = _prepare(Request(model, tokenizer, prompt, max_tokens, draft_model, stream, **kwargs))
    if isinstance(speculation, str):
        _LOG.info("left to mlx-lm: %s", speculation)
        yield from mlx_lm_stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, draft_model=draft_model, stream=stream, **kwargs
        )
    else:
        with wired_limit(model, [stream]):
            yield from speculation.run()


def generate(model: Module, tokenizer: Any, prompt: str | list[int], verbose: bool = False, **kwargs: Any) -> str:
    """As mlx_lm's function of that name: the whole text; `verbose` prints it and mlx-lm's figures."""
    pieces = []
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{'=' * 10}")
        if not any(pieces):
            print("No text generated for this prompt")
        else:
            print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
            print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
            print(f"Peak memory: {response.peak_memory:.3f} GB")
    return "".join(pieces)


def _prepare(request: Request) -> Speculation | str:
    """All that one generation needs, or why it is left to mlx-lm."""
    reason = request.why_left()
    if reason:
        return reason
    request.check()
    prompt = request.encode()
    if not prompt:
        return "the prompt is empty"
    target = _MODELS.of(request.model)
    draft = None if request.draft_model is None else _MODELS.of(request.draft_model)
    for adapted in (target, draft):
        if adapted is not None and adapted.reason:
            return adapted.reason
    if draft is not None:
        _check_vocabulary(target, draft, request.tokenizer)
    rows, draft_rows = _caller_rows(request, target, draft)
    for part in (rows, draft_rows):
        if part is not None and (reason := part.why_not()):
            return reason
    if rows is not None and draft_rows is not None and draft_rows.length < rows.length:
        return "the draft model's part of prompt_cache is shorter than the target's"
    return Speculation(request, prompt, target, draft, rows, draft_rows)


def _check_vocabulary(target: AdaptedModel, draft: AdaptedModel, tokenizer: Any) -> None:
    """Padded sizes may differ; only where the draft has fewer logits is the tokenizer asked."""
    if draft.tree.vocab_size >= target.tree.vocab_size:
        return
    largest = max(tokenizer.get_vocab().values())
    if largest >= draft.tree.vocab_size:
        raise VocabularyError(
            f"draft_model: it has {draft.tree.vocab_size} logits, the tokenizer {largest + 1} tokens; "
            "choose a draft of the same model family"
        )


def _caller_rows(
    request: Request, target: AdaptedModel, draft: AdaptedModel | None
) -> tuple[ModelRows | None, ModelRows | None]:
    """The target's part of the caller's prompt cache, and the draft model's behind it."""
    if request.prompt_cache is None:
        return None, None
    num_layers = len(request.model.layers)
    rows = ModelRows(request.model, target, request.prompt_cache[:num_layers])
    if draft is None or request.draft_model is None:
        return rows, None
    others = request.prompt_cache[num_layers:]
    if not others:
        raise UsageError(
            "prompt_cache: it has no part for the draft model; "
            "give make_prompt_cache(model) + make_prompt_cache(draft_model)"
        )
    return rows, ModelRows(request.draft_model, draft, others)


@contextmanager
def installed() -> Iterator[None]:
    """While this is open, mlx-lm's functions and commands generate with token trees.

    mlx_lm.server batches requests that name no seed, and batches have no trees; while this is open it serves every
    request by itself, in turn.
    """
    package = import_module("mlx_lm")
    modules = {name: import_module(f"mlx_lm.{name}") for name in COMMANDS}  # mlx_lm.generate names a function too
    places: list[tuple[Any, str, Any]] = [
        (module, "stream_generate", stream_generate) for module in modules.values()
    ]
    places.append((package, "stream_generate", stream_generate))
    places.append((modules["server"].ResponseGenerator, "_is_batchable", _never))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _never(generator: Any, arguments: Any) -> bool:
    return False
