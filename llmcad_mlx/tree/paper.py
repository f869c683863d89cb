"""LLMCad's growth policy and fallback (arXiv 2309.04255), kept as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.tree.policy import Candidates
from llmcad_mlx.tree.token_tree import Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

CONFIDENCE_THRESHOLD = 0.3
INITIAL_ALPHA = 0.01


class PaperPolicy:
    """Confidence-paced branches, one token per draft step, and a self-adjusting fallback threshold.

    Branches: the best candidate always continues its branch; any other with confidence above 0.3 opens a
    branch of its own. The branch to extend next is the one with the largest deficit
    `M·C_i/ΣC − T_i`, with C_i the cumulative confidence of its tip, T_i its length from the root and M the
    drafted tokens so far: max-min fairness by confidence.

    Fallback: when `max_i C_i < alpha`. Alpha starts at 0.01. After a verification, with N_all the length
    of the branch the target followed and N_correct how many of its tokens were right,
    `alpha ← 0.5·alpha` if all were right, else `alpha ← (N_all − N_correct)/N_all`. That is the printed
    formula; the papers' prose describes another, alpha divided by the average cumulative confidence after
    the error, which is not used.

    `max_nodes` bounds the tree, its root included.
    """

    def __init__(self, max_nodes: int = 64) -> None:
        if max_nodes < 1:
            raise ValueError(f"max_nodes is {max_nodes}; the root alone is 1")
        self.max_nodes = max_nodes
        self.alpha = INITIAL_ALPHA
        self._tips: list[int] = []

    def begin(self, tree: TokenTree) -> None:
        self._tips = tree.leaves()

    def next_leaves(self, tree: TokenTree) -> Sequence[int]:
        """The tip of the branch with the largest deficit; none when the tree is full or not trusted."""
        tips = self._tips
        if not tips or len(tree) >= self.max_nodes:
            return []
        cumulative, depths = tree.cumulative, tree.depths
        total = sum(cumulative[tip] for tip in tips)
        if total == 0.0 or max(cumulative[tip] for tip in tips) < self.alpha:
            return []
        share = (len(tree) - 1) / total
        return [max(tips, key=lambda tip: share * cumulative[tip] - depths[tip])]  # ties: the oldest branch

    def add(self, tree: TokenTree, leaf: int, candidates: Candidates) -> None:
        branch = self._tips.index(leaf) if leaf in self._tips else None  # None: a second drafter's candidates
        if not candidates.tokens:
            if branch is not None:
                del self._tips[branch]
            return
        for rank, (token, confidence) in enumerate(
            zip(candidates.tokens, candidates.confidences, strict=True)
        ):
            size = len(tree)
            if size >= self.max_nodes:
                return
            continues = rank == 0 and branch is not None
            if not continues and confidence <= CONFIDENCE_THRESHOLD:
                continue
            node = tree.add(leaf, token, confidence, candidates.source)
            if continues and branch is not None:
                self._tips[branch] = node
            elif node == size:
                self._tips.append(node)

    def submit(self, tree: TokenTree) -> Selection:
        """Everything that was drafted."""
        return tree.select(len(tree))

    def verified(self, tree: TokenTree, walk: Walk) -> None:
        if walk.path_tested == 0:
            return
        if not walk.refused:
            self.alpha *= 0.5
            return
        num_all = tree.depths[_branch_tip(tree, walk.last)]
        self.alpha = (num_all - walk.num_accepted) / num_all


def _branch_tip(tree: TokenTree, node: int) -> int:
    """The tip of the branch that runs through `node`: below it, best candidates continue the branch."""
    while children := tree.children(node):
        node = max(children, key=lambda child: tree.confidences[child])
    return node
