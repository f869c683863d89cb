"""Which parts of a target are kept in memory: pure arithmetic.

A pass reads every streamed byte once, so only the number of bytes kept counts. Pinned layers are spread evenly
over the depth, so that the disk is busy while they compute (DESIGN 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a target's parts. `layer_bytes`: what can be streamed of each decoder layer. `resident_bytes`: what
    always stays (norms, biases). `head_bytes` is 0 where the head is the embedding. `hidden`, `widest`: columns of
    the residual stream and of the largest activation."""

    layer_bytes: tuple[int, ...]
    resident_bytes: int
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    logit_columns: int
    hidden: int
    widest: int

    @property
    def total_bytes(self) -> int:
        """All weights."""
        return sum(self.layer_bytes) + self.resident_bytes + self.embedding_bytes + self.head_bytes

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head."""
        return self.head_bytes == 0

    @property
    def matrix_bytes(self) -> int:
        """What gives the logits."""
        return self.embedding_bytes if self.tied else self.head_bytes

    @property
    def pass_bytes(self) -> int:
        """What a pass reads with nothing pinned."""
        return sum(self.layer_bytes) + self.matrix_bytes

    @property
    def largest_layer(self) -> int:
        return max(self.layer_bytes, default=0)


@dataclass(frozen=True, slots=True)
class Pins:
    """What of a pass is kept: `num_layers` spread over the depth, and the head or not."""

    num_bytes: int
    num_layers: int
    head: bool

    @classmethod
    def of(cls, sizes: ModelSizes, allowance: int) -> Pins:
        """The choice that keeps the most bytes, `allowance` at most."""
        return max(
            (pins for pins in _choices(sizes) if pins.num_bytes <= allowance),
            key=lambda pins: pins.num_bytes,
            default=cls(0, 0, False),
        )


def _choices(sizes: ModelSizes) -> list[Pins]:
    """All that can be kept. Layers differ in size, so more of them need not be more bytes."""
    layers = sizes.layer_bytes
    counts = [(sum(layers[i] for i in spread(n, len(layers))), n) for n in range(len(layers) + 1)]
    with_head = (False, True) if sizes.matrix_bytes else (False,)
    return [Pins(size + sizes.matrix_bytes * head, n, head) for head in with_head for size, n in counts]


def streamed_choices(sizes: ModelSizes) -> list[int]:
    """The `streamed_bytes` that plans for this model can have, largest first."""
    return sorted({sizes.pass_bytes - pins.num_bytes for pins in _choices(sizes)}, reverse=True)


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices with gaps that differ by one at most."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))
