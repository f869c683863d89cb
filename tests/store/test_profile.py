"""What was learned about a pair survives a run; a bad file never stops one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.store.profile import PairProfile, profile_path
from llmcad_mlx.tree.token_tree import MODEL, NGRAM


def learned(path: Path | None) -> PairProfile:
    profile = PairProfile(path)
    profile.costs.draft.observe(1, 0.01)
    for _ in range(30):
        profile.costs.observe_pass(1, 0.1, 0.1)
        profile.costs.observe_pass(16, 0.3, 0.2)
        profile.costs.observe_round(3, 0.6)
        profile.calibration.observe(0.9, MODEL, False)
        profile.calibration.observe(0.4, NGRAM, True)
    return profile


def figures(profile: PairProfile) -> list[Any]:
    costs, calibration = profile.costs, profile.calibration
    times = [steps.predict(rows) for steps in (costs.draft, costs.verify, costs.computing) for rows in (1, 16)]
    shares = [*calibration.probabilities([0.9], MODEL), *calibration.probabilities([0.4], NGRAM)]
    return [*times, *shares, costs.totals]


def test_what_was_saved_is_read_back_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    profile = learned(path)
    profile.save()
    again = PairProfile(path)
    assert figures(again) == figures(profile) != figures(PairProfile(None))
    assert [file.name for file in path.parent.iterdir()] == ["yet.json"]
    again.costs.draft.observe(8, 0.02)
    again.costs.observe_pass(4, 0.3, 0.1)
    again.costs.observe_round(1, 0.3)
    again.save()
    third = PairProfile(path).costs
    assert (third.draft.predict(1), third.draft.predict(8)) == (0.01, 0.02)
    assert third.totals.tokens < third.totals.rounds * 3


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        {"version": 0},
        {"version": 999},
        {"costs": 3},
        {"costs": {**CostModel().to_dict(), "draft": {"1": 0.5}, "verify": {"1": 10**400}}},
        {"costs": {**CostModel().to_dict(), "draft": {"1": 0.5}, "rounds": [1]}},
        {"calibration": None},
        {"calibration": {"version": 1, "edges": [0.5], "sources": {}}},
    ],
    ids=lambda damage: repr(damage)[:50],
)
def test_a_damaged_file_is_not_used_at_all(tmp_path: Path, damage: bytes | dict[str, Any]) -> None:
    path = tmp_path / "pair.json"
    learned(path).save()
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(path.read_text()), **damage}).encode()
    path.write_bytes(damage)
    assert figures(PairProfile(path)) == figures(PairProfile(None))
    learned(path).save()  # and is replaced by a good one
    assert figures(PairProfile(path)) == figures(learned(None))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    learned(blocked / "pair.json").save()
    taken = tmp_path / "taken.json"
    (taken / "inside").mkdir(parents=True)
    for path in (taken, None):
        learned(path).save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.json"]  # nothing half-written


def test_every_pair_and_device_has_its_own_file(own_home: Path) -> None:
    target, draft = own_home / "target", own_home / "draft"
    paths = {
        profile_path(models, device)
        for models in ([target, draft], [draft, target], [target, "ngram"], [target])
        for device in ("cpu", "Apple M3 (gpu)")
    }
    assert len(paths) == 8
    assert {path.parent for path in paths} == {own_home / "profiles"}
    assert profile_path([target, draft], "cpu") in paths
