"""The benchmark: what runs when, and what is made of the figures. Tiny models, made-up times."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure import kernels, runner
from llmcad_mlx.measure.bench import Benchmark, bench_report, ratios, run_benchmark, summarise, summary_tables
from llmcad_mlx.measure.output import NO_PLOTS
from llmcad_mlx.measure.prompts import BenchPrompt, load_prompts, mixed_by_domain
from llmcad_mlx.measure.runner import (
    EngineContender,
    Generation,
    Workload,
    WrongDrafter,
    run_mismatches,
    variant_pair,
)
from llmcad_mlx.measure.variants import Ablated, Variant, ablated, forced_nodes, parse_variants
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import GenerationOptions, SamplingSettings, SpeculationSettings
from llmcad_mlx.tree.token_tree import NGRAM, TokenTree
from tests.measure.runs import made_up

pytestmark = pytest.mark.usefixtures("tiny_home")

OURS = "plain,chain:2,paper,throughput,tree:6,ngram,wrong,no-draft"


@pytest.fixture(scope="module")
def pair(tiny_home: Path, folder: Path) -> LoadedPair:
    """The target is its own draft: a perfect one."""
    return load_pair(str(folder), str(folder), False)


def options(max_tokens: int = 24, temperature: float = 0.0) -> GenerationOptions:
    return GenerationOptions.of(max_tokens=max_tokens, temperature=temperature)


def work_of(prompts: Path, **changes: Any) -> Workload:
    values = {"max_tokens": 12, "repeat": 2, "warmup": 1, "temperature": 0.0, "seed": 0}
    return Workload.of(prompts, "", None, **(values | changes))


def bench(pair: LoadedPair, prompts: Path, variants: str, **changes: Any) -> Benchmark:
    return run_benchmark(parse_variants(variants), work_of(prompts, **changes), pair, "tiny")


# -- prompts and variants --------------------------------------------------------------------------------


def test_packaged_prompts_cover_the_promised_domains() -> None:
    assert Counter(p.domain for p in load_prompts()) == dict.fromkeys(
        ("code", "explanation", "sql", "translation"), 3
    )
    assert Counter(p.domain for p in load_prompts(None, ["all"]))["repeat"] == 3
    assert [p.domain for p in load_prompts(None, ["long", "sql"])] == ["long", "sql", "sql", "sql"]


@pytest.mark.parametrize(
    "text",
    ["", "[[a]]\nname = 1\ntext = 'x'", "[[a]]\nname = 'n'", "a = 3", "not toml", "[[a]]\nname='n'\ntext=' '"],
)
def test_a_prompt_file_of_another_form_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_prompts(file)


def test_unknown_domain_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'nonsense' is unknown"):
        load_prompts(None, ["nonsense"])
    with pytest.raises(UsageError, match=r"none\.toml"):
        load_prompts(tmp_path / "none.toml")


def test_variant_numbers_reach_the_settings() -> None:
    chain, tree, ngram, mlx_lm = parse_variants("chain:3, tree:32,ngram,mlx-lm")
    assert chain.settings == SpeculationSettings("chain", 4)  # the root and 3 drafted tokens
    assert tree.settings == SpeculationSettings("throughput", 32)
    assert (ngram.drafters, ngram.settings) == ("ngram", SpeculationSettings())
    assert mlx_lm.is_mlx_lm


def test_names_of_variants_tell_nodes_and_missing_parts() -> None:
    names = ("tree:16", "draft:4", "tree", "chain:4", "plain")
    assert [forced_nodes(name) for name in names] == [16, 4, None, None, None]
    assert ablated("paper") == Ablated("paper", ())
    assert ablated("throughput-no-tree-no-pipeline") == Ablated("throughput", ("tree", "pipeline"))
    assert [ablated(name) for name in ("plain", "no-draft", "tree:4")] == [None, None, None]


@pytest.mark.parametrize("text", ["", "fast", "plain,plain", "chain:0", "chain:x", "plain:2", "tree:", "tree:²"])
def test_variants_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="variants"):
        parse_variants(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", -1), ("max_tokens", 0), ("repeat", 0), ("warmup", -1), ("temperature", -1.0)],
)
def test_workloads_out_of_range_are_refused_by_name(prompts: Path, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        work_of(prompts, **{option: value})


# -- order -----------------------------------------------------------------------------------------------


class Scripted:
    """A contender that says when it ran, and presses Ctrl-C at its turn `interrupt`."""

    def __init__(self, name: str, log: list[str], interrupt: int = -1) -> None:
        self.name, self.log, self.interrupt = name, log, interrupt

    def generate(self, prompt: Any, options: Any) -> Generation:
        if len(self.log) == self.interrupt:
            raise KeyboardInterrupt
        self.log.append(self.name)
        return Generation((1, 2), 2, len(prompt), 0.1, 0.2, GenerationStats())


def encoded(number: int) -> list[runner.EncodedPrompt]:
    return [runner.EncodedPrompt(BenchPrompt("d", str(i), "x"), (1, 2, 3)) for i in range(number)]


def test_every_variant_runs_once_at_each_place_and_first_equally_often() -> None:
    contenders = [Scripted(name, []) for name in "abcd"]
    turns = list(runner.schedule(contenders, encoded(4), range(4), warmup=0))
    groups = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(groups) == 16
    for group in groups:
        assert {turn.contender.name for turn in group} == set("abcd")
        assert len({turn.place for turn in group}) == 1
    for prompt in "0123":
        firsts = [group[0].contender.name for group in groups if group[0].place.prompt == prompt]
        assert sorted(firsts) == list("abcd"), "at one prompt, the repetitions start with different variants"


def test_the_warm_up_comes_first_and_meets_several_domains() -> None:
    mixed = mixed_by_domain([BenchPrompt(d, n, "x") for d in "ab" for n in "12"])
    assert [(p.domain, p.name) for p in mixed] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    turns = list(runner.schedule([Scripted(name, []) for name in "ab"], encoded(4), range(1), warmup=2))
    assert [(turn.warms_up, turn.place.prompt) for turn in turns[:4]] == [(True, p) for p in "0011"]
    assert {turn.place.repetition for turn in turns[4:]} == {0}


def scripted_work(repeat: int, warmup: int) -> Workload:
    return Workload((), options(), repeat, warmup)


def test_runs_are_interleaved_and_warm_up_is_not_kept() -> None:
    log: list[str] = []
    seen: list[tuple[str, int]] = []
    outcome = runner.run_interleaved(
        [Scripted("a", log), Scripted("b", log)],
        encoded(2),
        scripted_work(2, 1),
        lambda name, total: seen.append((name, total)),
    )
    assert log == list("ababbabaab")
    assert seen == [(name, 10) for name in log]
    assert [run.variant for run in outcome.runs] == log[2:]
    assert not outcome.interrupted
    assert [run.order for run in outcome.runs] == [0, 1] * 4


def test_ctrl_c_keeps_what_was_done_but_not_a_warm_up() -> None:
    log: list[str] = []
    contenders = [Scripted("a", log, interrupt=3), Scripted("b", log, interrupt=3)]
    outcome = runner.run_interleaved(contenders, encoded(2), scripted_work(2, 0))
    assert outcome.interrupted
    assert len(outcome.runs) == 3
    with pytest.raises(KeyboardInterrupt):
        runner.run_interleaved([Scripted("a", [], interrupt=0)], encoded(2), scripted_work(1, 1))


# -- arithmetic ------------------------------------------------------------------------------------------


def test_a_ratio_compares_runs_at_the_same_place_before_the_median_is_taken() -> None:
    runs = [made_up("plain", i, s) for i, s in enumerate((1.0, 10.0, 100.0))]
    runs += [made_up("fast", i, s) for i, s in enumerate((0.5, 2.5, 100.0))]
    _, fast = summarise(runs)
    assert fast.tokens_per_s_vs_plain == pytest.approx(2.0)  # of 2, 4 and 1; medians alone would give 4
    assert fast.tokens_per_s == pytest.approx(4 / 2.5)
    assert fast.prompt_tokens_per_s == pytest.approx(20.0)


def test_a_place_where_only_one_variant_ran_gives_no_ratio() -> None:
    runs = [made_up("plain", 0, 1.0), made_up("fast", 0, 0.5), made_up("fast", 1, 0.1)]
    assert ratios(runs, "fast", "plain", "tokens_per_s") == pytest.approx([2.0])
    assert ratios(runs, "fast", "mlx-lm", "tokens_per_s") == []


def test_the_worst_prompt_is_that_of_the_least_median() -> None:
    runs = [made_up("plain", i, 1.0, prompt=p) for p in "ab" for i in range(3)]
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


def test_totals_shares_and_unknowns() -> None:
    plain, theirs = summarise([made_up("plain", 0, 1.0), made_up("mlx-lm", 0, 2.0, ours=False)])
    assert (plain.tokens_per_pass, plain.acceptance_rate) == (2.0, 0.5)
    assert (plain.draft_share, plain.verify_share, plain.other_share) == (0.25, 0.5, 0.25)
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


def test_domains_get_lines_of_their_own_only_when_there_are_several() -> None:
    one = summarise([made_up("plain", 0, 1.0)])
    two = summarise([made_up("plain", 0, 1.0), made_up("plain", 0, 2.0, domain="e")])
    assert [line.domain for line in one] == ["all"]
    assert [(line.domain, line.num_runs) for line in two] == [("all", 2), ("d", 1), ("e", 1)]


def test_tables_show_ratios_only_against_what_ran() -> None:
    (table,) = summary_tables(summarise([made_up("plain", 0, 1.0), made_up("tree:4", 0, 0.5)]))
    assert "× plain" in table.header
    assert "× mlx-lm" not in table.header
    markdown = table.to_markdown().splitlines()
    assert markdown[0] == "**all prompts**"
    row = [cell.strip() for cell in markdown[-1].strip("|").split("|")]
    assert row == ["tree:4", "8.0", "2.00", "2.00", "2.00", "1.00", "50%", "25%", "50%", "25%", "20", "0/4"]
    (other,) = summary_tables(summarise([made_up("mlx-lm", 0, 1.0, ours=False)]))
    assert "× plain" not in other.header
    assert "prompt × mlx-lm" in other.header


# -- the wrong draft -------------------------------------------------------------------------------------


def test_wrong_proposals_avoid_everything_the_real_draft_proposed(pair: LoadedPair) -> None:
    right = pair.drafters[1]
    wrong = WrongDrafter(right, pair.vocab_size)
    proposals = []
    for drafter in (right, wrong):
        drafter.truncate(0)
        drafter.prefill([1, 2, 3, 4], lambda done: None, lambda: False)
        drafter.begin([1, 2, 3, 4], TargetSampler(SamplingSettings(), pair.vocab_size))
        proposals += drafter.expand(TokenTree(4, 3), [0])
    good, bad = proposals
    assert len(bad.tokens) == len(set(bad.tokens)) == len(good.tokens) > 0
    assert not set(bad.tokens) & set(good.tokens)
    assert list(bad.confidences) == list(good.confidences)
    assert (wrong.source, wrong.rows_fed) == (right.source, right.rows_fed)
    assert all(0 <= token < pair.vocab_size for token in bad.tokens)


def test_a_wrong_prompt_lookup_always_proposes() -> None:
    wrong = WrongDrafter(NgramDrafter(), 40)
    wrong.begin([1, 2, 3], TargetSampler(SamplingSettings(), 40))
    (found,) = wrong.expand(TokenTree(3, 2), [0])
    assert (len(found.tokens), found.source) == (1, NGRAM)
    assert found.tokens[0] != 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_draft_is_never_accepted_where_a_perfect_one_is(pair: LoadedPair, temperature: float) -> None:
    settings = SpeculationSettings("throughput", 8)  # forced, so that it cannot stop drafting
    done = {}
    for kind in ("all", "wrong"):
        contender = EngineContender(kind, variant_pair(pair, Variant(kind, kind, settings)), settings)
        done[kind] = contender.generate([5, 9, 30], options(24, temperature))
    right, wrong = done["all"], done["wrong"]
    assert wrong.tokens == right.tokens
    assert right.stats is not None
    assert wrong.stats is not None
    assert wrong.stats.path_tested > 10
    assert wrong.stats.accepted == 0
    assert right.stats.acceptance_rate > 0.9


# -- whole runs ------------------------------------------------------------------------------------------


def test_contenders_keep_what_they_learn_but_no_prompt(pair: LoadedPair) -> None:
    (variant,) = parse_variants("throughput")
    own = variant_pair(pair, variant)
    contender = EngineContender("throughput", own, SpeculationSettings())
    first, second = (contender.generate([5, 9, 30, 31, 12], options(8)) for _ in range(2))
    assert second.tokens == first.tokens
    assert second.stats is not None
    assert second.stats.reused_tokens == 0
    assert own.profile.costs.verify
    assert not pair.profile.costs.verify


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_all_our_variants_give_the_same_text(pair: LoadedPair, prompts: Path, temperature: float) -> None:
    runs = bench(pair, prompts, OURS, temperature=temperature).outcome.runs
    assert len(runs) == 8 * 4 * 2
    assert set(run_mismatches(runs)) == {0}
    accepted = {line.variant: line.acceptance_rate for line in summarise(runs)}
    assert (accepted["tree:6"] or 0.0) > 0.5
    assert accepted["no-draft"] is None


def test_mlx_lm_runs_on_a_copy_of_the_same_weights(pair: LoadedPair, prompts: Path) -> None:
    done = bench(pair, prompts, "plain,mlx-lm,mlx-lm-draft", repeat=1)
    by_variant = {run.variant: run.generation for run in done.outcome.runs if run.place.domain == "code"}
    assert by_variant["mlx-lm"].tokens == by_variant["plain"].tokens
    assert len(by_variant["mlx-lm-draft"].tokens) == len(by_variant["plain"].tokens)
    assert by_variant["mlx-lm"].num_timed == len(by_variant["mlx-lm"].tokens) - 1
    assert any("first token" in note for note in bench_report(done, []).notes)


def test_a_pair_without_draft_still_runs_every_variant_of_ours(pair: LoadedPair, prompts: Path) -> None:
    alone = replace(pair, drafters=[], draft_name="none")
    done = bench(alone, prompts, "plain,throughput,ngram,wrong", repeat=1)
    assert set(run_mismatches(done.outcome.runs)) == {0}
    drafters = {variant.name: variant_pair(alone, variant).drafters for variant in done.variants}
    assert {name: len(found) for name, found in drafters.items()} == {
        "plain": 0, "throughput": 0, "ngram": 1, "wrong": 1,
    }  # fmt: skip
    assert isinstance(drafters["wrong"][0], WrongDrafter)
    with pytest.raises(UsageError, match="draft:4 needs a draft model or an n-gram table"):
        bench(alone, prompts, "plain,draft:4")
    with pytest.raises(UsageError, match="needs a draft model"):
        bench(alone, prompts, "plain,mlx-lm-draft")


def test_the_draft_alone_is_without_prompt_lookup(pair: LoadedPair) -> None:
    sources = {}
    for name in ("tree:8", "draft:8"):
        (variant,) = parse_variants(name)
        assert variant.settings == SpeculationSettings("throughput", 8)
        sources[name] = [drafter.source for drafter in variant_pair(pair, variant).drafters]
    assert sources == {"tree:8": ["ngram", "model"], "draft:8": ["model"]}


def test_report_files_hold_every_run_versions_and_the_command(
    pair: LoadedPair, prompts: Path, tmp_path: Path
) -> None:
    report = bench_report(bench(pair, prompts, "plain,tree:6"), ["llmcad-mlx", "bench"])
    assert report.write(tmp_path / "out") is None
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["argv"] == ["llmcad-mlx", "bench"]
    assert {"mlx", "mlx-lm", "numba"} <= set(written["machine"]["versions"])
    assert written["options"]["variants"] == ["plain", "tree:6"]
    assert len(written["runs"]) == 16
    assert {
        "variant", "domain", "prompt", "repetition", "prompt_s", "decode_s", "tokens", "tokens_per_s",
        "prompt_tokens_per_s", "tokens_per_pass", "acceptance_rate", "target_passes", "draft_s", "verify_s",
        "other_s", "equals_plain",
    } <= set(written["runs"][0])  # fmt: skip
    run = written["runs"][0]
    assert run["draft_s"] + run["verify_s"] + run["other_s"] == pytest.approx(run["decode_s"])
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.startswith("# tiny, draft ")
    assert "    llmcad-mlx bench\n" in text
    assert report.to_markdown() in text
    assert f"{written['summary'][0]['tokens_per_s']:.1f}" in text
    assert "**chat**" in text
    assert "**code**" in text
    for name in ("tokens_per_s.png", "time_split.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_everything_but_the_plots_is_written(
    pair: LoadedPair, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bench_report(bench(pair, prompts, "plain", repeat=1), [])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.write(tmp_path / "out") == NO_PLOTS
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]


# -- kernels ---------------------------------------------------------------------------------------------


def test_kernel_table_has_times_ratios_and_small_errors() -> None:
    times = kernels.time_kernels(rows=(1, 4, 8), repeat=1, shape=(64, 128))
    assert (kernels.OURS in {entry.kernel for entry in times}) == cpu_kernels_wanted()
    assert all(entry.error < 1e-5 for entry in times)
    assert {entry.rows for entry in times if entry.kernel == kernels.MLX_DENSE} == {1, 4}
    report = kernels.kernel_report(times)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["1", "4", "8", "largest error"]
    assert table.rows[0][2] == "1.0"
    assert set(report.document) == {"device", "machine", "notes", "times"}


# -- command line ----------------------------------------------------------------------------------------


@pytest.fixture
def words(folder: Path, prompts: Path) -> Callable[..., list[str]]:
    def call(*more: object) -> list[str]:
        given = ["--target", folder, "--draft", folder, "--prompts", prompts, "--max-tokens", 4, "--repeat", 1]
        return ["bench", *map(str, (*given, "--warmup", 0, *more))]

    return call


def test_another_program_is_compared_in_the_same_run(words: Any, document: Any, output: Any) -> None:
    found = document(*words("--variants", "plain", "--compare", "mlx-lm"))
    assert found["options"]["variants"] == ["plain", "mlx-lm"]
    assert found["options"]["max_tokens"] == 4
    assert {run["variant"] for run in found["runs"]} == {"plain", "mlx-lm"}
    _, err = output("bench", "--compare", "ollama", code=2)
    assert "the one program to compare with is 'mlx-lm'" in err


def test_a_pipe_gets_markdown_and_out_gets_files(words: Any, output: Any, tmp_path: Path) -> None:
    out, _ = output(*words("--variants", "plain", "--out", tmp_path / "new" / "out"))
    assert "| plain" in out
    assert (tmp_path / "new" / "out" / "bench.json").exists()


def test_ctrl_c_prints_the_table_and_ends_with_130(words: Any, output: Any, interrupt_at: Any) -> None:
    interrupt_at(3)
    out, err = output(*words("--variants", "plain,tree:4"), code=130)
    assert "| tree:4" in out
    assert "only 2 generations" in out
    assert "interrupted" in err


@pytest.mark.parametrize(
    "arguments",
    [["--variants", "fast"], ["--domains", "x"], ["--repeat", "0"], ["--prompts", "/no/such/file"],
     ["--kernels", "--repeat", "0"]],
)  # fmt: skip
def test_bad_options_end_with_2_before_anything_is_loaded(arguments: list[str], output: Any) -> None:
    assert output("bench", *arguments, code=2)[1].startswith("error: ")


def test_help_names_all_variants(output: Any) -> None:
    shown, _ = output("bench", "--help")
    for name in ("chain:K", "tree:N", "no-draft", "mlx-lm-draft", "--kernels", "--growth"):
        assert name in shown
