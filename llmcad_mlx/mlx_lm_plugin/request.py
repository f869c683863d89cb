"""The arguments of mlx-lm's `stream_generate`, and which of them are left to mlx-lm's own function.

Chooses tokens with the caller's own mlx-lm sampler and logits processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from llmcad_mlx.errors import UsageError
from llmcad_mlx.sampling import Row, TargetSampler
from llmcad_mlx.settings import LogitsProcessor, SamplingSettings


class CallerSampler(TargetSampler):
    """Calls processors and sampler as mlx-lm's plain generation does: for each token, in order.

    `logprobs` collects what each token was drawn from, (V,), until it is taken; a greedy choice leaves nothing.
    """

    def __init__(
        self,
        sampler: Any,
        processors: Sequence[LogitsProcessor],
        vocab_size: int,
        dtype: mx.Dtype,
        num_before: int,
    ) -> None:
        """`dtype`: of the model's logits. `num_before`: tokens that a prompt cache held: mlx-lm's processors see
        the prompt and what follows, not those."""
        super().__init__(SamplingSettings(), vocab_size)
        self._draw = sampler
        self._calls = list(processors)
        self.dtype = dtype
        self._num_before = num_before
        self._last: mx.array | None = None
        self._logprobs: list[mx.array] = []

    @property
    def greedy(self) -> bool:
        """Whether tokens are the largest logits, which needs none of the caller's functions."""
        return self._draw is greedy_sampler and not self._calls

    def choose(
        self, logits: Row | mx.array, tokens: Sequence[int], position: int, path: Sequence[int] = ()
    ) -> int:
        if self.greedy:
            return super().choose(logits, tokens, position, path)
        row = mx.array(logits)[None].astype(self.dtype)
        if self._calls:
            seen = mx.array([*tokens, *path][self._num_before :])
            for process in self._calls:
                row = process(seen, row)
        self._last = row - mx.logsumexp(row, keepdims=True)
        self._logprobs.append(self._last.squeeze(0))
        return int(self._draw(self._last).item())

    def take_logprobs(self) -> list[mx.array]:
        """The rows (V,) since the last call."""
        rows, self._logprobs = self._logprobs, []
        return rows

    def draw_ahead(self) -> None:
        """mlx-lm always draws one token more than it gives out: so must we, for the next text of a program that
        seeds once to be the same."""
        if self._last is not None:
            mx.eval(self._draw(self._last))


_KNOWN = {
    "sampler", "logits_processors", "max_kv_size", "prompt_cache", "prefill_step_size", "kv_bits", "kv_group_size",
    "quantized_kv_start", "prompt_progress_callback", "input_embeddings", "num_draft_tokens",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `max_tokens`: None for no limit. `max_drafted` in a pass; None lets the policy choose."""

    model: Module
    draft_model: Module | None
    tokenizer: Any
    prompt: Sequence[int]
    max_tokens: int | None
    stream: Any
    sampler: Any = greedy_sampler
    processors: Sequence[LogitsProcessor] = ()
    prompt_cache: list[Any] | None = None
    prefill_chunk: int | None = None
    max_drafted: int | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None

    @classmethod
    def of(
        cls,
        model: Module,
        tokenizer: Any,
        prompt: Any,
        max_tokens: int,
        draft_model: Module | None,
        stream: Any,
        options: Mapping[str, Any],
    ) -> Request:
        """Raises UsageError naming an option that is out of range."""
        chunk, drafted = options.get("prefill_step_size"), options.get("num_draft_tokens")
        if chunk is not None and chunk < 1:
            raise UsageError(f"prefill_step_size: {chunk} is out of range; give 1 or more")
        if drafted is not None and drafted < 0:
            raise UsageError(f"num_draft_tokens: {drafted} is out of range; give 0 or more")
        return cls(
            model,
            draft_model,
            tokenizer,
            _encode(prompt, tokenizer),
            None if max_tokens < 0 else max_tokens,
            stream,
            options.get("sampler") or greedy_sampler,
            options.get("logits_processors") or (),
            options.get("prompt_cache"),
            chunk,
            None if draft_model is None else drafted,  # without a draft model, mlx-lm ignores it too
            options.get("prompt_progress_callback") or (lambda done, total: None),
        )


def why_left_to_mlx_lm(
    model: Module, draft_model: Module | None, prompt: Any, max_tokens: int, options: Mapping[str, Any]
) -> str:
    """Which argument only mlx-lm's own function can heed; "" for none."""
    unknown = sorted(options.keys() - _KNOWN)
    if unknown:
        return f"{unknown[0]} is not an option this plugin knows"
    if max_tokens == 0 or len(prompt) == 0:
        return "nothing is asked for"
    for name in ("input_embeddings", "kv_bits"):
        if options.get(name) is not None:
            return f"{name} is given"
    if options.get("max_kv_size") is not None and _may_outgrow(model, draft_model, max_tokens, prompt, options):
        return "the text may outgrow max_kv_size"
    return ""


def _may_outgrow(
    model: Module, draft_model: Module | None, max_tokens: int, prompt: Any, options: Mapping[str, Any]
) -> bool:
    """Whether max_kv_size changes anything: mlx-lm heeds it only for some of the caches that it makes."""
    if draft_model is not None or options.get("prompt_cache") is not None or hasattr(model, "make_cache"):
        return False
    # A text has no more tokens than bytes.
    num_tokens = len(prompt.encode()) + 1 if isinstance(prompt, str) else len(prompt)
    return max_tokens < 0 or bool(num_tokens + max_tokens > options["max_kv_size"])


def wrapped(tokenizer: Any) -> Any:
    """mlx-lm's wrapper of a tokenizer."""
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def _encode(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids, by mlx-lm's rule: text gets special tokens unless it begins with them."""
    if isinstance(prompt, mx.array):
        tokens: Any = prompt.tolist()
        return list(tokens)
    if not isinstance(prompt, str):
        return list(prompt)
    special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=special))
