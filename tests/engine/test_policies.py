"""From speculation settings to a policy: every option acts or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.engine.policies import make_policy
from llmcad_mlx.errors import UsageError
from llmcad_mlx.policy import Candidates, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.fixed import ChainPolicy
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.settings import SpeculationSettings
from llmcad_mlx.tree.token_tree import NGRAM, TokenTree


def policy_of(max_nodes: int | None = None, **options: Any) -> GrowthPolicy:
    limit = {} if max_nodes is None else {"max_nodes": max_nodes}
    return make_policy(SpeculationSettings(**options), [NgramDrafter()], CostModel(), Calibration(), **limit)


def drafted(policy: GrowthPolicy, confidence: float = 0.6) -> TokenTree:
    """One round's tree when every leaf has two candidates of which the second is above the paper's threshold."""
    tree = TokenTree(0)
    policy.begin(tree)
    while leaves := policy.next_leaves(tree, NGRAM):
        for leaf in leaves:
            policy.add(tree, leaf, Candidates([1, 2], [confidence, 0.35], NGRAM))
    return policy.submit(tree).tree


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({"policy": "paper", "fallback": False}, 9),
        ({"policy": "paper", "fallback": False, "tree_nodes": 5}, 5),
        ({"fallback": False}, 16),
        ({"fallback": False, "tree_nodes": 6}, 6),
        ({"tree_nodes": 7}, 7),
        ({"policy": "chain"}, 5),
        ({"policy": "chain", "tree_nodes": 3}, 3),
        ({"policy": "plain"}, 1),
    ],
    ids=str,
)
def test_a_fixed_number_of_nodes_is_drafted(options: dict[str, Any], nodes: int) -> None:
    assert len(drafted(policy_of(**options))) == nodes
    assert len(drafted(policy_of(**options), confidence=0.0)) in (nodes, 1)  # 1: no candidate is worth a place


def test_the_papers_fallback_ends_drafting_where_confidence_does() -> None:
    policy = policy_of(policy="paper", tree_nodes=64)
    assert isinstance(policy, PaperPolicy)
    policy.alpha = 0.3
    assert len(drafted(policy)) < 12
    assert len(drafted(policy_of(policy="paper", tree_nodes=64, fallback=False))) == 64


@pytest.mark.parametrize(
    "options", [{"policy": "paper"}, {"policy": "paper", "fallback": False}, {"tree_nodes": 6}]
)
def test_without_trees_one_branch_is_submitted(options: dict[str, Any]) -> None:
    tree = drafted(policy_of(tree=False, **options))
    assert tree.parents == list(range(-1, len(tree) - 1))
    assert len(tree) > 4
    branchy = drafted(policy_of(**options))
    assert branchy.parents != list(range(-1, len(branchy) - 1))


def test_the_pipeline_and_the_largest_pass_reach_the_policy() -> None:
    for name in ("throughput", "paper", "chain", "plain"):
        assert policy_of(policy=name).pipelined
        assert not policy_of(policy=name, pipeline=False).pipelined
    policies = policy_of(), policy_of(256), policy_of(256, tree_nodes=32)
    assert [p.max_nodes for p in policies if isinstance(p, ThroughputPolicy)] == [64, 256, 32]
    assert isinstance(policy_of(policy="chain"), ChainPolicy)


@pytest.mark.parametrize("name", ["pipeline", "tree", "fallback"])
@pytest.mark.parametrize("value", [0, 1, "off", None])
def test_switches_are_true_or_false(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name}: {value!r} is neither"):
        SpeculationSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["chain", "plain"])
@pytest.mark.parametrize("name", ["tree", "fallback"])
def test_what_a_policy_does_not_have_cannot_be_switched_off(policy: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: the {policy} policy"):
        SpeculationSettings(policy, **{name: False})  # type: ignore[arg-type]
