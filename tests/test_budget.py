"""The budget holds from the first moment on: what is refused before anything is loaded, and MLX's own limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from llmcad_mlx import load, loader
from llmcad_mlx.errors import BudgetError, ModelError
from llmcad_mlx.estimate import DraftEstimate, ModelEstimate, estimate_needs
from llmcad_mlx.machine import ProcessMemory, memory_of_process
from llmcad_mlx.memory import LEAST_CACHE, TokenBytes
from llmcad_mlx.models.folder import read_config
from llmcad_mlx.models.tokenizer import tokenizer_loading_bytes
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.streaming.build import token_state
from tests.support.tiny_folder import change_config, make_folder

MB = 10**6
GB = 10**9
pytestmark = pytest.mark.usefixtures("own_home", "streams_small_matrices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", layers=4)


@pytest.fixture(scope="module")
def draft(folder: Path) -> Path:
    return make_folder(folder.parent / "draft", layers=2)


@pytest.fixture
def cache_limit() -> Iterator[int]:
    """MLX's, before anything is loaded."""
    limit = mx.set_cache_limit(11 << 20)
    yield 11 << 20
    mx.set_cache_limit(limit)


def cache_limit_now() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_a_budget_that_loading_would_break_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcad_mlx.estimate.tokenizer_loading_bytes", lambda path: 4 * GB)
    monkeypatch.setattr(loader, "load_model_folder", None)
    least = -(-(memory_of_process().now + 4 * GB) // MB)
    with pytest.raises(BudgetError, match="more while they load") as caught:
        load(folder, None, memory="4GB")
    found = re.search(r"works is (\d+) MB", str(caught.value))
    assert found is not None
    assert int(found[1]) == pytest.approx(least, abs=50)


def test_the_smallest_budget_that_is_named_works(folder: Path, draft: Path) -> None:
    """One refusal, not one for each thing that is found out later."""
    with load(folder, draft, memory="3GB"):  # what the first model brings along
        pass
    with pytest.raises(BudgetError) as caught:
        load(folder, draft, memory="20MB", context=64)
    found = re.search(r"works is (\d+) MB", str(caught.value))
    assert found is not None
    with load(folder, draft, memory=(int(found[1]) + 20) * MB, context=64) as engine:  # others' memory grows too
        assert engine.pair.plan is not None
        assert engine.pair.plan.total_bytes <= engine.pair.plan.budget_bytes


def test_the_estimate_is_what_loading_finds(folder: Path, draft: Path) -> None:
    options = MemoryOptions(memory=3 * GB)
    model = ModelEstimate.of(read_config(folder), str(folder))
    needs = estimate_needs(model, DraftEstimate.at(draft), options, folder)
    with load(folder, draft, memory="3GB", pinned=0) as engine:
        target, (_, model_drafter) = engine.pair.target.model, engine.pair.drafters
        assert needs.draft_bytes == pytest.approx(model_drafter.model.weight_bytes, rel=0.1)
        engine.generate("the", max_tokens=2)
        assert needs.sizes.kv_bytes_per_token == TokenBytes.of(engine.pair.target.cache.token_nbytes)
        assert needs.draft_kv_bytes_per_token == token_state(model_drafter.model).kv_bytes
        assert sum(needs.sizes.layer_bytes) == pytest.approx(engine.pair.plan.streamed_bytes, rel=0.2)
    assert target.context_length == model.context_length
    assert needs.loading_bytes >= memory_of_process().now // 2 + tokenizer_loading_bytes(folder)


def test_what_cannot_be_estimated_is_left_to_loading(folder: Path, tmp_path: Path) -> None:
    broken = make_folder(tmp_path / "broken")
    change_config(broken, model_type="no-such-kind")
    with pytest.raises(ModelError, match="unknown architecture 'no-such-kind'"):
        load(broken, None, memory="3GB")


def test_mlx_keeps_what_the_plan_has_room_for_until_the_engine_closes(folder: Path, cache_limit: int) -> None:
    with load(folder, None, memory="3GB") as engine:
        assert engine.pair.plan is not None
        assert cache_limit_now() == engine.pair.plan.cache_bytes == 3 * GB // 32
    assert cache_limit_now() == cache_limit
    with load(folder, None):  # no plan: MLX's own limit
        assert cache_limit_now() == cache_limit


def test_a_refusal_leaves_mlx_as_it_was(folder: Path, cache_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def too_little(*_: Any) -> None:
        limits.append(cache_limit_now())
        raise BudgetError("too little")

    monkeypatch.setattr(loader, "_needs", too_little)
    with pytest.raises(BudgetError):
        load(folder, None, memory="3GB")
    assert limits == [LEAST_CACHE]
    assert cache_limit_now() == cache_limit


# -- a simulated Mac ------------------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """16 GB, of which Metal recommends 11.45 GB; the process takes 400 MB. Gets the limits of wired memory."""
    wired = [0]

    def set_wired_limit(limit: int) -> int:
        wired.append(limit)
        return wired[-2]

    monkeypatch.setattr(loader, "physical_memory_bytes", lambda: 16 << 30)
    monkeypatch.setattr(loader, "working_set_bytes", lambda: 11_450 * MB)
    for module in ("loader", "estimate"):
        monkeypatch.setattr(f"llmcad_mlx.{module}.memory_of_process", lambda: ProcessMemory(400 * MB, 500 * MB))
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    return wired


def test_a_macs_default_budget(mac: list[int]) -> None:
    active = mx.get_active_memory() + mx.get_cache_memory()
    share = round(0.85 * 11_450 * MB) + max(400 * MB - active, 0)
    assert loader.budget_for(18 * GB, MemoryOptions()) == pytest.approx(share, abs=MB)
    assert loader.budget_for(9 * GB, MemoryOptions()) is None
    assert loader.budget_for(18 * GB, MemoryOptions(memory=5 * GB)) == 5 * GB


def test_a_mac_wires_what_a_pass_uses_and_no_more(folder: Path, draft: Path, mac: list[int]) -> None:
    with load(folder, draft, memory="3GB") as engine:
        plan = engine.pair.plan
        assert plan is not None
        used = plan.pinned_bytes + plan.buffer_bytes + plan.draft_bytes + plan.resident_bytes
        assert mac == [0, used]
        assert used < plan.total_bytes
    assert mac == [0, used, 0]


def test_a_mac_refuses_by_its_footprint(folder: Path, mac: list[int]) -> None:
    with pytest.raises(
        BudgetError, match=r"300 MB is too little; .* \(interpreter and libraries 4\d\d MB"
    ) as caught:
        load(folder, None, memory="300MB")
    found = re.search(r"works is (\d+) MB", str(caught.value))
    assert found is not None
    with load(folder, None, memory=int(found[1]) * MB):
        pass


def test_elsewhere_nothing_is_wired(folder: Path, mac: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "working_set_bytes", lambda: None)
    with load(folder, None, memory="3GB"):
        assert mac == [0]
    assert loader.budget_for(13 * GB, MemoryOptions()) == round(0.7 * (16 << 30))
