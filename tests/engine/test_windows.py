"""Layers with a window give up what none of their rows can see: the text stays, only less can be taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmcad_mlx import Engine, load
from llmcad_mlx.conversations.file import read_conversation
from llmcad_mlx.models.cache import LazyKVCache
from llmcad_mlx.models.slots import window_rows
from tests.support.architecture_configs import WINDOW
from tests.support.tiny_folder import change_config, copy_folder, family_folder

SLACK = "llmcad_mlx.models.slots.WINDOW_SLACK"
PROMPT = " ".join(["the cat in the hat and then of the other one"] * 6)
OPTIONS = {"max_tokens": 40, "seed": 5}
ROUNDS: tuple[dict[str, Any], ...] = (
    {"policy": "plain"},
    {"tree_nodes": 6},
    {"tree_nodes": 12, "policy": "paper"},
)

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module", params=["gemma3_text", "cohere2", "gpt_oss", "host"])
def windowed(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window in some layers; "host" runs on the CPU kernels where there are any."""
    path = tmp_path_factory.mktemp("models") / request.param
    if request.param != "host":
        return family_folder(path, request.param)
    copy_folder(folder, path)
    change_config(path, layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
    return path


@pytest.fixture(params=["", "mlx"], ids=["kernels", "mlx"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setenv("LLMCAD_MLX_KERNELS", request.param)


def cache_of(engine: Engine) -> LazyKVCache:
    cache = engine.pair.target.cache
    assert isinstance(cache, LazyKVCache)
    return cache


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("options", [{}, {"pinned": 0}], ids=["resident", "streamed"])
@pytest.mark.usefixtures("kernels", "streams_small_matrices")
def test_the_text_is_that_of_a_model_that_keeps_everything(
    monkeypatch: pytest.MonkeyPatch, windowed: Path, tmp_path: Path, options: dict[str, Any], temperature: float
) -> None:
    with load(windowed, None) as engine:
        expected = engine.generate(PROMPT, policy="plain", temperature=temperature, **OPTIONS).tokens
        assert cache_of(engine).least_length == 0
        given = len(expected) + engine.pair.target.cache.length
    monkeypatch.setattr(SLACK, 16)
    assert given > 2 * window_rows(WINDOW)
    with load(windowed, copy_folder(windowed, tmp_path / "draft"), **options) as engine:
        assert (engine.pair.target.feed is not None) is bool(options)
        for round_options in ROUNDS:
            engine.restore(None)
            result = engine.generate(PROMPT, temperature=temperature, **round_options, **OPTIONS)
            assert result.tokens == expected
            assert cache_of(engine).front(WINDOW).tokens > 0
        drafter = next(drafter for drafter in engine.pair.drafters if drafter.cache is not None)
        assert drafter.cache is not None
        assert drafter.cache.least_length > 0


@pytest.mark.usefixtures("kernels")
def test_kept_caches_hold_what_is_there_and_go_on_alike(
    monkeypatch: pytest.MonkeyPatch, windowed: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(SLACK, 16)
    more = PROMPT + " and then"
    draft = copy_folder(windowed, tmp_path / "draft")
    with load(windowed, draft) as engine:
        engine.generate(PROMPT, max_tokens=1, policy="paper")
        cache = cache_of(engine)
        snapshot = engine.snapshot()
        assert snapshot is not None
        target = snapshot.parts[0]
        held = {
            store.window: layer.keys.shape[1]
            for store, layer in zip(cache.stores, target.layers, strict=True)
            if layer
        }
        assert held[None] == cache.length
        assert held[WINDOW] == cache.length - cache.front(WINDOW).tokens < cache.length // 2
        assert sum(layer.nbytes for layer in target.layers if layer) == cache.states_nbytes
        engine.save_conversation(tmp_path / "a.chat", {})
        went_on = engine.generate(more, policy="paper", **OPTIONS)
        assert went_on.stats.reused_tokens > window_rows(WINDOW)
        engine.restore(snapshot)
        again = engine.generate(more, policy="paper", **OPTIONS)
        assert snapshot.reusable(engine.tokens) == again.stats.reused_tokens
        before_window = engine.tokens[:20]
        assert snapshot.reusable(before_window) == 0
    with load(windowed, draft) as engine:
        assert engine.restore_conversation(read_conversation(tmp_path / "a.chat")) == []
        loaded = engine.generate(more, policy="paper", **OPTIONS)
        engine.restore(None)
        afresh = engine.generate(more, policy="paper", **OPTIONS)
    assert went_on.tokens == again.tokens == loaded.tokens == afresh.tokens
    assert went_on.stats.reused_tokens == again.stats.reused_tokens == loaded.stats.reused_tokens
    assert afresh.stats.reused_tokens == 0


@pytest.mark.usefixtures("kernels")
def test_what_cannot_be_taken_back_is_read_again(monkeypatch: pytest.MonkeyPatch, windowed: Path) -> None:
    monkeypatch.setattr(SLACK, 16)
    with load(windowed, None) as engine:
        engine.generate(PROMPT, **OPTIONS)
        least, tokens = cache_of(engine).least_length, engine.tokens
        assert 0 < least < len(tokens) - 16
        for length, reused in ((least + 4, least + 3), (least - 4, 0)):
            engine.restore(None)
            expected = engine.generate(tokens[:length], **OPTIONS)
            engine.restore(None)
            engine.generate(PROMPT, **OPTIONS)
            result = engine.generate(tokens[:length], **OPTIONS)
            assert result.tokens == expected.tokens
            assert result.stats.reused_tokens == reused


def test_a_file_that_lacks_more_than_the_window_allows_is_not_used(windowed: Path) -> None:
    with load(windowed, None) as engine:
        engine.generate(PROMPT, max_tokens=1)
        cache = cache_of(engine)
        states, length = list(cache.states(cache.length)), cache.length
        for missing in (16, length - WINDOW + 1, 1, 3):
            cut = [
                layer
                if layer is None or store.window is None
                else type(layer)(layer.keys[:, missing:], layer.values[:, missing:], layer.on_cpu_kernels)
                for store, layer in zip(cache.stores, states, strict=True)
            ]
            if missing == 16:
                cache.restore(cut, length)
                assert cache.front(WINDOW).tokens == 16
                continue
            with pytest.raises(ValueError, match="lacks"):
                cache.restore(cut, length)
            assert cache.length == 0 == cache.front(WINDOW).tokens
        kept = np.array(cache.live_slots())
        assert not len(kept)
