"""The default policy: best-first growth, stopped where one more step earns fewer tokens than it costs.

What to expand is decided here; the ledger says what may be risked, at which price, and when a round measures.

Everything is priced in tokens: a second is worth the tokens that decoding yields in it. Maximising tokens minus
price times seconds, with the achieved rate as the price, maximises the rate itself (Dinkelbach's method for
ratios). Best-first order maximises the expected accepted tokens of so many nodes (SpecExec, OPT-Tree, DySpec).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.ledger import EXPLORE, DraftAccount, LookupAccount, Mode, Prices, Ranking, Schedule
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, ROOT, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

DEFAULT_MAX_NODES = 64
_MAX_WIDTH = 8  # leaves of a draft step
_KEPT_CHILDREN = 8  # candidates of a leaf worth remembering
_MIN_CONFIDENCE = 1e-3  # a child less likely than this is not worth a place in the tree
_MIN_PAID = 0.02  # the same where each row is paid for, and such a child would never be given one
_HIT_DECAY = 0.95
_LEAST_GAIN = 0.05  # tokens a tree must promise beyond plain decoding, or measured costs' noise decides
_LEAST_NET = 0.12  # the same after the price of its rows: the best of many guesses promises more than it keeps
_UNLIKELY = 0.03  # probability of a node that is not worth a draft step, unless it delays nothing
_AHEAD = 4  # draft steps that are looked ahead when one is priced
_LEAST_PROVISIONAL = 0.005  # probability that the text passes through a node, for expanding it in free time


def provisional_nodes(max_nodes: int) -> int:
    """Nodes a drafter may have expanded in a tree that grows while the target, given `max_nodes`, waits."""
    return max(4 * max_nodes, 64)


class ThroughputPolicy(GrowthPolicy):
    """Best-first growth with a measured stop rule; never slower than plain decoding for long.

    `costs` and `calibration` are the engine's, shared so that they can be saved. With `tree_nodes` the tree is
    grown to exactly the best that many nodes, whatever the costs say; otherwise `max_nodes` bounds a pass.
    Steps of the model are priced; other drafters cost next to nothing.
    Without `branching`, for the ablation, only the best candidate of a leaf is kept and one branch is submitted.
    """

    def __init__(
        self,
        costs: CostModel,
        calibration: Calibration,
        tree_nodes: int | None = None,
        max_nodes: int = DEFAULT_MAX_NODES,
        *,
        branching: bool = True,
        pipelined: bool = True,
    ) -> None:
        self.costs = costs
        self.calibration = calibration
        self.tree_nodes = tree_nodes
        self.max_nodes = tree_nodes or max_nodes
        self.max_width = _MAX_WIDTH if branching else 1
        self.max_provisional = provisional_nodes(self.max_nodes)
        self.pipelined = pipelined
        self._kept_children = _KEPT_CHILDREN if branching else 1
        self._branching = branching
        self._expanded: dict[str, set[int]] = {}
        self._tree = TokenTree(0)  # of the present round
        self._gain = 0.7  # acceptance probability that expanding a certain leaf has added, lately
        self._model_used = False  # for any node of this round's tree
        self._drafted_s = 0.0  # what this round's steps of the model take, as predicted
        self._next_root = -1  # position of the next round's root if the text goes on
        self._ranking: Ranking | None = None  # of the tree as it is; None: to be made when somebody asks
        self._draft_account = DraftAccount()
        self._lookup_account = LookupAccount()
        self._schedule = Schedule(costs, forced=tree_nodes is not None)
        self._prices = Prices(costs, self.max_nodes)

    def wants(self, source: str) -> bool:
        """All drafters; those that only look up while drafting with the model does not pay."""
        return source != MODEL or self._draft_account.drafting or self.tree_nodes is not None

    def begin(self, tree: TokenTree, survivors: Selection | None = None) -> None:
        before, self._expanded = self._expanded, {}
        if survivors is not None:
            for source, nodes in before.items():
                self._expanded[source] = {survivors.old_to_new[node] for node in nodes} - {DROPPED}
        self._tree = tree
        self._prices.begin()
        self._ranking, self._drafted_s = None, 0.0
        self._model_used = MODEL in tree.sources
        new_text = tree.root_position != self._next_root
        self._lookup_account.begin(new_text)
        self._schedule.begin(new_text, self._prices.more_rows(1, 1) > max(self._lookup_account.balance, 0.0))

    def next_leaves(self, tree: TokenTree, source: str, free_seconds: float = 0.0) -> Sequence[int]:
        """The most likely nodes `source` has not expanded, while expanding them pays."""
        if not self._schedule.mode.asks:
            return []
        expanded = self._expanded.setdefault(source, set())
        if self.tree_nodes is not None:
            leaves = self._with_room(tree, self._best_unexpanded(tree, expanded, self.max_width), self.max_nodes)
        elif source == MODEL:
            leaves = self._paying(tree, expanded, free_seconds)
            self._model_used = self._model_used or bool(leaves)
            self._drafted_s += self.costs.draft.predict(len(leaves)) if leaves else 0.0
        else:
            leaves = self._free(tree, expanded)
        expanded.update(leaves)
        return leaves

    def _best_unexpanded(self, tree: TokenTree, expanded: set[int], count: int) -> list[int]:
        fresh = [node for node in range(len(tree)) if node not in expanded]
        if len(fresh) > 1:
            fresh.sort(key=tree.cumulative.__getitem__, reverse=True)
        return fresh[:count]

    @staticmethod
    def _with_room(tree: TokenTree, leaves: list[int], num_nodes: int) -> list[int]:
        """The leaves whose children could still be among the best `num_nodes` of the tree."""
        if len(tree) < num_nodes:
            return leaves
        bar = sorted(tree.cumulative, reverse=True)[num_nodes - 1]
        return [leaf for leaf in leaves if tree.cumulative[leaf] > bar]

    def _free(self, tree: TokenTree, expanded: set[int]) -> list[int]:
        """For a drafter that costs nothing: nodes likely enough to be worth a row of the target pass."""
        size = len(tree)
        if len(expanded) == size:
            return []
        if size == 1:
            return [ROOT] if self._prices.more_rows(1, 1) < 1.0 else []
        ranking = self._ranked(tree)
        floor = max(self._prices.more_rows(ranking.rows, 1), _MIN_PAID)
        if ROOT in expanded and len(ranking.probabilities) > 1 and ranking.probabilities[1] <= floor:
            return []  # most often: no node below the root is likely enough
        leaves = self._with_room(tree, self._best_unexpanded(tree, expanded, self.max_width), self.max_nodes)
        return [leaf for leaf in leaves if tree.cumulative[leaf] > floor]

    def _paying(self, tree: TokenTree, expanded: set[int], free_seconds: float) -> list[int]:
        """The best so many leaves that a model step on them gains more than it costs; none if no step does."""
        if not self._schedule.considers_model():
            return []
        leaves = self._best_unexpanded(tree, expanded, self.max_width)
        if not expanded and self._schedule.tries_model(self._draft_account.balance):
            return leaves[:1]
        if not self.costs.draft:
            return []
        leaves = self._with_room(tree, leaves[: EXPLORE * self.costs.draft.most_rows], self._prices.most_nodes())
        ranking = self._ranked(tree)
        if self._prices.expect(ranking.probabilities, self._drafted_s):
            self._ranking = None
            ranking = self._ranked(tree)
        least = 0.0 if free_seconds or self.costs.verify.hidden_rows else _UNLIKELY
        best, best_value, gain = 0, 0.0, 0.0
        later = self._later(tree.cumulative[leaves[0]], ranking) if leaves else 0.0
        for width, leaf in enumerate(leaves, 1):
            if tree.cumulative[leaf] < least:
                break
            covered = sum(tree.confidences[child] for child in tree.children(leaf))  # by another drafter
            gain += tree.cumulative[leaf] * self._gain * max(1.0 - covered, 0.0)
            value = gain + later - self._prices.step(width, free_seconds) - self._places(ranking, 0, width)
            if value > best_value:
                best, best_value = width, value
        return leaves[:best]

    def _places(self, ranking: Ranking, taken: int, count: int) -> float:
        """Tokens that places in the pass cost `count` new nodes, after `taken` others: the price of more rows, or,
        where that is above it, what the least likely nodes promise: the pass may be at the edge of a step."""
        more = self._prices.more_rows(ranking.rows + taken, count)
        last = ranking.rows - taken
        return more if last <= count else min(more, sum(ranking.probabilities[last - count : last]))

    def _later(self, probability: float, ranking: Ranking) -> float:
        """What the steps after one on a leaf of that `probability` gain at most, each on the likeliest child.

        A step that does not pay may lead to some that do: three rows are often hardly dearer than two.
        """
        step = self._prices.step(1)
        best = total = 0.0
        for depth in range(_AHEAD):
            probability *= self._gain
            total += probability * self._gain - step - self._places(ranking, depth + 1, 1)
            best = max(best, total)
        return best

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        source, raws = candidates.source, candidates.confidences[: self._kept_children]
        unpaid = self.costs.verify.hidden_rows or self.tree_nodes is not None
        best, least = 0.0, _MIN_CONFIDENCE if unpaid else _MIN_PAID
        confidences = self.calibration.probabilities(raws, source)
        for token, confidence, raw in zip(candidates.tokens, confidences, raws, strict=False):
            best = max(best, confidence)
            if confidence >= least:
                tree.add(leaf, token, confidence, source, raw)
                self._ranking = None
        if source == MODEL:
            self._gain = self._gain * _HIT_DECAY + best * (1 - _HIT_DECAY)

    def provisional_leaves(self, tree: TokenTree, source: str, width: int) -> Sequence[int]:
        """The nodes the text passes through most likely, of those `source` has not expanded.

        None while plain decoding is measured: a step that makes a layer wait would make it look slow.
        """
        if self.tree_nodes is None and (self._schedule.mode.one_row or not self._schedule.knows_plain()):
            return []
        expanded = self._expanded.setdefault(source, set())
        room = self.max_provisional - len(expanded)
        leaves = self._best_unexpanded(tree, expanded, max(min(self.max_width, width, room), 0))
        leaves = [leaf for leaf in leaves if tree.cumulative[leaf] > _LEAST_PROVISIONAL]
        expanded.update(leaves)
        self._model_used = self._model_used or (source == MODEL and bool(leaves))
        return leaves

    def submit(self, tree: TokenTree) -> Selection:
        """The best nodes, as many as maximise expected tokens minus the price of the target pass."""
        if self._branching:
            return tree.select(self._worth(self._ranked(tree)))
        branch = tree.best_branch()
        return tree.keep(branch[: self._worth(self._prices.rank([tree.cumulative[node] for node in branch]))])

    def _worth(self, ranking: Ranking) -> int:
        """How many nodes to submit, of those that are ranked."""
        if self.tree_nodes is not None:
            return self.tree_nodes
        probabilities, rows = ranking.probabilities, ranking.rows
        if len(probabilities) == 1 or self._schedule.mode.one_row:
            return 1
        if ranking.net < _LEAST_NET or sum(probabilities[:rows]) - 1.0 < _LEAST_GAIN:
            rows = 1
        elif 1 < rows < len(probabilities) and self._schedule.is_new(rows + 1):
            rows += 1  # measure the next size too: a single disturbed observation would rule it out for good
        if self._model_used:
            balance = self._draft_account.balance
        else:
            balance = self._lookup_account.balance
            rows = self._lookup_account.affordable(rows, self._prices)
        return 2 if rows == 1 and self._schedule.tries_row(probabilities[1], balance) else rows

    def _ranked(self, tree: TokenTree) -> Ranking:
        """The tree's nodes: asked for several times between two changes of it."""
        if self._ranking is None:
            self._ranking = self._prices.rank(sorted(tree.cumulative, reverse=True))
        return self._ranking

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        """Learn from every candidate the target's choices have judged, also those not submitted."""
        drafted, rows, num_tokens = self._tree, len(tree), len(walk.tokens)
        self._next_root = tree.root_position + num_tokens
        missed = False
        if self._lookup_account.declined and rows == 1:
            likeliest = max(drafted.children(ROOT), key=drafted.confidences.__getitem__)
            missed = drafted.tokens[likeliest] == walk.tokens[0]
        risked = rows > 1 and not self._model_used and self._schedule.mode is not Mode.TRYING_ROW
        net = walk.num_accepted - self._prices.more_rows(1, rows - 1) if risked else 0.0
        self._lookup_account.book(num_tokens, net, missed)
        model_right = self._model_used and any(tree.sources[node] == MODEL for node in walk.nodes)
        self._schedule.verified(rows, num_tokens, self._model_used, model_right)
        self.calibration.observe_choices(drafted, walk.tokens)

    def finished(self, num_tokens: int, seconds: float) -> None:
        if self._schedule.knew_plain:  # else it measured, and drafted nothing
            self._prices.observe_round(num_tokens, seconds)
        account, was_drafting = self._draft_account, self._draft_account.drafting
        account.book(num_tokens, num_tokens - seconds * self.costs.plain_rate if self._model_used else None)
        if was_drafting and not account.drafting:
            self._prices.forget_rounds()
