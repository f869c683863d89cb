"""What a memory budget is spent on, for any model and any budget, and the speeds that follow. Numbers on paper."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmcad_mlx.errors import BudgetError
from llmcad_mlx.memory import (
    LEAST_CACHE,
    Attention,
    Measured,
    MemoryNeeds,
    MemoryPlan,
    ModelSizes,
    ReadRate,
    Speeds,
    TokenBytes,
    _choices,
    default_budget,
    larger_plans,
    make_plan,
    spread,
)

MB = 10**6


def streamed_choices(sizes: ModelSizes) -> list[int]:
    """The `streamed_bytes` that plans for this model can have, largest first."""
    return sorted({sizes.pass_bytes - pins.num_bytes for pins in _choices(sizes)}, reverse=True)


LARGE = 10**12


def sizes_of(layers: tuple[int, ...], embedding: int = 20 * MB, head: int = 0) -> ModelSizes:
    return ModelSizes(
        layer_bytes=layers,
        resident_bytes=MB // 10,
        embedding_bytes=embedding,
        head_bytes=head,
        kv_bytes_per_token=TokenBytes(3000),
        logit_columns=32000,
        hidden=512,
        widest=1536,
    )


def needs_of(sizes: ModelSizes, draft: int = 10 * MB, context: int = 4096, least: int = 1024) -> MemoryNeeds:
    return MemoryNeeds(
        sizes,
        context=context,
        min_context=least,
        runtime_bytes=200 * MB,
        draft_bytes=draft,
        draft_kv_bytes_per_token=TokenBytes(500 if draft else 0),
    )


@st.composite
def needs(draw: st.DrawFn) -> MemoryNeeds:
    """Models of a few layers, alike or not, tied or not; with a draft or without."""
    size = st.integers(1, 60 * MB)
    layers = draw(st.one_of(st.lists(size, max_size=9), st.builds(lambda n, s: [s] * n, st.integers(1, 9), size)))
    head = draw(st.one_of(st.just(0), size))
    context = draw(st.integers(1, 8192))
    full, windowed = draw(st.integers(0, 100_000)), draw(st.sampled_from([(), ((512, 50_000),)]))
    kv = TokenBytes(full, windowed)
    sizes = replace(sizes_of(tuple(layers), draw(size), head), kv_bytes_per_token=kv)
    return needs_of(sizes, draw(st.sampled_from([0, 90 * MB])), context, draw(st.integers(1, context)))


budgets = st.integers(200 * MB, 2500 * MB)
pinned_or_auto = st.one_of(st.none(), st.integers(0, 400 * MB))


def planned(needs: MemoryNeeds, budget: int | None, pinned: int | None = None) -> MemoryPlan:
    """A plan; the example is dropped where there is none."""
    try:
        return make_plan(needs, budget, pinned)
    except BudgetError:
        assume(False)
        raise


def pass_bytes_kept(plan: MemoryPlan, sizes: ModelSizes) -> int:
    """Pinned bytes that a pass would read otherwise."""
    head = sizes.embedding_bytes if sizes.tied else sizes.head_bytes
    return sum(sizes.layer_bytes[i] for i in plan.pinned_layers) + head * plan.pin_head


@settings(deadline=None)
@given(needs(), budgets, pinned_or_auto)
def test_a_plan_keeps_to_its_budget_and_adds_up(needs: MemoryNeeds, budget: int, pinned: int | None) -> None:
    plan, sizes = planned(needs, budget, pinned), needs.sizes
    assert 0 <= plan.total_bytes <= budget == plan.budget_bytes
    assert plan.spare_bytes == budget - plan.total_bytes
    kept = pass_bytes_kept(plan, sizes)
    embedding = 0 if sizes.tied or not plan.pin_embedding else sizes.embedding_bytes
    assert plan.pinned_bytes == kept + embedding
    assert plan.streamed_bytes == sizes.pass_bytes - kept
    assert needs.min_context <= plan.context <= needs.context
    assert 0 <= plan.draft_kv_bytes <= plan.draft_bytes
    largest_unit = max(
        (size for i, size in enumerate(sizes.layer_bytes) if i not in plan.pinned_layers), default=0
    )
    if plan.streamed_bytes:
        assert plan.buffer_bytes >= plan.num_buffers * largest_unit
    else:
        assert not plan.buffer_bytes or not sizes.pass_bytes


@settings(deadline=None)
@given(needs(), budgets, budgets)
def test_more_memory_or_no_draft_never_streams_more(needs: MemoryNeeds, one: int, other: int) -> None:
    low, high = sorted((one, other))
    streamed = planned(needs, low).streamed_bytes
    assert planned(needs, high).streamed_bytes <= streamed
    without_draft = replace(needs, draft_bytes=0, draft_kv_bytes_per_token=TokenBytes())
    assert planned(without_draft, low).streamed_bytes <= streamed


@settings(deadline=None)
@given(needs(), st.none() | budgets, st.integers(0, 400 * MB))
def test_as_much_is_pinned_as_was_asked_for(needs: MemoryNeeds, budget: int | None, pinned: int) -> None:
    plan = planned(needs, budget, pinned)
    kept = pass_bytes_kept(plan, needs.sizes)
    assert kept <= pinned
    assert not [
        choice for choice in streamed_choices(needs.sizes) if kept < needs.sizes.pass_bytes - choice <= pinned
    ]


@settings(deadline=None)
@given(needs(), pinned_or_auto)
def test_the_smallest_budget_named_is_the_smallest(needs: MemoryNeeds, pinned: int | None) -> None:
    with pytest.raises(BudgetError, match="memory: 1 MB is too little; the smallest that works is ") as caught:
        make_plan(needs, MB, pinned)
    found = re.search(r"works is (\d+) MB", str(caught.value))
    assert found is not None
    smallest = int(found[1]) * MB
    assert make_plan(needs, smallest, pinned).total_bytes <= smallest
    with pytest.raises(BudgetError, match=f"works is {found[1]} MB"):
        make_plan(needs, smallest - MB, pinned)


@given(st.integers(0, 200), st.integers(0, 200))
def test_pinned_layers_are_spread_evenly(a: int, b: int) -> None:
    count, total = sorted((a, b))
    chosen = spread(count, total)
    assert len(set(chosen)) == count
    assert all(0 <= index < total for index in chosen)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    if count:  # the ends count as half a gap each
        assert chosen[0] + total - chosen[-1] <= -(-total // count) + 1


def test_choices_of_layers_of_different_sizes() -> None:
    """Two small layers are less than a large one, so more layers must not count as more."""
    sizes = sizes_of((MB, 9 * MB, MB), embedding=40 * MB)
    assert streamed_choices(sizes) == sorted({51 * MB - kept * MB for kept in (0, 2, 9, 11, 40, 42, 49, 51)})[::-1]


def test_without_a_limit_all_is_kept_with_all_the_room() -> None:
    plan = make_plan(needs_of(sizes_of((MB,) * 4)), None)
    assert (plan.streamed_bytes, plan.pin_embedding) == (0, True)
    assert (plan.budget_bytes, plan.spare_bytes, plan.context, plan.max_nodes) == (None, 0, 4096, 256)
    assert plan.pinned_layers == (0, 1, 2, 3)


def test_an_embedding_that_is_no_head_stays_on_the_disk_rather_than_a_layer() -> None:
    needs = needs_of(sizes_of((10 * MB,) * 8, embedding=300 * MB, head=10 * MB), draft=0)
    plan = make_plan(needs, make_plan(needs, None).total_bytes - (256 << 20) - 200 * MB)
    assert plan.streamed_bytes == 0
    assert not plan.pin_embedding


def test_all_is_kept_where_shorter_contexts_and_smaller_trees_make_it_fit() -> None:
    needs = needs_of(sizes_of((10 * MB,) * 8))
    whole = make_plan(needs, None)
    less = make_plan(needs, whole.total_bytes - whole.cache_bytes - 30 * MB)
    assert (less.streamed_bytes, less.pin_embedding) == (0, True)
    assert (less.max_nodes, less.prefill_chunk) < (whole.max_nodes, whole.prefill_chunk)


def test_memory_that_is_left_becomes_context() -> None:
    """What is too little for a layer is not wasted."""
    needs = needs_of(sizes_of((100 * MB,) * 20), draft=0)
    for budget in range(520 * MB, 1000 * MB, 7 * MB):
        plan = make_plan(needs, budget)
        assert plan.context == needs.context or plan.spare_bytes < 3000 * (64 * 1.25 + 32)


def test_the_default_budget_is_a_share_of_the_machine() -> None:
    assert default_budget(70, 100) is None
    assert default_budget(71, 100) == 70
    assert default_budget(LARGE, 16 * LARGE) is None


def test_loading_must_fit_too() -> None:
    """A budget that only loading would exceed is refused, with what loading takes as the smallest."""
    needs = replace(needs_of(sizes_of((MB,) * 4)), loading_bytes=777 * MB)
    with pytest.raises(BudgetError, match=r"smallest that works is 777 MB \(.*, more while they load\)"):
        make_plan(needs, 776 * MB)
    assert make_plan(needs, 777 * MB) == make_plan(replace(needs, loading_bytes=0), 777 * MB)
    assert make_plan(needs, None).budget_bytes is None


def test_what_mlx_may_keep_grows_with_the_budget_and_is_planned() -> None:
    needs = needs_of(sizes_of((100 * MB,) * 200))
    for budget, cache in (
        (500 * MB, LEAST_CACHE),
        (4096 << 20, 128 << 20),
        (12 << 30, 256 << 20),
        (None, 256 << 20),
    ):
        plan = make_plan(needs, budget)
        assert plan.cache_bytes == cache
        assert plan.work_bytes > cache
    with pytest.raises(BudgetError) as caught:
        make_plan(needs, MB)
    smallest = re.search(r"works is (\d+) MB", str(caught.value))
    assert smallest is not None
    assert make_plan(needs, int(smallest[1]) * MB).cache_bytes == LEAST_CACHE


METAL_32 = Attention(heads=32, kv_heads=8, head_dim=256, itemsize=2, has_kernels=True)


def test_scores_are_kept_where_mlx_has_no_kernel() -> None:
    """By the rules of MLX's Metal back end; a row and key also have a byte of the mask."""
    assert METAL_32.score_bytes(512, 4096) == 512 * 4096 * (32 * 2 + 1)  # 134 MB, and the mask
    for dim in (64, 128):
        fused = replace(METAL_32, head_dim=dim)
        assert fused.score_bytes(8, 4096) == fused.score_bytes(512, 4096) == 0
        many_heads = replace(fused, kv_heads=4)  # 8 rows of 8 heads a key's head: too many for the vector kernel
        assert many_heads.score_bytes(4, 4096) == 0
        assert many_heads.score_bytes(512, 4096) == many_heads.score_bytes(8, 4096) == 8 * 4096 * 65
    assert METAL_32.score_bytes(8, 4096) == 0
    assert METAL_32.score_bytes(9, 4096) == 9 * 4096 * 65
    assert replace(METAL_32, head_dim=80).score_bytes(512, 100) == 8 * 100 * 65  # few rows have no kernel there
    assert replace(METAL_32, head_dim=64, has_kernels=False).score_bytes(1, 100) == 100 * 65


def test_prompt_chunks_get_smaller_where_scores_would_break_the_budget() -> None:
    needs = needs_of(sizes_of((10 * MB,) * 8))
    whole = make_plan(needs, None)
    with_scores = replace(needs, sizes=replace(needs.sizes, attention=METAL_32))
    assert make_plan(with_scores, None).work_bytes - whole.work_bytes == METAL_32.score_bytes(512, 4096 + 256)
    plan = make_plan(with_scores, whole.total_bytes - whole.cache_bytes)
    assert plan.prefill_chunk < whole.prefill_chunk
    assert plan.work_bytes >= METAL_32.score_bytes(plan.prefill_chunk, plan.context)


# -- a simulated Mac: 16 GB, of which Metal recommends 11.45 GB ----------------------------------------------

MAC_BYTES, WORKING_SET = 16 << 30, 11_450 * MB
QWEN_32B = ModelSizes((280 * MB,) * 64, 2 * MB, 440 * MB, 440 * MB, TokenBytes(262_144), 151_936, 5120, 25_600)


def test_the_default_budget_of_a_mac_stays_below_what_metal_recommends() -> None:
    budget = default_budget(QWEN_32B.pass_bytes, MAC_BYTES, WORKING_SET, 300 * MB)
    assert budget == round(0.85 * WORKING_SET) + 300 * MB
    assert budget < 0.65 * MAC_BYTES < default_budget(QWEN_32B.pass_bytes, MAC_BYTES)
    assert default_budget(9 * 10**9, MAC_BYTES, WORKING_SET, 300 * MB) is None
    assert default_budget(11 * 10**9, MAC_BYTES, WORKING_SET, 300 * MB) == budget
    # A user who lets the GPU have more than that still leaves room for others.
    assert default_budget(QWEN_32B.pass_bytes, MAC_BYTES, MAC_BYTES) == round(0.65 * MAC_BYTES)


def test_the_plan_of_a_mac_keeps_to_it() -> None:
    budget = default_budget(QWEN_32B.pass_bytes, MAC_BYTES, WORKING_SET, 300 * MB)
    needs = MemoryNeeds(QWEN_32B, 4096, 1024, runtime_bytes=300 * MB, draft_bytes=400 * MB)
    plan = make_plan(needs, budget)
    assert plan.total_bytes - plan.runtime_bytes <= 0.85 * WORKING_SET  # the GPU's share
    assert MAC_BYTES - plan.total_bytes >= 0.35 * MAC_BYTES
    assert len(plan.pinned_layers) > 20
    assert plan.cache_bytes == 256 << 20


# -- speeds ------------------------------------------------------------------------------------------------


def test_speeds_by_the_formulas() -> None:
    measured = Measured(4.0, 16.0, 0.5, 0.2, 0.1, None, 10)
    speeds = Speeds.of(100, ReadRate(100.0), measured)  # a second of reading
    assert speeds == Speeds(pytest.approx(4 / 1.1), 4.0, 1.0, 1.0)
    speeds = Speeds.of(10, ReadRate(100.0), measured)  # computing takes longer
    assert speeds == Speeds(pytest.approx(4 / 0.6), pytest.approx(40.0), pytest.approx(5.0), pytest.approx(10.0))
    assert Speeds.of(0, None, measured) == Speeds(pytest.approx(4 / 0.6), None, pytest.approx(5.0), None)
    assert Speeds.of(50, ReadRate(100.0), None) == Speeds(None, None, None, 2.0)


@pytest.mark.parametrize("budget", [1500 * MB, 6000 * MB])
def test_layers_with_a_window_take_what_it_needs(budget: int) -> None:
    """Gemma 3's proportions: five of six layers see 512 tokens."""
    sizes = replace(sizes_of((40 * MB,) * 6), kv_bytes_per_token=TokenBytes(60_000))
    windowed = replace(sizes, kv_bytes_per_token=TokenBytes(10_000, ((512, 50_000),)))
    before, now = (make_plan(needs_of(one, context=32_768), budget) for one in (sizes, windowed))
    assert now.context >= before.context
    assert now.context == 32_768 or now.context > 2 * before.context
    short = (make_plan(needs_of(one, context=500, least=500), None).kv_bytes for one in (sizes, windowed))
    assert len({*short}) == 1  # what is shorter than the window stays


def test_larger_budgets_are_planned_as_loading_would() -> None:
    """With a model large enough that the steps differ."""
    sizes = ModelSizes((300 * MB,) * 20, 0, 100 * MB, 100 * MB, TokenBytes(1000), 1000, 64, 64)
    needs = MemoryNeeds(sizes, 4096, 1024, runtime_bytes=200 * MB)
    now = make_plan(needs, 3000 * MB)
    rows = list(larger_plans(needs, now))
    assert [name for name, _ in rows] == ["+25 %", "+50 %", "+100 %", "all resident"]
    for (_, plan), budget in zip(rows, (3750, 4500, 6000), strict=False):
        assert plan == make_plan(needs, budget * MB)
    streamed = [now.streamed_bytes, *(plan.streamed_bytes for _, plan in rows)]
    assert streamed == sorted(set(streamed), reverse=True)
    assert streamed[-1] == 0
    last = rows[-1][1]
    assert make_plan(needs, last.budget_bytes) == last
