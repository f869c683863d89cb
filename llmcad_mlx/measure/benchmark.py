"""A whole benchmark: from options to a report of all runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from llmcad_mlx.api import Engine
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.machine import Machine, this_machine
from llmcad_mlx.measure.contenders import Sampling, check_variants, has_draft, make_contenders
from llmcad_mlx.measure.prompts import BenchPrompt, load_prompts
from llmcad_mlx.measure.records import Run
from llmcad_mlx.measure.runner import EncodedPrompt, mixed_by_domain, run_interleaved
from llmcad_mlx.measure.variants import PLAIN, Variant, needs_mlx_lm, parse_variants
from llmcad_mlx.memory.plan import MemoryPlan
from llmcad_mlx.settings import GenerationOptions, MemoryOptions, check_integer
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name
from llmcad_mlx.store.pull import DEFAULT_PRESET


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to compare on what, checked before anything is loaded."""

    variants: tuple[Variant, ...]
    prompts: tuple[BenchPrompt, ...]
    sampling: Sampling
    repeat: int
    warmup: int

    @classmethod
    def of(
        cls,
        variants: str,
        domains: str,
        prompts: Path | None,
        max_tokens: int,
        repeat: int,
        warmup: int,
        temperature: float,
        seed: int,
        per_domain: int | None = None,
    ) -> BenchPlan:
        """Check what the command line was given. Raises UsageError naming the option."""
        GenerationOptions.of(max_tokens=max_tokens, temperature=temperature, seed=seed)
        if max_tokens < 1:
            raise UsageError("max_tokens: a benchmark needs a limit; give 1 or more")
        check_integer("repeat", repeat, 1, 10_000)
        check_integer("warmup", warmup, 0, 10_000)
        if per_domain is not None:
            check_integer("per_domain", per_domain, 1, 10_000)
        names = [name.strip() for name in domains.split(",") if name.strip()]
        return cls(
            tuple(parse_variants(variants)),
            tuple(mixed_by_domain(load_prompts(prompts, names, per_domain))),
            Sampling(max_tokens, temperature, seed),
            repeat,
            warmup,
        )

    @property
    def num_generations(self) -> int:
        """All generations, warm-up included."""
        return len(self.variants) * (self.warmup + self.repeat * len(self.prompts))


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured, and on what."""

    plan: BenchPlan
    target: str
    draft: str
    device: str
    machine: Machine
    runs: list[Run]
    interrupted: bool
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    memory_plan: MemoryPlan | None = None

    @property
    def comparable(self) -> bool:
        """Whether mlx-lm's tokens should be ours: it draws other random numbers."""
        return self.plan.sampling.temperature == 0.0

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        return _notes(self)


def run_benchmark(
    plan: BenchPlan,
    target: str | None,
    draft: str,
    show_progress: bool,
    on_turn: Callable[[str], None] = lambda name: None,
    memory: MemoryOptions | None = None,
) -> BenchReport:
    """Load the pair and run the plan; `show_progress` is for downloads, `on_turn` as in `run_interleaved`.

    Raises the errors of `load_pair`, and UsageError for a variant that the pair cannot run.
    """
    pair = load_pair(target, draft, show_progress, memory)
    return measure_pair(plan, pair, target or DEFAULT_PRESET, _draft_folder(pair), on_turn)


def measure_pair(
    plan: BenchPlan,
    pair: LoadedPair,
    target: str,
    draft_path: Path | None = None,
    on_turn: Callable[[str], None] = lambda name: None,
) -> BenchReport:
    """Run the plan on a loaded pair.

    `target` is its name for people, `draft_path` the draft model's folder, None without one.
    """
    check_variants(plan.variants, draft_path is not None, has_draft(pair))
    contenders = make_contenders(plan.variants, pair, draft_path)
    prompts = encode_prompts(plan.prompts, pair)
    outcome = run_interleaved(contenders, prompts, plan.sampling, plan.repeat, plan.warmup, on_turn)
    return BenchReport(
        plan=plan,
        target=target,
        draft=pair.draft_name,
        device=device_name(),
        machine=this_machine(),
        runs=outcome.runs,
        interrupted=outcome.interrupted,
        memory=pair.options,
        memory_plan=pair.plan,
    )


def encode_prompts(prompts: Sequence[BenchPrompt], pair: LoadedPair) -> list[EncodedPrompt]:
    """Each prompt as a user message in the model's chat template, or as text where it has none."""
    engine = Engine(pair)
    chat = bool(getattr(pair.tokenizer, "chat_template", None))
    texts: list[Any] = [[{"role": "user", "content": p.text}] if chat else p.text for p in prompts]
    return [EncodedPrompt(prompt, tuple(engine.encode(text))) for prompt, text in zip(prompts, texts, strict=True)]


def _draft_folder(pair: LoadedPair) -> Path | None:
    """Where mlx-lm finds the draft model, None when the pair has none."""
    if all(drafter.model is None for drafter in pair.drafters):
        return None
    return pair.draft_path


def _notes(report: BenchReport) -> list[str]:
    plan = report.plan
    notes = [
        f"Prompts: {len(plan.prompts)}; repetitions: {plan.repeat}; at most {plan.sampling.max_tokens} tokens; "
        f"temperature {plan.sampling.temperature:g}. All variants interleaved in one process; speeds are medians, "
        "ratios medians of the ratios at the same prompt and repetition. Wrong tokens differ from plain's, of all."
    ]
    memory = report.memory_plan
    if memory is not None:
        rate = report.memory.read_bandwidth
        notes.append(
            f"Target: {format_size(memory.pinned_bytes)} pinned, "
            f"{format_size(memory.streamed_bytes)} read on each pass"
            + (f", emulated at {format_size(int(rate))}/s. All speeds are emulated." if rate is not None else ".")
            + " Waits: the processor has nothing to do while weights load. Survived: passes after which something "
            "drafted meanwhile was left to start with. A: tokens per pass, B: read rate, W: bytes per pass."
        )
    if needs_mlx_lm(plan.variants):
        notes.append(
            "mlx-lm computes the first token with the prompt, so its decoding speed leaves that token out. "
            "Its tokens may differ from plain's by rounding."
        )
        if mx.default_device() == mx.cpu:
            notes.append(
                "On this CPU mlx-lm runs on weights cast to float32, which favours it: MLX's CPU matmul is many "
                "times slower in 16 bits."
            )
        if not report.comparable:
            notes.append("Above temperature 0 mlx-lm draws other random numbers; its text is not compared.")
    if any(variant.name == PLAIN for variant in plan.variants):
        notes.append(
            "Worst prompt: the least, over prompts, of the median ratio over repetitions. Break-even: the tokens "
            "per pass at which passes that take so long would be as fast as plain decoding."
        )
    else:
        notes.append("Without the variant 'plain' there is nothing to compare texts and speeds with.")
    if report.interrupted:
        notes.append(f"Interrupted: only {len(report.runs)} generations were done.")
    return notes
