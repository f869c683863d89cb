"""The target whose weights are read from the disk on every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.target.feeds import Background, SequentialFeed
from llmcad_mlx.target.resident import ResidentTarget
from llmcad_mlx.target.target import Verification
from llmcad_mlx.tree.token_tree import TokenTree


class StreamedTarget(ResidentTarget):
    """Verifies token trees with a model that is larger than the memory it may use.

    A pass asks for the streamed units in their order. Whenever the next one is not in memory yet, the pass's
    `background` is called instead of waiting.
    """

    def __init__(self, model: TreeModel, vocab_size: int, feed: SequentialFeed, prefill_chunk: int) -> None:
        """model: its streamed modules take their weights from `feed`. prefill_chunk: prompt tokens per pass."""
        super().__init__(model, vocab_size)
        self.feed = feed
        self.prefill_chunk = prefill_chunk

    @property
    def io_wait_s(self) -> float:
        """Seconds blocked on reads so far."""
        return self.feed.stream.wait_s

    @property
    def streamed_bytes(self) -> int:
        """Bytes read so far."""
        return self.feed.bytes_read

    def free_seconds(self) -> float:
        """How long drafting may go on before the next pass ends later for it."""
        return self.feed.free_seconds()

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
        background: Background | None = None,
    ) -> None:
        """Append `tokens` to the cache, `prefill_chunk` of them with each pass."""
        with self.feed.working(background):
            self.model.prefill(
                tokens, self.cache, self.prefill_chunk, on_progress=on_progress, should_stop=should_stop
            )

    def verify(self, tree: TokenTree, background: Background | None = None) -> Verification:
        """One pass over all nodes."""
        with self.feed.working(background):
            return super().verify(tree)

    def close(self) -> None:
        """Stop reading."""
        self.feed.close()
