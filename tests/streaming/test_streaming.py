"""A streamed target against the same model in memory: token for token, whatever is pinned."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from llmcad_mlx import UsageError, load
from llmcad_mlx.errors import BudgetError, ModelError, StorageError
from llmcad_mlx.memory import make_plan
from llmcad_mlx.streaming import build as assembly
from llmcad_mlx.streaming.storage import FileStorage
from tests.support.tiny_folder import copy_folder, family_folder, make_folder

PROMPT = "then the other one ran in and then the other one"
pytestmark = pytest.mark.usefixtures("tiny_home", "streams_small_matrices")

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: make_folder(path, layers=6),
    "quantised": lambda path: make_folder(path, seed=3, layers=5, bits=4),
    "tied": lambda path: family_folder(path, "qwen2", tie_word_embeddings=True),
    "experts": lambda path: family_folder(path, "qwen3_moe"),
    "windows": lambda path: family_folder(path, "gemma3_text"),
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama", layers=6)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[float, list[int]]:
    """Plain tokens of the model in memory, by temperature."""
    with load(folder, None) as engine:
        return {t: engine.generate(PROMPT, max_tokens=24, temperature=t, seed=5).tokens for t in (0.0, 0.8)}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_streamed_text_is_the_resident_text(
    folder: Path, reference: dict[float, list[int]], share: float, temperature: float
) -> None:
    with load(folder, "ngram", pinned=0) as engine:
        assert engine.pair.plan is not None
        pinned = round(share * (engine.pair.plan.pinned_bytes + engine.pair.plan.streamed_bytes))
    with load(folder, "ngram", pinned=pinned) as engine:
        plan = engine.pair.plan
        assert plan is not None
        assert plan.pinned_bytes <= pinned or plan.pin_embedding
        assert (engine.pair.target.feed is not None) is (plan.streamed_bytes > 0)
        for options in ({"policy": "plain"}, {"tree_nodes": 6}, {"tree_nodes": 6, "pipeline": False}, {}):
            result = engine.generate(PROMPT, max_tokens=24, temperature=temperature, seed=5, **options)
            assert result.tokens == reference[temperature]
            if plan.streamed_bytes:
                # The first passes find in the buffers what was read ahead before.
                read = plan.streamed_bytes * result.stats.target_passes - plan.buffer_bytes
                assert result.stats.streamed_bytes >= read


def test_a_draft_model_works_while_the_target_loads(llama: Path, tmp_path: Path) -> None:
    draft = make_folder(tmp_path / "draft", layers=6, noise=0.02)
    with load(llama, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=40).tokens
    with load(llama, draft, pinned=0, read_bandwidth="10MB/s") as engine:
        result = engine.generate(PROMPT, max_tokens=40, tree_nodes=8)
        assert result.tokens == expected
        assert result.stats.provisional > 0
        assert result.stats.survived > 0


def test_turns_and_long_prompts_stream_as_they_are_kept(llama: Path) -> None:
    long = PROMPT * 6
    with load(llama, None) as plain, load(llama, "ngram", pinned=0) as streamed:
        for prompt in (long, long + " and then", PROMPT, long):
            assert streamed.generate(prompt, max_tokens=9).tokens == plain.generate(prompt, max_tokens=9).tokens


def test_nothing_of_a_streamed_layer_stays_in_memory(llama: Path) -> None:
    with load(llama, None, pinned=0) as engine:
        plan = engine.pair.plan
        assert plan is not None
        assert plan.pinned_layers == ()
        feed: Any = engine.pair.target.feed
        assert len(feed.stream._buffers) == plan.num_buffers < len(engine.pair.target.model.model.layers)
        before = mx.get_active_memory()
        engine.generate(PROMPT, max_tokens=5)
        assert mx.get_active_memory() - before < plan.streamed_bytes / 4


# -- budgets -----------------------------------------------------------------------------------------------


def test_an_impossible_budget_is_refused_with_the_smallest_one(llama: Path) -> None:
    with pytest.raises(BudgetError, match="memory: 1 MB is too little; the smallest that works is ") as caught:
        load(llama, "ngram", memory="1MB")
    smallest = str(caught.value).split("works is ")[1].split(" (")[0]
    with load(llama, "ngram", memory=int(smallest.split()[0]) * 10**6 + (64 << 20)) as engine:
        assert engine.generate(PROMPT, max_tokens=3).tokens


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("memory", "much"), ("memory", 0), ("memory", 16), ("memory", True), ("pinned", "all"),
        ("pinned", -1), ("pinned", "16"), ("context", 0), ("read_bandwidth", "250"),
        ("read_bandwidth", "fast"), ("read_bandwidth", 0.0), ("read_bandwidth", float("nan")),
    ],
)  # fmt: skip
def test_impossible_memory_options_are_refused(llama: Path, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option.replace("_", "-")):
        load(llama, None, **{option: value})


def test_a_prompt_longer_than_the_context_is_refused_with_whose_it_is(llama: Path) -> None:
    with load(llama, None, pinned=0, context=16) as engine, pytest.raises(UsageError) as caught:
        engine.generate(PROMPT * 3)
    assert "in the context of 16 tokens that the memory plan has room for (--context asks for" in str(caught.value)
    with load(llama, None, pinned=0, context=10**6) as engine, pytest.raises(UsageError) as caught:
        engine.generate(PROMPT * 10**4)
    assert re.search(r"in the model's context of \d+ tokens; shorten it", str(caught.value))


def test_a_budget_that_shrinks_the_context_is_told_at_load(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llmcad_mlx.loader.make_plan", lambda *given: replace(make_plan(*given), context=20))
        load(llama, None, pinned=0, progress=True).close()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d{3,}", "N", line) for line in lines] == [
        "[memory: room for 20 tokens of context, not N; --context N or more --memory makes it]"
    ]
    load(llama, None, pinned=0, progress=True).close()
    assert capsys.readouterr().err == ""


def test_a_model_stored_in_another_form_is_told_to_convert(tmp_path: Path) -> None:
    """mlx-lm joins the experts of such a folder when it loads them, so they cannot be read in place."""
    folder = family_folder(tmp_path / "foreign", "qwen3_moe")
    file = folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    for name in [name for name in weights if ".switch_mlp." in name]:
        for number, expert in enumerate(weights.pop(name)):
            weights[name.replace("switch_mlp", f"experts.{number}")] = expert
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    with pytest.raises(ModelError, match=r"is stored in another form than .*`llmcad-mlx convert` makes a folder"):
        load(folder, None, pinned=0)


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda file: os.truncate(file, file.stat().st_size // 2), Path.unlink],
    ids=["truncated", "deleted"],
)
def test_a_file_that_changes_while_running_is_named(llama: Path, tmp_path: Path, damage: Any) -> None:
    folder = copy_folder(llama, tmp_path / "copy")
    file = folder / "model.safetensors"
    with load(folder, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=12).tokens
    with load(folder, None, pinned=0) as engine:
        tokens = []
        with pytest.raises(StorageError, match=r"model\.safetensors: .*; (load|fetch) the model again"):  # noqa: PT012
            for response in engine.stream_generate(PROMPT, max_tokens=12):
                tokens.append(response.token)
                if len(tokens) == 4:
                    damage(file)
        assert 4 <= len(tokens) < 12
        assert tokens == expected[: len(tokens)]
    shutil.copyfile(llama / "model.safetensors", file)
    with load(folder, None, pinned=0) as engine:
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected


def test_a_generation_goes_on_after_a_read_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(llama, None) as engine:
        expected = engine.generate(PROMPT, max_tokens=12).tokens
    with load(llama, None, pinned=0) as engine:
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected

        def fail(*args: Any) -> None:
            raise StorageError("model.safetensors: cannot be read (made up); check the disk")

        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "read_into", fail)
            with pytest.raises(StorageError, match="made up"):  # noqa: PT012
                for _ in range(3):  # what was read ahead still serves
                    engine.generate(PROMPT + " x", max_tokens=12)
        assert engine.generate(PROMPT, max_tokens=12).tokens == expected


def test_a_streamed_model_is_probed_on_a_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike are layers that run on kernels of ours, too, so a deep model does not take longer."""
    seen: list[int] = []
    probe = assembly.probe

    def noting(model: nn.Module) -> Any:
        seen.append(len(model.layers))
        return probe(model)

    monkeypatch.setattr(assembly, "probe", noting)
    deep = make_folder(tmp_path / "deep", layers=7)
    with load(str(deep), pinned=0) as engine:
        engine.generate([1, 2, 3], max_tokens=4)
    assert seen == [2]
