"""The draft model: many leaves in one forward, and from its logits to ranked candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.drafting import Drafter
from llmcad_mlx.errors import GenerationError
from llmcad_mlx.models.cache import ModelCache
from llmcad_mlx.models.folder import TokenList
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import Candidates
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, ROOT, Selection, TokenTree

_CHUNKS = 256  # a row is cut into that many pieces to find its largest entries without sorting it
_PIECE = 128  # numbers in such a piece on a GPU: Metal sorts 2,048 in one go, as many as 262,144 have pieces
_NUM_CANDIDATES = 8  # of a node
_FED_WITH_NODES = 6  # missed tokens; more go through the model's body first, without the head
_WINDOW = 32  # tokens read again after a long break


def top_candidates(
    logits: mx.array,
    positions: Sequence[int],
    sampler: TargetSampler,
    count: int,
    vocabulary: TokenList | None = None,
    on_host: bool = True,
) -> list[Candidates]:
    """The `count` best candidates of each row of `logits` (N, V), best first, equal ones in order of their ids.

    vocabulary: (V,) ascending ids below the sampler's `vocab_size`, where the columns are not token 0, 1, 2, …
    on_host: whether they are found in numpy, which is faster where logits are on the host, or with MLX operations.

    Candidates are ranked by `TargetSampler.draft_scores` for the row's position, and their confidence is the
    softmax of those scores: at T = 0 the draft's own probability, above it a probability given the noise that
    the target will use too. Raises GenerationError for logits that are not finite where it matters.
    """
    if on_host:
        rows = np.asarray(logits.astype(mx.float32))
        scores = [sampler.draft_scores(row, p, vocabulary) for row, p in zip(rows, positions, strict=True)]
        found = [_best_of(row, count) for row in scores]
    else:
        found = _on_device(logits, positions, sampler, count, vocabulary)
    if vocabulary is None:
        return found
    return [Candidates(vocabulary[list(each.tokens)].tolist(), each.confidences) for each in found]


def _best_of(scores: npt.NDArray[np.float32], count: int) -> Candidates:
    """The largest `count` entries of `scores` (V,) and their softmax."""
    size = len(scores)
    count = min(count, size)
    if size >= _CHUNKS * 16 and count < _CHUNKS:
        # The best `count` entries lie in the `count` pieces with the largest maxima, or others of equal ones.
        width = size // _CHUNKS
        body = scores[: width * _CHUNKS].reshape(_CHUNKS, width)
        peaks = body.max(axis=1)
        pieces = np.flatnonzero(peaks >= np.partition(peaks, _CHUNKS - count)[_CHUNKS - count])
        inside = (pieces[:, None] * width + np.arange(width)).ravel()
        tokens = np.concatenate([inside, np.arange(width * _CHUNKS, size)])
        some = scores[tokens]
    else:
        tokens, some = np.arange(size), scores
    order = np.flatnonzero(some >= np.partition(some, len(some) - count)[len(some) - count])
    if len(order) < count:  # NaN is above everything
        raise _broken_draft()
    order = order[np.argsort(-some[order], kind="stable")[:count]]
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
        scores = scores / temperature + mx.array(noise[:, : scores.shape[1]])
    tokens, top = _largest(scores, min(count, scores.shape[1]))
    logprobs = top - mx.logsumexp(scores, axis=-1, keepdims=True)
    mx.eval(tokens, logprobs)
    # Rounding must not make a probability of more than 1; a NaN stays one.
    confidences = np.exp(np.minimum(np.asarray(logprobs), 0.0))
    if not np.isfinite(confidences).all():
        raise _broken_draft()
    ids: list[list[int]] = tokens.tolist()  # type: ignore[assignment]
    return [Candidates(t, c) for t, c in zip(ids, confidences.tolist(), strict=True)]


def _largest(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Columns and values (N, count) of the largest entries of `scores` (N, V), equal ones in order of columns.

    Sorts, as MLX's partitions are sorts on a GPU, but few numbers at once: the best `count` entries lie in the
    `count` pieces of a row with the largest maxima. MLX's sorts leave equal numbers in their order.
    """
    size = scores.shape[1]
    whole = size // _PIECE
    columns, some = None, scores
    if whole > 2 * count:
        peaks = scores[:, : whole * _PIECE].reshape(-1, whole, _PIECE).max(axis=-1)
        pieces = mx.sort(mx.argsort(-peaks, axis=-1)[:, :count], axis=-1).astype(mx.int32)
        columns = (pieces[..., None] * _PIECE + mx.arange(_PIECE)).reshape(-1, count * _PIECE)
        if rest := size - whole * _PIECE:
            last = mx.broadcast_to(mx.arange(size - rest, size), (columns.shape[0], rest))
            columns = mx.concatenate([columns, last], axis=-1)
        some = mx.take_along_axis(scores, columns, axis=-1)
    best = mx.argsort(-some, axis=-1)[:, :count]
    top = mx.take_along_axis(some, best, axis=-1)
    return best if columns is None else mx.take_along_axis(columns, best, axis=-1), top


def _broken_draft() -> GenerationError:
    return GenerationError(
        "the draft's logits contain NaN or infinity; its file is damaged or its precision too low: "
        "pull it again, or choose another draft"
    )


class ModelDrafter(Drafter):
    """A small model with its own lazy KV cache.

    Nodes get a slot in the cache when they are fed, that is when they or a descendant are expanded. Accepted
    nodes without one are fed with the next round's first forward. Nodes that survive a round keep their slots,
    uncommitted; then the new root, the bonus token, has one already.
    """

    source = MODEL
    model: TreeModel
    cache: ModelCache

    def __init__(self, model: TreeModel, vocabulary: TokenList | None = None) -> None:
        """vocabulary: the tokens of a trimmed head, see `top_candidates`.

        Raises ValueError for a model whose cache cannot roll back.
        """
        cache = model.new_cache()
        if cache.capability == "plain":
            raise ValueError(f"a draft must be able to take tokens back; {model.report.reason}")
        self.model = model
        self.cache = cache
        self._start = 0  # index in the sequence of the cache's first token
        self._vocabulary = vocabulary
        self._on_host = cpu_kernels_wanted()
        self._sampler: TargetSampler | None = None
        self._slots: dict[int, int] = {}  # node -> slot
        self._ready: dict[int, Candidates] = {}  # proposals not asked for yet
        self._caught_up: list[int] = []  # slots of committed tokens that are not committed in the cache yet
        self._carried: TokenTree | None = None  # the tree that slots and proposals were kept for

    @property
    def num_cached(self) -> int:
        return 0 if self._start else self.cache.length  # 0 where they are not the first ones

    @property
    def num_bytes(self) -> int:
        return self.model.weight_bytes

    def prefill(
        self,
        tokens: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        limit: int | None = None,
    ) -> bool:
        """All but the last token, which is the first root."""
        if self._start:
            self._restart(0)
        missing = tokens[self.cache.length : len(tokens) - 1]
        self.model.prefill(missing[:limit], self.cache, on_progress=on_progress)
        return limit is not None and len(missing) > limit

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
        needed = set(itertools.chain.from_iterable(tree.path(leaf) for leaf in leaves))
        nodes = sorted(needed - self._slots.keys())  # the leaves and what is above them, parents first
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
        logits = result.logits[max(len(missed) - 1, 0) :]
        asked = [ROOT, *nodes] if missed else nodes
        positions = [tree.position(node) + 1 for node in asked]
        assert self._sampler is not None
        found = top_candidates(logits, positions, self._sampler, _NUM_CANDIDATES, self._vocabulary, self._on_host)
        self._ready.update(zip(asked, found, strict=True))
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

    def _as_chain(self, tree: TokenTree, nodes: Sequence[int]) -> list[int]:
        """For a model that takes no branches: the first nodes that go on with the line fed so far."""
        tip = max(self._slots, key=lambda node: tree.depths[node], default=ROOT)
        line = []
        for node in nodes:
            if tree.parents[node] == tip:
                line.append(node)
                tip = node
        return line

    def commit(self, tree: TokenTree, path: Sequence[int], survivors: Selection | None = None) -> None:
        """Keep the slots of accepted and surviving nodes that were fed; the others come with the next round."""
        if not self._slots and not self._caught_up:
            self._ready.clear()
            self._carried = None if survivors is None else survivors.tree
            return  # most rounds, where drafting hardly pays
        fed = list(itertools.takewhile(lambda node: node in self._slots, path))
        names: dict[int, int] = {}  # of those that survive, old to new
        if survivors is not None:
            news = {node: survivors.old_to_new[node] for node in self._slots}
            names = {node: new for node, new in news.items() if new != DROPPED}
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
        kept = min(length - self._start, self.cache.length)
        if kept <= 0 or kept < self.cache.least_length:
            self._restart(0)
        else:
            self.cache.truncate(kept)
