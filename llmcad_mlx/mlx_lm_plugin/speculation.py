"""One generation through the engine: the caller's functions choose, mlx-lm's responses answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import greedy_sampler

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.engine.round import Round, run_round
from llmcad_mlx.engine.session import Session
from llmcad_mlx.engine.text import Piece, TextStream
from llmcad_mlx.errors import UsageError, VocabularyError
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModel, AdaptedModels, LeftToMlxLmError, ModelRows
from llmcad_mlx.policy.best_first import DEFAULT_MAX_NODES
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import Row, TargetSampler
from llmcad_mlx.settings import LogitsProcessor, SamplingSettings, SpeculationSettings, StopSettings
from llmcad_mlx.verifying import Target

_LOG = logging.getLogger("llmcad_mlx.mlx_lm_plugin")


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of mlx-lm's `stream_generate`, by its names. `tokenizer`: mlx-lm's wrapper of one."""

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

    def check(self) -> None:
        """Raise LeftToMlxLmError for what only mlx-lm can heed, UsageError naming an option out of range."""
        if self.max_tokens == 0 or len(self.prompt) == 0:
            raise LeftToMlxLmError("nothing is asked for")
        for name in ("input_embeddings", "kv_bits"):
            if getattr(self, name) is not None:
                raise LeftToMlxLmError(f"{name} is given")
        # mlx-lm heeds max_kv_size only for some of the caches that it makes.
        given = self.draft_model is not None or self.prompt_cache is not None or hasattr(self.model, "make_cache")
        if self.max_kv_size is not None and not given:
            # A text has no more tokens than bytes.
            num_tokens = len(self.prompt.encode()) + 1 if isinstance(self.prompt, str) else len(self.prompt)
            if self.max_tokens < 0 or num_tokens + self.max_tokens > self.max_kv_size:
                raise LeftToMlxLmError("the text may outgrow max_kv_size")
        for name, least in (("prefill_step_size", 1), ("num_draft_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: {value} is out of range; give {least} or more")


OPTIONS = frozenset(field.name for field in fields(Request)[6:])
"""What may be given beyond `stream_generate`'s named arguments."""


def encoded(tokenizer: Any, prompt: str | mx.array | list[int]) -> list[int]:
    """The prompt's token ids, by mlx-lm's rule: text gets special tokens unless it begins with them."""
    if not isinstance(prompt, str):
        tokens: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
        return list(tokens)
    begins = tokenizer.bos_token
    special = begins is None or not prompt.startswith(begins)
    return list(tokenizer.encode(prompt, add_special_tokens=special))


class CallerSampler(TargetSampler):
    """Calls processors and sampler as mlx-lm's plain generation does: for each token, in order.

    It keeps what each token was drawn from until that is taken; a greedy choice leaves nothing.
    """

    def __init__(self, request: Request, vocab_size: int, dtype: mx.Dtype, num_before: int) -> None:
        """`dtype`: of the model's logits. `num_before`: tokens that a prompt cache held: mlx-lm's processors see
        the prompt and what follows, not those."""
        super().__init__(SamplingSettings(), vocab_size)
        self._draw: Any = request.sampler or greedy_sampler
        self._calls: list[LogitsProcessor] = list(request.logits_processors or ())
        self._dtype = dtype
        self._num_before = num_before
        self._last: mx.array | None = None
        self._logprobs: list[mx.array] = []

    def choose(
        self, logits: Row | mx.array, tokens: Sequence[int], position: int, path: Sequence[int] = ()
    ) -> int:
        if self._draw is greedy_sampler and not self._calls:  # the largest logits: the caller has no function
            return super().choose(logits, tokens, position, path)
        row = mx.array(logits)[None].astype(self._dtype)
        if self._calls:
            seen = mx.array([*tokens, *path][self._num_before :])
            for process in self._calls:
                row = process(seen, row)
        self._last = row - mx.logsumexp(row, keepdims=True)
        self._logprobs.append(self._last.squeeze(0))
        return int(self._draw(self._last).item())

    def take_logprobs(self, done: Round) -> list[mx.array]:
        """The rows (V,) of a round's tokens, evaluated as mlx-lm's are: another thread may look at them."""
        rows, self._logprobs = self._logprobs, []
        if not rows:
            logits = done.verification.logits[mx.array(list(done.walk.visited))]
            rows = list((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(self._dtype))
        mx.eval(rows)
        return rows

    def draw_ahead(self) -> None:
        """Draw one token more than is given out, as mlx-lm does: a program that seeds once goes on the same."""
        if self._last is not None:
            mx.eval(self._draw(self._last))


class Speculation:
    """One generation: an engine with caches of its own, and the caller's cache around it."""

    def __init__(self, request: Request, models: AdaptedModels) -> None:
        """Raises LeftToMlxLmError, UsageError naming an option, VocabularyError for a draft of too few tokens."""
        request.check()
        self._request = request
        self._prompt = encoded(request.tokenizer, request.prompt)
        if not self._prompt:
            raise LeftToMlxLmError("the prompt is empty")
        target = models.of(request.model)
        draft = None if request.draft_model is None else models.of(request.draft_model)
        if draft is not None:
            _check_vocabulary(target, draft, request.tokenizer)
        rows = _caller_rows(request, target, draft)
        self._stats = GenerationStats()
        tree = target.with_prefill_chunk(request.prefill_step_size)
        self._target = Target(tree, tree.vocab_size)  # like mlx-lm's, every logit can be chosen
        owners: list[Target | ModelDrafter] = [self._target]
        drafters: list[Drafter] = [NgramDrafter()]
        max_nodes = DEFAULT_MAX_NODES
        if draft is not None:  # without one, mlx-lm ignores num_draft_tokens too
            drafter = ModelDrafter(draft.with_prefill_chunk(request.prefill_step_size))
            owners.append(drafter)
            drafters.append(drafter)
            if request.num_draft_tokens is not None:
                max_nodes = request.num_draft_tokens + 1
        self._kept = list(zip(owners, rows, strict=False))
        for owner, part in self._kept:
            part.put_into(owner.cache)
        self._before = rows[0].tokens() if rows else []
        profile = target.profile(draft)
        self._policy = make_policy(SpeculationSettings(), drafters, profile.costs, profile.calibration, max_nodes)
        self._session = Session(self._target, drafters, profile.costs, tokens=list(self._before))
        self._sampler = CallerSampler(request, tree.vocab_size, target.logits_dtype, len(self._before))
        self._given_out = 0

    def run(self) -> Iterator[GenerationResponse]:
        """The responses; the caller's cache is written before the last one, or when this is closed."""
        request, policy, stats = self._request, self._policy, self._stats
        limit = None if request.max_tokens < 0 else request.max_tokens
        text = TextStream(MlxLmPieces(request.tokenizer), StopSettings(), request.tokenizer.eos_token_ids, limit)
        before, tell = len(self._before), request.prompt_progress_callback or (lambda done, total: None)
        with mx.stream(request.stream):
            whole = [*self._before, *self._prompt]
            self._session.start(whole, policy, stats, lambda done, total: tell(done - before, total - before))
        try:
            while text.finish_reason is None:
                with mx.stream(request.stream):
                    done = run_round(self._session, policy, self._sampler, stats, text.push)
                    responses = self._responses(text.take(), done)
                for response in responses:
                    self._given_out += 1
                    if response.finish_reason is not None:
                        with mx.stream(request.stream):
                            self._sampler.draw_ahead()
                        self._give_back()
                    yield response
        finally:
            self._give_back()
            counts = (stats.generated_tokens, stats.target_passes, stats.accepted)
            _LOG.info("%d tokens in %d passes of the target, %d drafted tokens accepted", *counts)

    def _responses(self, pieces: Sequence[Piece], done: Round) -> list[GenerationResponse]:
        stats, prompt = self._stats, self._prompt
        logprobs = self._sampler.take_logprobs(done)
        first = stats.generated_tokens - len(pieces) + 1
        return [
            GenerationResponse(
                text=piece.text,
                token=piece.token,
                logprobs=logprobs[index],
                from_draft=index < done.walk.num_accepted,
                prompt_tokens=len(prompt),
                prompt_tps=len(prompt) / max(stats.prompt_s, 1e-9),
                generation_tokens=first + index,
                generation_tps=stats.tokens_per_s,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=piece.finish_reason,
            )
            for index, piece in enumerate(pieces)
        ]

    def _give_back(self) -> None:
        """Once: the caller's cache holds what was given out, the last token included, as after mlx-lm's."""
        kept, self._kept = self._kept, []
        tokens = self._session.tokens[: len(self._before) + len(self._prompt) + self._given_out]
        for owner, rows in kept:
            with mx.stream(self._request.stream):
                owner.truncate(len(tokens))
                cache = owner.cache
                if owner.num_cached < cache.length:  # a draft gave up the start; the caller has its rows
                    cache = owner.model.new_cache()
                    rows.put_into(cache)
                owner.model.prefill(tokens[cache.length :], cache)
                rows.take_from(cache, tokens)


class MlxLmPieces:
    """mlx-lm's own detokenizer: text as without this package."""

    def __init__(self, tokenizer: Any) -> None:
        self._detokenizer = tokenizer.detokenizer

    def push(self, token: int) -> str:
        self._detokenizer.add_token(token)
        return str(self._detokenizer.last_segment)

    def flush(self) -> str:
        self._detokenizer.finalize()
        return str(self._detokenizer.last_segment)


def _check_vocabulary(target: AdaptedModel, draft: AdaptedModel, tokenizer: Any) -> None:
    """Padded sizes may differ; only where the draft has fewer logits is the tokenizer asked."""
    size = draft.tree.vocab_size
    if size < target.tree.vocab_size and (largest := max(tokenizer.get_vocab().values())) >= size:
        raise VocabularyError(
            f"draft_model: it has {size} logits, the tokenizer {largest + 1} tokens; "
            "choose a draft of the same model family"
        )


def _caller_rows(request: Request, target: AdaptedModel, draft: AdaptedModel | None) -> list[ModelRows]:
    """The target's part of the caller's prompt cache, and the draft model's behind it; [] without a cache."""
    if request.prompt_cache is None:
        return []
    num_layers = len(request.model.layers)
    entries, others = request.prompt_cache[:num_layers], request.prompt_cache[num_layers:]
    if draft is None:
        return [ModelRows(target, entries)]
    if not others:
        raise UsageError(
            "prompt_cache: it has no part for the draft model; "
            "give make_prompt_cache(model) + make_prompt_cache(draft_model)"
        )
    rows, draft_rows = ModelRows(target, entries), ModelRows(draft, others)
    if draft_rows.length < rows.length:
        raise LeftToMlxLmError("the draft model's part of prompt_cache is shorter than the target's")
    return [rows, draft_rows]
