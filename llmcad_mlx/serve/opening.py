"""How an answer that has to call a tool begins: with the opening of a call, as the chat template writes calls."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import mlx.core as mx

from llmcad_mlx.engine.session import common_prefix
from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import chat_text
from llmcad_mlx.serve.protocol import GenerationRequest, bad_request
from llmcad_mlx.settings import LogitsProcessor

_ID = "call00001"  # nine letters and digits: some templates take no others


def beginning_with_call(
    wanted: GenerationRequest, prompt: Sequence[int], tokenizer: Any, is_thinking: bool
) -> GenerationRequest:
    """The request whose answer begins as a call of one of `wanted.must_call`; what follows is up to the model.

    tokenizer: mlx-lm's TokenizerWrapper, of a model that calls tools. is_thinking: the prompt ends within
    thinking, which the answer ends first. Raises ApiError (400) where the chat template shows no form of calls.
    """
    before = f"{tokenizer.think_end}\n\n" if is_thinking else ""
    calls = [
        tokenizer.encode(before + _call(wanted, name, arguments, tokenizer), add_special_tokens=False)
        for name in {min(wanted.must_call), max(wanted.must_call)}  # what these begin with, all do
        for arguments in ({}, {"a": 1})
    ]
    # In tokens, so that the model goes on as it would have written them itself.
    opening = calls[0][: min(common_prefix(calls[0], call) for call in calls)]
    sampling = wanted.options.sampling
    forced = replace(sampling, logits_processors=(*sampling.logits_processors, _beginning(opening, len(prompt))))
    return replace(wanted, options=replace(wanted.options, sampling=forced))


def _call(wanted: GenerationRequest, name: str, arguments: dict[str, int], tokenizer: Any) -> str:
    """The text of a call."""
    call = {"id": _ID, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    text = ""
    with suppress(UsageError):  # of a template that takes no calls
        text = chat_text(messages, tokenizer, {**wanted.template_options, "tools": wanted.tools}, is_asked=False)
    _, start, written = text.rpartition(tokenizer.tool_call_start)
    if not start or name not in written:
        raise bad_request(
            "tool_choice: this model's chat template shows no form of calls that could be begun; use auto",
            "tool_choice",
        )
    return start + written


def _beginning(tokens: Sequence[int], start: int) -> LogitsProcessor:
    """Lets only `tokens` follow the first `start` ones, and then all."""

    def only_the_next(seen: mx.array, logits: mx.array) -> mx.array:
        place = seen.size - start
        if place >= len(tokens):
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == tokens[place], 0.0, -mx.inf)[None]

    return only_the_next
