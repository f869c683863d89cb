"""What was learned about a pair survives a run; a bad file never stops one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.policy.costs import CostModel, RoundTotals
from llmcad_mlx.store.profile import PairProfile, profile_path
from llmcad_mlx.tree.token_tree import MODEL, NGRAM


def learned(path: Path | None) -> PairProfile:
    """A profile that has seen something."""
    profile = PairProfile(path)
    profile.costs.draft.observe(1, 0.01)
    profile.costs.verify.observe(1, 0.1)
    profile.costs.verify.observe(16, 0.3)
    for _ in range(30):
        profile.calibration.observe(0.9, MODEL, False)
        profile.calibration.observe(0.4, NGRAM, True)
    return profile


GOOD_COSTS = {**CostModel().to_dict(), "draft": {"1": 0.5}}


def figures(profile: PairProfile) -> list[float]:
    costs, calibration = profile.costs, profile.calibration
    times = [costs.draft.predict(1), costs.verify.predict(1), costs.verify.predict(16)]
    return [*times, *calibration.probabilities([0.9], MODEL), *calibration.probabilities([0.4], NGRAM)]


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    profile = learned(path)
    profile.save()
    assert figures(PairProfile(path)) == figures(profile) != figures(PairProfile(None))
    assert [file.name for file in path.parent.iterdir()] == ["yet.json"]


def test_a_second_run_adds_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "pair.json"
    learned(path).save()
    again = PairProfile(path)
    again.costs.draft.observe(8, 0.02)
    again.save()
    assert PairProfile(path).costs.draft.predict(8) == 0.02
    assert PairProfile(path).costs.draft.predict(1) == 0.01


def test_without_a_path_nothing_is_kept() -> None:
    profile = learned(None)
    profile.save()
    assert not PairProfile(None).costs.verify


def changed(path: Path, **entries: Any) -> str:
    learned(path).save()
    return json.dumps({**json.loads(path.read_text()), **entries})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"version": 2}',
        b'{"version": 999}',
        b'{"version": 2, "costs": 3, "calibration": []}',
    ],
    ids=repr,
)
def test_a_damaged_file_means_starting_afresh(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pair.json"
    path.write_bytes(content)
    assert figures(PairProfile(path)) == figures(PairProfile(None))


@pytest.mark.parametrize(
    "entries",
    [
        {"version": 0},
        {"costs": None},
        {"costs": {**GOOD_COSTS, "verify": {"1": "slow"}}},
        {"costs": {**GOOD_COSTS, "verify": {"1": 10**400}}},
        {"costs": {**GOOD_COSTS, "verify": {"1": -1.0}}},
        {"calibration": None},
        {"calibration": {"version": 1}},
        {"calibration": {"version": 1, "edges": [0.5], "sources": {}}},
    ],
    ids=lambda entries: repr(entries)[:50],
)
def test_a_file_that_is_half_good_is_not_used_at_all(tmp_path: Path, entries: dict[str, Any]) -> None:
    path = tmp_path / "pair.json"
    path.write_text(changed(path, **entries))
    assert figures(PairProfile(path)) == figures(PairProfile(None))
    learned(path).save()  # and is replaced by a good one
    assert figures(PairProfile(path)) == figures(learned(None))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    learned(blocked / "pair.json").save()
    taken = tmp_path / "taken.json"
    (taken / "inside").mkdir(parents=True)
    learned(taken).save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.json"]  # nothing half-written


def test_every_pair_and_device_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_MLX_HOME", str(tmp_path))
    target, draft = tmp_path / "target", tmp_path / "draft"
    paths = {
        profile_path(models, device)
        for models in ([target, draft], [draft, target], [target, "ngram"], [target])
        for device in ("cpu", "Apple M3 (gpu)")
    }
    assert len(paths) == 8
    assert all(path.parent == tmp_path / "profiles" for path in paths)
    assert profile_path([target, draft], "cpu") in paths


def test_rounds_are_kept_with_the_profile(tmp_path: Path) -> None:
    profile = PairProfile(tmp_path / "pair.json")
    for _ in range(50):
        profile.costs.draft.observe(1, 0.01)
        profile.costs.observe_pass(8, 0.5, 0.2)
        profile.costs.observe_round(3, 0.6)
    assert profile.costs.totals.tokens / profile.costs.totals.rounds == pytest.approx(3)
    assert profile.costs.totals.rows / profile.costs.totals.rounds == pytest.approx(8)
    assert profile.costs.totals.rest_s / profile.costs.totals.rounds == pytest.approx(0.1)
    assert profile.costs.computing.predict(8) == pytest.approx(0.2)
    assert profile.costs.verify.predict(8) == pytest.approx(0.5)
    profile.save()
    again = PairProfile(tmp_path / "pair.json")
    assert again.costs.totals == profile.costs.totals
    assert again.costs.computing.predict(8) == pytest.approx(0.2)
    assert again.costs.draft.predict(1) == 0.01
    again.costs.observe_pass(4, 0.3, 0.1)
    again.costs.observe_round(1, 0.3)
    again.save()
    assert PairProfile(tmp_path / "pair.json").costs.totals.tokens < again.costs.totals.rounds * 3


def test_recent_rounds_count_most() -> None:
    costs = CostModel()
    for tokens in [1] * 500 + [5] * 500:
        costs.observe_round(tokens, 0.0)
    assert costs.totals.tokens / costs.totals.rounds == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize(
    "damage",
    [
        lambda costs: costs.pop("rounds"),
        lambda costs: costs.pop("computing"),
        lambda costs: costs.update(rounds=[1]),
        lambda costs: costs["rounds"].update(tokens=-1.0),
        lambda costs: costs["rounds"].update(tokens="many"),
        lambda costs: costs["rounds"].update(more=1.0),
        lambda costs: costs.update(computing={"8": -1.0}),
    ],
)
def test_a_profile_without_good_rounds_is_one_without_rounds(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "pair.json"
    profile = PairProfile(file)
    profile.costs.observe_pass(8, 0.5, 0.2)
    profile.costs.observe_round(3, 0.6)
    profile.save()
    content = json.loads(file.read_text())
    damage(content["costs"])
    file.write_text(json.dumps(content))
    again = PairProfile(file)
    assert again.costs.totals == RoundTotals()
    assert not again.costs.computing
