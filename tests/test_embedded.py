"""The embedded pair, for real: same text with and without drafting, in far fewer passes where text repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from llmcad_mlx import Engine, load
from llmcad_mlx.cpu import SWITCH, cpu_kernels_wanted
from llmcad_mlx.measure.runner import EngineContender, variant_pair
from llmcad_mlx.measure.workload import load_prompts, parse_variants
from llmcad_mlx.models import positions
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.models.probe import _activations_in_float32
from llmcad_mlx.models.tree_model import ProbeReport, TreeModel
from llmcad_mlx.settings import GenerationOptions
from llmcad_mlx.store.names import DEFAULT_PRESET, resolve_target
from llmcad_mlx.store.presets import FileSource, PackagedSource, get_preset
from llmcad_mlx.tree.token_tree import MODEL, NGRAM, TABLE
from tests.support.real_text import PROMPTS, REPEAT, chat, compare, default_engine

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with default_engine() as loaded:
        yield loaded


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculative_text_equals_plain_text(engine: Engine, temperature: float) -> None:
    """By turns under what the policy chooses and under a forced tree, which drafts whatever it costs."""
    for seed, prompt in enumerate(PROMPTS[:4]):
        options = {"tree_nodes": 16} if seed % 2 == 0 else {}
        found = compare(engine, prompt, 64, temperature=temperature, seed=seed, **options)
        assert found.tokens > 20
        assert found.mismatches == 0, prompt


def test_with_its_publishers_sampling_a_first_answer_ends(engine: Engine) -> None:
    """Greedy, the model says the same line until no token is left."""
    target = get_preset(DEFAULT_PRESET).target
    assert isinstance(target, FileSource)
    options = GenerationOptions.of(max_tokens=1024, **target.sampling)
    assert engine.generate(chat("What is a hash table?"), options=options).finish_reason == "stop"


def test_repeated_text_takes_few_passes(engine: Engine) -> None:
    """Sixteen nodes are forced: what the policy would choose depends on the machine's speed."""
    result = engine.generate(chat(REPEAT), max_tokens=64, tree_nodes=16)
    assert result.stats.tokens_per_pass > 3
    assert result.stats.accepted > result.stats.target_passes


def test_the_draft_that_comes_with_the_package_is_the_default(engine: Engine) -> None:
    assert [drafter.source for drafter in engine.pair.drafters] == [NGRAM, TABLE, MODEL]
    draft = get_preset(DEFAULT_PRESET).draft
    assert isinstance(draft, PackagedSource)
    files = [file for file in draft.path.rglob("*") if file.is_file()]
    assert engine.pair.names.draft_path == draft.path
    assert sum(file.stat().st_size for file in files) < 30_000_000


def test_the_draft_guesses_what_the_target_says(engine: Engine) -> None:
    """Alone, without prompt lookup, on prompts it was not made from; docs/embedded-draft.md has all forty. The
    bound is well below what was measured: it finds a draft that is broken, not one that is a little worse."""
    (variant,) = parse_variants("draft:16")
    assert variant.settings is not None
    with default_engine() as own:
        contender = EngineContender(variant.name, variant_pair(own.pair, variant), variant.settings)
        options = GenerationOptions.of(max_tokens=48)
        prompts = load_prompts(Path("examples/four_domains.toml"), per_domain=1)
        answers = [contender.generate(own.encode(chat(p.text)), options) for p in prompts]
    stats = [answer.stats for answer in answers if answer.stats is not None]
    assert len(stats) == 4
    assert sum(s.generated_tokens for s in stats) / sum(s.target_passes for s in stats) > 1.6


ODD = (
    " ", "\n\n\n", "a", "The capital of France is", "😀👩‍👩‍👧", "مرحبا بالعالم", "日本é đem", "<|im_end|> <think>",
    "def f(x):\n    if x:\n", "1234567890" * 20, "a b " * 80, "\x00\u200b\ufeff",
)  # fmt: skip


def test_odd_prompts_have_the_same_text_every_way(engine: Engine) -> None:
    """In memory, streamed, with trees and chains, greedy and sampled by turns; and it is what the tokenizer
    decodes."""
    with load(engine.pair.names.target_path, "ngram", pinned=0) as streamed:
        for seed, prompt in enumerate(ODD):
            options = {"max_tokens": 8, "temperature": 0.9 * (seed % 2), "seed": seed}
            expected = engine.generate(prompt, policy="plain", **options)
            assert expected.text == engine.tokenizer.decode(
                [token for token in expected.tokens if token not in engine.tokenizer.eos_token_ids]
            )
            for way, settings in ((engine, {"tree_nodes": 16}), (engine, {"policy": "chain"}), (streamed, {})):
                assert way.generate(prompt, **options, **settings).tokens == expected.tokens, prompt


def test_the_first_blank_of_an_answer_is_there(engine: Engine) -> None:
    answer = engine.generate("The capital of France is", max_tokens=3)
    assert answer.text.startswith(" Paris")
    stopped = engine.generate("The capital of France is", max_tokens=3, stop=[" Paris"])
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_text_makes_sense(engine: Engine) -> None:
    """Equality alone would also hold for garbage."""
    answer = engine.generate(chat("What is the capital of France?"), max_tokens=24)
    assert "Paris" in answer.text
    assert engine.generate(chat(REPEAT), max_tokens=24).text.strip()[:40].startswith("The lighthouse keeper")


@pytest.mark.skipif(cpu_kernels_wanted(), reason="MLX's own kernels compute it: make test-kernels")
def test_a_tree_in_16_bits_says_what_its_tokens_say_in_32() -> None:
    """As on a Mac. The smallest tree that branches, because MLX's float16 on a CPU takes seconds for each row."""
    loaded = load_model_folder(resolve_target(DEFAULT_PRESET))
    root, *children = (loaded.tokenizer.encode(text)[0] for text in ("The", " capital", " cat"))
    with _activations_in_float32(loaded.model):
        lines = [loaded.model(mx.array([[root, child]]))[0] for child in children]
        exact = np.array(mx.stack([lines[0][0], lines[0][1], lines[1][1]]))
    positions.install(loaded.model)
    report = ProbeReport("tree", "", 0.0, exact.shape[1], False, True, False, 0.0)
    model = TreeModel(loaded.model, loaded.config, report)
    rows = model.forward([root, *children], model.new_cache(), [-1, 0, 0]).logits
    assert rows.dtype == mx.float16
    found = np.array(rows.astype(mx.float32))
    assert np.abs(found - exact).max() < 0.02 * np.ptp(exact)
    assert np.abs(exact[1] - exact[2]).max() > 0.2 * np.ptp(exact)  # the two children say different things
    assert (found.argmax(1) == exact.argmax(1)).all()


@pytest.mark.large  # half a minute: each row takes seconds
def test_as_on_a_mac_it_computes_in_16_bits_with_mlx_s_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's job, streamed, for as few tokens as MLX's float16 on a CPU allows: seconds for each row."""
    monkeypatch.setenv(SWITCH, "mlx")
    with default_engine(draft="ngram", pinned="30MB") as engine:
        report = engine.pair.target.model.report
        assert report.capability == "tree"
        assert 0.0 <= report.max_difference < 1.0
        prompt = engine.encode("a b a b a b")
        plain = engine.generate(prompt, max_tokens=2, policy="plain")
        result = engine.generate(prompt, max_tokens=2, tree_nodes=3)
    assert result.stats.streamed_bytes > 0
    assert result.stats.tested > 0
    # Another token may be chosen only where rounding can decide.
    assert result.tokens == plain.tokens or plain.stats.near_ties > 0
