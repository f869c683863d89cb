"""The draft model: proposes children by its own probabilities, many leaves in one forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from llmcad_mlx.drafting.candidates import TokenList, top_candidates
from llmcad_mlx.models.lazy_cache import LazyKVCache
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, ROOT, Selection, TokenTree

_FED_WITH_NODES = 6  # missed tokens; more go through the model's body first, without the head
_WINDOW = 32  # tokens read again after a long break


class ModelDrafter:
    """A small model with its own lazy KV cache.

    Nodes get a slot in the cache when they are fed, that is when they or a descendant are expanded. Accepted
    nodes without one are fed with the next round's first forward. Nodes that survive a round keep their slots,
    uncommitted; then the new root, the bonus token, has one already.
    """

    source = MODEL

    def __init__(self, model: TreeModel, num_candidates: int = 8, vocabulary: TokenList | None = None) -> None:
        """vocabulary: the tokens of a trimmed head, see `top_candidates`.

        Raises ValueError for a model whose cache cannot roll back.
        """
        cache = model.new_cache()
        if not isinstance(cache, LazyKVCache):
            raise ValueError(f"a draft must be able to take tokens back; {model.reason}")
        self.model = model
        self.cache = cache
        self.rows_fed: int | None = 0
        self._start = 0  # index in the sequence of the cache's first token
        self._num_candidates = num_candidates
        self._vocabulary = vocabulary
        self._tokens: Sequence[int] = ()
        self._sampler: TargetSampler | None = None
        self._slots: dict[int, int] = {}  # node -> slot
        self._ready: dict[int, Candidates] = {}  # proposals not asked for yet
        self._caught_up: list[int] = []  # slots of committed tokens that are not committed in the cache yet
        self._carried: TokenTree | None = None  # the tree that slots and proposals were kept for

    @property
    def num_cached(self) -> int:
        """Committed tokens in the cache; 0 where they are not the first ones of the sequence."""
        return 0 if self._start else self.cache.length

    def prefill(
        self, tokens: Sequence[int], on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> None:
        """Feed all but the last token, which is the first root."""
        missing = self._unread(tokens)
        self.model.prefill(missing, self.cache, on_progress=on_progress, should_stop=should_stop)

    def prefill_some(self, tokens: Sequence[int], limit: int) -> bool:
        missing = self._unread(tokens)
        self.model.prefill(missing[:limit], self.cache)
        return len(missing) > limit

    def _unread(self, prompt: Sequence[int]) -> Sequence[int]:
        if self._start:
            self._restart(0)
        return prompt[self.cache.length : len(prompt) - 1]

    def begin(self, tokens: Sequence[int], sampler: TargetSampler, tree: TokenTree | None = None) -> None:
        self._tokens, self._sampler = tokens, sampler
        if tree is None or tree is not self._carried:
            self._forget_round()
        self._carried = None
        self.rows_fed = 0

    def expand(self, tree: TokenTree, leaves: Sequence[int]) -> list[Candidates]:
        """One forward over the leaves and whatever above them has no slot yet."""
        self._feed(tree, leaves)
        return [self._ready.pop(leaf, Candidates((), ())) for leaf in leaves]

    def _feed(self, tree: TokenTree, leaves: Sequence[int]) -> None:
        missed, caught_up = self._missed() if ROOT not in self._slots else ([], False)
        nodes = self._unfed(tree, leaves)
        if self.model.capability == "chain":
            nodes = self._as_chain(tree, nodes)
        num_rows = len(missed) + len(nodes)
        self.rows_fed = None if caught_up else num_rows
        if not num_rows:
            return
        tokens = [*missed, *(tree.tokens[node] for node in nodes)]
        first = self.cache.num_slots
        places = {ROOT: first + len(missed) - 1} if missed else dict(self._slots)
        parents = [-1, *range(first, first + len(missed) - 1)] if missed else []
        for offset, node in enumerate(nodes, len(missed)):
            parents.append(places[tree.parents[node]])
            places[node] = first + offset
        result = self.model.forward(tokens, self.cache, parents)
        self._slots = places | self._slots
        self._propose(tree, [ROOT, *nodes] if missed else nodes, result.logits[max(len(missed) - 1, 0) :])
        if missed:
            self._caught_up = list(range(first, first + len(missed)))

    def _missed(self) -> tuple[list[int], bool]:
        """The tokens to feed before any node, and whether many others had to be fed first.

        A few are fed with the nodes. More than a few mean that the policy has left this drafter alone: reading
        all of what was written meanwhile could cost more than drafting ever gains, so it starts again from the
        last tokens. The next prompt is read in full again.
        """
        missed = list(self._tokens[self._start + self.cache.length :])
        if len(missed) <= _FED_WITH_NODES:
            return missed, False
        if len(missed) > _WINDOW:
            self._restart(max(0, len(self._tokens) - _WINDOW))
            missed = list(self._tokens[self._start :])
        self.model.prefill(missed[:-1], self.cache)
        return missed[-1:], True

    def _restart(self, start: int) -> None:
        self.cache.truncate(0)
        self._start = start

    def _unfed(self, tree: TokenTree, leaves: Sequence[int]) -> list[int]:
        """The nodes to feed, parents first: the leaves and their ancestors, without those that have slots."""
        needed = set(itertools.chain.from_iterable(tree.path(leaf) for leaf in leaves))
        return sorted(node for node in needed if node not in self._slots)

    def _as_chain(self, tree: TokenTree, nodes: Sequence[int]) -> list[int]:
        """For a model that takes no branches: the first nodes that go on with the line fed so far."""
        tip = max(self._slots, key=lambda node: tree.depths[node], default=ROOT)
        line = []
        for node in nodes:
            if tree.parents[node] == tip:
                line.append(node)
                tip = node
        return line

    def _propose(self, tree: TokenTree, nodes: Sequence[int], logits: mx.array) -> None:
        """Turn rows of logits (len(nodes), V) into candidates for the children of `nodes`."""
        assert self._sampler is not None
        positions = [tree.position(node) + 1 for node in nodes]
        found = top_candidates(logits, positions, self._sampler, self._num_candidates, self._vocabulary)
        self._ready.update(zip(nodes, found, strict=True))

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        """Keep the slots of accepted and surviving nodes that were fed; the others come with the next round."""
        if not self._slots and not self._caught_up:
            self._ready.clear()
            self._carried = None if survivors is None else survivors.tree
            return  # most rounds, where drafting hardly pays
        fed = list(itertools.takewhile(lambda node: node in self._slots, path))
        names = {} if survivors is None else _new_names(self._slots, survivors)
        kept = self.cache.commit(
            [*self._caught_up, *(self._slots[node] for node in fed)], [self._slots[node] for node in names]
        )
        self._slots = dict(zip(names.values(), kept, strict=True))
        self._ready = {names[node]: self._ready[node] for node in self._ready if node in names}
        self._caught_up = [self._slots[ROOT]] if ROOT in self._slots else []
        self._carried = None if survivors is None else survivors.tree

    def _forget_round(self) -> None:
        self.cache.rollback()
        self._slots.clear()
        self._ready.clear()
        self._caught_up.clear()

    def truncate(self, length: int) -> None:
        self._forget_round()
        self._carried = None
        if length <= self._start:
            self._restart(0)
        self.cache.truncate(min(length - self._start, self.cache.length))


def _new_names(nodes: Iterable[int], survivors: Selection) -> dict[int, int]:
    """Of `nodes`, those that survive: old name to new name."""
    return {node: new for node in nodes if (new := survivors.old_to_new[node]) != DROPPED}
