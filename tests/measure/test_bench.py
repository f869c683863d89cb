"""The benchmark: what runs when, and what is made of the figures. Tiny models, made-up times."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmcad_mlx.cli.main import run as run_cli
from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import LoadedPair
from llmcad_mlx.measure import benchmark, kernels, runner, summary, tables
from llmcad_mlx.measure.benchmark import BenchPlan, measure_pair
from llmcad_mlx.measure.contenders import EngineContender, Sampling, WrongDrafter, variant_pair
from llmcad_mlx.measure.output import report_json, report_tables, to_markdown, write_report
from llmcad_mlx.measure.plots import MISSING
from llmcad_mlx.measure.prompts import BenchPrompt, load_prompts
from llmcad_mlx.measure.records import Generation, Place, Run
from llmcad_mlx.measure.variants import Variant, parse_variants
from llmcad_mlx.policy import Candidates
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings, SpeculationSettings
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.tree.token_tree import NGRAM, TokenTree
from llmcad_mlx.verifying import Target
from tests.support.tiny import VOCAB, tiny_llama, tiny_tree_model

OURS = "plain,chain:2,paper,throughput,tree:6,ngram,wrong,no-draft"


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<end>": VOCAB - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="w0")
    return TokenizerWrapper(fast)


def model_folder(path: Path, seed: int) -> Path:
    """A folder that mlx-lm's loader opens, with the weights of `tiny_llama(seed)`."""
    model = tiny_llama(seed)
    path.mkdir(exist_ok=True)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory) -> LoadedPair:
    """Target and draft with the same weights: a perfect draft."""
    return LoadedPair(
        target=Target(tiny_tree_model(3), VOCAB),
        drafters=[NgramDrafter(), ModelDrafter(tiny_tree_model(3))],
        tokenizer=tokenizer,
        vocab_size=VOCAB,
        context_length=4096,
        profile=PairProfile(None),
        target_path=model_folder(tmp_path_factory.mktemp("models") / "target", 3),
        draft_name="tiny",
    )


def prompt_file(folder: Path) -> Path:
    file = folder / "prompts.toml"
    file.write_text(
        '[[a]]\nname = "one"\ntext = "w1 w2 w3 w4"\n[[a]]\nname = "two"\ntext = "w5 w6 w7 w5 w6"\n'
        '[[b]]\nname = "one"\ntext = "w9 w8 w7"\n'
    )
    return file


def plan_of(folder: Path, variants: str = OURS, **changes) -> BenchPlan:
    values = {
        "variants": variants, "domains": "", "prompts": prompt_file(folder), "max_tokens": 12, "repeat": 2,
        "warmup": 1, "temperature": 0.0, "seed": 0,
    }  # fmt: skip
    return BenchPlan.of(**(values | changes))


# -- prompts and variants --------------------------------------------------------------------------------


def test_packaged_prompts_cover_the_promised_domains():
    assert Counter(p.domain for p in load_prompts()) == dict.fromkeys(
        ("code", "explanation", "sql", "translation"), 3
    )
    assert Counter(p.domain for p in load_prompts(None, ["all"]))["repeat"] == 3
    assert [p.domain for p in load_prompts(None, ["long", "sql"])] == ["long", "sql", "sql", "sql"]


@pytest.mark.parametrize(
    "text",
    ["", "[[a]]\nname = 1\ntext = 'x'", "[[a]]\nname = 'n'", "a = 3", "not toml", "[[a]]\nname='n'\ntext=' '"],
)
def test_a_prompt_file_of_another_form_is_refused_by_name(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_prompts(file)


def test_unknown_domain_and_missing_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'nonsense' is unknown"):
        load_prompts(None, ["nonsense"])
    with pytest.raises(UsageError, match=r"none\.toml"):
        load_prompts(tmp_path / "none.toml")


def test_variant_numbers_reach_the_settings():
    chain, tree, ngram, mlx_lm = parse_variants("chain:3, tree:32,ngram,mlx-lm")
    assert chain.settings == SpeculationSettings("chain", 4)  # the root and 3 drafted tokens
    assert tree.settings == SpeculationSettings("throughput", 32)
    assert (ngram.drafters, ngram.settings) == ("ngram", SpeculationSettings())
    assert mlx_lm.is_mlx_lm


@pytest.mark.parametrize("text", ["", "fast", "plain,plain", "chain:0", "chain:x", "plain:2", "tree:", "tree:²"])
def test_variants_that_do_not_exist_are_refused(text):
    with pytest.raises(UsageError, match="variants"):
        parse_variants(text)


# -- order -----------------------------------------------------------------------------------------------


def test_every_variant_runs_once_at_each_place_and_first_equally_often():
    turns = list(runner.schedule(num_variants=4, num_prompts=4, repeat=4, warmup=0))
    groups = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(groups) == 16
    for group in groups:
        assert {t.variant for t in group} == {0, 1, 2, 3}
        assert len({(t.repetition, t.prompt) for t in group}) == 1
    for prompt in range(4):
        firsts = [g[0].variant for g in groups if g[0].prompt == prompt]
        assert sorted(firsts) == [0, 1, 2, 3], "at one prompt, the repetitions start with different variants"


def test_the_warm_up_comes_first_and_meets_several_domains():
    prompts = [BenchPrompt(d, n, "x") for d in "ab" for n in "12"]
    mixed = runner.mixed_by_domain(prompts)
    assert [(p.domain, p.name) for p in mixed] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    turns = list(runner.schedule(2, 4, repeat=1, warmup=2))
    assert [(t.repetition, t.prompt) for t in turns[:4]] == [(-1, 0), (-1, 0), (-1, 1), (-1, 1)]
    assert all(t.repetition == 0 for t in turns[4:])


class Scripted:
    """A contender that says when it ran, and presses Ctrl-C at its turn `interrupt`."""

    def __init__(self, name: str, log: list[str], interrupt: int = -1) -> None:
        self.name, self.log, self.interrupt = name, log, interrupt

    def generate(self, prompt, sampling) -> Generation:
        if len(self.log) == self.interrupt:
            raise KeyboardInterrupt
        self.log.append(self.name)
        return Generation((1, 2), 2, len(prompt), 0.1, 0.2, GenerationStats())


ENCODED = [runner.EncodedPrompt(BenchPrompt("d", str(i), "x"), (1, 2, 3)) for i in range(2)]


def test_runs_are_interleaved_and_warm_up_is_not_kept():
    log: list[str] = []
    outcome = runner.run_interleaved(
        [Scripted("a", log), Scripted("b", log)], ENCODED, Sampling(2), repeat=2, warmup=1
    )
    assert log == list("ababbabaab")
    assert [run.variant for run in outcome.runs] == log[2:]
    assert not outcome.interrupted
    assert [run.order for run in outcome.runs] == [0, 1] * 4


def test_ctrl_c_keeps_what_was_done_but_not_a_warm_up():
    log: list[str] = []
    contenders = [Scripted("a", log, interrupt=3), Scripted("b", log, interrupt=3)]
    outcome = runner.run_interleaved(contenders, ENCODED, Sampling(2), repeat=2, warmup=0)
    assert outcome.interrupted
    assert len(outcome.runs) == 3
    with pytest.raises(KeyboardInterrupt):
        runner.run_interleaved([Scripted("a", [], interrupt=0)], ENCODED, Sampling(2), repeat=1, warmup=1)


# -- arithmetic ------------------------------------------------------------------------------------------


def made_up(
    variant: str, repetition: int, decode_s: float, tokens=(1, 2, 3, 4), ours=True, domain="d", prompt="p"
) -> Run:
    stats = GenerationStats(
        generated_tokens=4, target_passes=2, accepted=2, path_tested=4, draft_s=decode_s / 4, verify_s=decode_s / 2
    )
    generation = Generation(tokens, len(tokens), 10, 0.5, decode_s, stats if ours else None)
    return Run(variant, Place(domain, prompt, repetition), 0, generation)


def test_a_ratio_compares_runs_at_the_same_place_before_the_median_is_taken():
    runs = [made_up("plain", i, s) for i, s in enumerate((1.0, 10.0, 100.0))]
    runs += [made_up("fast", i, s) for i, s in enumerate((0.5, 2.5, 100.0))]
    fast = next(line for line in summary.summarise(runs) if line.variant == "fast")
    assert fast.tokens_per_s_vs_plain == pytest.approx(2.0)  # of 2, 4 and 1; medians alone would give 4
    assert fast.tokens_per_s == pytest.approx(4 / 2.5)
    assert fast.prompt_tokens_per_s == pytest.approx(20.0)


def test_a_place_where_only_one_variant_ran_gives_no_ratio():
    runs = [made_up("plain", 0, 1.0), made_up("fast", 0, 0.5), made_up("fast", 1, 0.1)]
    assert summary.ratios(runs, "fast", "plain", summary.decode_rate) == pytest.approx([2.0])
    assert summary.ratios(runs, "fast", "mlx-lm", summary.decode_rate) == []


def test_the_worst_prompt_is_that_of_the_least_median():
    runs = [made_up("plain", i, 1.0, prompt=p) for p in "ab" for i in range(3)]
    runs += [made_up("fast", i, s, prompt="a") for i, s in enumerate((0.5, 10.0, 0.4))]
    runs += [made_up("fast", i, s, prompt="b") for i, s in enumerate((0.8, 0.8, 0.1))]
    plain, fast = summary.summarise(runs)
    assert fast.worst_prompt_vs_plain == pytest.approx(1 / 0.8)
    assert plain.worst_prompt_vs_plain == pytest.approx(1.0)


def test_break_even_is_what_passes_of_that_length_must_give():
    runs = [made_up("plain", 0, 1.0), made_up("fast", 0, 3.0), made_up("fast", 1, 9.0)]
    _, fast = summary.summarise(runs)
    assert fast.break_even == pytest.approx(
        (3.0 / 2) / (1.0 / 4)
    )  # 2 passes, 4 tokens; the lone run tells nothing
    assert summary.summarise([made_up("fast", 0, 3.0)])[0].break_even is None


def test_totals_shares_and_unknowns():
    runs = [made_up("plain", 0, 1.0), made_up("mlx-lm", 0, 2.0, ours=False)]
    plain, theirs = summary.summarise(runs)
    assert (plain.tokens_per_pass, plain.acceptance_rate) == (2.0, 0.5)
    assert (plain.draft_share, plain.verify_share, plain.other_share) == (0.25, 0.5, 0.25)
    assert plain.tokens_per_s_vs_mlx_lm == pytest.approx(2.0)
    assert (theirs.tokens_per_pass, theirs.acceptance_rate, theirs.other_share) == (None, None, None)


def test_mismatches_count_positions_and_missing_tokens():
    assert summary.count_mismatches((1, 2, 3), (1, 2, 3)) == 0
    assert summary.count_mismatches((1, 9, 3), (1, 2, 3)) == 1
    assert summary.count_mismatches((1, 2), (1, 2, 3, 4)) == 2
    runs = [
        made_up("plain", 0, 1.0), made_up("fast", 0, 1.0, (1, 2, 3, 9)), made_up("fast", 1, 1.0),
        made_up("mlx-lm", 0, 1.0, (1, 9, 9, 9), ours=False),
    ]  # fmt: skip
    assert summary.run_mismatches(runs) == [0, 1, None, 3]
    assert summary.run_mismatches(runs, comparable=False) == [0, 1, None, None]
    fast = next(line for line in summary.summarise(runs) if line.variant == "fast")
    assert (fast.mismatches, fast.num_compared) == (1, 4)


def test_domains_get_lines_of_their_own_only_when_there_are_several():
    one = summary.summarise([made_up("plain", 0, 1.0)])
    two = summary.summarise([made_up("plain", 0, 1.0), made_up("plain", 0, 2.0, domain="e")])
    assert [line.domain for line in one] == ["all"]
    assert [(line.domain, line.num_runs) for line in two] == [("all", 2), ("d", 1), ("e", 1)]


def test_tables_show_ratios_only_against_what_ran():
    lines = summary.summarise([made_up("plain", 0, 1.0), made_up("tree:4", 0, 0.5)])
    (table,) = tables.summary_tables(lines)
    assert "× plain" in table.header
    assert "× mlx-lm" not in table.header
    markdown = table.to_markdown().splitlines()
    assert markdown[0] == "**all prompts**"
    row = [cell.strip() for cell in markdown[-1].strip("|").split("|")]
    assert row == ["tree:4", "8.0", "2.00", "2.00", "2.00", "1.00", "50%", "25%", "50%", "25%", "20", "0/4"]
    (other,) = tables.summary_tables(summary.summarise([made_up("mlx-lm", 0, 1.0, ours=False)]))
    assert "× plain" not in other.header
    assert "prompt × mlx-lm" in other.header


# -- the wrong draft -------------------------------------------------------------------------------------


def test_wrong_proposals_avoid_everything_the_real_draft_proposed(pair):
    model = pair.drafters[1].model
    sampler = TargetSampler(SamplingSettings(), VOCAB)
    right, wrong = ModelDrafter(model), WrongDrafter(ModelDrafter(model), VOCAB)
    for drafter in (right, wrong):
        drafter.prefill([1, 2, 3, 4], lambda done: None, lambda: False)
        drafter.begin([1, 2, 3, 4], sampler)
    tree = TokenTree(4, 3)
    (good,), (bad,) = right.expand(tree, [0]), wrong.expand(tree, [0])
    assert len(bad.tokens) == len(set(bad.tokens)) == len(good.tokens) > 0
    assert not set(bad.tokens) & set(good.tokens)
    assert list(bad.confidences) == list(good.confidences)
    assert wrong.rows_fed == right.rows_fed > 0
    assert all(0 <= token < VOCAB for token in bad.tokens)


def test_a_wrong_prompt_lookup_always_proposes():
    wrong = WrongDrafter(NgramDrafter(), VOCAB)
    wrong.begin([1, 2, 3], TargetSampler(SamplingSettings(), VOCAB))
    (found,) = wrong.expand(TokenTree(3, 2), [0])
    assert isinstance(found, Candidates)
    assert (len(found.tokens), found.source) == (1, NGRAM)
    assert found.tokens[0] != 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_draft_is_never_accepted_where_the_real_one_always_is(pair, temperature):
    settings = SpeculationSettings("throughput", 8)  # forced, so that it cannot stop drafting
    done = {}
    for kind in ("all", "wrong"):
        contender = EngineContender(kind, variant_pair(pair, Variant(kind, kind, settings)), settings)
        done[kind] = contender.generate([1, 2, 3], Sampling(24, temperature))
    assert done["wrong"].tokens == done["all"].tokens
    assert done["wrong"].stats.path_tested > 10
    assert done["wrong"].stats.accepted == 0
    assert done["all"].stats.acceptance_rate > 0.9


# -- whole runs ------------------------------------------------------------------------------------------


def test_contenders_keep_what_they_learn_but_no_prompt(pair):
    (variant,) = parse_variants("throughput")
    own = variant_pair(pair, variant)
    contender = EngineContender("throughput", own, variant.settings)
    first, second = (contender.generate([1, 2, 3, 4, 5], Sampling(8)) for _ in range(2))
    assert second.tokens == first.tokens
    assert second.stats.reused_tokens == 0
    assert own.profile.costs.verify
    assert not pair.profile.costs.verify


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_all_our_variants_give_the_same_text(pair, tmp_path, temperature):
    report = measure_pair(plan_of(tmp_path, temperature=temperature), pair, "tiny")
    assert len(report.runs) == 8 * 3 * 2
    assert set(summary.run_mismatches(report.runs)) == {0}
    accepted = {line.variant: line.acceptance_rate for line in summary.summarise(report.runs)}
    assert accepted["tree:6"] > 0.5
    assert accepted["no-draft"] is None


def test_mlx_lm_runs_on_a_copy_of_the_same_weights(pair, tmp_path):
    plan = plan_of(tmp_path, "plain,mlx-lm,mlx-lm-draft", repeat=1)
    report = measure_pair(plan, pair, "tiny", draft_path=model_folder(tmp_path / "draft", 3))
    by_variant = {run.variant: run.generation for run in report.runs if run.place.prompt == "two"}
    assert by_variant["mlx-lm"].tokens == by_variant["plain"].tokens
    assert len(by_variant["mlx-lm-draft"].tokens) == len(by_variant["plain"].tokens)
    assert by_variant["mlx-lm"].num_timed == len(by_variant["mlx-lm"].tokens) - 1
    assert any("first token" in note for note in report.notes)
    with pytest.raises(UsageError, match="needs a draft model"):
        measure_pair(plan, pair, "tiny")


def test_a_pair_without_draft_still_runs_every_variant_of_ours(pair, tmp_path):
    from dataclasses import replace

    alone = replace(pair, drafters=[], draft_name="none")
    report = measure_pair(plan_of(tmp_path, "plain,throughput,ngram,wrong", repeat=1), alone, "tiny")
    drafted = {
        v: sum(r.generation.stats.drafted for r in report.runs if r.variant == v) for v in ("throughput", "wrong")
    }
    assert drafted["throughput"] == 0
    assert drafted["wrong"] > 0
    with pytest.raises(UsageError, match="draft:4 needs a draft model or an n-gram table"):
        measure_pair(plan_of(tmp_path, "plain,draft:4", repeat=1), alone, "tiny")


def test_the_draft_alone_is_without_prompt_lookup(pair):
    sources = {}
    for name in ("tree:8", "draft:8"):
        (variant,) = parse_variants(name)
        assert variant.settings == SpeculationSettings("throughput", 8)
        sources[name] = [drafter.source for drafter in variant_pair(pair, variant).drafters]
    assert sources == {"tree:8": ["ngram", "model"], "draft:8": ["model"]}


def test_report_files_hold_every_run_versions_and_the_command(pair, tmp_path):
    report = measure_pair(plan_of(tmp_path, "plain,tree:6"), pair, "tiny")
    assert write_report(report, tmp_path / "out", ["llmcad-mlx", "bench"]) is None
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["argv"] == ["llmcad-mlx", "bench"]
    assert {"mlx", "mlx-lm", "numba"} <= set(written["machine"]["versions"])
    assert written["options"]["variants"] == ["plain", "tree:6"]
    assert len(written["runs"]) == 12
    assert {
        "variant", "domain", "prompt", "repetition", "prompt_s", "decode_s", "tokens", "tokens_per_s",
        "prompt_tokens_per_s", "tokens_per_pass", "acceptance_rate", "target_passes", "draft_s", "verify_s",
        "other_s", "equals_plain",
    } <= set(written["runs"][0])  # fmt: skip
    run = written["runs"][0]
    assert run["draft_s"] + run["verify_s"] + run["other_s"] == pytest.approx(run["decode_s"])
    assert "tree:6" in (tmp_path / "out" / "bench.md").read_text()
    for name in ("tokens_per_s.png", "time_split.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_everything_but_the_plots_is_written(pair, tmp_path, monkeypatch):
    report = measure_pair(plan_of(tmp_path, "plain", repeat=1), pair, "tiny")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_report(report, tmp_path / "out", []) == MISSING
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]


def test_markdown_and_json_of_a_report_agree(pair, tmp_path):
    report = measure_pair(plan_of(tmp_path, "plain,throughput", repeat=1), pair, "tiny")
    shown = to_markdown(report_tables(report), report.notes)
    line = report_json(report, [])["summary"][0]
    assert f"{line['tokens_per_s']:.1f}" in shown
    assert "**a**" in shown
    assert "**b**" in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", -1), ("max_tokens", 0), ("repeat", 0), ("warmup", -1), ("temperature", -1.0)],
)
def test_plans_out_of_range_are_refused_by_name(tmp_path, option, value):
    with pytest.raises(UsageError, match=option):
        plan_of(tmp_path, **{option: value})


# -- kernels ---------------------------------------------------------------------------------------------


def test_kernel_table_has_times_ratios_and_small_errors():
    times = kernels.time_kernels(rows=(1, 4, 8), repeat=1, shape=(64, 128))
    names = {entry.kernel for entry in times}
    assert (kernels.OURS in names) == cpu_kernels_wanted()
    assert all(entry.error < 1e-5 for entry in times)
    assert {entry.rows for entry in times if entry.kernel == kernels.MLX_DENSE} == {1, 4}
    table = kernels.kernel_table(times)
    assert [row[0] for row in table.rows] == ["1", "4", "8", "largest error"]
    assert table.rows[0][2] == "1.0"


def test_the_exact_weight_is_what_mlx_dequantises():
    weight = mx.random.normal((8, 128), key=mx.random.key(1))
    packed = mx.quantize(weight, kernels.GROUP_SIZE, kernels.BITS)
    ours = kernels._Matrix(*packed).exact()
    theirs = np.asarray(mx.dequantize(*packed, kernels.GROUP_SIZE, kernels.BITS))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


# -- command line ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cli(pair, monkeypatch):
    monkeypatch.setattr(benchmark, "load_pair", lambda target, draft, progress, memory: pair)


def test_another_program_is_compared_in_the_same_run(tiny_cli, tmp_path, capsys):
    arguments = [
        "bench", "--json", "--variants", "plain", "--compare", "mlx-lm", "--prompts", str(prompt_file(tmp_path)),
        "--max-tokens", "4", "--repeat", "1", "--warmup", "0",
    ]  # fmt: skip
    assert run_cli(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"]["variants"] == ["plain", "mlx-lm"]
    assert {run["variant"] for run in report["runs"]} == {"plain", "mlx-lm"}
    assert run_cli(["bench", "--compare", "ollama"]) == 2
    assert "the one program to compare with is 'mlx-lm'" in capsys.readouterr().err


def test_json_is_the_only_thing_on_standard_output(tiny_cli, tmp_path, capsys):
    arguments = ["bench", "--json", "--variants", "plain,throughput", "--prompts", str(prompt_file(tmp_path))]
    assert run_cli([*arguments, "--max-tokens", "4", "--repeat", "1", "--warmup", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["max_tokens"] == 4


def test_a_pipe_gets_markdown_and_out_gets_files(tiny_cli, tmp_path, capsys):
    arguments = ["bench", "--variants", "plain", "--prompts", str(prompt_file(tmp_path)), "--max-tokens", "4"]
    assert run_cli([*arguments, "--repeat", "1", "--warmup", "0", "--out", str(tmp_path / "new" / "out")]) == 0
    assert "| plain" in capsys.readouterr().out
    assert (tmp_path / "new" / "out" / "bench.json").exists()


def test_ctrl_c_prints_the_table_and_ends_with_130(tiny_cli, tmp_path, capsys, monkeypatch):
    generate, calls = EngineContender.generate, []

    def interrupted(self, prompt, sampling):
        calls.append(self.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompt, sampling)

    monkeypatch.setattr(EngineContender, "generate", interrupted)
    arguments = ["bench", "--variants", "plain,tree:4", "--prompts", str(prompt_file(tmp_path)), "--warmup", "0"]
    assert run_cli([*arguments, "--max-tokens", "4"]) == 130
    shown = capsys.readouterr()
    assert "| tree:4" in shown.out
    assert "only 2 generations" in shown.out
    assert "interrupted" in shown.err


@pytest.mark.parametrize(
    "arguments", [["--variants", "fast"], ["--domains", "x"], ["--repeat", "0"], ["--prompts", "/no/such/file"]]
)
def test_bad_options_end_with_2_before_anything_is_loaded(arguments, capsys):
    assert run_cli(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_all_variants(capsys):
    assert run_cli(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("chain:K", "tree:N", "no-draft", "mlx-lm-draft", "--kernels", "--growth"):
        assert name in shown
