"""Gumbel noise keyed by seed and position: the one source of randomness in sampling.

Drafting, verifying and plain decoding all read the same vector at the same position, which is what makes
speculative text equal plain text at any temperature (Gumbel-max: argmax(log p + g) is a sample of p; the
shared vector is the drafter-invariant coupling of arXiv 2408.07978).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_KEY_LIMIT = 1 << 64
_COARSE_LIMIT = 256
_VECTOR = 1024
_BLOCK = 16 * _VECTOR  # temporaries this small stay in the processor's cache and in the allocator

_Words = npt.NDArray[np.uint64]


def gumbel(seed: int, position: int, size: int) -> npt.NDArray[np.float32]:
    """Standard Gumbel noise, shape (size,), float32, always finite.

    Counter based: Philox keyed by (seed, position), raw words rather than numpy's distributions, whose
    streams may change between numpy versions. Entry i depends on (seed, position, i) only, so a padded
    vocabulary gets the same first entries.

    A uniform u = (n + 1/2)/2^32 becomes g = -log(-log(1 - u)). Written with 1 - u, the large g that let a
    rare token win come from small u, where float32 is finest; 24-bit uniforms would end at g = 16.6, that
    is at tokens of probability 6e-8. The lowest 256 of the 2^32 steps are refined with 64 more bits, so the
    upper tail runs smoothly to g = 67. The lower end is cut at g = -2.8, which no argmax sees.

    Takes 0.5 ms for size 151,936 (one core of an AMD EPYC with AVX-512, numpy 2.4).

    Raises ValueError for a seed or position outside [0, 2^64) or a negative size.
    """
    if not 0 <= seed < _KEY_LIMIT or not 0 <= position < _KEY_LIMIT or size < 0:
        raise ValueError(f"noise needs 0 <= seed, position < 2^64 and size >= 0, not {seed}, {position}, {size}")
    key = np.array([seed, position], dtype=np.uint64)
    generator = np.random.Philox(key=key)
    # Whole vectors, so that an entry is computed by the same code whatever the size.
    noise = np.empty(-(-size // _VECTOR) * _VECTOR, dtype=np.float32)
    for start in range(0, len(noise), _BLOCK):
        _fill(noise[start : start + _BLOCK], generator, key, start)
    return noise[:size]


def _fill(block: npt.NDArray[np.float32], generator: np.random.Philox, key: _Words, start: int) -> None:
    """Fill `block`, whose first entry is entry `start` of the vector, from the next words of `generator`."""
    words = generator.random_raw(len(block) // 2).astype("<u8", copy=False).view("<u4")
    block[:] = words
    block += np.float32(0.5)
    block *= np.float32(2.0**-32)
    if words.min() < _COARSE_LIMIT:
        for index in np.flatnonzero(words < _COARSE_LIMIT).tolist():
            block[index] = _refined(key, start + index, int(words[index]))
    np.minimum(block, np.float32(1.0 - 2.0**-24), out=block)
    np.negative(block, out=block)
    np.log1p(block, out=block)
    np.negative(block, out=block)
    np.log(block, out=block)
    np.negative(block, out=block)


def _refined(key: _Words, index: int, word: int) -> float:
    """The uniform for a coarse `word` with 64 more bits, from a part of the counter nothing else uses."""
    counter = np.array([index, 0, 0, 1], dtype=np.uint64)
    fraction = (int(np.random.Philox(key=key, counter=counter).random_raw()) + 0.5) * 2.0**-64
    return (word + fraction) * 2.0**-32


class PositionNoise:
    """The noise of one sequence, with the last few positions kept.

    Draft and target ask for the same positions within a round. `keep` vectors of `size` float32 stay in
    memory: 16 of 151,936 are 9.7 MB.
    """

    def __init__(self, seed: int, size: int, keep: int = 16) -> None:
        if keep < 1:
            raise ValueError(f"noise must keep at least 1 position, not {keep}")
        self.seed = seed
        self.size = size
        self._keep = keep
        self._vectors: dict[int, npt.NDArray[np.float32]] = {}

    def at(self, position: int) -> npt.NDArray[np.float32]:
        """`gumbel(seed, position, size)`, read-only because it is shared."""
        vector = self._vectors.pop(position, None)
        if vector is None:
            vector = gumbel(self.seed, position, self.size)
            vector.flags.writeable = False
            if len(self._vectors) >= self._keep:
                del self._vectors[next(iter(self._vectors))]  # the least recently used comes first
        self._vectors[position] = vector
        return vector
