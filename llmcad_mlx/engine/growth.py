"""The speculative pipeline (DESIGN 3.6): who grows a round's tree, by which policy, and when.

Before the target's pass the tree is drafted until the policy falls back. During the pass, whenever the target
waits for weights, the same tree goes on growing provisionally: also below nodes the target was not given, for
the bonus token may be one of them. Afterwards the subtree below that token starts the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.policy import ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import DEFAULT_MAX_NODES, ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import (
    DEFAULT_CHAIN_LENGTH,
    FIXED_PAPER_NODES,
    FIXED_THROUGHPUT_NODES,
    SamplingSettings,
    SpeculationSettings,
)
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, ROOT, TABLE, Selection, TokenTree
from llmcad_mlx.tree.walk import Walk

_WIDEST = 16  # leaves of a model's step in the background
_LOOKUPS = 64  # leaves of a lookup's, which takes no time to speak of
_PREFILL_STEP = 64  # prompt tokens a drafter reads at a time while the target waits


@dataclass(slots=True)
class Growth:
    """One round's tree below `tokens` and who grows it. Steps are timed, and charged to `costs` and `stats`.

    Drafters take part from when first asked: most rounds of text hard to guess need none but the cheapest.

    `num_provisional`: steps taken by `provisional_step`, `background_s`: seconds spent in them.
    """

    tree: TokenTree
    drafters: Sequence[Drafter]
    tokens: Sequence[int]
    sampler: TargetSampler
    policy: GrowthPolicy
    costs: CostModel
    stats: GenerationStats
    clock: Callable[[], float]
    num_provisional: int = 0
    background_s: float = 0.0
    _begun: list[Drafter] = field(default_factory=list)

    def begin(self, drafter: Drafter) -> None:
        drafter.begin(self.tokens, self.sampler, self.tree)
        self._begun.append(drafter)

    def draft(self, free_seconds: Callable[[], float] = lambda: 0.0) -> None:
        """Ask the drafters in order, cheapest first, while the policy wants more of each.

        free_seconds: how long that delays nothing.
        """
        for drafter in self.drafters:
            while leaves := self.policy.next_leaves(self.tree, drafter.source, free_seconds()):
                size = len(self.tree)
                self._expand(drafter, leaves)
                if len(self.tree) == size:
                    break  # it has no idea about the likeliest nodes, and next come those that are less likely

    def provisional_step(self, seconds: float) -> bool:
        """One step of drafting beyond what was submitted; False when no node is worth one within `seconds`."""
        started = self.clock()
        for drafter in self.drafters:
            width = _LOOKUPS
            if drafter.source == MODEL:  # as wide as ends in time; one leaf before a step was measured
                draft = self.costs.draft
                fitting = (width for width in range(_WIDEST, 0, -1) if draft.predict(width) <= seconds)
                width = next(fitting, 0) if draft else 1
            if leaves := self.policy.provisional_leaves(self.tree, drafter.source, width):
                size = len(self.tree)
                self.stats.hidden_draft_s += self._expand(drafter, leaves)
                self.stats.provisional += len(self.tree) - size
                self.num_provisional += 1
                self.background_s += self.clock() - started
                return True
        return False

    def _expand(self, drafter: Drafter, leaves: Sequence[int]) -> float:
        """One draft step; returns its seconds, 0.0 for one without a forward."""
        seconds, size = 0.0, len(self.tree)
        started = self.clock()
        if drafter not in self._begun:
            self.begin(drafter)
        proposals = drafter.expand(self.tree, leaves)
        if drafter.rows_fed != 0:
            seconds = self.clock() - started
            self.stats.draft_s += seconds
            if drafter.rows_fed is not None:
                self.costs.draft.observe(drafter.rows_fed, seconds)
        for leaf, candidates in zip(leaves, proposals, strict=True):
            self.policy.add(self.tree, leaf, candidates)
        self.stats.drafted += len(self.tree) - size
        return seconds

    def commit(self, path: Sequence[int], steps: Walk) -> Selection | None:
        """Tell those who took part what was accepted and what goes on, see `Drafter.commit`.

        Returns what is drafted below the bonus token, its node the new root; None when it was not drafted.
        `path`: the accepted nodes of `tree`, top down.
        """
        survivors = None
        if self.policy.pipelined and not steps.stopped:
            node = self.tree.child(path[-1] if path else ROOT, steps.tokens[-1])
            survivors = None if node is None else self.tree.reroot(node)
        for drafter in self._begun:
            drafter.commit(self.tree, path, survivors)
        return survivors


@dataclass(frozen=True, slots=True)
class CarriedTree:
    """What survived a round, and what it was drafted for."""

    survivors: Selection
    policy: GrowthPolicy
    sampling: SamplingSettings


def make_policy(
    settings: SpeculationSettings,
    drafters: Sequence[Drafter],
    costs: CostModel,
    calibration: Calibration,
    max_nodes: int,
) -> GrowthPolicy:
    """The policy that `settings` name.

    "throughput" reads `costs`, learns into `calibration`, and sends the target at most `max_nodes` nodes where
    `settings` leave it the choice; "paper" and "chain" listen to one drafter: the model where there is one, else
    the table, else the last of `drafters`.
    """
    nodes, branching, pipelined = settings.tree_nodes, settings.tree, settings.pipeline
    if settings.policy == "throughput":
        if not settings.fallback:
            nodes = nodes or FIXED_THROUGHPUT_NODES
        return ThroughputPolicy(costs, calibration, nodes, max_nodes, branching=branching, pipelined=pipelined)
    found = [drafter.source for drafter in drafters] or [NGRAM]
    source = next((source for source in (MODEL, TABLE) if source in found), found[-1])
    if settings.policy == "paper":
        nodes = nodes or (DEFAULT_MAX_NODES if settings.fallback else FIXED_PAPER_NODES)
        return PaperPolicy(nodes, source, branching=branching, fallback=settings.fallback, pipelined=pipelined)
    length = DEFAULT_CHAIN_LENGTH if nodes is None else nodes - 1
    return ChainPolicy(0 if settings.policy == "plain" else length, source, pipelined)


def prefill_steps(drafters: Sequence[Drafter], prompt: Sequence[int]) -> Callable[[float], bool]:
    """A background that lets the drafters read `prompt`, one after the other, a piece with each call."""
    waiting = list(drafters)

    def step(seconds: float) -> bool:  # what is not read now is read afterwards, and takes as long
        if waiting and not waiting[0].prefill(prompt, limit=_PREFILL_STEP):
            del waiting[0]
        return bool(waiting)

    return step
