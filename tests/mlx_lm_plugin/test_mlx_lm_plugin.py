"""The plugin beside mlx-lm's own functions, field by field, on a tiny model."""

from __future__ import annotations

import gc
import importlib
import itertools
import logging
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers

import llmcad_mlx
from llmcad_mlx import ModelError, UsageError, VocabularyError, mlx_lm_plugin
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.mlx_lm_plugin import speculation
from llmcad_mlx.mlx_lm_plugin.adapted import AdaptedModels
from llmcad_mlx.mlx_lm_plugin.generation import generate, installed, stream_generate
from llmcad_mlx.settings import SpeculationSettings
from llmcad_mlx.store.convert import convert_folder
from tests.models.test_config import rewrite
from tests.support.architecture_configs import build
from tests.support.tiny import WEIGHTS, tiny_llama
from tests.support.tiny_folder import EOS, VOCAB, copy_folder, family_folder

PROMPT = "then the other one ran in and then the other one"
SECOND = "and the one in the other"
LOGGER = "llmcad_mlx.mlx_lm_plugin"

# In 16 bits mlx-lm reads a prompt in other pieces than we do, and rounds in other places.
ATOL = 2.5e-3 if mx.float32 == WEIGHTS else 0.5
Loaded = tuple[Any, Any]  # an mlx-lm model and its tokenizer

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def loaded(tiny_home: Path, folder: Path) -> Loaded:
    model, tokenizer = mlx_lm.load(str(folder))
    return model, tokenizer


@pytest.fixture(scope="module")
def draft(tiny_home: Path, draft: Path) -> Any:
    return mlx_lm.load(str(draft))[0]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees of eight nodes whatever they cost: on a tiny model plain decoding is faster."""

    def forced_policy(settings: SpeculationSettings, *learned: Any) -> Any:
        return make_policy(SpeculationSettings(tree_nodes=min(8, learned[-1])), *learned)

    monkeypatch.setattr(speculation, "make_policy", forced_policy)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def same_responses(ours: Sequence[GenerationResponse], theirs: Sequence[GenerationResponse]) -> None:
    """Every field but times, memory and `from_draft`, which tells what was drafted here."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is GenerationResponse
        for name in ("text", "token", "prompt_tokens", "generation_tokens", "finish_reason"):
            assert getattr(mine, name) == getattr(other, name), name
        assert (mine.logprobs.shape, mine.logprobs.dtype) == (other.logprobs.shape, other.logprobs.dtype)
        assert np.allclose(numbers(mine.logprobs), numbers(other.logprobs), atol=ATOL)
        for name in ("prompt_tps", "generation_tps", "peak_memory"):
            assert getattr(mine, name) > 0
    assert any(np.isfinite(numbers(r.logprobs)).any() for r in ours)


def both(
    loaded: Loaded, prompt: Any, options: Callable[[], dict[str, Any]], seed: int = 0, draft: Any = None
) -> tuple[list[GenerationResponse], list[GenerationResponse]]:
    """Our responses, with a draft model if given, and mlx-lm's plain ones.

    `options` makes fresh ones, for samplers and caches have state.
    """
    mx.random.seed(seed)
    ours = list(stream_generate(*loaded, prompt, draft_model=draft, **options()))
    mx.random.seed(seed)
    return ours, list(mlx_lm.stream_generate(*loaded, prompt, **options()))


def num_drafted(responses: Sequence[GenerationResponse]) -> int:
    return sum(response.from_draft for response in responses)


def two_of(kind: type, *arguments: int) -> list[Any]:
    return [kind(*arguments) for _ in range(2)]


class LetEndAfter:
    """A logits processor that allows only the end of the sequence after `count` tokens, and keeps what it sees."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.seen.append(tokens.tolist())
        is_end = mx.arange(logits.shape[-1]) == EOS
        return mx.where(is_end if len(self.seen) <= self.count else ~is_end, -mx.inf, logits)


def test_repeated_text_is_drafted_without_a_draft_model(loaded: Loaded, forced: None) -> None:
    """A bias makes the model repeat itself."""
    options = {"max_tokens": 30, "logits_processors": make_logits_processors({20: 60.0})}
    ours, theirs = both(loaded, PROMPT, lambda: dict(options))
    same_responses(ours, theirs)
    assert num_drafted(ours) > 10


@pytest.mark.parametrize(
    ("as_given", "sampling"),
    [
        *((kind, {}) for kind in (str, list, mx.array)),
        (str, {"temp": 0.8}),
        (str, {"temp": 1.0, "top_p": 0.9, "min_p": 0.02}),
        (str, {"temp": 1.5, "top_k": 5}),
    ],
)
def test_same_seed_same_responses_at_any_temperature(
    loaded: Loaded, draft: Any, as_given: type, sampling: dict[str, Any], forced: None
) -> None:
    prompt = PROMPT if as_given is str else as_given(loaded[1].encode(PROMPT))
    options = {"max_tokens": 40, "sampler": make_sampler(**sampling)}
    ours, theirs = both(loaded, prompt, lambda: dict(options), seed=5, draft=draft)
    same_responses(ours, theirs)
    assert num_drafted(ours) > (0 if sampling else 10)


def test_a_program_that_seeds_once_gets_the_same_second_text(loaded: Loaded, forced: None) -> None:
    texts = []
    for function in (generate, mlx_lm.generate):
        mx.random.seed(3)
        sampler = make_sampler(1.0)
        texts.append([function(*loaded, PROMPT, max_tokens=count, sampler=sampler) for count in (7, 20)])
    assert texts[0] == texts[1]
    assert not texts[0][1].startswith(texts[0][0])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_processors_see_and_do_what_they_do_in_mlx_lm(
    loaded: Loaded, draft: Any, temperature: float, forced: None
) -> None:
    spies: list[LetEndAfter] = []

    def options() -> dict[str, Any]:
        spies.append(LetEndAfter(11))
        usual = make_logits_processors({5: -1.0, 9: 2.0}, repetition_penalty=1.3)
        return {"max_tokens": -1, "sampler": make_sampler(temperature), "logits_processors": [*usual, spies[-1]]}

    ours, theirs = both(loaded, PROMPT, options, seed=2, draft=draft)
    same_responses(ours, theirs)
    assert ours[-1].finish_reason == "stop"
    assert ours[-1].token == EOS
    assert spies[0].seen == spies[1].seen[:12]


def test_a_caller_s_own_sampler_is_called_once_for_each_token(loaded: Loaded, forced: None) -> None:
    shapes = []

    def second_best(logprobs: mx.array) -> mx.array:
        shapes.append(logprobs.shape)
        return mx.argsort(-logprobs, axis=-1)[:, 1]

    ours = list(stream_generate(*loaded, PROMPT, max_tokens=16, sampler=second_best))
    # One more than it gives out: mlx-lm draws ahead.
    assert shapes == [(1, VOCAB)] * 17
    same_responses(ours, list(mlx_lm.stream_generate(*loaded, PROMPT, max_tokens=16, sampler=second_best)))


OURS, THEIRS = stream_generate, mlx_lm.stream_generate


@pytest.mark.parametrize(
    ("turns", "num_taken", "num_trimmed"),
    [
        *((turns, None, 0) for turns in itertools.product((OURS, THEIRS), repeat=2)),
        *(((OURS, THEIRS), num_taken, 0) for num_taken in (1, 3, 6, 15)),
        ((OURS, OURS), None, 9),
    ],
)
def test_prompt_cache_over_two_turns(
    loaded: Loaded, turns: tuple[Any, Any], num_taken: int | None, num_trimmed: int, forced: None
) -> None:
    """Either may take either turn; the first may be left early, or with its last response and never closed."""
    found = []
    for first, second in (turns, (THEIRS, THEIRS)):
        cache = make_prompt_cache(loaded[0])
        running = first(*loaded, PROMPT, max_tokens=15, prompt_cache=cache)
        responses = list(itertools.islice(running, num_taken))
        if num_taken != 15:
            running.close()
        lengths = [entry.offset for entry in cache]
        trim_prompt_cache(cache, num_trimmed)
        responses += second(*loaded, SECOND, max_tokens=15, prompt_cache=cache)
        lengths += [entry.offset for entry in cache]
        rows = [numbers(entry.keys[:, :, : entry.offset]) for entry in cache]
        found.append((responses, lengths, rows))
    (ours, our_lengths, our_rows), (theirs, their_lengths, their_rows) = found
    same_responses(ours, theirs)
    assert our_lengths == their_lengths
    for mine, other in zip(our_rows, their_rows, strict=True):
        assert np.allclose(mine, other, atol=ATOL)


def test_a_draft_model_adds_to_what_repeats(loaded: Loaded, draft: Any, forced: None) -> None:
    alone, theirs = both(loaded, SECOND, lambda: {"max_tokens": 40})
    drafted, _ = both(loaded, SECOND, lambda: {"max_tokens": 40}, draft=draft)
    same_responses(drafted, theirs)
    assert num_drafted(drafted) > num_drafted(alone)


def test_num_draft_tokens_bounds_a_pass(loaded: Loaded, forced: None) -> None:
    """The target drafts for itself, so that all is accepted."""
    responses = list(stream_generate(*loaded, SECOND, max_tokens=30, draft_model=loaded[0], num_draft_tokens=2))
    runs = [len(list(run)) for is_draft, run in itertools.groupby(r.from_draft for r in responses) if is_draft]
    assert max(runs) == 2
    assert [r.token for r in responses] == [r.token for r in stream_generate(*loaded, SECOND, max_tokens=30)]


@pytest.mark.parametrize("gives_up", [False, True])
def test_prompt_cache_with_a_draft_model(
    loaded: Loaded, draft: Any, gives_up: bool, forced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the draft, after a break, gives up the start of the text."""
    if gives_up:
        monkeypatch.setattr("llmcad_mlx.drafting.model._FED_WITH_NODES", 0)
        monkeypatch.setattr("llmcad_mlx.drafting.model._WINDOW", 1)
    cache = make_prompt_cache(loaded[0]) + make_prompt_cache(draft)
    own, text = make_prompt_cache(loaded[0]), []
    for prompt in (PROMPT, SECOND, PROMPT):
        ours = list(stream_generate(*loaded, prompt, max_tokens=20, draft_model=draft, prompt_cache=cache))
        theirs = list(mlx_lm.stream_generate(*loaded, prompt, max_tokens=20, prompt_cache=own))
        same_responses(ours, theirs)
        assert {entry.offset for entry in cache} == {own[0].offset}
        text += [*loaded[1].encode(prompt), *(response.token for response in theirs)]
    # The draft's part is right too: what it says next is what it says after the whole text.
    part = cache[len(loaded[0].layers) :]
    continued = draft(mx.array([[7]]), cache=part)[0, -1]
    assert np.allclose(numbers(continued), numbers(draft(mx.array([[*text, 7]]))[0, -1]), atol=2 * ATOL)


@pytest.mark.parametrize("step", [{}, *({"prefill_step_size": size} for size in (1, 4, 1000))])
def test_prompt_progress(loaded: Loaded, step: dict[str, int]) -> None:
    told: list[list[tuple[int, int]]] = []
    for function in (OURS, THEIRS):
        cache = make_prompt_cache(loaded[0])
        list(THEIRS(*loaded, SECOND, max_tokens=2, prompt_cache=cache))
        told.append([])
        reported = {"prompt_progress_callback": lambda *done: told[-1].append(done), **step}
        list(function(*loaded, PROMPT, max_tokens=2, prompt_cache=cache, **reported))
    assert told[0] == told[1]
    assert len(told[0]) >= 3


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("", lambda: {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}, "kv_bits is given"),
        ("", lambda: {"prompt_cache": two_of(QuantizedKVCache, 32, 8)}, "prompt_cache holds QuantizedKVCache"),
        ("", lambda: {"prompt_cache": two_of(RotatingKVCache, 16)}, "prompt_cache holds RotatingKVCache"),
        ("qwen2", lambda: {"max_kv_size": 17}, "the text may outgrow max_kv_size"),
        ("qwen2", lambda: {"max_kv_size": 18}, ""),
        ("llama", lambda: {"max_kv_size": 9}, ""),  # it makes its own caches, which mlx-lm leaves as they are
        ("mamba2", dict, "rollback"),
    ],
    ids=["kv_bits", "quantised", "rotating", "outgrown", "fits", "own caches", "cannot take tokens back"],
)
def test_what_is_left_to_mlx_lm(
    loaded: Loaded, family: str, options: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = (build(family) if family else loaded[0], loaded[1])
    with caplog.at_level(logging.INFO, LOGGER):
        same_responses(*both(model, [3, 4, 5, 6, 7, 8], lambda: {"max_tokens": 12, **options()}))
    assert caplog.messages[0].startswith(f"left to mlx-lm: {reason}" if reason else "12 tokens in")


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "gpt2", "deepseek_v3", "phi3", "cohere2"])
def test_other_families(loaded: Loaded, family: str, forced: None) -> None:
    """Sliding windows, experts, chains only, latent attention: with a prompt cache where it is a plain one."""
    model = (build(family), loaded[1])
    prompt = [3, 4, 5, 6, 3, 4, 5]
    same_responses(*both(model, prompt, lambda: {"max_tokens": 12}))
    caches = [make_prompt_cache(model[0]) for _ in range(2)]
    each = iter(caches)
    same_responses(*both(model, prompt, lambda: {"max_tokens": 6, "prompt_cache": next(each)}))
    went_on = [list(mlx_lm.stream_generate(*model, [6, 3], max_tokens=6, prompt_cache=cache)) for cache in caches]
    same_responses(*went_on)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "non-zero"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"prefill_step_size": 0}, UsageError, "prefill_step_size: 0 is out of range"),
        ({"num_draft_tokens": -1}, UsageError, "num_draft_tokens: -1 is out of range"),
        ({"draft_model": tiny_llama(1)}, VocabularyError, "draft_model: it has 40 logits"),
    ],
)
def test_bad_options(loaded: Loaded, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        list(stream_generate(*loaded, PROMPT, **options))


def test_prompt_cache_without_a_part_for_the_draft(loaded: Loaded, draft: Any) -> None:
    with pytest.raises(UsageError, match="prompt_cache: it has no part for the draft model"):
        list(stream_generate(*loaded, PROMPT, draft_model=draft, prompt_cache=make_prompt_cache(loaded[0])))


def test_the_user_s_model_is_left_as_it_was(loaded: Loaded) -> None:
    model, tokenizer = loaded
    before = [(name, id(value)) for name, value in tree_flatten(model.parameters())]
    classes = [type(module) for module in model.modules()]
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12)
    assert generate(model, tokenizer, PROMPT, max_tokens=12) == text
    assert [(name, id(value)) for name, value in tree_flatten(model.parameters())] == before
    assert [type(module) for module in model.modules()] == classes
    assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12) == text


def test_changed_weights_are_noticed(loaded: Loaded) -> None:
    model = tiny_llama(3, vocab=VOCAB)
    first = generate(model, loaded[1], PROMPT, max_tokens=12)
    model.update(tree_map(lambda p: p * 1.5, model.parameters()))
    second = generate(model, loaded[1], PROMPT, max_tokens=12)
    assert second != first
    assert second == mlx_lm.generate(model, loaded[1], PROMPT, max_tokens=12)


def test_what_was_made_for_a_model_goes_with_it() -> None:
    models, model = AdaptedModels(), tiny_llama(4)
    adapted = models.of(model)
    assert models.of(model) is adapted
    seen, weight = weakref.ref(adapted), weakref.ref(adapted.tree.model)
    del adapted, model
    gc.collect()
    assert seen() is None
    assert weight() is None


def test_a_failing_sampler_leaves_the_prompt_cache_usable(loaded: Loaded, forced: None) -> None:
    rows = iter(range(5))

    def failing(logprobs: mx.array) -> mx.array:
        if next(rows, None) is None:
            raise RuntimeError("no more")
        return mx.argmax(logprobs, axis=-1)

    cache, prompt = make_prompt_cache(loaded[0]), loaded[1].encode(PROMPT)
    with pytest.raises(RuntimeError, match="no more"):
        list(stream_generate(*loaded, PROMPT, sampler=failing, prompt_cache=cache))
    whole = [r.token for r in mlx_lm.stream_generate(*loaded, PROMPT, max_tokens=10)]
    kept = cache[0].offset - len(prompt)
    assert 0 <= kept <= 5
    continued = loaded[0](mx.array([[7]]), cache=cache)[0, -1]
    expected = loaded[0](mx.array([[*prompt, *whole[:kept], 7]]))[0, -1]
    assert np.allclose(numbers(continued), numbers(expected), atol=2 * ATOL)


def test_installed_reaches_mlx_lms_own_functions(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    before = mlx_lm.stream_generate
    modules = [mlx_lm, *(importlib.import_module(f"mlx_lm.{name}") for name in ("chat", "server"))]
    plain = mlx_lm.generate(*loaded, PROMPT, max_tokens=12)
    with caplog.at_level(logging.INFO, LOGGER), installed():
        assert all(module.stream_generate is stream_generate for module in modules)
        assert mlx_lm.generate(*loaded, PROMPT, max_tokens=12) == plain
    assert "12 tokens in" in caplog.text
    assert all(module.stream_generate is before for module in modules)


def test_verbose_prints_the_text_and_mlx_lms_figures(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(*loaded, PROMPT, verbose=True, max_tokens=12)
    ours = capsys.readouterr().out
    mlx_lm.generate(*loaded, PROMPT, verbose=True, max_tokens=12)
    theirs = capsys.readouterr().out
    assert text in ours
    assert re.sub(r"\d", "", ours) == re.sub(r"\d", "", theirs)


MOVED = {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}
READ_OTHERWISE = {
    "moved": (("rope_theta",), MOVED, r"model.layers.\d.self_attn.rope.base is 300.0, not 10000"),
    "moved, by its own word": (
        ("rope_theta", "tie_word_embeddings"),
        MOVED,
        r"(.* is 300.0, not 10000|it has a lm_head)",
    ),
    "head": (("tie_word_embeddings",), {}, r"it has a lm_head"),
}


@pytest.mark.parametrize("case", READ_OTHERWISE)
def test_a_config_is_read_as_its_publisher_does(folder: Path, tmp_path: Path, case: str) -> None:
    """By `load` and what is installed; what mlx-lm alone has loaded is refused, whatever runs it."""
    drop, changes, difference = READ_OTHERWISE[case]
    place = rewrite(copy_folder(folder, tmp_path / "model"), drop, **changes)
    with llmcad_mlx.load(place, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=8).tokens
    for options in ({}, {"kv_bits": 8}):
        with pytest.raises(UsageError, match=rf"\({difference}\); load it with llmcad_mlx.mlx_lm_plugin.load"):
            list(stream_generate(*mlx_lm.load(str(place)), PROMPT, max_tokens=8, **options))
    assert [r.token for r in stream_generate(*mlx_lm_plugin.load(str(place)), PROMPT, max_tokens=8)] == expected
    with installed():
        model, tokenizer, config = mlx_lm.load(str(place), return_config=True)
    assert [r.token for r in stream_generate(model, tokenizer, PROMPT, max_tokens=8)] == expected
    assert config["rope_theta"] == model.args.rope_theta
    assert mlx_lm.utils.load_model.__module__ == "mlx_lm.utils"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}


def quantised(place: Path) -> Path:
    convert_folder(place, place.parent / "quantised", bits=8, group_size=32)
    return place.parent / "quantised"


def linked(place: Path) -> Path:
    """As the hub's client lays models out."""
    blobs, snapshot = place.parent / "blobs", place.parent / "models--a--b" / "snapshots" / "0123"
    place.rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


@pytest.mark.parametrize("prepare", [lambda place: place, quantised, linked], ids=["plain", "quantised", "linked"])
@pytest.mark.parametrize("changes", [{}, MOVED, {"rope_scaling": YARN}])
def test_what_is_loaded_right_is_never_refused(
    folder: Path, tmp_path: Path, prepare: Callable[[Path], Path], changes: dict[str, Any]
) -> None:
    """Also where its arguments are those of mlx-lm's reading; with layers of an adapter; with no folder left."""
    place = prepare(
        rewrite(copy_folder(folder, tmp_path / "model"), ("rope_theta",) if changes == MOVED else (), **changes)
    )
    for gone in (False, True):
        model, tokenizer = mlx_lm_plugin.load(str(place))
        linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
        if gone:
            shutil.rmtree(place)
        assert len(list(stream_generate(model, tokenizer, PROMPT, max_tokens=4))) == 4


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}], ids=["trees", "mlx-lm's own"])
def test_a_text_ends_where_mlx_lm_computes_another(tmp_path: Path, options: dict[str, Any]) -> None:
    """Phi 3 with factors for long texts, of which mlx-lm takes one set for all."""
    factors = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
    place = family_folder(tmp_path / "model", "phi3")
    rewrite(place, ("sliding_window",), rope_scaling=factors, original_max_position_embeddings=16)
    with pytest.raises(UsageError, match=r"rope._freqs is .*; load it with llmcad_mlx.mlx_lm_plugin.load"):
        list(stream_generate(*mlx_lm.load(str(place)), [5, 6], max_tokens=4))
    loaded = mlx_lm_plugin.load(str(place))
    with llmcad_mlx.load(place, None) as engine:
        expected = engine.generate([5, 6, 7], max_tokens=4).tokens
        assert engine.pair.context_length == 16
    assert [r.token for r in stream_generate(*loaded, [5, 6, 7], max_tokens=4, **options)][:4] == expected
    loaded[1].eos_token_ids = set()
    for asked in (30, -1):
        responses = list(stream_generate(*loaded, [*range(5, 15)], max_tokens=asked, **options))
        assert (len(responses), responses[-1].finish_reason) == (6, "length")
    with pytest.raises(
        UsageError, match=r"prompt: 16 tokens, but mlx-lm computes .* only up to 16; give a shorter"
    ):
        list(stream_generate(*loaded, [*range(5, 21)], **options))


def test_weights_that_changed_after_loading_are_no_reason_to_refuse(folder: Path, tmp_path: Path) -> None:
    place = copy_folder(folder, tmp_path / "model")
    loaded = mlx_lm.load(str(place))
    mx.eval(loaded[0].parameters())
    (place / "model.safetensors").write_text("")
    assert len(list(stream_generate(*loaded, PROMPT, max_tokens=4))) == 4


def test_looking_at_a_model_draws_no_random_numbers(folder: Path) -> None:
    sampler, texts = make_sampler(temp=1.0), []
    for run in (mlx_lm.stream_generate, stream_generate):
        loaded = mlx_lm.load(str(folder))
        mx.random.seed(7)
        texts.append([response.token for response in run(*loaded, PROMPT, max_tokens=12, sampler=sampler)])
    assert texts[0] == texts[1]


def test_settings_that_a_caller_gave_are_not_a_misreading(folder: Path) -> None:
    own = mlx_lm.load(str(folder), model_config={"rope_theta": 5.0})
    assert len(list(stream_generate(*own, PROMPT, max_tokens=4))) == 4


def test_what_mlx_lm_would_ignore_is_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = rewrite(copy_folder(folder, tmp_path / "model"), hidden_act="gelu")
    with pytest.raises(ModelError, match="hidden_act is 'gelu', which mlx-lm does not heed"):
        mlx_lm_plugin.load(str(place))
    with pytest.raises(ModelError, match="hidden_act is 'gelu', which mlx-lm does not heed"):
        list(stream_generate(*mlx_lm.load(str(place)), PROMPT, max_tokens=4))
    rewrite(place, ("layer_types",), hidden_act="silu", model_type="mistral", sliding_window=8)
    list(stream_generate(*mlx_lm.load(str(place)), PROMPT, max_tokens=4))
    assert "as the publisher's code does up to 8 tokens; beyond, the text is another" in caplog.text


@pytest.mark.parametrize("version", ["0.31.3", "0.32.1", "0.32.9", "0.33.0", "1.0"])
def test_import_fails_with_another_mlx_lm(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if version == "0.32.9":
        importlib.reload(mlx_lm_plugin)
        return
    message = rf"tested with mlx-lm >=0.32.2,<0.33, not {version}; run: pip install 'mlx-lm>=0.32.2,<0.33'"
    with pytest.raises(ImportError, match=message):
        importlib.reload(mlx_lm_plugin)
