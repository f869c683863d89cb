"""The Python API on a tiny model folder: against mlx-lm, from turn to turn, and after things went wrong."""

from __future__ import annotations

import inspect
import itertools
import pydoc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import GenerationResponse

import llmcad_mlx
from llmcad_mlx import ContextLengthError, Engine, GenerationError, UsageError, load
from llmcad_mlx.drafting.model import ModelDrafter
from tests.support.architecture_configs import build, config_of
from tests.support.tiny_folder import EOS, change_config, copy_folder, write_folder

POLICIES: list[dict[str, Any]] = [
    {"policy": "plain"},
    {"policy": "chain"},
    {"policy": "paper"},
    {"policy": "throughput"},
    {"policy": "throughput", "tree_nodes": 8},
]
SPECULATIVE = {"policy": "throughput", "tree_nodes": 8}
CHAT = [{"role": "user", "content": "tell me of the cat"}]
TEXT = "then the other one ran in and then the other one"

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Callable[..., list[int]]]:
    """Tokens of plain decoding from an empty cache: the reference."""
    with load(folder, None) as reference:

        def tokens(prompt: Any, **options: Any) -> list[int]:
            reference.pair.target.truncate(0)
            return reference.generate(prompt, policy="plain", **options).tokens

        yield tokens


def test_results_are_shown_in_one_short_line(engine: Engine) -> None:
    result = engine.generate(TEXT, max_tokens=60)
    (response, *_) = engine.stream_generate(TEXT, max_tokens=1)
    for shown in (repr(result), repr(response)):
        assert len(shown) < 200
        assert "\n" not in shown
    assert "60 tokens" in repr(result)
    assert repr(response.text) in repr(response)


def test_what_users_import_is_shown() -> None:
    for name in ("load", "Engine", "BudgetError", "StorageError"):
        assert name in dir(llmcad_mlx)
        assert callable(getattr(llmcad_mlx, name))
        assert name in pydoc.render_doc(llmcad_mlx, renderer=pydoc.plaintext)
    assert "memory" in inspect.signature(load).parameters


def end_after(count: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that lets only the end-of-sequence token through after `count` tokens."""
    calls = itertools.count(1)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        ends = mx.arange(logits.shape[-1]) == EOS
        return mx.where(ends if next(calls) <= count else ~ends, -mx.inf, logits)

    return process


def failing(at: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that raises at its `at`-th token."""
    calls = itertools.count(1)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(calls) == at:
            raise RuntimeError("processor broke")
        return logits

    return process


@pytest.fixture(scope="module")
def mlx_lm_responses(folder: Path) -> Callable[..., list[GenerationResponse]]:
    """What mlx-lm generates on the same folder."""
    model, tokenizer = mlx_lm.load(str(folder))

    def generate(tokens: list[int], max_tokens: int, processors: list[Any]) -> list[GenerationResponse]:
        return list(mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens, logits_processors=processors))

    return generate


@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "ends_after"), [(TEXT, 40, None), (CHAT, 25, None), ("a", 1, None), (TEXT, -1, 17)]
)
def test_responses_agree_with_mlx_lm(
    engine: Engine,
    mlx_lm_responses: Callable[..., list[GenerationResponse]],
    prompt: Any,
    max_tokens: int,
    ends_after: int | None,
    options: dict[str, Any],
) -> None:
    def processors() -> list[Any]:
        return [] if ends_after is None else [end_after(ends_after)]

    theirs = mlx_lm_responses(engine.encode(prompt), max_tokens, processors())
    ours = list(engine.stream_generate(prompt, max_tokens=max_tokens, logits_processors=processors(), **options))
    assert len(ours) == len(theirs) == (max_tokens if ends_after is None else ends_after + 1)
    for our, their in zip(ours, theirs, strict=True):
        assert isinstance(our, GenerationResponse)
        for field in ("text", "token", "finish_reason", "prompt_tokens", "generation_tokens"):
            assert getattr(our, field) == getattr(their, field), field
        assert our.prompt_tps >= 0
        assert our.generation_tps > 0
        assert our.peak_memory > 0
        if ends_after is None:  # with processors, mlx-lm's are those of the processed logits
            np.testing.assert_allclose(np.asarray(our.logprobs), np.asarray(their.logprobs), atol=1e-3)
    assert [r.finish_reason for r in ours[:-1]] == [None] * (len(ours) - 1)
    assert ours[-1].finish_reason == ("length" if ends_after is None else "stop")
    if options["policy"] == "plain":
        assert not any(r.from_draft for r in ours)


def test_rounds_can_be_watched_and_from_draft_marks_the_accepted_tokens(engine: Engine) -> None:
    rounds: list[Any] = []
    responses = list(engine.stream_generate(TEXT, on_round=rounds.append, max_tokens=60, **SPECULATIVE))
    stats = responses[-1].stats
    assert stats is not None
    assert 0 < stats.accepted == sum(r.from_draft for r in responses)
    assert stats.generated_tokens == 60
    assert stats.target_passes == 60 - stats.accepted  # each pass adds one token of the target's own
    assert stats.tokens_per_pass > 1.2  # or the tests here show little
    assert [token for done in rounds for token in done.walk.tokens] == [r.token for r in responses]
    assert max(len(done.selection.tree) for done in rounds) == 8


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2}], ids=str)
def test_same_seed_same_text_under_every_policy(
    engine: Engine, plain: Callable[..., list[int]], sampling: dict[str, Any]
) -> None:
    expected = plain(TEXT, max_tokens=40, seed=3, **sampling)
    for options in POLICIES:
        assert engine.generate(TEXT, max_tokens=40, seed=3, **sampling, **options).tokens == expected, options
    assert (plain(TEXT, max_tokens=40, seed=4, **sampling) == expected) is not bool(sampling)


@pytest.mark.parametrize("draft", [None, "none", "ngram", "auto"])
def test_the_draft_does_not_change_the_text(
    folder: Path, plain: Callable[..., list[int]], draft: str | None
) -> None:
    with load(str(folder), draft) as loaded:
        for options in (POLICIES[1], SPECULATIVE):
            assert loaded.generate(TEXT, max_tokens=20, **options).tokens == plain(TEXT, max_tokens=20), options


@pytest.mark.parametrize("options", [POLICIES[0], SPECULATIVE], ids=str)
def test_generate_is_stream_generate_to_the_end(engine: Engine, options: dict[str, Any]) -> None:
    progress: list[tuple[int, int]] = []
    result = engine.generate(CHAT, lambda *counts: progress.append(counts), max_tokens=30, **options)
    responses = list(engine.stream_generate(CHAT, max_tokens=30, **options))
    assert result.text == "".join(r.text for r in responses)
    assert result.tokens == [r.token for r in responses]
    assert result.finish_reason == "length"
    assert result.stats.generated_tokens == 30
    length = len(engine.encode(CHAT))
    assert progress[-1] == (length, length)
    assert progress == sorted(progress)


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_stop_strings_across_tokens_and_stop_tokens(engine: Engine, options: dict[str, Any]) -> None:
    full = engine.generate(TEXT, max_tokens=40, **options)
    stop = full.text[9:13]
    cut = engine.generate(TEXT, max_tokens=40, stop=["never there", stop], **options)
    assert cut.text == full.text[: full.text.find(stop)]
    assert cut.finish_reason == "stop"
    assert 1 < len(cut.tokens) < 40
    assert cut.tokens == full.tokens[: len(cut.tokens)]

    token = full.tokens[12]
    cut = engine.generate(TEXT, max_tokens=40, stop_tokens=[token], **options)
    assert cut.tokens == full.tokens[: full.tokens.index(token) + 1]
    assert cut.finish_reason == "stop"
    assert engine.generate(TEXT, max_tokens=40, **options).text == full.text


def test_text_messages_and_ids_are_the_same_prompt(engine: Engine) -> None:
    written = "<|im_start|>user\ntell me of the cat<|im_end|>\n<|im_start|>assistant\n"
    tokens = engine.encode(CHAT)
    assert engine.encode(written) == tokens
    results = [engine.generate(p, max_tokens=10).tokens for p in (CHAT, written, tokens, np.array(tokens))]
    assert results == [results[0]] * 4


# --- Sessions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_a_next_turn_reuses_the_conversation(
    folder: Path, draft: Path, plain: Callable[..., list[int]], options: dict[str, Any]
) -> None:
    with load(folder, draft) as session:
        first = session.encode(TEXT)
        answer = session.generate(first, max_tokens=20, **options)
        assert answer.stats.reused_tokens == 0

        # Goes on: all is there but the last token, which a pass has read only if it was a node of the last tree.
        second = [*first, *answer.tokens, *session.encode(" and on")]
        result = session.generate(second, max_tokens=20, **options)
        assert len(first) + len(answer.tokens) - result.stats.reused_tokens in (0, 1)
        assert result.stats.prompt_tokens == len(second)
        assert result.tokens == plain(second, max_tokens=20)

        edited = [*first[:11], *session.encode("XYZ"), *second[14:]]
        for prompt, reused in (
            (edited, 11),  # in the middle of the prompt
            (edited, len(edited) - 1),  # the same again
            (edited[:5], 4),  # shorter than what is cached
            (session.encode("XYZ"), 0),  # another one altogether
        ):
            result = session.generate(prompt, max_tokens=15, **options)
            assert (result.stats.reused_tokens, result.tokens) == (reused, plain(prompt, max_tokens=15))


def test_the_draft_keeps_its_cache_too(folder: Path, draft: Path) -> None:
    with load(folder, draft) as session:
        drafter = next(d for d in session.pair.drafters if isinstance(d, ModelDrafter))
        first = session.encode(TEXT)
        answer = session.generate(first, max_tokens=10, **SPECULATIVE)
        before = drafter.cache.length
        assert before >= len(first) + len(answer.tokens) - 3
        fed: list[int] = []
        prefill = drafter.model.prefill
        drafter.model.prefill = lambda tokens, *a, **k: (fed.extend(tokens), prefill(tokens, *a, **k))[1]
        second = [*first, *answer.tokens, *session.encode("more of it")]
        session.generate(second, max_tokens=1, **SPECULATIVE)
        assert fed == second[before:-1]


def test_each_of_several_end_tokens_ends_a_text(folder: Path, tmp_path: Path) -> None:
    several = copy_folder(folder, tmp_path / "several")
    change_config(several, eos_token_id=[EOS, 5])
    with load(several, None) as session:
        result = session.generate(TEXT, max_tokens=9, logit_bias={5: 1e3})
    assert (result.tokens, result.text, result.finish_reason) == ([5], "", "stop")


# --- What ends early ----------------------------------------------------------------------------------------


def abandon(engine: Engine, taken: int, **options: Any) -> None:
    stream = engine.stream_generate(TEXT, max_tokens=-1, temperature=1.0, **options)
    for _ in range(taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]


def break_off(engine: Engine, at: int, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="processor broke"):
        engine.generate(TEXT, max_tokens=20, logits_processors=[failing(at)], **options)


def press_ctrl_c(engine: Engine, **options: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    engine.generate("zzz", max_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(TEXT * 3, interrupt, **options)


def rule_everything_out(engine: Engine, **options: Any) -> None:
    with pytest.raises(GenerationError, match="every token is ruled out"):
        engine.generate(TEXT, logits_processors=[lambda tokens, logits: logits - mx.inf], **options)


@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize(
    "end",
    [
        partial(abandon, taken=0), partial(abandon, taken=7), partial(break_off, at=1), partial(break_off, at=6),
        press_ctrl_c, rule_everything_out,
    ],
    ids=["at once", "abandoned", "error", "later error", "in the prompt", "no token"],
)  # fmt: skip
def test_after_a_generation_that_ended_early(
    engine: Engine, plain: Callable[..., list[int]], options: dict[str, Any], end: Callable[..., None]
) -> None:
    end(engine, **options)
    for prompt in (TEXT, TEXT[:20] + " something else"):
        assert engine.generate(prompt, max_tokens=20, **options).tokens == plain(prompt, max_tokens=20)


@pytest.mark.parametrize("family", ["mamba", "gpt2"])
def test_after_an_error_in_a_model_that_takes_no_trees(tmp_path: Path, family: str) -> None:
    folder = write_folder(tmp_path / family, build(family), config_of(family))
    with load(folder) as session:
        assert session.pair.target.cache.capability == ("plain" if family == "mamba" else "chain")
        prompt = session.encode("a cat")
        expected = session.generate(prompt, max_tokens=12).tokens
        for at in (1, 5):
            with pytest.raises(RuntimeError, match="processor broke"):
                session.generate(prompt, max_tokens=12, logits_processors=[failing(at)])
            assert session.generate(prompt, max_tokens=12).tokens == expected
        longer = [*prompt, *expected, 5]
        again = session.generate(longer, max_tokens=12)
    with load(folder, None) as fresh:
        assert again.tokens == fresh.generate(longer, max_tokens=12).tokens


# --- The end of the context, and of the engine --------------------------------------------------------------


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_the_context_ends_a_generation_with_length(engine: Engine, options: dict[str, Any]) -> None:
    prompt = (engine.encode(TEXT) * 20)[:505]
    for max_tokens in (-1, 100):
        result = engine.generate(prompt, max_tokens=max_tokens, logit_bias={EOS: -100}, **options)
        assert (len(result.tokens), result.finish_reason) == (7, "length")
    assert engine.generate(prompt, max_tokens=3, **options).finish_reason == "length"


def test_a_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    for length in (512, 600):
        with pytest.raises(ContextLengthError, match=rf"^prompt: its {length} tokens .* context of 512"):
            engine.stream_generate([5] * length)
    assert len(engine.generate([5] * 511).tokens) == 1


def test_the_end_of_an_engine_saves_what_was_learned_and_refuses_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCAD_MLX_HOME", str(tmp_path))
    with load(folder) as session:
        stream = session.stream_generate(TEXT, max_tokens=-1, logit_bias={EOS: -100})
        next(stream)
        unstarted = session.stream_generate(TEXT)
    assert len(list(tmp_path.glob("profiles/*.json"))) == 1
    session.close()  # again
    for use in (lambda: session.generate(TEXT), lambda: list(stream), lambda: next(unstarted)):
        with pytest.raises(UsageError, match="engine is closed"):
            use()
