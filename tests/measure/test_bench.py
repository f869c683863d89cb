"""The benchmark: what runs when, and what is made of the figures. Tiny models, made-up times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure import runner, workload
from llmcad_mlx.measure.bench import Benchmark, bench_report, plots_of, run_benchmark, summarise, summary_tables
from llmcad_mlx.measure.runner import EngineContender, Generation, run_mismatches, variant_pair
from llmcad_mlx.measure.workload import BenchPrompt, Variant, Workload, load_prompts, parse_variants
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import GenerationOptions, SpeculationSettings
from tests.measure.runs import drawn, made_up

pytestmark = pytest.mark.usefixtures("tiny_home")

OURS = "plain,chain:2,paper,throughput,tree:6,ngram,wrong,no-draft"


@pytest.fixture(scope="module")
def pair(tiny_home: Path, folder: Path) -> LoadedPair:
    """The target is its own draft: a perfect one."""
    return load_pair(str(folder), str(folder), False)


def work_of(prompts: Path, **changes: Any) -> Workload:
    values = {"max_tokens": 12, "repeat": 2, "warmup": 1, "temperature": 0.0, "seed": 0, "per_domain": None}
    return Workload.of(prompts, "", **(values | changes))


def bench(pair: LoadedPair, prompts: Path, variants: str, **changes: Any) -> Benchmark:
    work = work_of(prompts, **changes)
    return run_benchmark(parse_variants(variants), work, pair, "tiny", lambda name, total: None)


# -- prompts and variants --------------------------------------------------------------------------------


def test_packaged_prompts_cover_the_promised_domains() -> None:
    assert Counter(p.domain for p in load_prompts()) == dict.fromkeys(
        ("code", "explanation", "sql", "translation"), 3
    )
    assert Counter(p.domain for p in load_prompts(None, ["all"]))["repeat"] == 3
    assert [p.domain for p in load_prompts(None, ["long", "sql"])] == ["long", "sql", "sql", "sql"]
    with pytest.raises(UsageError, match="'nonsense' is unknown"):
        load_prompts(None, ["nonsense"])


@pytest.mark.parametrize(
    "text",
    ["", "[[a]]\nname = 1\ntext = 'x'", "[[a]]\nname = 'n'", "a = 3", "not toml", "[[a]]\nname='n'\ntext=' '"],
)
def test_a_prompt_file_of_another_form_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_prompts(file)


def test_variants_are_what_their_names_say() -> None:
    found = {variant.name: variant for variant in parse_variants("chain:3, tree:32,draft:8,ngram,mlx-lm,ablation")}
    assert found["chain:3"].settings == SpeculationSettings("chain", 4)  # the root and 3 drafted tokens
    assert found["tree:32"] == Variant("tree:32", "all", SpeculationSettings("throughput", 32))
    assert found["draft:8"] == Variant("draft:8", "draft", SpeculationSettings("throughput", 8))
    assert found["ngram"] == Variant("ngram", "ngram", SpeculationSettings())
    assert found["mlx-lm"].is_mlx_lm
    assert len(found) == 5 + 11
    both = found["paper-no-tree-no-fallback-no-pipeline"].settings
    assert both == SpeculationSettings("paper", pipeline=False, tree=False, fallback=False)
    assert found["throughput-no-pipeline"].settings == SpeculationSettings(pipeline=False)
    assert all(
        f"{name} (" in workload.variant_help()
        for name in ("chain or chain:K", "tree:N", "no-draft", "mlx-lm-draft")
    )


@pytest.mark.parametrize(
    "text",
    ["", "fast", "plain,plain", "chain:0", "chain:x", "plain:2", "tree:", "tree:²", "paper-no-x", "chain-no-tree"],
)
def test_variants_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="variants"):
        parse_variants(text)


# -- order -----------------------------------------------------------------------------------------------


class Scripted:
    """A contender that says when it ran."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def generate(self, prompt: Any, options: Any) -> Generation:
        self.log.append(self.name)
        return Generation((1, 2), 2, len(prompt), 0.1, 0.2, GenerationStats())


def encoded(number: int) -> list[BenchPrompt]:
    return [BenchPrompt("d", str(i), "x", (1, 2, 3)) for i in range(number)]


def test_every_variant_runs_once_at_each_place_and_first_equally_often() -> None:
    contenders = [Scripted(name, []) for name in "abcd"]
    turns = list(runner.schedule(contenders, encoded(4), range(4), warmup=0))
    groups = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(groups) == 16
    for group in groups:
        assert {turn.contender.name for turn in group} == set("abcd")
        assert len({turn.place for turn in group}) == 1
    warm_up = list(runner.schedule(contenders[:2], encoded(4), range(1), warmup=2))[:4]
    assert [(turn.warms_up, turn.place.prompt) for turn in warm_up] == [(True, p) for p in "0011"]
    for prompt in "0123":
        firsts = [group[0].contender.name for group in groups if group[0].place.prompt == prompt]
        assert sorted(firsts) == list("abcd"), "at one prompt, the repetitions start with different variants"


def test_runs_are_interleaved_and_warm_up_is_not_kept() -> None:
    log: list[str] = []
    seen: list[tuple[str, int]] = []
    contenders, work = [Scripted("a", log), Scripted("b", log)], Workload((), GenerationOptions(), 2, 1)
    turns = runner.take_turns(contenders, encoded(2), work, lambda name, total: seen.append((name, total)))
    runs = [run for found in turns for run in found]
    assert log == list("ababbabaab")
    assert seen == [(name, 10) for name in log]
    assert [run.variant for run in runs] == log[2:]
    assert [run.order for run in runs] == [0, 1] * 4


# -- arithmetic ------------------------------------------------------------------------------------------


def test_a_ratio_compares_runs_at_the_same_place_before_the_median_is_taken() -> None:
    runs = [made_up("plain", i, s) for i, s in enumerate((1.0, 10.0, 100.0))]
    runs += [made_up("fast", i, s) for i, s in enumerate((0.5, 2.5, 100.0))]
    runs.append(made_up("fast", 9, 2.5))  # where plain did not run there is no ratio
    _, fast = summarise(runs)
    assert fast.tokens_per_s_vs_plain == pytest.approx(2.0)  # of 2, 4 and 1; medians alone would give 4
    assert fast.tokens_per_s_vs_mlx_lm is None
    assert fast.tokens_per_s == pytest.approx(4 / 2.5)
    assert fast.prompt_tokens_per_s == pytest.approx(20.0)


def test_the_worst_prompt_is_that_of_the_least_median() -> None:
    runs = [made_up("plain", i, prompt=p) for p in "ab" for i in range(3)]
    runs += [made_up("fast", i, s, prompt="a") for i, s in enumerate((0.5, 10.0, 0.4))]
    runs += [made_up("fast", i, s, prompt="b") for i, s in enumerate((0.8, 0.8, 0.1))]
    plain, fast = summarise(runs)
    assert fast.worst_prompt_vs_plain == pytest.approx(1 / 0.8)
    assert plain.worst_prompt_vs_plain == pytest.approx(1.0)


def test_break_even_is_what_passes_of_that_length_must_give() -> None:
    runs = [made_up("plain", 0, 1.0), made_up("fast", 0, 3.0), made_up("fast", 1, 9.0)]
    _, fast = summarise(runs)
    # 2 passes, 4 tokens; the lone run tells nothing
    assert fast.break_even == pytest.approx((3.0 / 2) / (1.0 / 4))
    assert summarise([made_up("fast", 0, 3.0)])[0].break_even is None


def test_what_another_program_does_not_tell_is_unknown() -> None:
    plain, theirs = summarise([made_up("plain", 0, 1.0), made_up("mlx-lm", 0, 2.0, ours=False)])
    assert plain.tokens_per_s_vs_mlx_lm == pytest.approx(2.0)
    assert (theirs.tokens_per_pass, theirs.acceptance_rate, theirs.other_share) == (None, None, None)


def test_mismatches_count_positions_and_missing_tokens() -> None:
    runs = [
        made_up("plain"), made_up("fast", tokens=(1, 2, 3, 9)), made_up("fast", 1),
        made_up("short", tokens=(1, 2)), made_up("mlx-lm", tokens=(1, 9, 9, 9), ours=False),
    ]  # fmt: skip
    assert run_mismatches(runs) == [0, 1, None, 2, 3]
    assert run_mismatches(runs, comparable=False) == [0, 1, None, 2, None]
    fast = next(line for line in summarise(runs) if line.variant == "fast")
    assert (fast.mismatches, fast.num_compared) == (1, 4)


def test_tables_show_ratios_only_against_what_ran_and_domains_where_there_are_several() -> None:
    (table,) = summary_tables(summarise([made_up("plain", 0, 1.0), made_up("tree:4", 0, 0.5)]))
    assert "× plain" in table.header
    assert "× mlx-lm" not in table.header
    markdown = table.to_markdown().splitlines()
    assert markdown[0] == "**all prompts**"
    row = [cell.strip() for cell in markdown[-1].strip("|").split("|")]
    assert row == ["tree:4", "8.0", "2.00", "2.00", "2.00", "1.00", "50%", "25%", "50%", "25%", "20", "0/4"]
    two = summarise([made_up("plain", 0, 1.0), made_up("plain", 0, 2.0, domain="e")])
    assert [(line.domain, line.num_runs) for line in two] == [("all", 2), ("d", 1), ("e", 1)]
    (other,) = summary_tables(summarise([made_up("mlx-lm", 0, 1.0, ours=False)]))
    assert "× plain" not in other.header
    assert "prompt × mlx-lm" in other.header


# -- plots -----------------------------------------------------------------------------------------------


def test_plots_are_the_summary_and_begin_at_zero() -> None:
    runs = [made_up("plain", domain=domain) for domain in "ab"]
    runs += [made_up("chain", 0, 0.5, io_wait_s=0.1), made_up("mlx-lm", ours=False)]
    lines = [line for line in summarise(runs) if line.domain == "all"]
    figures = [drawn(plot) for plot in plots_of(lines)]
    (speed,), (split,) = (figure.axes for figure in figures)
    assert [bar.get_width() for bar in speed.patches] == pytest.approx([line.tokens_per_s for line in lines])
    assert speed.get_xlim()[0] == split.get_xlim()[0] == 0.0
    total: dict[float, float] = {}
    for bar in split.patches:
        total[bar.get_y()] = total.get(bar.get_y(), 0.0) + bar.get_width()
    assert list(total.values()) == pytest.approx([100.0, 100.0])
    only = plots_of([line for line in lines if line.variant == "mlx-lm"])
    assert [plot.draw is None for plot in only] == [False, True]


# -- the wrong draft -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_draft_is_never_accepted_where_a_perfect_one_is(pair: LoadedPair, temperature: float) -> None:
    settings = SpeculationSettings("throughput", 8)  # forced, so that it cannot stop drafting
    texts, stats = [], []
    for kind, own in (("all", pair), ("wrong", pair), ("wrong", replace(pair, drafters=[]))):
        contender = EngineContender(kind, variant_pair(own, Variant(kind, kind, settings)), settings)
        found = contender.generate([5, 9, 30], GenerationOptions.of(max_tokens=24, temperature=temperature))
        assert found.stats is not None
        texts.append(found.tokens)
        stats.append(found.stats)
    right, wrong, wrong_lookup = stats
    assert texts == texts[:1] * 3
    assert right.acceptance_rate > 0.9
    assert wrong.path_tested > 10
    assert wrong.accepted == 0
    assert wrong_lookup.path_tested > 10


# -- whole runs ------------------------------------------------------------------------------------------


def test_contenders_keep_what_they_learn_but_no_prompt(pair: LoadedPair) -> None:
    (variant,) = parse_variants("throughput")
    own = variant_pair(pair, variant)
    contender = EngineContender("throughput", own, SpeculationSettings())
    first, second = (contender.generate([5, 9, 30, 31, 12], GenerationOptions.of(max_tokens=8)) for _ in range(2))
    assert second.tokens == first.tokens
    assert second.stats is not None
    assert second.stats.reused_tokens == 0
    assert own.profile.costs.verify
    assert not pair.profile.costs.verify


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_all_our_variants_give_the_same_text(pair: LoadedPair, prompts: Path, temperature: float) -> None:
    runs = bench(pair, prompts, OURS, temperature=temperature).runs
    assert len(runs) == 8 * 4 * 2
    assert set(run_mismatches(runs)) == {0}
    accepted = {line.variant: line.acceptance_rate for line in summarise(runs)}
    assert (accepted["tree:6"] or 0.0) > 0.5
    assert accepted["no-draft"] is None


def test_mlx_lm_runs_on_a_copy_of_the_same_weights(pair: LoadedPair, prompts: Path) -> None:
    done = bench(pair, prompts, "plain,mlx-lm,mlx-lm-draft", repeat=1)
    by_variant = {run.variant: run.generation for run in done.runs if run.place.domain == "code"}
    assert by_variant["mlx-lm"].tokens == by_variant["plain"].tokens
    assert len(by_variant["mlx-lm-draft"].tokens) == len(by_variant["plain"].tokens)
    assert by_variant["mlx-lm"].num_timed == len(by_variant["mlx-lm"].tokens) - 1
    assert any("first token" in note for note in bench_report(done).notes)


def test_every_variant_has_its_drafters(pair: LoadedPair, prompts: Path) -> None:
    alone = replace(pair, drafters=[])

    def sources(of: LoadedPair, name: str) -> list[str]:
        (variant,) = parse_variants(name)
        return [drafter.source for drafter in variant_pair(of, variant).drafters]

    assert sources(pair, "tree:8") == ["ngram", "model"]
    assert sources(pair, "draft:8") == ["model"]
    assert [sources(alone, name) for name in ("plain", "throughput", "ngram", "wrong")] == [
        [], [], ["ngram"], ["ngram"],
    ]  # fmt: skip
    assert set(run_mismatches(bench(alone, prompts, "plain,throughput,ngram,wrong", repeat=1).runs)) == {0}
    with pytest.raises(UsageError, match="draft:4 needs a draft model or an n-gram table"):
        bench(alone, prompts, "plain,draft:4")
    with pytest.raises(UsageError, match="needs a draft model"):
        bench(alone, prompts, "plain,mlx-lm-draft")
    with pytest.raises(UsageError, match="plain-equal is for a target that is streamed"):
        bench(pair, prompts, "plain-equal")


# -- command line ----------------------------------------------------------------------------------------


@pytest.fixture
def words(folder: Path, prompts: Path) -> Callable[..., list[str]]:
    def call(*more: object) -> list[str]:
        given = ["--target", folder, "--draft", folder, "--prompts", prompts, "--max-tokens", 4, "--repeat", 1]
        return ["bench", *map(str, (*given, "--warmup", 0, *more))]

    return call


def test_json_has_every_run_beside_another_program_in_the_same_run(words: Any, document: Any) -> None:
    found = document(*words("--variants", "plain", "--compare", "mlx-lm"))
    assert found["options"]["variants"] == ["plain", "mlx-lm"]
    assert found["options"]["max_tokens"] == 4
    assert found["options"]["prompts"] == ["chat/1", "code/1", "chat/2", "code/2"]
    assert len(found["runs"]) == 8
    ours, theirs = (next(run for run in found["runs"] if run["variant"] == name) for name in ("plain", "mlx-lm"))
    assert set(ours) == set(theirs) >= {
        "variant", "domain", "prompt", "repetition", "prompt_s", "decode_s", "tokens", "tokens_per_s",
        "prompt_tokens_per_s", "tokens_per_pass", "acceptance_rate", "target_passes", "draft_s", "verify_s",
        "other_s", "equals_plain",
    }  # fmt: skip
    assert ours["draft_s"] + ours["verify_s"] + ours["other_s"] == pytest.approx(ours["decode_s"])
    assert (ours["target_passes"], theirs["target_passes"]) == (4, None)


def test_ctrl_c_prints_the_table_and_ends_with_130(words: Any, output: Any, interrupt_at: Any) -> None:
    interrupt_at(3)
    out, err = output(*words("--variants", "plain,tree:4"), code=130)
    assert "| tree:4" in out
    assert "only 2 generations" in out
    assert "interrupted" in err
    interrupt_at(1)
    assert output(*words("--variants", "plain"), code=130)[0] == ""
