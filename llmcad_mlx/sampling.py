"""How the target chooses a token: penalties, filters, temperature, and noise keyed by position.

The rule, the same for plain and speculative decoding: logits processors; at temperature 0 the largest
logit (lowest id among equals), else argmax(filter(log_softmax(logits))/T + g(seed, position)). Options mean
what they mean in mlx-lm: filters act on the probabilities before temperature, in the order top-p, min-p,
top-k. Chosen in numpy on the host, where a row of logits is needed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.sample_utils import make_logits_processors

from llmcad_mlx.errors import GenerationError, UsageError
from llmcad_mlx.tree.noise import PositionNoise

LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]
Row: TypeAlias = npt.NDArray[np.float32]

_MIN_TEMPERATURE = 1e-6  # below, logprob/T leaves no bits for the noise and overflows float32 soon after
_MAX_FLOAT32 = 3.4e38
_HEAD = 1024  # top-p looks at this many tokens before it sorts them all


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling options, checked when built; the defaults are greedy decoding with everything off.

    `temperature`: 0 is greedy. `top_p` in (0, 1], 1 is off. `top_k` >= 0, 0 is off. `min_p` in [0, 1],
    0 is off. `seed` in [0, 2^64). Penalties as in mlx-lm, 0 is off; each looks at the last
    `*_context_size` tokens of prompt and output. `logit_bias`: token id → finite number added to its logit.
    `logits_processors`: callables with mlx-lm's signature, (tokens (L,), logits (1, V)) → logits (1, V),
    run after the penalties, in order.

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
        _check_integer("top_k", self.top_k, low=0)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_integer("seed", self.seed, low=0, high=2**64 - 1)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0)
        _check_number("presence_penalty", self.presence_penalty)
        _check_number("frequency_penalty", self.frequency_penalty)
        for name in ("repetition_context_size", "presence_context_size", "frequency_context_size"):
            _check_integer(name, getattr(self, name), low=1)
        _check_bias(self.logit_bias)
        if not isinstance(self.logits_processors, tuple | list):
            raise UsageError("logits_processors: give a list of callables")
        if not all(callable(processor) for processor in self.logits_processors):
            raise UsageError("logits_processors: every entry must be callable (tokens, logits) -> logits")
        # Copies, so that what was checked cannot change afterwards.
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


class TargetSampler:
    """Chooses the target's tokens for one generation.

    `vocab_size` is the number of real tokens: logits rows may be padded beyond it, and padding is never
    chosen. Custom processors may keep state: `choose` runs them once for each token it returns, in order.
    """

    def __init__(self, settings: SamplingSettings, vocab_size: int) -> None:
        """Raises UsageError when `logit_bias` names a token outside the vocabulary."""
        if settings.logit_bias:
            beyond = max(settings.logit_bias)
            if beyond >= vocab_size:
                raise UsageError(f"logit_bias: token {beyond} is not in the vocabulary of {vocab_size}")
        self.settings = settings
        self.vocab_size = vocab_size
        self._processors = _make_processors(settings)
        # How many of the last tokens the processors see: mlx-lm's own need no more than their context.
        self._history = (
            None
            if settings.logits_processors
            else max(
                settings.repetition_context_size,
                settings.presence_context_size,
                settings.frequency_context_size,
            )
        )
        self._noise = PositionNoise(settings.seed, vocab_size)

    @property
    def greedy(self) -> bool:
        """Whether the choice is a plain argmax, so that `greedy_tokens` may take all rows at once."""
        return self.settings.temperature == 0.0 and not self._processors

    def choose(self, logits: Row | mx.array, tokens: Sequence[int], position: int) -> int:
        """The token that follows `tokens`.

        `logits` (V,) is the target's row, V >= vocab_size; `tokens` is all of the prompt and output so far;
        `position` is the index that the chosen token will have in the sequence. `logits` is not changed.

        Raises GenerationError when no token can be chosen (NaN, +inf, or every token ruled out).
        """
        return self.pick(self.processed(logits, tokens), position)

    def processed(self, logits: Row | mx.array, tokens: Sequence[int]) -> Row:
        """The row (vocab_size,) after penalties, bias and custom processors, checked for NaN."""
        row = _as_row(logits)
        if self._processors:
            recent = tokens if self._history is None else tokens[-self._history :]
            row = _run_processors(self._processors, row, recent)
        if len(row) < self.vocab_size:
            raise GenerationError(
                f"the target gave {len(row)} logits for a vocabulary of {self.vocab_size}; "
                "model and tokenizer do not belong together"
            )
        row = row[: self.vocab_size]
        check_peak(float(row.max()))
        return row

    def pick(self, row: Row, position: int) -> int:
        """The choice at `position` from a `processed` row."""
        if self.settings.temperature == 0.0:
            return int(row.argmax())
        return int(self._perturbed(self._filter(self.logprobs(row)), position).argmax())

    def noise_at(self, position: int) -> Row:
        """The noise (vocab_size,) of a position, read-only."""
        return self._noise.at(position)

    @staticmethod
    def logprobs(logits: Row | mx.array) -> Row:
        """log_softmax of a row (V,), float32, a new array."""
        row = _as_row(logits)
        shifted: Row = row - row.max()
        shifted -= np.log(np.exp(shifted).sum())
        return shifted

    def draft_scores(self, logprobs: Row, position: int, vocabulary: npt.NDArray[np.int32] | None = None) -> Row:
        """What the draft ranks candidates by at `position`: its guess at the target's own ranking.

        `logprobs` (V,) are the draft's log probabilities, padded or not. At T > 0 the result is
        logprobs/T + the noise the target will use (drafter-invariant coupling, arXiv 2408.07978); at T = 0
        it is `logprobs`. Shape (min(V, vocab_size),): draft padding is dropped.
        vocabulary: (V,) ids below `vocab_size`, where entry i is not about token i but vocabulary[i].
        """
        real = logprobs[: self.vocab_size]
        if self.settings.temperature == 0.0:
            return real
        return self._perturbed(real, position, vocabulary)

    def _perturbed(self, logprobs: Row, position: int, vocabulary: npt.NDArray[np.int32] | None = None) -> Row:
        with np.errstate(over="ignore"):  # masked logits of -3e38 may become -inf
            scores: Row = logprobs / np.float32(self.settings.temperature)
        noise = self._noise.at(position)
        scores += noise[: len(scores)] if vocabulary is None else noise[vocabulary]
        return scores

    def _filter(self, logprobs: Row) -> Row:
        """Set to -inf, in place, what top-p, min-p and top-k rule out, in mlx-lm's order."""
        settings = self.settings
        if settings.top_p < 1.0:
            _keep_top_p(logprobs, settings.top_p)
        if settings.min_p > 0.0:
            logprobs[logprobs < logprobs.max() + np.float32(math.log(settings.min_p))] = -np.inf
        if 0 < settings.top_k < len(logprobs):
            _keep_top_k(logprobs, settings.top_k)
        return logprobs


def greedy_tokens(logits: npt.NDArray[np.float32], vocab_size: int) -> list[int]:
    """The greedy choice of every row of `logits` (N, V), padding beyond `vocab_size` left out.

    The same as `TargetSampler.choose` on each row when `greedy`. Raises GenerationError as it does.
    """
    tokens = logits[:, :vocab_size].argmax(axis=1)
    for peak in logits[np.arange(len(tokens)), tokens].tolist():  # argmax stops at a NaN if there is one
        check_peak(peak)
    chosen: list[int] = tokens.tolist()
    return chosen


def check_peak(peak: float) -> None:
    """Refuse a row by its largest logit, which is NaN if any is."""
    if math.isfinite(peak):
        return
    if peak == -math.inf:
        raise GenerationError("every token is ruled out; check logit_bias and logits_processors")
    raise GenerationError(
        f"the target's logits contain {'NaN' if math.isnan(peak) else 'infinity'}; "
        "the model file is damaged, its precision too low, or a logits processor is wrong"
    )


def _as_row(logits: Row | mx.array) -> Row:
    if isinstance(logits, mx.array):
        logits = np.asarray(logits.astype(mx.float32))
    return np.asarray(logits, dtype=np.float32)


def _run_processors(processors: Sequence[LogitsProcessor], row: Row, tokens: Sequence[int]) -> Row:
    history = mx.array(list(tokens), dtype=mx.int32)
    logits = mx.array(row)[None]  # a copy: mlx-lm's penalties write into what they are given
    for processor in processors:
        logits = processor(history, logits)
        if not isinstance(logits, mx.array) or logits.shape != (1, len(row)):
            name = getattr(processor, "__name__", type(processor).__name__)
            raise GenerationError(f"logits processor {name} must return logits of shape (1, {len(row)})")
    return _as_row(logits[0])


def _make_processors(settings: SamplingSettings) -> tuple[LogitsProcessor, ...]:
    # A repetition penalty of 1 multiplies by 1: leaving it out keeps the greedy path.
    repetition = 0.0 if settings.repetition_penalty == 1.0 else settings.repetition_penalty
    penalties = make_logits_processors(
        logit_bias=dict(settings.logit_bias) if settings.logit_bias else None,
        repetition_penalty=repetition,
        repetition_context_size=settings.repetition_context_size,
        presence_penalty=settings.presence_penalty,
        presence_context_size=settings.presence_context_size,
        frequency_penalty=settings.frequency_penalty,
        frequency_context_size=settings.frequency_context_size,
    )
    return (*penalties, *settings.logits_processors)


def _keep_top_p(logprobs: Row, top_p: float) -> None:
    """Keep the smallest head of tokens whose mass reaches `top_p`, and the ties of its last one."""
    wanted = top_p * float(np.exp(logprobs).sum(dtype=np.float64))
    size = len(logprobs)
    for head in (_HEAD, size):  # a small part of a large vocabulary nearly always holds the mass
        top = np.partition(logprobs, size - head)[size - head :] if head < size else logprobs
        top = np.sort(top)[::-1]
        mass = np.cumsum(np.exp(top), dtype=np.float64)
        num_kept = int(np.searchsorted(mass, wanted, side="left")) + 1  # kept while the mass above < wanted
        if num_kept <= len(top):
            logprobs[logprobs < top[num_kept - 1]] = -np.inf
            return


def _keep_top_k(logprobs: Row, top_k: int) -> None:
    """Keep the `top_k` largest; among equals at the border, the lowest ids."""
    candidates = logprobs[logprobs > -np.inf]  # what earlier filters ruled out would slow the partition
    if len(candidates) <= top_k:
        return
    border = np.partition(candidates, len(candidates) - top_k)[len(candidates) - top_k]
    at_border = np.flatnonzero(logprobs == border)
    num_above = int((logprobs > border).sum())
    logprobs[logprobs < border] = -np.inf
    logprobs[at_border[top_k - num_above :]] = -np.inf


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT32:
        raise UsageError(f"{name}: must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name}: {value} is out of range; it must be {_range(low, high)}")


def _check_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: must be an integer, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name}: {value} is out of range; it must be {_range(low, high)}")


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise UsageError("logit_bias: give a mapping of token id to number")
    for token, value in bias.items():
        _check_integer("logit_bias token", token, low=0)
        _check_number(f"logit_bias of token {token}", value)
