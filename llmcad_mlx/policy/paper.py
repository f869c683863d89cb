"""LLMCad's growth policy and fallback (arXiv 2309.04255), kept as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.tree.token_tree import MODEL, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

CONFIDENCE_THRESHOLD = 0.3
INITIAL_ALPHA = 0.01


class PaperPolicy(GrowthPolicy):
    """Confidence-paced branches, one token per draft step, and a self-adjusting fallback threshold.

    Branches: the best candidate always continues its branch; any other with confidence above 0.3 opens a
    branch of its own. The branch to extend next is the one with the largest deficit
    `M·C_i/ΣC − T_i`, with C_i the cumulative confidence of its tip, T_i its length from the root and M the
    drafted tokens so far: max-min fairness by confidence.

    Fallback: when `max_i C_i < alpha`. Alpha starts at 0.01. After a verification, with N_all the length
    of the branch the target followed and N_correct how many of its tokens were right,
    `alpha ← 0.5·alpha` if all were right, else `alpha ← (N_all − N_correct)/N_all`, as printed; the papers'
    prose has another formula, alpha divided by the average cumulative confidence after the error.

    While the target waits for its weights, the most likely branch is continued by its best candidates alone
    (the papers' pipeline), by no more than `max_nodes` of them.

    `max_nodes` bounds the tree, its root included; `source` is the one drafter it uses. For the ablation:
    without `branching` the best candidate alone is kept, without `fallback` alpha is 0 for good.
    """

    def __init__(
        self,
        max_nodes: int = 64,
        source: str = MODEL,
        *,
        branching: bool = True,
        fallback: bool = True,
        pipelined: bool = True,
    ) -> None:
        self.source = source
        self.max_nodes = max_nodes
        self.branching = branching
        self.fallback = fallback
        self.pipelined = pipelined
        self.alpha = INITIAL_ALPHA if fallback else 0.0
        self._tips: list[int] = []
        self._asked: set[int] = set()
        self._provisional: int | None = None  # candidates that may still be added; None before the fallback

    def wants(self, source: str) -> bool:
        return source == self.source

    def begin(self, tree: TokenTree, survivors: Selection | None = None) -> None:
        self._tips = tree.leaves()
        self._asked = set()
        self._provisional = None

    def next_leaves(self, tree: TokenTree, source: str, free_seconds: float = 0.0) -> Sequence[int]:
        """The tip of the branch with the largest deficit; none when the tree is full or not trusted.

        A tip that was asked for and is still a tip got no candidates.
        """
        tips = [tip for tip in self._tips if tip not in self._asked]
        if not tips or len(tree) >= self.max_nodes:
            return []
        cumulative, depths = tree.cumulative, tree.depths
        total = sum(cumulative[tip] for tip in tips)
        if total == 0.0 or max(cumulative[tip] for tip in tips) < self.alpha:
            return []
        share = (len(tree) - 1) / total
        tip = max(tips, key=lambda tip: share * cumulative[tip] - depths[tip])  # ties: the oldest branch
        self._asked.add(tip)
        return [tip]

    def provisional_leaves(self, tree: TokenTree, source: str, width: int) -> Sequence[int]:
        """The tip of the branch that was the most likely one at the fallback."""
        if self._provisional is None:
            tips = [tip for tip in self._tips if tip not in self._asked]
            self._tips = [max(tips, key=tree.cumulative.__getitem__)] if tips else []
            self._provisional = self.max_nodes
        if self._provisional == 0 or width < 1:
            return []
        leaves, self._tips = self._tips, []
        return leaves

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        if self._provisional is not None:
            for token, confidence in zip(candidates.tokens[:1], candidates.confidences, strict=False):
                self._tips = [tree.add(leaf, token, confidence, candidates.source)]
                self._provisional -= 1
            return
        branch = self._tips.index(leaf)
        pairs = zip(candidates.tokens, candidates.confidences, strict=True)
        for rank, (token, confidence) in enumerate(pairs):
            if len(tree) >= self.max_nodes:
                return
            if rank == 0:
                self._tips[branch] = tree.add(leaf, token, confidence, candidates.source)
            elif confidence > CONFIDENCE_THRESHOLD and self.branching:
                self._tips.append(tree.add(leaf, token, confidence, candidates.source))

    def submit(self, tree: TokenTree) -> Selection:
        """Everything that was drafted, unless more than `max_nodes` survived the last round."""
        return tree.select(self.max_nodes)

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        if walk.path_tested == 0 or not self.fallback:
            return
        if not walk.refused:
            self.alpha *= 0.5
            return
        tip = walk.last
        while children := tree.children(tip):  # the best candidate continues the branch
            tip = max(children, key=tree.confidences.__getitem__)
        num_all = tree.depths[tip]
        self.alpha = (num_all - walk.num_accepted) / num_all
