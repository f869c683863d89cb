"""One speculative round: grow, verify, commit.

    growth.draft()                     drafters propose, the policy decides what is worth it
    verification = target.verify(…)    one pass of the target over the nodes the policy submits; while it waits
                                       for weights, the drafters go on (`pipeline`)
    walk(…)                            the target chooses every token; the tree says how far it reaches
    commit(…)                          the accepted path joins the sequence in all caches; what was drafted
                                       below its last token starts the next round

The text depends on the target, the sampling settings and the seed alone: every emitted token is chosen by
`choose`, which plain decoding (a tree that is a lone root) calls with the same arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.engine.growth import CarriedTree, Growth, prefill_steps
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.policy import GrowthPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler, check_peak
from llmcad_mlx.tree.token_tree import Selection, TokenTree
from llmcad_mlx.tree.walk import Walk, walk
from llmcad_mlx.verifying.target import Target, Verification


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did: the tree as drafted, the part that was verified, and the target's walk over it.

    `survivors`: the part of `drafted` that the next round starts with.
    """

    drafted: TokenTree
    selection: Selection
    verification: Verification
    walk: Walk
    survivors: Selection | None


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
    _carried: CarriedTree | None = field(default=None, init=False)
    _unfinished: bool = field(default=False, init=False)  # whether caches and tokens may disagree
    _bytes_before: int = field(default=0, init=False)  # what the target had streamed when the round began

    def round(
        self, sampler: TargetSampler, stats: GenerationStats, stop: Callable[[int], bool] | None = None
    ) -> Round:
        """Grow, verify, commit; appends the emitted tokens to `tokens`. `stop(token)` ends the walk."""
        self._settle()
        started = self.clock()
        growth = self._begin(sampler, stats)
        growth.draft(self.target.free_seconds)
        selection = self._submit(growth.tree)
        verification = self._verify(selection.tree, growth, stats)
        steps = walk(selection.tree, self._chooser(verification, selection.tree, sampler), stop)
        survivors = self._commit(growth, selection, verification, steps)
        if survivors is not None:
            self._carried = CarriedTree(survivors, self.policy, sampler.settings)
        self._unfinished = False
        done = Round(growth.tree, selection, verification, steps, survivors)
        self._count(done, growth, stats)
        seconds = self.clock() - started
        self.policy.finished(len(steps.tokens), seconds)
        stats.decode_s += seconds
        return done

    def _settle(self) -> None:
        """After a round or a prefill that was broken off: make the caches hold what `tokens` says."""
        if self._unfinished:
            self.start(list(self.tokens), GenerationStats())
        self._unfinished = True

    def _begin(self, sampler: TargetSampler, stats: GenerationStats) -> Growth:
        carried, self._carried = self._carried, None
        survivors = carried.survivors if carried and carried.serves(self.policy, sampler.settings) else None
        tree = survivors.tree if survivors else TokenTree(self.tokens[-1], len(self.tokens) - 1)
        self.policy.begin(tree, survivors)
        growth = Growth(tree, self._active(), self.tokens, sampler, self.policy, self.costs, stats, self.clock)
        if survivors is not None:
            growth.begin_all()
        return growth

    def _active(self) -> list[Drafter]:
        wanted = self.policy.sources
        return [drafter for drafter in self.drafters if drafter.source in wanted]

    def _submit(self, tree: TokenTree) -> Selection:
        selection = self.policy.submit(tree)
        if self.target.capability == "plain":
            return tree.select(1)
        if self.target.capability == "chain":
            return tree.keep_path([selection.new_to_old[node] for node in selection.tree.best_branch()])
        return selection

    def _verify(self, tree: TokenTree, growth: Growth, stats: GenerationStats) -> Verification:
        waited, started = self.target.io_wait_s, self.clock()
        verification = self.target.verify(tree, growth.provisional_step if self.policy.pipelined else None)
        seconds = self.clock() - started
        waited = self.target.io_wait_s - waited
        busy = seconds - growth.background_s - waited
        # Drafting in the background takes the place of waiting, so it is not taken off what a pass takes.
        self.costs.observe_pass(len(tree), seconds, busy)
        stats.verify_s += busy
        stats.io_wait_s += waited
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

    def _commit(
        self, growth: Growth, selection: Selection, verification: Verification, steps: Walk
    ) -> Selection | None:
        self.policy.verified(selection.tree, steps)
        self.target.commit(verification, steps.nodes)
        path = [selection.new_to_old[node] for node in steps.nodes]
        survivors = growth.survivors(path, steps)
        growth.commit(path, survivors)
        self.tokens.extend(steps.tokens)
        return survivors

    def _count(self, done: Round, growth: Growth, stats: GenerationStats) -> None:
        stats.target_passes += 1
        stats.tested += len(done.selection.tree) - 1
        stats.accepted += done.walk.num_accepted
        stats.path_tested += done.walk.path_tested
        stats.generated_tokens += len(done.walk.tokens)
        stats.provisional_passes += growth.num_provisional > 0
        stats.survived += done.survivors is not None and len(done.survivors.tree) > 1
        stats.streamed_bytes += self.target.streamed_bytes - self._bytes_before
        self._bytes_before = self.target.streamed_bytes

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
        self._carried, self._unfinished = None, True
        common = common_prefix(self.tokens, prompt)
        kept = min(common, len(prompt) - 1)
        self.target.truncate(kept)
        kept = self.target.num_cached
        for drafter in self.drafters:
            drafter.truncate(kept)
        self.tokens = list(prompt)
        stats.prompt_tokens, stats.reused_tokens = len(prompt), kept
        on_progress(kept, len(prompt))
        self.target.prefill(
            prompt[kept:-1],
            lambda done: on_progress(min(kept + done, len(prompt)), len(prompt)),
            should_stop,
            prefill_steps(self._active(), prompt) if self.policy.pipelined else None,
        )
        for drafter in self._active():
            # Told again with each chunk: whoever wants to end the prompt here raises.
            drafter.prefill(prompt, lambda done: on_progress(len(prompt), len(prompt)), should_stop)
        on_progress(len(prompt), len(prompt))
        self._unfinished = self.target.num_cached < len(prompt) - 1
        self._bytes_before = self.target.streamed_bytes
        stats.prompt_s += self.clock() - started


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
