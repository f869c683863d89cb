"""From the name of a growth policy to the policy."""

from __future__ import annotations

from collections.abc import Sequence

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.profile import PairProfile
from llmcad_mlx.settings import DEFAULT_CHAIN_LENGTH, SpeculationSettings
from llmcad_mlx.tree.fixed import ChainPolicy
from llmcad_mlx.tree.paper import PaperPolicy
from llmcad_mlx.tree.policy import GrowthPolicy
from llmcad_mlx.tree.throughput import DEFAULT_MAX_NODES, ThroughputPolicy
from llmcad_mlx.tree.token_tree import MODEL, NGRAM


def make_policy(settings: SpeculationSettings, drafters: Sequence[Drafter], profile: PairProfile) -> GrowthPolicy:
    """The policy that `settings` name.

    "throughput" learns into `profile`; "paper" and "chain" listen to one drafter, the model where there is one.
    """
    nodes = settings.tree_nodes
    if settings.policy == "throughput":
        return ThroughputPolicy(profile.costs, profile.calibration, nodes, max_nodes=DEFAULT_MAX_NODES)
    if settings.policy == "plain":
        return ChainPolicy(0)
    source = MODEL if any(drafter.source == MODEL for drafter in drafters) else NGRAM
    if settings.policy == "paper":
        return PaperPolicy(DEFAULT_MAX_NODES if nodes is None else nodes, source)
    return ChainPolicy(DEFAULT_CHAIN_LENGTH if nodes is None else nodes - 1, source)
