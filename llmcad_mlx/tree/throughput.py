"""The default policy: best-first growth, stopped where one more step earns fewer tokens than it costs.

Everything is priced in tokens: a second is worth `costs.rate`, the tokens that decoding yields per second.
Maximising tokens minus price times seconds, with the achieved rate as the price, maximises the rate itself
(Dinkelbach's method for ratios). Best-first order maximises the expected accepted tokens for a number of
nodes (SpecExec, OPT-Tree and DySpec reach the same rule).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmcad_mlx.tree.calibration import Calibration
from llmcad_mlx.tree.cost_model import CostModel
from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, NGRAM, TABLE, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

DEFAULT_MAX_NODES = 64
_PROVISIONAL = 4  # times the nodes of a pass may be expanded in a tree that grows while the target waits
_MIN_PROVISIONAL = 64
_KEPT_CHILDREN = 8  # candidates of a leaf worth remembering
_MIN_CONFIDENCE = 1e-3  # a child less likely than this is not worth a place in the tree
# The account of the draft model, in tokens of plain decoding: what its rounds gained or lost against it.
_OPENING = 3.0
_MOST = 6.0  # gains are not saved up for ever: a draft that turns bad is noticed within so many tokens
_GIVE_UP = -3.0  # stop drafting with the model
_TRY_AGAIN = 3.0  # start again, for as long as the account allows
_ALLOWANCE = 0.015  # paid in for each token, which bounds what useless drafting may cost
_WORST_ROUND = -3.0
_LOOK_AGAIN = 32  # rounds without the draft after which one step is taken to see whether it would pay now
_WELL_KNOWN = 3  # observations of a pass's size
_SURE = 2  # observations that make a step time believable
_HIT_DECAY = 0.95
_LIKELY = 0.5  # probability of a node that is worth a look although its price seems too high
_LEAST_GAIN = 0.05  # tokens a tree must promise beyond plain decoding, or measured costs' noise decides
_LEAST_NET = 0.05  # the same after the price of its rows: the best of many guesses promises more than it keeps
_PLAIN_AGAIN = 24  # rounds without a plain pass after which one is due, times the tokens a round gives
_YIELD_DECAY = 0.9
_TINY = 0.01  # probability of a node that is not worth a row, whatever that costs
_AHEAD = 4  # draft steps that are looked ahead when one is priced
_EXPLORE = 2  # times the largest measured row count that a step may have
_LEAST_PROVISIONAL = 0.005  # probability that the text passes through a node, for expanding it in free time


def provisional_nodes(max_nodes: int) -> int:
    """Nodes a drafter may have expanded in a tree that grows while the target, given `max_nodes`, waits."""
    return max(_PROVISIONAL * max_nodes, _MIN_PROVISIONAL)


class ThroughputPolicy:
    """Best-first growth with a measured stop rule; never slower than plain decoding for long.

    `costs` and `calibration` are the engine's, shared so that they can be saved. With `tree_nodes` the tree is
    grown to exactly the best that many nodes, whatever the costs say. `max_nodes` bounds a pass otherwise,
    `max_provisional` (4 times as much, at least 64) the nodes each drafter has expanded in a tree that grows while
    the target waits for its weights.
    `lookups`: the sources that cost next to nothing; the model is the one that is priced.
    Without `branching`, for the ablation, only the best candidate of a leaf is kept and one branch is submitted.
    """

    def __init__(
        self,
        costs: CostModel,
        calibration: Calibration,
        tree_nodes: int | None = None,
        max_nodes: int = DEFAULT_MAX_NODES,
        max_width: int = 8,
        *,
        max_provisional: int | None = None,
        branching: bool = True,
        pipelined: bool = True,
        lookups: Collection[str] = (NGRAM, TABLE),
    ) -> None:
        for name, value in (
            ("tree_nodes", 1 if tree_nodes is None else tree_nodes),
            ("max_nodes", max_nodes),
            ("max_width", max_width),
            ("max_provisional", 1 if max_provisional is None else max_provisional),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.costs = costs
        self.calibration = calibration
        self.tree_nodes = tree_nodes
        self.max_nodes = tree_nodes or max_nodes
        self.max_width = max_width if branching else 1
        self.max_provisional = max_provisional or provisional_nodes(self.max_nodes)
        self.pipelined = pipelined
        self._lookups = frozenset(lookups)
        self._kept_children = _KEPT_CHILDREN if branching else 1
        self._branching = branching
        self._expanded: dict[str, set[int]] = {}
        self._tree: TokenTree | None = None
        self._gain = 0.7  # acceptance probability that expanding a certain leaf has added, lately
        self._drafting = True  # whether drafting with the model has been paying
        self._account = _OPENING
        self._idle = 0  # rounds since the model was last used
        self._model_used = False
        self._plain_rounds = 0  # rounds since the target's pass had more than one row
        self._since_plain = 0  # rounds since the target's pass had a single row
        self._yield = 1.0  # tokens a round has given lately
        self._measuring_plain = False
        self._rate = 0.0  # `costs.rate` when the round began: asked for dozens of times in each

    @property
    def sources(self) -> frozenset[str]:
        """All drafters; those that only look up while drafting with the model does not pay."""
        drafting = self._drafting or self.tree_nodes is not None
        return self._lookups | {MODEL} if drafting else self._lookups

    # -- growth ------------------------------------------------------------------------------------------

    def begin(self, tree: TokenTree, survivors: Selection | None = None) -> None:
        expanded = self._expanded if survivors is not None else {}
        self._expanded = {source: _renamed(nodes, survivors) for source, nodes in expanded.items()}
        self._tree = tree
        self._rate = self.costs.rate
        self._model_used = MODEL in tree.sources
        # What a plain pass takes decides about every tree, so it is measured again from time to time. That
        # round gives up `_yield` - 1 tokens: the more, the rarer.
        # Where the target waits for weights, a plain pass takes what any pass takes.
        due = self._since_plain >= _PLAIN_AGAIN * self._yield and not self.costs.verify.hidden_rows
        self._measuring_plain = due and self.tree_nodes is None

    def next_leaves(self, tree: TokenTree, source: str, free_seconds: float = 0.0) -> Sequence[int]:
        """The most likely nodes `source` has not expanded, while expanding them pays."""
        expanded = self._expanded.setdefault(source, set())
        if self.tree_nodes is not None:
            leaves = self._unfilled(tree, expanded)
        elif source == MODEL:
            leaves = self._paying(tree, expanded, free_seconds)
            self._model_used = self._model_used or bool(leaves)
        else:
            leaves = self._free(tree, expanded)
        expanded.update(leaves)
        return leaves

    def _best_unexpanded(self, tree: TokenTree, expanded: set[int], count: int) -> list[int]:
        cumulative = tree.cumulative
        fresh = [node for node in range(len(tree)) if node not in expanded]
        fresh.sort(key=lambda node: -cumulative[node])
        return fresh[:count]

    def _unfilled(self, tree: TokenTree, expanded: set[int]) -> list[int]:
        """Nodes whose children could still enter the best `tree_nodes`: those that are in them now."""
        return self._with_room(tree, self._best_unexpanded(tree, expanded, self.max_width), self.max_nodes)

    @staticmethod
    def _with_room(tree: TokenTree, leaves: list[int], num_nodes: int) -> list[int]:
        """The leaves whose children could still be among the best `num_nodes` of the tree."""
        if len(tree) < num_nodes:
            return leaves
        bar = sorted(tree.cumulative, reverse=True)[num_nodes - 1]
        return [leaf for leaf in leaves if tree.cumulative[leaf] > bar]

    def _free(self, tree: TokenTree, expanded: set[int]) -> list[int]:
        """For a drafter that costs nothing: nodes likely enough to be worth a row of the target pass."""
        rows, _ = self._worthwhile(sorted(tree.cumulative, reverse=True))
        floor = max(self._price(rows, 1), 0.02)
        leaves = self._with_room(tree, self._best_unexpanded(tree, expanded, self.max_width), self.max_nodes)
        return [leaf for leaf in leaves if tree.cumulative[leaf] > floor]

    def _paying(self, tree: TokenTree, expanded: set[int], free_seconds: float) -> list[int]:
        """The best so many leaves that a model step on them gains more than it costs; none if no step does."""
        if self._measuring_plain or not self._knows_plain():
            return []  # the very first passes measure plain decoding, too
        leaves = self._best_unexpanded(tree, expanded, self.max_width)
        if not expanded and self._look_again():
            return leaves[:1]
        if not self.costs.draft:
            return []
        leaves = self._with_room(tree, leaves[: _EXPLORE * self.costs.draft.most_rows], self._most_nodes())
        rate, (rows, _) = self._rate, self._worthwhile(sorted(tree.cumulative, reverse=True))
        best, best_value, gain = 0, 0.0, 0.0
        later = self._later(tree.cumulative[leaves[0]], rows + 1) if leaves else 0.0
        for width, leaf in enumerate(leaves, 1):
            covered = sum(tree.confidences[child] for child in tree.children(leaf))  # by another drafter
            gain += tree.cumulative[leaf] * self._gain * max(1.0 - covered, 0.0)
            price = rate * max(self.costs.draft.predict(width) - free_seconds, 0.0)
            value = gain + later - price - self._price(rows, width)
            if value > best_value:
                best, best_value = width, value
        return leaves[:best]

    def _later(self, probability: float, rows: int) -> float:
        """What the steps after one on a leaf of that `probability` gain at most, each on the likeliest child.

        A step that does not pay by itself may be the way to some that do: a pass of three rows is often hardly
        dearer than one of two.
        """
        step = self._rate * self.costs.draft.predict(1)
        best = total = 0.0
        for depth in range(_AHEAD):
            probability *= self._gain
            total += probability * self._gain - step - self._price(rows + depth, 1)
            best = max(best, total)
        return best

    def _knows_plain(self) -> bool:
        """Whether what a plain pass takes is believable; waiting for weights varies less than computing."""
        verify = self.costs.verify
        return verify.times_seen(1) >= (1 if verify.hidden_rows else _SURE)

    def _most_nodes(self) -> int:
        """Costs beyond what was measured are a guess: larger trees are tried step by step."""
        verify = self.costs.verify
        return min(self.max_nodes, max(_EXPLORE * verify.most_rows, verify.hidden_rows, 1))

    def _look_again(self) -> bool:
        """Whether to take one step that seems not to pay: its price was measured too rarely or long ago."""
        draft = self.costs.draft
        if sum(draft.times_observed(rows) for rows in range(1, 4)) < _SURE:
            return True
        return self._idle >= _LOOK_AGAIN and self._account > 0.0

    def _price(self, rows: int, more: int) -> float:
        """Tokens that `more` rows in the target pass cost beyond `rows`."""
        verify, most = self.costs.verify, self.max_nodes
        return self._rate * (verify.predict(min(rows + more, most + 1)) - verify.predict(min(rows, most)))

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        probability, source = self.calibration.probability, candidates.source
        best = 0.0
        pairs = zip(candidates.tokens[: self._kept_children], candidates.confidences, strict=False)
        for token, raw in pairs:
            confidence = probability(raw, source)
            best = max(best, confidence)
            if confidence >= _MIN_CONFIDENCE:
                tree.add(leaf, token, confidence, source, raw)
        if source == MODEL:
            self._gain = self._gain * _HIT_DECAY + best * (1 - _HIT_DECAY)

    def provisional_leaves(self, tree: TokenTree, source: str, width: int) -> Sequence[int]:
        """The nodes the text passes through most likely, of those `source` has not expanded.

        None while plain decoding is measured: a step that makes a layer wait would make it look slow.
        """
        unsure = self.tree_nodes is None and not self._knows_plain()
        if self._measuring_plain or unsure:
            return []
        expanded = self._expanded.setdefault(source, set())
        room = self.max_provisional - len(expanded)
        leaves = self._best_unexpanded(tree, expanded, max(min(self.max_width, width, room), 0))
        leaves = [leaf for leaf in leaves if tree.cumulative[leaf] > _LEAST_PROVISIONAL]
        expanded.update(leaves)
        self._model_used = self._model_used or (source == MODEL and bool(leaves))
        return leaves

    # -- verification ------------------------------------------------------------------------------------

    def submit(self, tree: TokenTree) -> Selection:
        """The best nodes, as many as maximise expected tokens minus the price of the target pass."""
        if self._branching:
            return tree.select(self._worth(sorted(tree.cumulative, reverse=True)))
        branch = tree.best_branch()
        return tree.keep_path(branch[: self._worth([tree.cumulative[node] for node in branch])])

    def _worth(self, ranked: Sequence[float]) -> int:
        """How many nodes to submit, of those with the cumulative confidences `ranked`, largest first."""
        if self.tree_nodes is not None:
            return self.tree_nodes
        ranked, verify = ranked[: self._most_nodes()], self.costs.verify
        best, net = self._worthwhile(ranked)
        if self._measuring_plain:
            return 1
        if net < _LEAST_NET:
            best = 1
        if best == 1 and self._look_at_two(ranked):
            return 2
        if sum(ranked[:best]) - 1.0 < _LEAST_GAIN:
            return 1
        # Measure the next size too: a single disturbed observation would rule it out for good.
        if 1 < best < len(ranked) and verify.times_seen(best + 1) < _WELL_KNOWN:
            best += 1
        return best

    def _worthwhile(self, ranked: Sequence[float]) -> tuple[int, float]:
        """How many of the nodes gain most tokens over the price of their rows, and how much more than the root."""
        verify, hidden = self.costs.verify, self.costs.verify.hidden_rows
        best, best_value, alone, gain = 1, -float("inf"), 0.0, 0.0
        for nodes, probability in enumerate(ranked[: self._most_nodes()], 1):
            if probability < _TINY and nodes > hidden:
                break
            gain += probability
            value = gain - self._rate * verify.predict(nodes)
            alone = value if nodes == 1 else alone
            if value > best_value + 1e-9:
                best, best_value = nodes, value
        return best, best_value - alone

    def _look_at_two(self, ranked: Sequence[float]) -> bool:
        """Whether to submit a likely node that seems too dear: its price was measured too rarely or long ago."""
        if len(ranked) < 2 or ranked[1] < _LIKELY or self._account <= 0.0 or not self._knows_plain():
            return False
        return self.costs.verify.times_observed(2) < _WELL_KNOWN or self._plain_rounds >= _LOOK_AGAIN

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        """Learn from every candidate the target's choices have judged, also those not submitted."""
        self._plain_rounds = self._plain_rounds + 1 if len(tree) == 1 else 0
        self._since_plain = 0 if len(tree) == 1 else self._since_plain + 1
        self._yield = self._yield * _YIELD_DECAY + len(walk.tokens) * (1 - _YIELD_DECAY)
        drafted = self._tree if self._tree is not None else tree
        node: int | None = 0
        for token in walk.tokens:
            if node is None:
                break
            for child in drafted.children(node):
                right = drafted.tokens[child] == token
                self.calibration.observe(drafted.raw_confidences[child], drafted.sources[child], right)
            node = drafted.child(node, token)

    # -- whether to draft at all -------------------------------------------------------------------------

    def finished(self, num_tokens: int, seconds: float) -> None:
        """The round is over: `num_tokens` emitted in `seconds`, everything included.

        A draft that keeps losing against plain decoding overdraws its account and is left alone until the
        allowance has paid for another try. So a useless one costs a few tokens and 1.5 % of the time.
        """
        self._account += _ALLOWANCE * num_tokens
        self._idle = 0 if self._model_used else self._idle + 1
        self.costs.observe_round(num_tokens, seconds)
        if self._model_used:
            # One disturbed round says little about the draft.
            self._account += max(num_tokens - seconds * self.costs.plain_rate, _WORST_ROUND)
        self._account = min(self._account, _MOST)
        if self._drafting and self._account < _GIVE_UP:
            self._drafting = False
            self.costs.forget_rate()
        elif not self._drafting and self._account >= _TRY_AGAIN:
            self._drafting = True


def _renamed(nodes: set[int], survivors: Selection | None) -> set[int]:
    """The new names of those of `nodes` that survive."""
    return set() if survivors is None else {survivors.old_to_new[node] for node in nodes} - {DROPPED}
