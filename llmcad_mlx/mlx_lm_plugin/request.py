"""The arguments of mlx-lm's `stream_generate`, and which of them are left to mlx-lm's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import LogitsProcessor


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, by mlx-lm's names. `tokenizer`: mlx-lm's wrapper of one."""

    model: Module
    tokenizer: Any
    prompt: str | mx.array | list[int]
    max_tokens: int
    draft_model: Module | None
    stream: Any
    sampler: Any = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    max_kv_size: int | None = None
    prompt_cache: list[Any] | None = None
    prefill_step_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int | None = None
    quantized_kv_start: int | None = None
    prompt_progress_callback: Callable[[int, int], None] | None = None
    input_embeddings: mx.array | None = None
    num_draft_tokens: int | None = None

    def why_left(self) -> str:
        """Which argument only mlx-lm's own function can heed; "" for none."""
        if self.max_tokens == 0 or len(self.prompt) == 0:
            return "nothing is asked for"
        for name in ("input_embeddings", "kv_bits"):
            if getattr(self, name) is not None:
                return f"{name} is given"
        return "the text may outgrow max_kv_size" if self._may_outgrow() else ""

    def _may_outgrow(self) -> bool:
        """Whether max_kv_size changes anything: mlx-lm heeds it only for some of the caches that it makes."""
        if self.max_kv_size is None or self.draft_model is not None or self.prompt_cache is not None:
            return False
        if hasattr(self.model, "make_cache"):
            return False
        # A text has no more tokens than bytes.
        num_tokens = len(self.prompt.encode()) + 1 if isinstance(self.prompt, str) else len(self.prompt)
        return self.max_tokens < 0 or num_tokens + self.max_tokens > self.max_kv_size

    def check(self) -> None:
        """Raise UsageError naming an option that is out of range."""
        for name, least in (("prefill_step_size", 1), ("num_draft_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: {value} is out of range; give {least} or more")

    def encode(self) -> list[int]:
        """The prompt's token ids, by mlx-lm's rule: text gets special tokens unless it begins with them."""
        if isinstance(self.prompt, mx.array):
            tokens: Any = self.prompt.tolist()
            return list(tokens)
        if not isinstance(self.prompt, str):
            return list(self.prompt)
        begins = self.tokenizer.bos_token
        special = begins is None or not self.prompt.startswith(begins)
        return list(self.tokenizer.encode(self.prompt, add_special_tokens=special))


OPTIONS = frozenset(field.name for field in fields(Request)[6:])
"""What may be given beyond `stream_generate`'s named arguments."""
