"""Options of speculation and generation: frozen records, checked when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from llmcad_mlx.errors import UsageError

PolicyName = Literal["throughput", "paper", "chain", "plain"]
POLICIES: tuple[str, ...] = get_args(PolicyName)

DEFAULT_CHAIN_LENGTH = 4
FIXED_PAPER_NODES = 9  # without the fallback rule: the root and 8 drafted tokens
FIXED_THROUGHPUT_NODES = 16
_MAX_TREE_NODES = 4096
_MAX_TOKEN = 2**31 - 1


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

    max_tokens: int = 256
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


def stop_settings(max_tokens: Any = 256, stop: Any = None, stop_tokens: Any = None) -> StopSettings:
    """Build `StopSettings` from what users write: one stop string or several, token ids in any collection."""
    strings = (stop,) if isinstance(stop, str) else _as_tuple("stop", "non-empty strings", stop)
    return StopSettings(max_tokens, frozenset(_as_tuple("stop_tokens", "token ids", stop_tokens)), strings)


def _as_tuple(name: str, what: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset):
        raise UsageError(f"{name}: give a list of {what}, not {value!r}")
    return tuple(value)


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raise UsageError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: must be an integer, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name}: {value} is out of range; it must be from {low} to {high}")
