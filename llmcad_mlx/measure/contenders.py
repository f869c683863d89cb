"""Variants made runnable: each with caches, policy and learned costs of its own, on shared weights.

A drafter that costs what another one costs and is always wrong: what "never slower" is tested with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import generation_stream, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

from llmcad_mlx.api import Engine
from llmcad_mlx.drafting import Drafter, LookupDrafter
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure.records import Generation
from llmcad_mlx.measure.variants import MLX_LM_DRAFT, Variant, needs_mlx_lm
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.calibration import ngram_confidence
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SpeculationSettings
from llmcad_mlx.store.names import NO_DRAFT
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.tree.token_tree import NGRAM, Selection, TokenTree

_SHIFT = 7  # any number: it only has to lead to another token


class WrongDrafter(LookupDrafter):
    """Asks another drafter and proposes other tokens with the same confidences.

    No proposed token is among the inner drafter's own candidates, so wherever the target agrees with any of
    those, all proposals are wrong. Prompt lookup, which is often silent, is made to propose below every leaf:
    with nothing found it claims what two matching tokens would.
    """

    def __init__(self, inner: Drafter, vocab_size: int) -> None:
        self.inner = inner
        self.vocab_size = vocab_size

    @property
    def source(self) -> str:
        return self.inner.source

    @property
    def rows_fed(self) -> int | None:
        return self.inner.rows_fed

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        self.inner.prefill(tokens, on_progress, should_stop)

    def prefill_some(self, tokens: Sequence[int], limit: int) -> bool:
        return self.inner.prefill_some(tokens, limit)

    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None:
        self.inner.begin(tokens, sampler, tree)

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        proposals = self.inner.expand(tree, leaves)
        return [self._wrong(found, tree.tokens[leaf]) for leaf, found in zip(leaves, proposals, strict=True)]

    def _wrong(self, found: Candidates, leaf_token: int) -> Candidates:
        if not found.tokens and self.source == NGRAM:
            found = Candidates([leaf_token], [ngram_confidence(2)], NGRAM)
        taken = set(found.tokens)
        shifted = []
        for token in found.tokens[: self.vocab_size - len(taken)]:
            other = (token + _SHIFT) % self.vocab_size
            while other in taken:
                other = (other + 1) % self.vocab_size
            taken.add(other)
            shifted.append(other)
        return Candidates(shifted, found.confidences[: len(shifted)], found.source)

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        self.inner.commit(tree, path, survivors)

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What all variants generate with."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Contender(Protocol):
    """A variant that can generate, over and over, each time from an empty cache."""

    @property
    def name(self) -> str: ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Generate after the tokens of `prompt`, to an end-of-sequence token or `max_tokens`."""


class EngineContender:
    """Our engine with one speculation setting. What it learns about costs is kept from run to run."""

    def __init__(self, name: str, pair: LoadedPair, settings: SpeculationSettings) -> None:
        self.name = name
        self._pair = pair
        self._engine = Engine(pair)
        self._settings = settings

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        self._forget()
        tokens, stats = [], GenerationStats()
        started = time.perf_counter()
        for response in self._engine.stream_generate(
            prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            **asdict(self._settings),
        ):
            tokens.append(response.token)
            stats = response.stats or stats
        seconds = time.perf_counter() - started
        plan = self._pair.plan
        return Generation(
            tokens=tuple(tokens),
            num_timed=len(tokens),
            prompt_tokens=len(prompt),
            prompt_s=stats.prompt_s,
            decode_s=seconds - stats.prompt_s,
            stats=stats,
            pass_bytes=0 if plan is None else plan.streamed_bytes,
        )

    def _forget(self) -> None:
        """Empty the caches, so that no prompt is taken over from the run before."""
        self._pair.target.truncate(0)
        for drafter in self._pair.drafters:
            drafter.truncate(0)


class MlxLmContender:
    """mlx-lm's own generation, with or without its draft model."""

    def __init__(self, name: str, model: Module, tokenizer: Any, draft_model: Module | None = None) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._draft_model = draft_model

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        mx.random.seed(sampling.seed)
        sampler = make_sampler(sampling.temperature)
        tokens: list[int] = []
        prompt_s = 0.0
        started = time.perf_counter()
        for response in stream_generate(
            self._model,
            self._tokenizer,
            list(prompt),
            sampling.max_tokens,
            draft_model=self._draft_model,
            sampler=sampler,
        ):
            if not tokens:
                prompt_s = time.perf_counter() - started
            tokens.append(response.token)
        seconds = time.perf_counter() - started
        # It has started on a token that nobody will ask for; that must not run into the next variant's time.
        mx.synchronize(generation_stream)
        return Generation(tuple(tokens), len(tokens) - 1, len(prompt), prompt_s, seconds - prompt_s, None)


def make_contenders(
    variants: Sequence[Variant], pair: LoadedPair, draft_path: Path | None = None
) -> list[Contender]:
    """Runnable variants on the pair's weights.

    draft_path: the draft model's folder, None when there is none. mlx-lm's variants get a second copy of the
    weights, loaded by mlx-lm, and on a CPU cast to float32; plain-equal one of its own, too. Raises UsageError for
    a variant that needs a draft model where there is none.
    """
    check_variants(variants, draft_path is not None, has_draft(pair))
    theirs = {}
    if needs_mlx_lm(variants):
        theirs = _mlx_lm_contenders(variants, pair, draft_path)
    return [
        theirs[variant.name]
        if variant.settings is None
        else EngineContender(variant.name, variant_pair(pair, variant), variant.settings)
        for variant in variants
    ]


def check_variants(variants: Sequence[Variant], has_draft_model: bool, has_draft: bool) -> None:
    """Raises UsageError for a variant that needs a draft model, or a draft of any kind, where there is none."""
    for variant in variants:
        if not has_draft_model and (variant.name == MLX_LM_DRAFT or variant.equal_memory):
            raise UsageError(f"variants: {variant.name} needs a draft model; name one with --draft")
        if not has_draft and variant.drafters == "draft":
            raise UsageError(
                f"variants: {variant.name} needs a draft model or an n-gram table; name one with --draft"
            )


def has_draft(pair: LoadedPair) -> bool:
    """Whether anything but prompt lookup drafts."""
    return any(not isinstance(drafter, NgramDrafter) for drafter in pair.drafters)


def variant_pair(pair: LoadedPair, variant: Variant) -> LoadedPair:
    """The same models with drafters and learned costs of their own; nothing is saved to disk.

    The target's cache is everybody's: a contender empties it before it generates.
    """
    if variant.equal_memory:
        return _without_draft(pair)
    return replace(pair, drafters=_drafters(pair, variant), profile=PairProfile(None))


def _without_draft(pair: LoadedPair) -> LoadedPair:
    """The target alone, with the draft's memory to pin more of it."""
    options, plan = pair.options, pair.plan
    if plan is None:
        raise UsageError("variants: plain-equal is for a target that is streamed; give --memory or --pinned")
    if options.pinned is not None:
        options = replace(options, pinned=options.pinned + plan.draft_bytes)
    return replace(load_pair(str(pair.target_path), NO_DRAFT, False, options), profile=PairProfile(None))


def _drafters(pair: LoadedPair, variant: Variant) -> list[Drafter]:
    if variant.drafters == "none" or pair.target.capability == "plain":
        return []
    models = [drafter for drafter in pair.drafters if drafter.model is not None]
    others = [drafter for drafter in pair.drafters if not isinstance(drafter, NgramDrafter)]
    if variant.drafters == "wrong":
        inner: Drafter = models[0] if models else NgramDrafter()
        return [WrongDrafter(inner, pair.vocab_size)]
    if variant.drafters == "ngram":
        return [NgramDrafter()]
    lookup: list[Drafter] = [] if variant.drafters == "draft" else [NgramDrafter()]
    return [*lookup, *others] if pair.drafters else []


def _mlx_lm_contenders(
    variants: Sequence[Variant], pair: LoadedPair, draft_path: Path | None
) -> dict[str, MlxLmContender]:
    """mlx-lm's variants by name, on one copy of the target."""
    model = _mlx_lm_model(pair.target_path)
    found = {}
    for variant in variants:
        if variant.settings is None:
            draft_model = None
            if draft_path is not None and variant.name == MLX_LM_DRAFT:
                draft_model = _mlx_lm_model(draft_path)
            found[variant.name] = MlxLmContender(variant.name, model, pair.tokenizer, draft_model)
    return found


def _mlx_lm_model(path: Path) -> Any:
    model: Any = load_model(path)[0]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model
