"""From the name of a growth policy to the policy."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.drafting import Drafter
from llmcad_mlx.policy import GrowthPolicy
from llmcad_mlx.policy.best_first import DEFAULT_MAX_NODES, ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.fixed import ChainPolicy
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.settings import (
    DEFAULT_CHAIN_LENGTH,
    FIXED_PAPER_NODES,
    FIXED_THROUGHPUT_NODES,
    SpeculationSettings,
)
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, TABLE


def make_policy(
    settings: SpeculationSettings,
    drafters: Sequence[Drafter],
    costs: CostModel,
    calibration: Calibration,
    max_nodes: int = DEFAULT_MAX_NODES,
) -> GrowthPolicy:
    """The policy that `settings` name.

    "throughput" reads `costs`, learns into `calibration`, and sends the target at most `max_nodes` nodes where
    `settings` leave it the choice; "paper" and "chain" listen to one drafter: the model where there is one, else
    the table, else the last of `drafters`.
    """
    nodes, pipelined = settings.tree_nodes, settings.pipeline
    found = [drafter.source for drafter in drafters]
    if settings.policy == "throughput":
        if not settings.fallback:
            nodes = nodes or FIXED_THROUGHPUT_NODES
        return ThroughputPolicy(
            costs,
            calibration,
            nodes,
            max_nodes,
            branching=settings.tree,
            pipelined=pipelined,
            lookups=set(found) - {MODEL},
        )
    if settings.policy == "plain":
        return ChainPolicy(0, pipelined=pipelined)
    source = next((source for source in (MODEL, TABLE) if source in found), found[-1] if found else NGRAM)
    if settings.policy == "paper":
        return PaperPolicy(
            nodes or (DEFAULT_MAX_NODES if settings.fallback else FIXED_PAPER_NODES),
            source,
            branching=settings.tree,
            fallback=settings.fallback,
            pipelined=pipelined,
        )
    return ChainPolicy(DEFAULT_CHAIN_LENGTH if nodes is None else nodes - 1, source, pipelined)
