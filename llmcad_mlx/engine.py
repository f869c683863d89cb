"""One speculative round: grow, verify, commit.

    tree = grow(…)                     drafters propose, the policy decides what is worth it
    verification = target.verify(…)    one pass of the target over the nodes the policy submits
    walk(…)                            the target chooses every token; the tree says how far it reaches
    commit(…)                          the accepted path joins the sequence in all caches

The text depends on the target, the sampling settings and the seed alone: every emitted token is chosen by
`choose`, which plain decoding (a tree that is a lone root) calls with the same arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.sampling import TargetSampler, check_peak
from llmcad_mlx.stats import GenerationStats
from llmcad_mlx.target.target import Target, Verification
from llmcad_mlx.tree.cost_model import CostModel
from llmcad_mlx.tree.policy import GrowthPolicy
from llmcad_mlx.tree.token_tree import Selection, TokenTree
from llmcad_mlx.tree.walk import Walk, walk


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did: the tree as drafted, the part that was verified, and the target's walk over it."""

    drafted: TokenTree
    selection: Selection
    verification: Verification
    walk: Walk


@dataclass(slots=True)
class SpeculativeEngine:
    """Runs rounds for one sequence of tokens.

    `tokens` is prompt and output; its last one is the next root and the only one not in the target's cache.
    Drafters are asked in order, cheapest first. `clock` gives seconds; only costs are learned from it, never a
    token.
    """

    target: Target
    drafters: Sequence[Drafter]
    policy: GrowthPolicy
    costs: CostModel
    clock: Callable[[], float] = time.perf_counter
    tokens: list[int] = field(default_factory=list)

    def round(
        self, sampler: TargetSampler, stats: GenerationStats, stop: Callable[[int], bool] | None = None
    ) -> Round:
        """Grow, verify, commit; appends the emitted tokens to `tokens`. `stop(token)` ends the walk."""
        started = self.clock()
        tree = self._grow(sampler, stats)
        selection = self._submit(tree)
        verification = self._verify(selection.tree, stats)
        steps = walk(selection.tree, self._chooser(verification, selection.tree, sampler), stop)
        self._commit(tree, selection, verification, steps)
        self._count(tree, selection, steps, stats)
        seconds = self.clock() - started
        self.policy.finished(len(steps.tokens), seconds)
        stats.decode_s += seconds
        return Round(tree, selection, verification, steps)

    def _grow(self, sampler: TargetSampler, stats: GenerationStats) -> TokenTree:
        tree = TokenTree(self.tokens[-1], len(self.tokens) - 1)
        self.policy.begin(tree)
        for drafter in self._active():
            drafter.begin(self.tokens, sampler)
            while leaves := self.policy.next_leaves(tree, drafter.source):
                started = self.clock()
                proposals = drafter.expand(tree, leaves)
                if drafter.rows_fed != 0:
                    seconds = self.clock() - started
                    stats.draft_s += seconds
                    if drafter.rows_fed is not None:
                        self.costs.draft.observe(drafter.rows_fed, seconds)
                for leaf, candidates in zip(leaves, proposals, strict=True):
                    self.policy.add(tree, leaf, candidates)
        return tree

    def _active(self) -> list[Drafter]:
        return [drafter for drafter in self.drafters if drafter.source in self.policy.sources]

    def _submit(self, tree: TokenTree) -> Selection:
        selection = self.policy.submit(tree)
        if self.target.capability == "plain":
            return tree.select(1)
        if self.target.capability == "chain":
            return tree.keep_path(_best_path(selection.tree, selection.new_to_old))
        return selection

    def _verify(self, tree: TokenTree, stats: GenerationStats) -> Verification:
        started = self.clock()
        verification = self.target.verify(tree)
        seconds = self.clock() - started
        self.costs.verify.observe(len(tree), seconds)
        stats.verify_s += seconds
        return verification

    def _chooser(
        self, verification: Verification, tree: TokenTree, sampler: TargetSampler
    ) -> Callable[[int, Sequence[int]], int]:
        def choose(node: int, path_tokens: Sequence[int]) -> int:
            if sampler.greedy:
                token, peak = verification.greedy_row(node)
                check_peak(peak)
                return token
            history = [*self.tokens, *path_tokens]
            return sampler.choose(verification.row(node), history, tree.position(node) + 1)

        return choose

    def _commit(self, tree: TokenTree, selection: Selection, verification: Verification, steps: Walk) -> None:
        self.policy.verified(selection.tree, steps)
        self.target.commit(verification, steps.nodes)
        path = [selection.new_to_old[node] for node in steps.nodes]
        for drafter in self._active():
            drafter.commit(tree, path)
        self.tokens.extend(steps.tokens)

    def _count(self, tree: TokenTree, selection: Selection, steps: Walk, stats: GenerationStats) -> None:
        stats.target_passes += 1
        stats.drafted += len(tree) - 1
        stats.tested += len(selection.tree) - 1
        stats.accepted += steps.num_accepted
        stats.path_tested += steps.path_tested
        stats.generated_tokens += len(steps.tokens)

    def start(
        self,
        prompt: Sequence[int],
        stats: GenerationStats,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make `prompt` the sequence, keeping what caches already hold of it, and feed the rest.

        on_progress(done, total) counts prompt tokens; should_stop ends the prefill early.
        """
        started = self.clock()
        common = _common_prefix(self.tokens, prompt)
        kept = min(common, len(prompt) - 1)
        self.target.truncate(kept)
        kept = self.target.num_cached
        for drafter in self.drafters:
            drafter.truncate(kept)
        self.tokens = list(prompt)
        stats.prompt_tokens, stats.reused_tokens = len(prompt), kept
        on_progress(kept, len(prompt))
        self.target.prefill(
            prompt[kept:-1], lambda done: on_progress(min(kept + done, len(prompt)), len(prompt)), should_stop
        )
        for drafter in self._active():
            drafter.prefill(prompt, lambda done: None, should_stop)
        on_progress(len(prompt), len(prompt))
        stats.prompt_s += self.clock() - started


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _best_path(tree: TokenTree, names: Sequence[int]) -> list[int]:
    """The branch with the largest summed cumulative confidence, root included, as `names` of its nodes."""
    total = list(tree.cumulative)
    for node in range(1, len(tree)):
        total[node] += total[tree.parents[node]]
    tip = max(range(len(tree)), key=total.__getitem__)
    return [names[node] for node in (0, *tree.path(tip))]
