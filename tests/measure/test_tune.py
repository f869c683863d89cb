"""`llmcad-mlx tune`: what is measured, predicted, chosen and remembered. Tiny models; where times decide, the
clock is a simulated one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.errors import GenerationError, ModelError, UsageError
from llmcad_mlx.loader import LoadedPair, conditions, load_names
from llmcad_mlx.measure.candidates import DraftOptions, Lineup, find_candidates, short_name
from llmcad_mlx.measure.runner import EngineContender, Generation, Run, total_stats
from llmcad_mlx.measure.tune import (
    CandidateFigures,
    Prediction,
    TunePlan,
    Tuning,
    decide,
    median_runs,
    split,
    tune_report,
)
from llmcad_mlx.measure.workload import BenchPrompt, load_prompts
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.names import NO_DRAFT, PairPaths, device_name, find_pair, pair_profile_path
from llmcad_mlx.store.profile import Conditions, PairProfile, find_choice
from llmcad_mlx.tree.token_tree import MODEL
from llmcad_mlx.verifying import Target
from tests.measure import runs
from tests.support.simulated_stream import SimulatedClock
from tests.support.tiny_folder import copy_folder, make_folder

pytestmark = pytest.mark.usefixtures("own_home")

NEAR, WILD = "near", "wild"
HERE = Conditions(device_name())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft that is often right, and one that never is."""
    folder = tmp_path_factory.mktemp("models")
    make_folder(folder / "target", seed=3)
    make_folder(folder / NEAR, seed=3, noise=0.02)
    make_folder(folder / WILD, seed=8)
    return folder


@pytest.fixture
def target(models: Path, tmp_path: Path) -> Path:
    """One of its own for each test: choices are kept by folder."""
    return copy_folder(models / "target", tmp_path / "target")


def plan_of(
    prompts: Path | None, drafts: str | None = None, bits: str = "none", trim: str = "none", **changes: Any
) -> TunePlan:
    work = {"per_domain": None, "max_tokens": 40, "repeat": 2, "warmup": 1, "temperature": 0.0, "seed": 0}
    return TunePlan.of(DraftOptions.of(drafts, bits, trim), MemoryOptions(), prompts, **(work | changes))


# -- prompts, options ------------------------------------------------------------------------------------


def test_the_packaged_prompts_cover_four_domains_and_are_not_those_drafts_are_judged_on() -> None:
    plan = plan_of(None, "ngram, self:4,ngram", "8,2", "4096, 8192,4096")
    assert plan.drafts == DraftOptions(("ngram", "self:4"), (8, 2), (4096, 8192))  # each entry once
    assert len(plan.calibrating) == len(plan.measured) == 8
    assert {domain for domain, _ in plan.measured} == {"chat", "code", "summarising", "translation"}
    judged = load_prompts(Path(__file__).parents[2] / "examples" / "four_domains.toml")
    assert not {prompt.text for prompt in judged} & {prompt.text for prompt in plan.workload.prompts}


def test_half_of_each_domain_predicts_the_other() -> None:
    halves = split([BenchPrompt(d, n, "x") for d, names in (("a", "123"), ("b", "12")) for n in names])
    assert halves == [{("a", "1"), ("a", "3"), ("b", "1")}, {("a", "2"), ("b", "2")}]
    with pytest.raises(UsageError, match="prompts: a has one prompt"):
        split([BenchPrompt("a", "1", "x")])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 1), ("per_domain", 1), ("drafts", " ,"), ("drafts", "ngram,self:9"), ("drafts", "5bit:x"),
        ("drafts", "trimmed:9:5bit:x"), ("bits", "5"), ("bits", ""), ("trim", "few"), ("trim", "0"), ("trim", ""),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(prompts: Path, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{option.rstrip('s')}"):
        plan_of(prompts, **{option: value})


# -- arithmetic ------------------------------------------------------------------------------------------


def made_up(name: str, prompt: str = "1", repetition: int = 0, decode_s: float = 1.0, **counts: Any) -> Run:
    known = {"generated_tokens": 20, "target_passes": 10, "tested": 30, "verify_s": 0.0}
    return runs.made_up(name, repetition, decode_s, prompt=prompt, tokens=(1,) * 20, **(known | counts))


def predict(done: list[Run], streamed: int = 0, bandwidth: float | None = None) -> Prediction:
    found = Prediction.of(done, CostModel(), streamed, bandwidth)
    assert found is not None
    return found


def test_a_resident_prediction_is_tokens_per_pass_over_computing_and_the_rest() -> None:
    """A = 30 / 10 = 3; C = 0.2 s; D = (3.5 - 2) / 10 = 0.15 s."""
    found = predict([
        made_up("x", "1", generated_tokens=10, target_passes=5, verify_s=1.0, decode_s=1.5),
        made_up("x", "2", generated_tokens=20, target_passes=5, verify_s=1.0, decode_s=2.0),
    ])  # fmt: skip
    assert found.measured.tokens_per_pass == 3.0
    assert found.measured.nodes == 1 + 60 / 10
    assert (found.measured.pass_s, found.measured.rest_s) == (pytest.approx(0.2), pytest.approx(0.15))
    assert found.read_rate is None
    assert found.tokens_per_s == pytest.approx(3.0 / 0.35)
    assert Prediction.of([made_up("x", target_passes=0)], CostModel(), 0, None) is None


@pytest.mark.parametrize(("bandwidth", "pass_s"), [(100.0, 1.0), (10_000.0, 0.1), (None, 0.4)])
def test_a_streamed_pass_takes_what_is_longer_reading_or_computing(bandwidth: float | None, pass_s: float) -> None:
    """W = 100 bytes; C = 0.1 s; passes took 0.4 s with waiting and drafting meanwhile; D = 0.05 s."""
    run = made_up("x", verify_s=1.0, io_wait_s=2.0, hidden_draft_s=1.0, decode_s=4.5)
    found = predict([run], 100, bandwidth)
    assert found.tokens_per_s == pytest.approx(2.0 / (pass_s + 0.05))
    assert found.read_rate is not None
    assert found.read_rate.emulated is (bandwidth is not None)


def test_a_disturbed_repetition_does_not_count() -> None:
    done = [made_up("x", "1", i, seconds) for i, seconds in enumerate((1.0, 9.0, 1.2))]
    done += [made_up("x", "2", i, seconds) for i, seconds in enumerate((7.0, 2.0, 1.0))]
    middle = median_runs(done)
    assert [run.generation.decode_s for run in middle] == [1.2, 2.0]
    assert total_stats(middle).tokens_per_s == pytest.approx(40 / 3.2)


def line(name: str, speed: float | None, size: int = 0) -> CandidateFigures:
    return CandidateFigures(name, size, None, 0, None, 2.0, None, None, speed, None, 0.1, {}, 3, 0, 60)


def race(
    seconds: dict[str, list[float]], sizes: dict[str, int] | None = None, incumbent: str | None = None
) -> Any:
    """Decide between candidates whose repetitions took so many seconds."""
    done = {name: [made_up(name, "2", i, s) for i, s in enumerate(times)] for name, times in seconds.items()}
    lines = [
        line(name, total_stats(median_runs(own)).tokens_per_s, (sizes or {}).get(name, 0))
        for name, own in done.items()
    ]
    return decide(lines, [run for own in done.values() for run in own], incumbent)


def test_the_fastest_wins_and_of_those_as_fast_within_the_noise_the_smallest() -> None:
    found = race({"small": [1.0], "large": [0.5]}, {"small": 1, "large": 100})
    assert (found.winner, found.tied) == ("large", ("large",))
    assert {entry.name: entry.ratio for entry in found.standings} == {"large": 1.0, "small": 0.5}
    found = race({"large": [1.0], "small": [1.02], "slow": [1.1]}, {"large": 100, "small": 1, "slow": 0})
    assert (found.winner, found.fastest, found.tied) == ("small", "large", ("large", "small"))
    assert race({"b": [1.02], "a": [1.0]}).winner == "a"  # of the same size the faster


def test_noise_is_the_spread_between_repetitions_but_not_what_slows_all_of_one() -> None:
    """A repetition in which everything took three times as long says nothing about a candidate."""
    drifting = race({"a": [1.0, 3.0, 2.0], "b": [1.1, 3.3, 2.2]}, {"a": 9, "b": 1})
    assert drifting.winner == "a"
    assert drifting.standings[1].noise == 0.03
    unsteady = race({"a": [1.0, 1.0, 1.0], "b": [0.9, 1.1, 1.3]}, {"a": 9, "b": 1})
    assert unsteady.standings[1].noise == pytest.approx((1 / 0.9 - 1 / 1.3) / 2)
    assert unsteady.winner == "b"


def test_what_was_chosen_before_stays_within_twice_the_noise() -> None:
    times = {"old": [1.05], "new": [1.0]}
    assert race(times).winner == "new"
    assert race(times, {"old": 100}, incumbent="old").winner == "old"
    assert race({"old": [1.08], "new": [1.0]}, incumbent="old").winner == "new"
    assert race(times, incumbent="gone").winner == "new"
    assert decide([line("a", None)], [], "a") is None


# -- measuring on a simulated clock ----------------------------------------------------------------------


class TimedTarget(Target):
    """A pass takes 100 ms and 2 ms for each further node."""

    clock: SimulatedClock

    def verify(self, tree: Any, background: Any = None) -> Any:
        self.clock.now += 0.1 + 0.002 * (len(tree) - 1)
        return super().verify(tree)


class TimedDrafter(ModelDrafter):
    """A step takes `step_s`."""

    clock: SimulatedClock
    step_s: float

    def expand(self, tree: Any, leaves: Any) -> Any:
        self.clock.now += self.step_s
        return super().expand(tree, leaves)


class Stage:
    """Opens candidates whose times are simulated: "near2" is another one like "near", at a step time of its own.

    `change`: called with each candidate's name and pair.
    """

    def __init__(self, models: Path, target: Path, prompts: Path, **step_s: float) -> None:
        self.target, self.prompts, self.step_s = target, prompts, step_s
        self.clock = SimulatedClock()
        self.opened: list[str] = []
        self.change: Callable[[str, Any], None] = lambda name, pair: None
        paths = {name: models / name.rstrip("2") for name in step_s} | {"ngram": None, NO_DRAFT: None}
        self.candidates = tuple(PairPaths(target, name, path) for name, path in paths.items())

    def tuning(self, incumbent: str | None = None, together: bool = True, **changes: Any) -> Tuning:
        lineup = Lineup("tiny", self.target, self.candidates, incumbent=incumbent)
        return Tuning(plan_of(self.prompts, **changes), lineup, together, self.open)

    def tuned(self, **changes: Any) -> Tuning:
        """All but saved."""
        tuning = self.tuning(**changes)
        tuning.measure()
        tuning.decide()
        return tuning

    def open(self, candidate: PairPaths) -> LoadedPair:
        self.opened.append(candidate.draft_name)
        pair = load_names(candidate, MemoryOptions())
        pair.clock = self.clock
        pair.target = TimedTarget(pair.target.model, pair.vocab_size)
        pair.target.clock = self.clock
        for index, drafter in enumerate(pair.drafters):
            if isinstance(drafter, ModelDrafter):
                timed = TimedDrafter(drafter.model)
                timed.clock, timed.step_s = self.clock, self.step_s[candidate.draft_name]
                pair.drafters[index] = timed
        self.change(candidate.draft_name, pair)
        return pair


@pytest.fixture
def staged(models: Path, target: Path, prompts: Path) -> Callable[..., Stage]:
    return partial(Stage, models, target, prompts)


def test_the_draft_with_the_highest_measured_speed_wins(staged: Any) -> None:
    stage = staged(near=0.01, near2=0.09, wild=0.01)
    report = stage.tuned()
    assert report.decision is not None
    assert report.decision.winner == NEAR
    found = {entry.draft: entry for entry in report.lines}
    assert set(found) == {NEAR, "near2", WILD, "ngram", NO_DRAFT}
    assert found[NO_DRAFT].tokens_per_s == pytest.approx(10.0)  # 100 ms a pass
    assert found[NEAR].tokens_per_s > 1.5 * found[NO_DRAFT].tokens_per_s
    assert found[NEAR].tokens_per_pass > 2
    assert found[NEAR].draft_step_s == pytest.approx(0.01)
    assert found[NEAR].draft_bytes > 0 == found["ngram"].draft_bytes
    for entry in found.values():
        assert entry.mismatches == 0 < entry.num_compared
        assert entry.difference is not None
        assert abs(entry.difference) < 0.2, entry.draft
        assert set(entry.domains) == {"chat", "code"}


def test_the_same_draft_wins_twice_in_a_row(staged: Any, target: Path) -> None:
    """Two that hardly differ, once each the faster one by a hair."""
    winners = []
    for steps in ({"near": 0.0100, "near2": 0.0101}, {"near": 0.0101, "near2": 0.0100}):
        stage = staged(**steps)
        choice = find_choice(target, HERE)
        report = stage.tuned(incumbent=None if choice is None else choice.draft)
        assert report.decision is not None
        assert set(report.decision.tied) == {"near", "near2"}
        report.save()
        winners.append(report.decision.winner)
    assert winners == [winners[0]] * 2


def test_apart_only_one_candidate_is_in_memory_and_goes_on_learning(staged: Any) -> None:
    stage = staged(near=0.01)
    pairs: list[LoadedPair] = []

    def alone(name: str, pair: LoadedPair) -> None:
        assert not any(hasattr(earlier, "target") for earlier in pairs)
        pairs.append(pair)

    stage.change = alone
    turns: list[int] = []
    tuning = stage.tuning(together=False)
    tuning.measure(lambda label, total: turns.append(total))
    assert len(tuning.runs) == 3 * 2 * 4
    assert turns == [3 * 2 * (1 + 4)] * turns[0]
    assert {run.place.repetition for run in tuning.runs} == {0, 1}
    assert stage.opened == [NEAR, "ngram", NO_DRAFT, "ngram", NO_DRAFT, NEAR]
    assert tuning.seats[NEAR].profile.calibration.probabilities([0.9], MODEL)[0] != 0.9


# -- candidates that fail --------------------------------------------------------------------------------


def test_a_candidate_that_cannot_be_loaded_or_fails_is_listed_and_the_rest_is_measured(
    staged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(near=0.01, wild=0.01)
    generate, calls = EngineContender.generate, []

    def failing(self: EngineContender, prompt: Any, sampling: Any) -> Generation:
        calls.append(self.name)
        if self.name == WILD and calls.count(WILD) == 3:
            raise GenerationError("its logits are NaN")
        return generate(self, prompt, sampling)

    def full(name: str, pair: LoadedPair) -> None:
        if name == "ngram":
            raise MemoryError

    stage.change = full
    monkeypatch.setattr(EngineContender, "generate", failing)
    report = stage.tuned()
    assert report.failures == {WILD: "its logits are NaN", "ngram": "there is not enough memory"}
    assert calls.count(WILD) == 3
    assert {entry.draft for entry in report.lines} == {NEAR, NO_DRAFT}
    assert report.decision is not None
    assert report.decision.winner == NEAR
    assert "Left out: wild: its logits are NaN." in tune_report(report).notes


def test_a_draft_that_makes_every_answer_take_five_times_as_long_is_not_measured(staged: Any) -> None:
    """Reading the prompt counts here, which no speed of decoding shows."""
    stage = staged(near=0.01, near2=0.01)

    def slow(name: str, pair: LoadedPair) -> None:
        for drafter in pair.drafters if name == "near2" else ():

            def slowly(*args: Any, read: Any = drafter.prefill) -> None:
                stage.clock.now += 20.0
                read(*args)

            drafter.prefill = slowly  # type: ignore[method-assign]

    stage.change = slow
    report = stage.tuned(warmup=2)
    assert set(report.failures) == {"near2"}
    took = r"its warm-up took 4\d\.\d s for an answer that takes \d\.\d s without a draft"
    assert re.fullmatch(took, report.failures["near2"])
    assert not [run for run in report.runs if run.variant == "near2"]
    unscreened = stage.tuned(warmup=0, repeat=1)
    found = {entry.draft: entry for entry in unscreened.lines}
    assert found["near2"].prompt_s == pytest.approx(40.0)  # the n-gram drafter is slow here, too
    assert found[NEAR].prompt_s == 0.0


@pytest.mark.skipif(not cpu_kernels_wanted(), reason="elsewhere rounding may decide near-ties")
def test_a_candidate_with_another_text_is_left_out(staged: Any, models: Path) -> None:
    stage = staged(near=0.001)

    def verify_with_another(name: str, pair: LoadedPair) -> None:
        if name == NEAR:
            pair.target = load_names(PairPaths(models / WILD, NO_DRAFT, None), MemoryOptions()).target

    stage.change = verify_with_another
    report = stage.tuned()
    assert set(report.failures) == {NEAR}
    assert "tokens are not the target's own" in report.failures[NEAR]
    assert NEAR not in {entry.draft for entry in report.lines}
    assert report.decision is not None
    assert report.decision.winner != NEAR


def test_a_target_that_fails_ends_it(staged: Any) -> None:
    stage = staged(near=0.01)

    def damaged(name: str, pair: LoadedPair) -> None:
        if name == NO_DRAFT:
            raise ModelError("the target is damaged")

    stage.change = damaged
    with pytest.raises(ModelError, match="the target is damaged"):
        stage.tuned()


def test_an_interrupted_run_shows_what_was_measured_and_saves_nothing(
    staged: Any, target: Path, interrupt_at: Any
) -> None:
    stage = staged(near=0.01)
    interrupt_at(8)
    tuning = stage.tuned()
    tuning.save()
    assert len(tuning.runs) == 4  # three turns were a warm-up
    assert (tuning.decision, tuning.saved) == (None, None)
    assert find_choice(target, HERE) is None
    report = tune_report(tuning)
    assert report.interrupted
    assert any("Interrupted after 4 generations: nothing is chosen" in note for note in report.notes)
    assert len(report.tables[0].rows) == 3


# -- what is tried ---------------------------------------------------------------------------------------


def names_of(found: Lineup) -> list[str]:
    return [short_name(candidate.draft_name) for candidate in found.candidates]


def look(target: Path, *names: object, incumbent: str | None = None, **copies: tuple[int, ...]) -> Lineup:
    """Look for drafts of these names, or for what is there."""
    options = DraftOptions(tuple(map(str, names)) or None, **copies)
    return find_candidates(str(target), target, options, incumbent, False)


def test_without_names_prompt_lookup_and_self_substitutes_are_tried(target: Path, tmp_path: Path) -> None:
    found = look(target, bits=(4,))
    assert names_of(found) == ["ngram", "self:4", "self:3", "self:2", "none"]
    assert not found.failures
    convert_folder(target, tmp_path / "four", 4, 32)
    found = look(tmp_path / "four", bits=(4,), incumbent="self:2")
    assert names_of(found) == ["self:2", "ngram", "self:3", "none"]


def test_draft_models_are_tried_in_fewer_bits(
    models: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(models / NEAR, tmp_path / "eight", 8, 32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = (models / NEAR, tmp_path / "eight", "auto", "nowhere/at-all-", "none")
    found = look(target, *given, bits=(4, 8))
    assert names_of(found) == ["near", "eight", "ngram", "8bit:near", "4bit:near", "4bit:eight", "none"]
    assert list(found.failures) == ["nowhere/at-all-"]
    path = found.candidates[5].draft_path
    assert path is not None
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    monkeypatch.chdir(models)
    relative = look(target, NEAR, f"8bit:{NEAR}")
    assert [candidate.draft_name for candidate in relative.candidates[:2]] == [
        str(models / NEAR), f"8bit:{models / NEAR}",
    ]  # fmt: skip


def test_draft_models_in_all_bits_are_tried_with_fewer_output_tokens(models: Path, target: Path) -> None:
    near = models / NEAR
    found = look(target, "ngram", near, "self:2", bits=(4,), tokens=(30, 90))
    assert names_of(found) == [
        "ngram", "near", "self:2", "4bit:near", "trimmed:30:near", "trimmed:30:self:2", "trimmed:30:4bit:near",
        "none",
    ]  # fmt: skip
    assert not found.failures
    paths = {short_name(candidate.draft_name): candidate.draft_path for candidate in found.candidates}
    made = paths["trimmed:30:4bit:near"]
    assert made is not None
    tokens = load_model_folder(made, lazy=True, alone=True).draft_tokens
    assert tokens is not None
    assert len(tokens) == 30
    assert find_pair(str(target), f"trimmed:30:4bit:{near}", False).draft_path == made
    assert len(look(target, paths["trimmed:30:near"], tokens=(20,)).candidates) == 2  # it is trimmed already


# -- command line ----------------------------------------------------------------------------------------


@pytest.fixture
def words(target: Path, prompts: Path) -> Callable[..., list[object]]:
    def call(*more: object) -> list[object]:
        fixed = ["--prompts", prompts, "--max-tokens", 6, "--repeat", 1, "--warmup", 0]
        return ["tune", target, *fixed, "--bits", "none", "--trim", "none", *more]

    return call


CANDIDATE_KEYS = {
    "draft", "draft_bytes", "draft_step_s", "streamed_bytes", "pinned_bytes", "tokens_per_pass", "tokens_per_s",
    "prompt_s", "domains", "num_runs", "mismatches", "num_compared", "predicted_tokens_per_s", "difference",
    "prediction", "standing",
}  # fmt: skip


def test_the_choice_is_printed_saved_and_used(
    words: Any, models: Path, target: Path, document: Any, output: Any
) -> None:
    found = document(*words("--drafts", f"ngram,{models / NEAR},{models / 'missing'}"))
    assert {entry["draft"] for entry in found["candidates"]} == {"ngram", str(models / NEAR), "none"}
    assert all(set(entry) == CANDIDATE_KEYS for entry in found["candidates"])
    assert [entry["draft"] for entry in found["failed"]] == [str(models / "missing")]
    assert found["winner"] in {entry["draft"] for entry in found["candidates"]}
    assert found["incumbent"] is None
    assert found["together"] is True
    assert len(found["runs"]) == 3 * 4
    assert found["options"]["calibrated_on"] == ["chat/1", "code/1"]
    assert found["options"]["measured_on"] == ["chat/2", "code/2"]
    assert Path(found["saved"]).is_file()
    assert find_pair(str(target), "auto", False).draft_name == found["winner"]
    for candidate in found["candidates"]:  # what was learned is there for the next run
        names = find_pair(str(target), candidate["draft"], False)
        verify = PairProfile(pair_profile_path(names, None, None)).costs.verify
        assert all(verify.times_seen(rows) for rows in (1, 2, 32, 33, 64))  # around the steps of a GPU's costs
    shown, _ = output(*words("--drafts", "ngram"))
    assert "(chosen)" in shown
    assert "--draft auto means" in shown


def test_under_a_budget_candidates_come_one_after_the_other(
    words: Any, models: Path, target: Path, document: Any, output: Any
) -> None:
    where = ("--pinned", "0", "--read-bandwidth", "50MB/s", "--context", "200")
    found = document(*words("--drafts", models / NEAR, *where))
    assert found["together"] is False
    assert found["emulated"] is True
    for candidate in found["candidates"]:
        assert 0 <= candidate["pinned_bytes"] < candidate["streamed_bytes"]  # an embedding may have found room
        assert candidate["prediction"]["read_rate"]["emulated"] is True
        assert candidate["predicted_tokens_per_s"] > 0
    here = conditions(MemoryOptions(pinned=0, read_bandwidth=50e6))
    assert find_pair(str(target), "auto", False, here).draft_name == found["winner"]
    assert find_choice(target, HERE) is None
    assert "the smallest that works is" in output(*words("--memory", "1MB"), code=2)[1]


def test_a_choice_that_cannot_be_saved_is_printed_and_an_error(words: Any, own_home: Path, output: Any) -> None:
    own_home.mkdir(exist_ok=True)
    (own_home / "profiles").write_text("a file where the folder should be")
    out, err = output(*words("--drafts", "ngram"), code=1)
    assert "(chosen)" in out
    assert err.count("\n") == 1
    assert "profiles" in err
