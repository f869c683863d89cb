"""Options as frozen records, checked when built. A default of an option stands here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from llmcad_mlx.errors import UsageError
from llmcad_mlx.sizes import check_unit, parse_rate, parse_size

LogitsProcessor: TypeAlias = Callable[[Any, Any], Any]
"""mlx-lm's: (tokens (L,) int32, logits (1, V)) → logits (1, V), MLX arrays."""

PolicyName = Literal["throughput", "paper", "chain", "plain"]
POLICIES: tuple[str, ...] = get_args(PolicyName)

DEFAULT_MAX_TOKENS = 256
DEFAULT_CHAIN_LENGTH = 4
FIXED_PAPER_NODES = 9  # without the fallback rule: the root and 8 drafted tokens
FIXED_THROUGHPUT_NODES = 16
_MAX_TREE_NODES = 4096
_MAX_TOKEN = 2**31 - 1
_MIN_TEMPERATURE = 1e-6  # below, logprob/T leaves no bits for the noise and overflows float32 soon after
_MAX_FLOAT32 = 3.4e38


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling options, checked when built; the defaults are greedy decoding with everything off.

    `temperature`: 0 is greedy. `top_p` in (0, 1], 1 is off. `top_k` >= 0, 0 is off. `min_p` in [0, 1],
    0 is off. `seed` in [0, 2^64). Penalties as in mlx-lm, 0 is off; each looks at the last
    `*_context_size` tokens of prompt and output. `logit_bias`: token id → finite number added to its logit.
    `logits_processors`: mlx-lm's (tokens (L,), logits (1, V)) → logits (1, V), run in order after the penalties.

    Raises UsageError naming the option.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0.0)
        if 0.0 < self.temperature < _MIN_TEMPERATURE:
            raise UsageError(f"temperature: {self.temperature} is too small; use 0 for greedy decoding")
        _check_number("top_p", self.top_p, low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise UsageError("top_p: must be above 0; use 1 to switch it off")
        check_integer("top_k", self.top_k, low=0)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        check_integer("seed", self.seed, low=0, high=2**64 - 1)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0)
        _check_number("presence_penalty", self.presence_penalty)
        _check_number("frequency_penalty", self.frequency_penalty)
        for name in ("repetition_context_size", "presence_context_size", "frequency_context_size"):
            check_integer(name, getattr(self, name), low=1)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise UsageError("logit_bias: give a mapping of token id to number")
            for token, value in self.logit_bias.items():
                check_integer("logit_bias token", token, low=0)
                _check_number(f"logit_bias of token {token}", value)
            # A copy, so that what was checked cannot change afterwards.
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if not isinstance(self.logits_processors, tuple | list):
            raise UsageError("logits_processors: give a list of callables")
        if not all(callable(processor) for processor in self.logits_processors):
            raise UsageError("logits_processors: every entry must be callable (tokens, logits) -> logits")
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))


OWN_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's own generation_config.json may say."""


def sampling_under(own: Mapping[str, float], given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own sampling beneath the options that were given; who asks for greedy decoding gets none of it."""
    return dict(given) if given.get("temperature") == 0 else {**own, **given}


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """How the draft is used.

    `policy`: "throughput" (default) measures and adapts; "paper" is LLMCad's; "chain" drafts a line of
    `tree_nodes - 1` tokens (4 if not given); "plain" does not draft. `tree_nodes`: nodes sent to the target in
    each pass, the root included; None lets the policy choose.

    Parts that can be switched off, for comparison: `pipeline`, drafting while the target waits for weights and
    using what survives a round; `tree`, more than one branch; `fallback`, the rule that ends drafting, without
    which every pass gets `tree_nodes` nodes (9 under "paper", 16 under "throughput" if not given).

    Raises UsageError naming the option.
    """

    policy: PolicyName = "throughput"
    tree_nodes: int | None = None
    pipeline: bool = True
    tree: bool = True
    fallback: bool = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"policy: {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if self.tree_nodes is not None:
            check_integer("tree_nodes", self.tree_nodes, 1, _MAX_TREE_NODES)
            if self.policy == "plain":
                raise UsageError("tree_nodes: the plain policy has no tree; leave one of the two out")
        for name in ("pipeline", "tree", "fallback"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}: {getattr(self, name)!r} is neither True nor False")
        for name in ("tree", "fallback"):
            if not getattr(self, name) and self.policy in ("chain", "plain"):
                raise UsageError(
                    f"{name}: the {self.policy} policy has none to switch off; leave one of the two out"
                )


@dataclass(frozen=True, slots=True)
class StopSettings:
    """When a generation ends: `max_tokens` (-1: no limit), stop token ids, stop strings.

    Raises UsageError naming the option.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        value = self.max_tokens
        if isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1:
            raise UsageError(f"max_tokens: {value!r} is out of range; give 1 or more, or -1 for no limit")
        for token in self.stop_tokens:
            check_integer("stop_tokens", token, 0, _MAX_TOKEN)
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise UsageError("stop: give a non-empty string or a list of them")

    @classmethod
    def of(cls, max_tokens: Any = DEFAULT_MAX_TOKENS, stop: Any = None, stop_tokens: Any = None) -> StopSettings:
        """From what users write: one stop string or several, token ids in any collection."""
        strings = (stop,) if isinstance(stop, str) else _as_tuple("stop", "non-empty strings", stop)
        return cls(max_tokens, frozenset(_as_tuple("stop_tokens", "token ids", stop_tokens)), strings)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options of one generation."""

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)
    stopping: StopSettings = field(default_factory=StopSettings)

    @classmethod
    def of(cls, **options: Any) -> GenerationOptions:
        """Sort keywords into their records: the fields of `SamplingSettings` and of `SpeculationSettings`,
        `max_tokens`, `stop` (a string or several) and `stop_tokens` (ids).

        Raises UsageError naming the option that is unknown or out of range.
        """
        for name in options:
            if name not in _SAMPLING | _SPECULATION | _STOPPING:
                known = ", ".join(sorted(_SAMPLING | _SPECULATION | _STOPPING))
                raise UsageError(f"{name}: unknown option; the options are {known}")
        return cls(
            SamplingSettings(**{name: value for name, value in options.items() if name in _SAMPLING}),
            SpeculationSettings(**{name: value for name, value in options.items() if name in _SPECULATION}),
            StopSettings.of(**{name: value for name, value in options.items() if name in _STOPPING}),
        )

    def keywords(self) -> dict[str, Any]:
        """The keywords from which `of` makes these options, all of them."""
        sampling = {name: getattr(self.sampling, name) for name in _SAMPLING}
        speculation = {name: getattr(self.speculation, name) for name in _SPECULATION}
        stop, stop_tokens = self.stopping.stop_strings, self.stopping.stop_tokens
        stopping = {"max_tokens": self.stopping.max_tokens, "stop": stop, "stop_tokens": stop_tokens}
        return sampling | speculation | stopping


_SAMPLING = frozenset(field.name for field in fields(SamplingSettings))
_SPECULATION = frozenset(field.name for field in fields(SpeculationSettings))
_STOPPING = frozenset({"max_tokens", "stop", "stop_tokens"})


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """How much memory a pair may use, and how its target is read.

    memory: bytes for the whole process; None: no limit as long as the models fit into `default_budget`.
    pinned: bytes of the target's weights that stay in memory; None: as much as fits. context: tokens to make room
    for. read_bandwidth: bytes per second, to emulate slower storage. verify: compare a bundle's weights with their
    checksums, all at load, streamed ones on every read. reserved: bytes of `memory` for the program itself.
    """

    memory: int | None = None
    pinned: int | None = None
    context: int | None = None
    read_bandwidth: float | None = None
    verify: bool = False
    reserved: int = 0

    @classmethod
    def of(
        cls,
        memory: int | str | None = None,
        pinned: int | str = "auto",
        context: int | None = None,
        read_bandwidth: float | str | None = None,
        verify: bool = False,
    ) -> MemoryOptions:
        """From what users write: bytes or "6GB", "auto" for `pinned`, "250MB/s".

        Raises UsageError naming the option that is wrong.
        """
        if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
            raise UsageError(f"context: {context!r} is not a number of tokens above 0")
        rate = read_bandwidth
        if isinstance(rate, str):
            rate = parse_rate(rate, "read-bandwidth")
        elif rate is not None and (isinstance(rate, bool) or not 0 < rate < float("inf")):
            raise UsageError(f"read-bandwidth: {rate!r} is not a number of bytes per second above 0")
        return cls(
            memory=None if memory is None else _as_bytes("memory", memory, 1),
            pinned=None if pinned == "auto" else _as_bytes("pinned", pinned, 0),
            context=context,
            read_bandwidth=rate,
            verify=verify,
        )


def _as_bytes(option: str, value: int | str, least: int) -> int:
    if isinstance(value, str):
        value = parse_size(value, option)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{option}: {value!r} is not a number of bytes; give one, or text like 6GB")
    check_unit(value, option, "GB")
    return value


def _as_tuple(name: str, what: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset):
        raise UsageError(f"{name}: give a list of {what}, not {value!r}")
    return tuple(value)


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT32:
        raise UsageError(f"{name}: must be a finite number, not {value!r}")
    _check_range(name, value, low, high)


def check_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raise UsageError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: must be an integer, not {value!r}")
    _check_range(name, value, low, high)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UsageError(f"{name}: {value} is out of range; it must be {wanted}")
