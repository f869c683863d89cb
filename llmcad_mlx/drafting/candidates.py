"""From the draft's logits to ranked candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import GenerationError
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.policy import Candidates

_CHUNKS = 256  # a row is cut into that many pieces to find its largest entries without sorting it


TokenList = npt.NDArray[np.int32]


def top_candidates(
    logits: mx.array,
    positions: Sequence[int],
    sampler: TargetSampler,
    count: int,
    vocabulary: TokenList | None = None,
) -> list[Candidates]:
    """The `count` best candidates of each row of `logits` (N, V), best first.

    vocabulary: (V,) ascending ids below the sampler's `vocab_size`, where the columns are not token 0, 1, 2, …

    Candidates are ranked by `TargetSampler.draft_scores` for the row's position, and their confidence is the
    softmax of those scores: at T = 0 the draft's own probability, above it a probability given the noise that
    the target will use too. Raises GenerationError for logits that are not finite where it matters.
    """
    if mx.default_device() == mx.cpu:
        rows = np.asarray(logits.astype(mx.float32))
        scores = [sampler.draft_scores(row, p, vocabulary) for row, p in zip(rows, positions, strict=True)]
        return [_named(_best_of(row, count), vocabulary) for row in scores]
    found = _on_device(logits, positions, sampler, count, vocabulary)
    return [_named(row, vocabulary) for row in found]


def _named(columns: Candidates, vocabulary: TokenList | None) -> Candidates:
    """Candidates by token for those by column."""
    if vocabulary is None:
        return columns
    return Candidates(vocabulary[list(columns.tokens)].tolist(), columns.confidences)


def _best_of(scores: npt.NDArray[np.float32], count: int) -> Candidates:
    """The largest `count` entries of `scores` (V,) and their softmax."""
    size = len(scores)
    count = min(count, size)
    if size >= _CHUNKS * 16 and count < _CHUNKS:
        # The best `count` entries lie in the `count` pieces with the largest maxima.
        width = size // _CHUNKS
        body = scores[: width * _CHUNKS].reshape(_CHUNKS, width)
        peaks = body.max(axis=1)
        pieces = np.argpartition(peaks, _CHUNKS - count)[_CHUNKS - count :]
        inside = (pieces[:, None] * width + np.arange(width)).ravel()
        tokens = np.concatenate([inside, np.arange(width * _CHUNKS, size)])
        some = scores[tokens]
    else:
        tokens, some = np.arange(size), scores
    order = np.argpartition(some, len(some) - count)[len(some) - count :]
    order = order[np.argsort(-some[order], kind="stable")]
    top = some[order]
    with np.errstate(invalid="ignore"):
        total = float(np.exp(scores - top[0]).sum())
    if not math.isfinite(total):
        raise _broken_draft()
    return Candidates(tokens[order].tolist(), (np.exp(top - top[0]) / total).tolist())


def _on_device(
    logits: mx.array,
    positions: Sequence[int],
    sampler: TargetSampler,
    count: int,
    vocabulary: TokenList | None = None,
) -> list[Candidates]:
    """Candidates by column with MLX operations: only they are read back, in one synchronisation."""
    scores = logits[:, : sampler.vocab_size].astype(mx.float32)
    temperature = sampler.settings.temperature
    if temperature > 0.0:
        noise = np.stack([sampler.noise_at(p) for p in positions])
        if vocabulary is not None:
            noise = noise[:, vocabulary]
        scores = (scores - mx.logsumexp(scores, axis=-1, keepdims=True)) / temperature
        scores = scores + mx.array(noise[:, : scores.shape[1]])
    count = min(count, scores.shape[1])
    tokens = mx.argpartition(-scores, kth=count - 1, axis=-1)[:, :count]
    top = mx.take_along_axis(scores, tokens, axis=-1)
    order = mx.argsort(-top, axis=-1)
    tokens = mx.take_along_axis(tokens, order, axis=-1)
    top = mx.take_along_axis(top, order, axis=-1)
    # Rounding must not make a probability of more than 1; a NaN stays one.
    confidences = mx.minimum(mx.exp(top - mx.logsumexp(scores, axis=-1, keepdims=True)), 1.0)
    mx.eval(tokens, confidences)
    ids: list[list[int]] = tokens.tolist()  # type: ignore[assignment]
    values: list[list[float]] = confidences.tolist()  # type: ignore[assignment]
    if not all(map(math.isfinite, itertools.chain.from_iterable(values))):
        raise _broken_draft()
    return [Candidates(t, c) for t, c in zip(ids, values, strict=True)]


def _broken_draft() -> GenerationError:
    return GenerationError(
        "the draft's logits contain NaN or infinity; its file is damaged or its precision too low: "
        "pull it again, or choose another draft"
    )
