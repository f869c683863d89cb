"""Runs ways of decoding by turns at the same prompts, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import generation_stream, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

from llmcad_mlx.api import Engine
from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure.output import share
from llmcad_mlx.measure.workload import MLX_LM_DRAFT, PLAIN, BenchPrompt, Variant, Workload
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.calibration import ngram_confidence
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import GenerationOptions, SpeculationSettings
from llmcad_mlx.store.names import NO_DRAFT
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.tree.token_tree import NGRAM, TokenTree

PromptName = tuple[str, str]
"""Domain and name."""
WARM_UP = -1
"""The repetition of a warm-up."""
OnTurn = Callable[[str, int], None]
"""Called before each step with its name and the number of all steps."""
Found = TypeVar("Found")


def until_interrupted(steps: Iterable[Iterable[Found]], found: list[Found]) -> bool:
    """Do the steps, adding to `found` what each gives; whether Ctrl-C ended them early. Raises KeyboardInterrupt
    where nothing was found yet."""
    try:
        for step in steps:
            found += step
    except KeyboardInterrupt:
        if not found:
            raise
        return True
    return False


@dataclass(frozen=True, slots=True)
class Generation:
    """One measured generation.

    All contenders are timed from outside with one clock: `prompt_s` to the end of prompt processing, `decode_s`
    from there to the last token, whatever happens between tokens included. Our prompt processing ends before
    the first token is computed, mlx-lm's with it, so `num_timed`, the tokens that `decode_s` paid for, is one
    less there. `stats` is None for mlx-lm, which counts neither passes nor drafts. `pass_bytes` of weights are
    read for each pass of the target.
    """

    tokens: tuple[int, ...]
    num_timed: int
    prompt_tokens: int
    prompt_s: float
    decode_s: float
    stats: GenerationStats | None
    pass_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A prompt in a repetition: what runs of different variants are compared at. `repetition` counts from 0."""

    domain: str
    prompt: str
    repetition: int

    @property
    def name(self) -> PromptName:
        return self.domain, self.prompt


@dataclass(frozen=True, slots=True)
class Run:
    """A generation with its labels; `order` is its turn among the variants at that place, from 0."""

    variant: str
    place: Place
    order: int
    generation: Generation

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed, None when no token was timed."""
        return share(self.generation.num_timed, self.generation.decode_s) or None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Prompt processing speed, None when it took no time."""
        return share(self.generation.prompt_tokens, self.generation.prompt_s) or None


def total_stats(runs: Iterable[Run]) -> GenerationStats:
    """The sums over runs of our own engine; all 0 without any."""
    found = [run.generation.stats for run in runs if run.generation.stats is not None]
    names = [field.name for field in fields(GenerationStats)]
    return GenerationStats(**{name: sum(getattr(s, name) for s in found) for name in names})


def run_mismatches(runs: Sequence[Run], comparable: bool = True, reference: str = PLAIN) -> list[int | None]:
    """For each run the tokens that differ from the reference's at the same place; None where that did not run
    there, and for mlx-lm unless `comparable`. What only one of two texts has differs."""
    expected = {run.place: run.generation.tokens for run in runs if run.variant == reference}
    return [
        sum(a != b for a, b in zip_longest(run.generation.tokens, expected[run.place]))
        if run.place in expected and (comparable or run.generation.stats is not None)
        else None
        for run in runs
    ]


def count_mismatches(
    runs: Sequence[Run], variant: str, comparable: bool = True, reference: str = PLAIN
) -> tuple[int, int]:
    """How many tokens of a variant are not the reference's, and how many were compared."""
    told = [
        (wrong, len(run.generation.tokens))
        for run, wrong in zip(runs, run_mismatches(runs, comparable, reference), strict=True)
        if run.variant == variant and wrong is not None
    ]
    return sum(wrong for wrong, _ in told), sum(length for _, length in told)


class Contender(Protocol):
    """A variant on shared weights that can generate, over and over, each time from an empty cache."""

    @property
    def name(self) -> str: ...

    def generate(self, prompt: Sequence[int], options: GenerationOptions) -> Generation:
        """Generate after the tokens of `prompt`, to an end-of-sequence token or the limit of `options`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation to do."""

    contender: Contender
    prompt: BenchPrompt
    place: Place
    order: int

    @property
    def warms_up(self) -> bool:
        """Whether it is not to be counted."""
        return self.place.repetition == WARM_UP

    def run(self, options: GenerationOptions) -> Run:
        """Do it."""
        generation = self.contender.generate(self.prompt.tokens, options)
        return Run(self.contender.name, self.place, self.order, generation)


def encode_prompts(prompts: Sequence[BenchPrompt], pair: LoadedPair) -> list[BenchPrompt]:
    """With their tokens: each a user message in the model's chat template, or text where it has none."""
    engine = Engine(pair)
    chat = bool(getattr(pair.tokenizer, "chat_template", None))
    texts: list[Any] = [[{"role": "user", "content": p.text}] if chat else p.text for p in prompts]
    return [
        replace(prompt, tokens=tuple(engine.encode(text))) for prompt, text in zip(prompts, texts, strict=True)
    ]


def schedule(
    contenders: Sequence[Contender], prompts: Sequence[BenchPrompt], repetitions: range, warmup: int
) -> Iterator[Turn]:
    """All turns, in order: `warmup` prompts, then in each repetition all prompts, each for all contenders.

    The contenders' order is rotated from prompt to prompt and from repetition to repetition, so that none always
    runs first and none always at the same prompt.
    """
    rounds = [(WARM_UP, index % len(prompts), index) for index in range(warmup)]
    rounds += [(repetition, n, repetition + n) for repetition in repetitions for n in range(len(prompts))]
    for repetition, number, shift in rounds:
        prompt = prompts[number]
        place = Place(prompt.domain, prompt.name, repetition)
        for order in range(len(contenders)):
            yield Turn(contenders[(order + shift) % len(contenders)], prompt, place, order)


def take_turns(
    contenders: Sequence[Contender], prompts: Sequence[BenchPrompt], workload: Workload, on_turn: OnTurn
) -> Iterator[list[Run]]:
    """Do all turns, giving the run of each, nothing for a warm-up. on_turn gets the contender's name."""
    turns = list(schedule(contenders, prompts, range(workload.repeat), workload.warmup))
    for turn in turns:
        on_turn(turn.contender.name, len(turns))
        run = turn.run(workload.options)
        yield [] if turn.warms_up else [run]


class EngineContender:
    """Our engine with one speculation setting. What it learns about costs is kept from run to run."""

    def __init__(self, name: str, pair: LoadedPair, settings: SpeculationSettings) -> None:
        self.name, self._engine, self._settings = name, Engine(pair), settings

    def generate(self, prompt: Sequence[int], options: GenerationOptions) -> Generation:
        self._engine.restore(None)  # no prompt is taken over from the run before
        options = replace(options, speculation=self._settings)
        tokens, stats = [], GenerationStats()
        started = time.perf_counter()
        for response in self._engine.stream_generate(list(prompt), options=options):
            tokens.append(response.token)
            stats = response.stats or stats
        seconds = time.perf_counter() - started
        plan = self._engine.pair.plan
        return Generation(
            tokens=tuple(tokens),
            num_timed=len(tokens),
            prompt_tokens=len(prompt),
            prompt_s=stats.prompt_s,
            decode_s=seconds - stats.prompt_s,
            stats=stats,
            pass_bytes=0 if plan is None else plan.streamed_bytes,
        )


@dataclass(frozen=True, slots=True)
class MlxLmContender:
    """mlx-lm's own generation, with or without its draft model."""

    name: str
    model: Module | None
    tokenizer: Any
    draft_model: Module | None

    def generate(self, prompt: Sequence[int], options: GenerationOptions) -> Generation:
        mx.random.seed(options.sampling.seed)
        tokens: list[int] = []
        prompt_s = 0.0
        started = time.perf_counter()
        for response in stream_generate(
            self.model,
            self.tokenizer,
            list(prompt),
            options.stopping.max_tokens,
            draft_model=self.draft_model,
            sampler=make_sampler(options.sampling.temperature),
        ):
            if not tokens:
                prompt_s = time.perf_counter() - started
            tokens.append(response.token)
        seconds = time.perf_counter() - started
        # It has started on a token that nobody will ask for; that must not run into the next contender's time.
        mx.synchronize(generation_stream)
        return Generation(tuple(tokens), len(tokens) - 1, len(prompt), prompt_s, seconds - prompt_s, None)


class WrongDrafter:
    """Asks another drafter and proposes none of its candidates, but others with the same confidences: wherever the
    target agrees with that drafter, all proposals are wrong. "Never slower" is tested with it.

    Prompt lookup, which is often silent, is made to propose below every leaf: with nothing found it claims what
    two matching tokens would.
    """

    def __init__(self, inner: Drafter, vocab_size: int) -> None:
        self.inner, self.vocab_size = inner, vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        proposals = self.inner.expand(tree, leaves)
        return [self._wrong(found, tree.tokens[leaf]) for leaf, found in zip(leaves, proposals, strict=True)]

    def _wrong(self, found: Candidates, leaf_token: int) -> Candidates:
        if not found.tokens and self.inner.source == NGRAM:
            found = Candidates([leaf_token], [ngram_confidence(2)], NGRAM)
        right = set(found.tokens)
        others = ((leaf_token + shift) % self.vocab_size for shift in range(1, self.vocab_size))
        wrong = list(islice((token for token in others if token not in right), len(found.tokens)))
        return Candidates(wrong, found.confidences[: len(wrong)], found.source)


def make_contenders(variants: Sequence[Variant], pair: LoadedPair) -> list[Contender]:
    """Runnable variants on the pair's weights.

    mlx-lm's variants get a second copy of the weights, loaded by mlx-lm, and on a CPU cast to float32; plain-equal
    one of its own, too. Raises UsageError for a variant that needs a draft model, or a draft of any kind, where
    there is none.
    """
    has_model = any(drafter.model is not None for drafter in pair.drafters)
    for variant in variants:
        if not has_model and (variant.name == MLX_LM_DRAFT or variant.equal_memory):
            raise UsageError(f"variants: {variant.name} needs a draft model; name one with --draft")
        if variant.drafters == "draft" and all(isinstance(drafter, NgramDrafter) for drafter in pair.drafters):
            raise UsageError(
                f"variants: {variant.name} needs a draft model or an n-gram table; name one with --draft"
            )
    theirs = _mlx_lm_model(pair.names.target_path) if any(variant.is_mlx_lm for variant in variants) else None
    contenders: list[Contender] = []
    for variant in variants:
        if variant.settings is not None:
            contenders.append(EngineContender(variant.name, variant_pair(pair, variant), variant.settings))
        else:
            draft = pair.names.draft_path if variant.name == MLX_LM_DRAFT else None
            draft_model = None if draft is None else _mlx_lm_model(draft)
            contenders.append(MlxLmContender(variant.name, theirs, pair.tokenizer, draft_model))
    return contenders


def _mlx_lm_model(path: Path) -> Any:
    model: Any = load_model(path)[0]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model


def variant_pair(pair: LoadedPair, variant: Variant) -> LoadedPair:
    """The same models with drafters and learned costs of their own; nothing is saved to disk.

    The target's cache is everybody's: a contender empties it before it generates. `equal_memory`: the target is
    loaded again, with the draft's memory to pin more of it.
    """
    if not variant.equal_memory:
        return replace(pair, drafters=_drafters(pair, variant), profile=PairProfile(None))
    options, plan = pair.options, pair.plan
    if plan is None:
        raise UsageError("variants: plain-equal is for a target that is streamed; give --memory or --pinned")
    if options.pinned is not None:
        options = replace(options, pinned=options.pinned + plan.draft_bytes)
    return replace(load_pair(str(pair.names.target_path), NO_DRAFT, False, options), profile=PairProfile(None))


def _drafters(pair: LoadedPair, variant: Variant) -> list[Drafter]:
    if variant.drafters == "none" or pair.target.cache.capability == "plain":
        return []
    lookup: Drafter = NgramDrafter()
    drafts = [drafter for drafter in pair.drafters if not isinstance(drafter, NgramDrafter)]
    if variant.drafters == "wrong":
        inner = next((drafter for drafter in drafts if drafter.model is not None), lookup)
        return [cast(Drafter, WrongDrafter(inner, pair.vocab_size))]
    if variant.drafters == "ngram":
        return [lookup]
    return drafts if variant.drafters == "draft" or not pair.drafters else [lookup, *drafts]
