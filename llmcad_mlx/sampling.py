"""How the target chooses a token: penalties, filters, temperature, and Gumbel noise keyed by seed and position.

The rule, the same for plain and speculative decoding: logits processors; at temperature 0 the largest
logit (lowest id among equals), else argmax(filter(log_softmax(logits))/T + g(seed, position)). Options mean
what they mean in mlx-lm: filters act on the probabilities before temperature, in the order top-p, min-p,
top-k. Chosen in numpy on the host, where a row of logits is needed anyway.

The noise g is the one source of randomness. Drafting, verifying and plain decoding all read the same vector at the
same position, which is what makes speculative text equal plain text at any temperature (Gumbel-max:
argmax(log p + g) is a sample of p; the shared vector is the drafter-invariant coupling of arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.sample_utils import make_logits_processors

from llmcad_mlx.errors import GenerationError, UsageError
from llmcad_mlx.settings import LogitsProcessor, SamplingSettings

Row: TypeAlias = npt.NDArray[np.float32]

_PENALTIES = ("repetition", "presence", "frequency")
_HEAD = 1024  # top-p looks at this many tokens before it sorts them all
_COARSE_LIMIT = 256
_VECTOR = 1024
_BLOCK = 16 * _VECTOR  # temporaries this small stay in the processor's cache and in the allocator
_KEPT_POSITIONS = 16  # 16 vectors for a vocabulary of 151,936 are 9.7 MB


class TargetSampler:
    """Chooses the target's tokens for one generation.

    `vocab_size` is the number of real tokens: logits rows may be padded beyond it, and padding is never
    chosen. Custom processors may keep state: `choose` runs them once for each token it returns, in order.

    `near_ties` counts the choices so far that `rounding` could have turned: by so much the difference of two
    logits may change with the number of rows in a pass; 0.0 where passes of all sizes agree bit for bit.
    """

    def __init__(self, settings: SamplingSettings, vocab_size: int, rounding: float = 0.0) -> None:
        """Raises UsageError when `logit_bias` names a token outside the vocabulary."""
        if settings.logit_bias:
            beyond = max(settings.logit_bias)
            if beyond >= vocab_size:
                raise UsageError(f"logit_bias: token {beyond} is not in the vocabulary of {vocab_size}")
        self.settings = settings
        self.vocab_size = vocab_size
        self.rounding = rounding
        self.near_ties = 0
        self._processors = _make_processors(settings)
        contexts = [getattr(settings, f"{kind}_context_size") for kind in _PENALTIES]
        # How many of the last tokens the processors see: mlx-lm's own need no more than their context.
        self._history = None if settings.logits_processors else max(contexts)
        self._noise: dict[int, Row] = {}  # of the last few positions

    def choose(
        self, logits: Row | mx.array, tokens: Sequence[int], position: int, path: Sequence[int] = ()
    ) -> int:
        """The token that follows `tokens` and `path`.

        logits: (V,) float32, the target's row, V >= vocab_size; it is not changed. tokens: prompt and output so
        far; path: what this round has added to them. position: the chosen token's index in the sequence.

        Raises GenerationError when no token can be chosen (NaN, +inf, or every token ruled out).
        """
        # Joined for those who look at it alone: the sequence may be long, and this runs for every token.
        history = [*tokens, *path] if self._processors else ()
        row = self.processed(logits, history)
        best = int(row.argmax())  # of a NaN if there is one
        peak = float(row[best])
        if peak == -math.inf:
            raise GenerationError("every token is ruled out; check logit_bias and logits_processors")
        if not math.isfinite(peak):
            raise GenerationError(
                f"the target's logits contain {'NaN' if math.isnan(peak) else 'infinity'}; "
                "the model file is damaged, its precision too low, or a logits processor is wrong"
            )
        temperature = self.settings.temperature
        if temperature != 0.0:
            row = self._perturbed(self._filter(self.logprobs(row)), position)
            best = int(row.argmax())
        if self.rounding:
            near = row >= row[best] - self.rounding / (temperature or 1.0)
            self.near_ties += int(np.count_nonzero(near)) > 1
        return best

    def processed(self, logits: Row | mx.array, tokens: Sequence[int]) -> Row:
        """The row (vocab_size,) after penalties, bias and custom processors."""
        row = _as_row(logits)
        if self._processors:
            recent = mx.array(list(tokens if self._history is None else tokens[-self._history :]), dtype=mx.int32)
            given = mx.array(row)[None]  # a copy: mlx-lm's penalties write into what they are given
            for processor in self._processors:
                given = processor(recent, given)
                if not isinstance(given, mx.array) or given.shape != (1, len(row)):
                    name = getattr(processor, "__name__", type(processor).__name__)
                    raise GenerationError(f"logits processor {name} must return logits of shape (1, {len(row)})")
            row = _as_row(given[0])
        if len(row) < self.vocab_size:
            raise GenerationError(
                f"the target gave {len(row)} logits for a vocabulary of {self.vocab_size}; "
                "model and tokenizer do not belong together"
            )
        return row[: self.vocab_size]

    def noise_at(self, position: int) -> Row:
        """The noise (vocab_size,) of a position; read-only, for draft and target ask for the same ones."""
        vector = self._noise.pop(position, None)
        if vector is None:
            vector = gumbel(self.settings.seed, position, self.vocab_size)
            vector.flags.writeable = False
            if len(self._noise) >= _KEPT_POSITIONS:
                del self._noise[next(iter(self._noise))]  # the least recently used comes first
        self._noise[position] = vector
        return vector

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
        noise = self.noise_at(position)
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


def _as_row(logits: Row | mx.array) -> Row:
    if isinstance(logits, mx.array):
        logits = np.asarray(logits.astype(mx.float32))
    return np.asarray(logits, dtype=np.float32)


def _make_processors(settings: SamplingSettings) -> tuple[LogitsProcessor, ...]:
    names = [f"{kind}_{what}" for kind in _PENALTIES for what in ("penalty", "context_size")]
    options = {name: getattr(settings, name) for name in names}
    if settings.repetition_penalty == 1.0:  # it multiplies by 1: leaving it out keeps the greedy path
        options["repetition_penalty"] = 0.0
    bias = dict(settings.logit_bias) if settings.logit_bias else None
    return (*make_logits_processors(bias, **options), *settings.logits_processors)


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


def gumbel(seed: int, position: int, size: int) -> Row:
    """Standard Gumbel noise, shape (size,), float32, always finite. `seed` and `position` are in [0, 2^64).

    Counter based: Philox keyed by (seed, position), raw words rather than numpy's distributions, whose
    streams may change between numpy versions. Entry i depends on (seed, position, i) only, so a padded
    vocabulary gets the same first entries.

    A uniform u = (n + 1/2)/2^32 becomes g = -log(-log(1 - u)). Written with 1 - u, the large g that let a
    rare token win come from small u, where float32 is finest; 24-bit uniforms would end at g = 16.6, that
    is at tokens of probability 6e-8. The lowest 256 of the 2^32 steps are refined with 64 more bits, so the
    upper tail runs smoothly to g = 67. The lower end is cut at g = -2.8, which no argmax sees.

    Takes 0.5 ms for size 151,936 (one core of an AMD EPYC with AVX-512, numpy 2.4).
    """
    key = np.array([seed, position], dtype=np.uint64)
    generator = np.random.Philox(key=key)
    # Whole vectors, so that an entry is computed by the same code whatever the size.
    noise = np.empty(-(-size // _VECTOR) * _VECTOR, dtype=np.float32)
    for start in range(0, len(noise), _BLOCK):
        _fill(noise[start : start + _BLOCK], generator, key, start)
    return noise[:size]


def _fill(block: Row, generator: np.random.Philox, key: npt.NDArray[np.uint64], start: int) -> None:
    """Fill `block`, whose first entry is entry `start` of the vector, from the next words of `generator`."""
    words = generator.random_raw(len(block) // 2).astype("<u8", copy=False).view("<u4")
    block[:] = words
    block += np.float32(0.5)
    block *= np.float32(2.0**-32)
    if words.min() < _COARSE_LIMIT:
        for index in np.flatnonzero(words < _COARSE_LIMIT).tolist():
            # 64 more bits, from a part of the counter that nothing else uses
            counter = np.array([start + index, 0, 0, 1], dtype=np.uint64)
            fraction = (int(np.random.Philox(key=key, counter=counter).random_raw()) + 0.5) * 2.0**-64
            block[index] = (int(words[index]) + fraction) * 2.0**-32
    np.minimum(block, np.float32(1.0 - 2.0**-24), out=block)
    np.negative(block, out=block)
    np.log1p(block, out=block)
    np.negative(block, out=block)
    np.log(block, out=block)
    np.negative(block, out=block)
