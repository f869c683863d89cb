"""Proposes what an n-gram table knows of the target's own text. Costs microseconds, and needs no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmcad_mlx.drafting.ngram_table import NgramTable
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import TABLE, Selection, TokenTree


class TableDrafter:
    """Looks the last tokens of a branch up in a table that was made once, for this target."""

    source = TABLE
    rows_fed = 0

    def __init__(self, table: NgramTable, num_candidates: int = 8) -> None:
        self.table = table
        self._num_candidates = num_candidates
        self._tokens: Sequence[int] = ()

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        """The table knows no prompts."""

    def prefill_some(self, tokens: Sequence[int], limit: int) -> bool:
        return False

    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None:
        self._tokens = tokens

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        return [self._after(tree.path_tokens(leaf)) for leaf in leaves]

    def _after(self, path: Sequence[int]) -> Candidates:
        context = [*self._tokens[-self.table.order :], *path] if path else self._tokens
        return Candidates(*self.table.candidates(context, self._num_candidates), TABLE)

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        """Nothing to do: `begin` gets what was accepted."""

    def truncate(self, length: int) -> None:
        """Nothing is kept."""
