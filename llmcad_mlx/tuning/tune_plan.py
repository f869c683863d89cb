"""What `llmcad-mlx tune` was asked to do, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from llmcad_mlx.api import GenerationOptions
from llmcad_mlx.bench.contenders import Sampling
from llmcad_mlx.bench.prompts import ALL_DOMAINS, load_prompts
from llmcad_mlx.bench.runner import mixed_by_domain
from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import check_integer
from llmcad_mlx.sources.copy_names import CopyName
from llmcad_mlx.sources.quantised_copy import BITS
from llmcad_mlx.sources.self_draft import self_draft_bits
from llmcad_mlx.tuning.figures import Split
from llmcad_mlx.tuning.measure import Task

NONE = "none"


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What to measure. `drafts`: None for what is there; `bits` and
    `tokens`: of the copies of draft models."""

    drafts: tuple[str, ...] | None
    bits: tuple[int, ...]
    tokens: tuple[int, ...]
    task: Task
    split: Split

    @property
    def domains(self) -> list[str]:
        """Of the prompts, in their order."""
        return list(dict.fromkeys(prompt.domain for prompt in self.task.prompts))

    @classmethod
    def of(
        cls,
        drafts: str | None,
        bits: str,
        trim: str,
        prompts: Path | None,
        per_domain: int | None,
        max_tokens: int,
        repeat: int,
        warmup: int,
        temperature: float,
        seed: int,
    ) -> TunePlan:
        """Check what the command line was given. Raises UsageError naming the option."""
        GenerationOptions.of({"max_tokens": max_tokens, "temperature": temperature, "seed": seed})
        if max_tokens < 2:
            raise UsageError("max_tokens: to be measured a draft needs a limit of 2 or more")
        check_integer("repeat", repeat, 1, 10_000)
        check_integer("warmup", warmup, 0, 10_000)
        if per_domain is not None:
            check_integer("per_domain", per_domain, 2, 10_000)
        with as_file(files("llmcad_mlx.tuning").joinpath("prompts.toml")) as packaged:
            found = load_prompts(prompts or packaged, [ALL_DOMAINS], per_domain)
        sampling = Sampling(max_tokens, temperature, seed)
        task = Task(tuple(mixed_by_domain(found)), sampling, repeat, warmup)
        return cls(_drafts(drafts), _bits(bits), _tokens(trim), task, Split.of(found))


def _drafts(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("drafts: none given; name some, separated by commas, or leave the option out")
    for name in names:
        self_draft_bits(name)
        CopyName.of(name)
    return tuple(names)


def _bits(text: str) -> tuple[int, ...]:
    if text == NONE:
        return ()
    names = [name.strip() for name in text.split(",")]
    known = {str(bits): bits for bits in BITS}
    for name in names:
        if name not in known:
            raise UsageError(f"bits: {name!r} is not one of {', '.join(known)}, or {NONE}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _tokens(text: str) -> tuple[int, ...]:
    if text == NONE:
        return ()
    names = [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdigit() and int(name) for name in names):
        raise UsageError(f"trim: {text!r} is not a list of numbers of tokens like 4096,8192, or {NONE}")
    return tuple(dict.fromkeys(int(name) for name in names))
