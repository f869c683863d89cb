"""One generation through the engine: the caller's functions choose, mlx-lm's responses answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import greedy_sampler

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.engine.round import Round, run_round
from llmcad_mlx.engine.session import Session
from llmcad_mlx.engine.text import Piece, TextStream
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModel
from llmcad_mlx.mlx_lm_plugin.prompt_caches import ModelRows, RowsDrafter
from llmcad_mlx.mlx_lm_plugin.request import Request
from llmcad_mlx.policy.best_first import DEFAULT_MAX_NODES
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import Row, TargetSampler
from llmcad_mlx.settings import LogitsProcessor, SamplingSettings, SpeculationSettings, StopSettings
from llmcad_mlx.verifying import Target

_LOG = logging.getLogger("llmcad_mlx.mlx_lm_plugin")


class CallerSampler(TargetSampler):
    """Calls processors and sampler as mlx-lm's plain generation does: for each token, in order.

    `logprobs` collects what each token was drawn from, (V,), until it is taken; a greedy choice leaves nothing.
    """

    def __init__(self, request: Request, vocab_size: int, dtype: mx.Dtype, num_before: int) -> None:
        """`dtype`: of the model's logits. `num_before`: tokens that a prompt cache held: mlx-lm's processors see
        the prompt and what follows, not those."""
        super().__init__(SamplingSettings(), vocab_size)
        self._draw: Any = request.sampler or greedy_sampler
        self._calls: list[LogitsProcessor] = list(request.logits_processors or ())
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


class Speculation:
    """One generation: an engine with caches of its own, and the caller's cache around it."""

    def __init__(
        self,
        request: Request,
        prompt: Sequence[int],
        target: AdaptedModel,
        draft: AdaptedModel | None,
        rows: ModelRows | None,
        draft_rows: ModelRows | None,
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._rows = rows
        self._stats = GenerationStats()
        tree = target.with_prefill_chunk(request.prefill_step_size)
        self._target = Target(tree, tree.vocab_size)  # like mlx-lm's, every logit can be chosen
        self._drafter: RowsDrafter | None = None
        if draft is not None:
            self._drafter = RowsDrafter(draft.with_prefill_chunk(request.prefill_step_size), draft_rows)
        self._before: list[int] = []
        cache = self._target.cache
        if rows is not None and cache.can_rollback:
            rows.put_into(cache)
            self._before = rows.tokens()
        profile = target.profile(draft)
        drafters: list[Drafter] = [NgramDrafter()]
        if self._drafter is not None:
            drafters.append(self._drafter)
        # Without a draft model, mlx-lm ignores num_draft_tokens too.
        drafted = None if draft is None else request.num_draft_tokens
        max_nodes = DEFAULT_MAX_NODES if drafted is None else drafted + 1
        self._policy = make_policy(SpeculationSettings(), drafters, profile.costs, profile.calibration, max_nodes)
        self._session = Session(self._target, drafters, profile.costs, tokens=list(self._before))
        self._sampler = CallerSampler(request, tree.vocab_size, target.logits_dtype, len(self._before))
        self._given_out = 0

    def run(self) -> Iterator[GenerationResponse]:
        """The responses; the caller's cache is written before the last one, or when this is closed."""
        request, finished = self._request, False
        limit = None if request.max_tokens < 0 else request.max_tokens
        text = TextStream(request.tokenizer, StopSettings(), request.tokenizer.eos_token_ids, limit)
        started = False
        try:
            with mx.stream(request.stream):
                self._session.start([*self._before, *self._prompt], self._policy, self._stats, self._progress)
            started = True
            while text.finish_reason is None:
                with mx.stream(request.stream):
                    done = run_round(self._session, self._policy, self._sampler, self._stats, text.push)
                    responses = self._responses(text.take(), done)
                for response in responses:
                    self._given_out += 1
                    if response.finish_reason is not None:
                        finished = True
                        self._finish()
                    yield response
        finally:
            if started and not finished:
                self._give_back()
            _LOG.info(
                "%d tokens in %d passes of the target, %d drafted tokens accepted",
                self._stats.generated_tokens,
                self._stats.target_passes,
                self._stats.accepted,
            )

    def _progress(self, done: int, total: int) -> None:
        before, tell = len(self._before), self._request.prompt_progress_callback
        if tell is not None:
            tell(done - before, total - before)

    def _responses(self, pieces: Sequence[Piece], done: Round) -> list[GenerationResponse]:
        """One for each token of a round."""
        stats, prompt = self._stats, self._prompt
        logprobs = self._sampler.take_logprobs() or self._greedy_logprobs(done)
        mx.eval(logprobs)  # mlx-lm's are too: another thread may look at them
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

    def _greedy_logprobs(self, done: Round) -> list[mx.array]:
        logits = done.verification.logits[mx.array(list(done.walk.visited))]
        rows = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(self._sampler.dtype)
        return list(rows)

    def _finish(self) -> None:
        with mx.stream(self._request.stream):
            self._sampler.draw_ahead()
        self._give_back()

    def _give_back(self) -> None:
        """The caller's cache holds what was given out, the last token included, as after mlx-lm's function."""
        if self._rows is None:
            return
        tokens = self._session.tokens[: len(self._before) + len(self._prompt) + self._given_out]
        cache = self._target.cache
        with mx.stream(self._request.stream):
            self._target.truncate(len(tokens))
            self._target.prefill(tokens[cache.length :], lambda done: None, lambda: False)
            self._rows.take_from(cache, tokens)
            if self._drafter is not None:
                self._drafter.give_back(tokens)
