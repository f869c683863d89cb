"""Who proposes tokens: the base of all drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmcad_mlx.models.cache import ModelCache
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import Candidates
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.token_tree import Selection, TokenTree


class Drafter:
    """Proposes children for nodes of a token tree. Keeps the state of one session.

    One round, for a drafter that is asked in it:

        drafter.begin(tokens, sampler, tree)        # the whole sequence; the tree's root is its last token
        candidates = drafter.expand(tree, leaves)   # any number of times
        drafter.commit(tree, path, survivors)       # the accepted nodes, top down, and what goes on below them

    The next round's tree is `survivors.tree`, or a new one: then all that was not accepted is forgotten.

    Without a model, as here, the sequence is all it keeps, and a prompt is read in no time.
    """

    source: str
    """What the nodes' `source` says, e.g. "model" or "ngram"."""
    model: TreeModel | None = None
    """The model that it runs; None where it only looks up."""
    cache: ModelCache | None = None
    """The model's state of the sequence; None without a model."""
    rows_fed: int | None = 0
    """Rows of the last `expand`'s forward, by which its time is filed; 0: it did none, and took no time to speak
    of; None: its time says nothing about steps."""
    _tokens: Sequence[int] = ()

    @property
    def num_cached(self) -> int:
        """How many of the sequence's first tokens are committed in `cache`."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Memory of what it drafts from, a model's weights or a table."""
        return 0

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        limit: int | None = None,
    ) -> bool:
        """Take in a prompt ahead of the first round, at most `limit` tokens more of it; returns whether others are
        left. on_progress gets the number of tokens done so far."""
        self._read(tokens)
        return False

    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None:
        """Start a round after `tokens`, prompt and output so far. Must be cheap: no forward yet.

        `tree` is the object that the last `commit` got as `survivors.tree`, or any other one, which means what
        None does: a lone root. So a round that was broken off leaves nothing behind.
        """
        self._read(tokens)

    def _read(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        """Candidates for the children of each of `leaves`, best first. Empty ones: nothing to propose."""
        return [self._after(tree.path_tokens(leaf)) for leaf in leaves]

    def _after(self, branch: list[int]) -> Candidates:
        """What may come after the sequence and `branch`."""
        raise NotImplementedError

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        """Nodes `path` of `tree` were accepted; all others are gone, but for those in `survivors`.

        `survivors`: the subtree of `tree` below a child of the last accepted node, that child included.
        """

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the sequence are still true."""
