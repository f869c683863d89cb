"""One speculative round: grow, verify, commit.

    growth.draft()                     drafters propose, the policy decides what is worth it
    verification = target.verify(…)    one pass of the target over the nodes the policy submits; while it waits
                                       for weights, the drafters go on (`growth`)
    walk(…)                            the target chooses every token; the tree says how far it reaches
    commit(…)                          the accepted path joins the sequence in all caches; what was drafted
                                       below its last token starts the next round

The text depends on the target, the sampling settings and the seed alone: every emitted token is chosen by
`TargetSampler.choose`, and plain decoding is a round whose tree is a lone root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmcad_mlx.engine.growth import CarriedTree, Growth
from llmcad_mlx.engine.session import Session
from llmcad_mlx.policy import GrowthPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.tree.token_tree import ROOT, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk, walk
from llmcad_mlx.verifying import Verification

ACCEPTED, REJECTED, PROVISIONAL = "accepted", "rejected", "provisional"


@dataclass(frozen=True, slots=True)
class RoundTree:
    """What became of a round's tree: as drafted, the part that was verified, the target's walk over that part.

    Holds no logits, so that it may be kept. `drafted` may have grown after the selection, while the target worked.
    """

    drafted: TokenTree
    selection: Selection
    walk: Walk

    def states(self) -> list[str]:
        """For each drafted node: root, accepted, rejected (tested in vain) or provisional (not tested)."""
        states = [PROVISIONAL] * len(self.drafted)
        for node in self.selection.new_to_old:
            states[node] = REJECTED
        for node in self.walk.nodes:
            states[self.selection.new_to_old[node]] = ACCEPTED
        states[ROOT] = "root"
        return states

    @property
    def bonus_token(self) -> int | None:
        """The target's own token after the accepted path; None where the text ended before it."""
        return self.walk.tokens[-1] if len(self.walk.tokens) > self.walk.num_accepted else None

    @property
    def last(self) -> int:
        """The drafted node that the bonus token follows."""
        return self.selection.new_to_old[self.walk.last]


@dataclass(frozen=True, slots=True)
class Round(RoundTree):
    """What one round did. `survivors`: the part of `drafted` that the next round starts with."""

    verification: Verification
    survivors: Selection | None


def run_round(
    session: Session,
    policy: GrowthPolicy,
    sampler: TargetSampler,
    stats: GenerationStats,
    stop: Callable[[int], bool] | None = None,
) -> Round:
    """Grow, verify, commit: the emitted tokens join the session's. `stop(token)` ends the walk.

    Books the round's steps, its pass and its outcome in the session's costs, whatever the policy, and in `stats`.
    """
    session.begin_round(policy)
    started = session.clock()
    growth = _begin(session, policy, sampler, stats)
    growth.draft(session.target.free_seconds)
    selection = _submit(session, policy, growth.tree)
    verification = _verify(session, policy, selection.tree, growth, stats)

    def choose(node: int, path: Sequence[int]) -> int:
        position = selection.tree.position(node) + 1
        return sampler.choose(verification.row(node), session.tokens, position, path)

    steps = walk(selection.tree, choose, stop)
    policy.verified(selection.tree, steps)
    session.target.commit(verification, steps.nodes)
    survivors = growth.commit([selection.new_to_old[node] for node in steps.nodes], steps)
    carried = None if survivors is None else CarriedTree(survivors, policy, sampler.settings)
    session.end_round(steps.tokens, carried)
    done = Round(growth.tree, selection, steps, verification, survivors)
    _count(done, growth, sampler, stats)
    stats.streamed_bytes += session.target.streamed_bytes - session.streamed_bytes
    session.streamed_bytes = session.target.streamed_bytes
    seconds = session.clock() - started
    stats.decode_s += seconds
    session.costs.observe_round(len(steps.tokens), seconds)
    policy.finished(len(steps.tokens), seconds)
    return done


def _begin(session: Session, policy: GrowthPolicy, sampler: TargetSampler, stats: GenerationStats) -> Growth:
    carried, session.carried = session.carried, None
    # Its ranks and figures hold for the policy and the sampling that it was drafted for.
    serves = carried is not None and carried.policy is policy and carried.sampling == sampler.settings
    survivors = carried.survivors if carried is not None and serves else None
    tree = survivors.tree if survivors else TokenTree(session.tokens[-1], len(session.tokens) - 1)
    policy.begin(tree, survivors)
    drafters = session.drafters_of(policy)
    growth = Growth(tree, drafters, session.tokens, sampler, policy, session.costs, stats, session.clock)
    if survivors is not None:
        for drafter in drafters:  # whoever drafted the nodes knows more of them than the tree does
            growth.begin(drafter)
    return growth


def _submit(session: Session, policy: GrowthPolicy, tree: TokenTree) -> Selection:
    """What the policy wants verified, cut to what the target can verify."""
    selection = policy.submit(tree)
    if session.target.cache.capability == "plain":
        return tree.select(1)
    if session.target.cache.capability == "chain":
        return tree.keep([selection.new_to_old[node] for node in selection.tree.best_branch()])
    return selection


def _verify(
    session: Session, policy: GrowthPolicy, tree: TokenTree, growth: Growth, stats: GenerationStats
) -> Verification:
    target, clock = session.target, session.clock
    waited, started = target.io_wait_s, clock()
    verification = target.verify(tree, growth.provisional_step if policy.pipelined else None)
    seconds = clock() - started
    waited = target.io_wait_s - waited
    busy = seconds - growth.background_s - waited
    # Drafting in the background takes the place of waiting, so it is not taken off what a pass takes.
    session.costs.observe_pass(len(tree), seconds, busy)
    stats.verify_s += busy
    stats.io_wait_s += waited
    return verification


def _count(done: Round, growth: Growth, sampler: TargetSampler, stats: GenerationStats) -> None:
    stats.target_passes += 1
    stats.tested += len(done.selection.tree) - 1
    stats.accepted += done.walk.num_accepted
    stats.path_tested += done.walk.path_tested
    stats.generated_tokens += len(done.walk.tokens)
    stats.near_ties = sampler.near_ties
    stats.provisional_passes += growth.num_provisional > 0
    stats.survived += done.survivors is not None and len(done.survivors.tree) > 1
