"""The lazy cache against fresh forwards of the same tokens, in any order of appends, commits and cuts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.memory import TokenBytes
from llmcad_mlx.models.cache import LazyKVCache
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.slots import most_window_dead, window_rows
from llmcad_mlx.models.tree_model import TreeModel
from tests.support.architecture_configs import VOCAB, WINDOW, build, config_of

exact_cpu = pytest.mark.skipif(sys.platform != "linux", reason="bit-exactness is claimed for Linux CPUs")


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def tree_model_of(name: str) -> TreeModel:
    """A tiny random model of an mlx-lm family; llama has two layers, the first with a sliding window of 8."""
    model = build(name)
    return TreeModel(model, config_of(name), probe(model))


class Reference:
    """Logits of a token sequence from one forward without any cache, remembered."""

    def __init__(self, tree_model: TreeModel) -> None:
        self.model = tree_model.model
        self.rows: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, tokens: tuple[int, ...]) -> np.ndarray:
        if tokens not in self.rows:
            self.rows[tokens] = np.array(self.model(mx.array([tokens]))[0, -1])
        return self.rows[tokens]


class RandomUse:
    """Random use of one cache below a prompt of `length` tokens.

    difference: the largest to the logits of `reference`, called with a path's tokens. spread: the smallest between
    two nodes of one depth; 0 would mean that the comparison sees nothing.
    """

    def __init__(
        self,
        tree_model: TreeModel,
        reference: Callable[[tuple[int, ...]], np.ndarray],
        rng: np.random.Generator,
        length: int,
        max_dead_share: float,
        min_dead: int,
    ) -> None:
        self.tree_model, self.reference, self.rng = tree_model, reference, rng
        self.cache: Any = tree_model.new_cache()
        self.cache.max_dead_share, self.cache.min_dead = max_dead_share, min_dead
        self.committed: tuple[int, ...] = tuple(rng.integers(1, VOCAB - 1, length).tolist())
        self.paths: dict[int, tuple[int, ...]] = {}  # uncommitted slot -> tokens below the committed ones
        self.difference, self.spread = 0.0, math.inf
        self.tree_model.prefill(self.committed, self.cache, chunk=5)

    def step(self) -> None:
        kinds = [self.append, self.commit, self.rollback, self.truncate]
        self.rng.choice(kinds, p=[0.5, 0.4, 0.05, 0.05])()
        live = self.cache.live_slots()
        assert np.all(np.diff(live) > 0)
        assert self.cache._positions[live].tolist() == list(range(len(self.committed)))

    def append(self) -> None:
        size, start = int(self.rng.integers(1, 6)), self.cache.num_slots
        tokens = self.rng.integers(1, VOCAB - 1, size).tolist()
        parents = [int(self.rng.choice([-1, *self.paths, *range(start, start + row)])) for row in range(size)]
        if self.rng.random() < 0.2:
            forward, parents = (
                self.tree_model.forward(tokens, self.cache),
                [-1, *range(start, start + size - 1)],
            )
        else:
            forward = self.tree_model.forward(tokens, self.cache, parents)
        for slot, token, parent, row in zip(forward.slots, tokens, parents, np.array(forward.logits), strict=True):
            path = self.paths[slot] = (*self.paths.get(parent, ()), token)
            self.difference = max(self.difference, gap(row, self.reference((*self.committed, *path))))
            for other in self.paths.values():
                if len(other) == len(path) and other != path:
                    self.spread = min(self.spread, gap(row, self.reference((*self.committed, *other))))
            assert self.cache._positions[slot] == len(self.committed) + len(self.paths[slot]) - 1

    def commit(self) -> None:
        """Accept a path; keep some of the tree below its end."""
        if not self.paths:
            return
        slot = int(self.rng.choice([*self.paths, -1]))
        path = path_to(self.cache, slot, self.paths) if slot >= 0 else []
        accepted = self.paths[slot] if path else ()
        keep: list[int] = []
        for below in sorted(self.paths):
            parent = int(self.cache._parents[below])
            if (parent in keep or parent == (path or [self.cache.last_slot])[-1]) and self.rng.random() < 0.6:
                keep.append(below)
        self.committed += accepted
        self.rng.shuffle(keep)
        kept = self.cache.commit(path, keep)
        self.paths = {new: self.paths[old][len(accepted) :] for old, new in zip(keep, kept, strict=True)}
        assert self.cache.num_slots == len(self.committed) + len(kept) + self.cache.num_dead
        for new, tokens in self.paths.items():
            assert self.cache._positions[new] == len(self.committed) + len(tokens) - 1

    def rollback(self) -> None:
        self.cache.rollback()
        self.paths = {}

    def truncate(self) -> None:
        length = len(self.committed) - int(self.rng.integers(0, 1 + min(4, len(self.committed))))
        if 0 < length < self.cache.least_length:
            with pytest.raises(ValueError, match="cannot keep"):
                self.cache.truncate(length)
            return
        self.cache.truncate(length)
        self.committed = self.committed[:length]
        self.paths = {}


def gap(row: np.ndarray, other: np.ndarray) -> float:
    """Largest difference; equal infinities do not count, NaN counts as infinite."""
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.where(row == other, 0, np.abs(row - other)), nan=np.inf).max())


def path_to(cache: LazyKVCache, slot: int, uncommitted: Container[int]) -> list[int]:
    """Uncommitted slots from the top of the tree to ``slot``."""
    path = [slot]
    while (parent := int(cache._parents[path[0]])) in uncommitted:
        path.insert(0, parent)
    return path


@exact_cpu
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    min_dead=st.sampled_from([1, 6]),
)
def test_random_use_equals_plain_forwards(seed: int, max_dead_share: float, min_dead: int) -> None:
    tree_model = tree_model_of("llama")
    rng = np.random.default_rng(seed)
    use = RandomUse(tree_model, Reference(tree_model), rng, int(rng.integers(0, 12)), max_dead_share, min_dead)
    for _ in range(20):
        use.step()
    assert use.difference == 0.0


@exact_cpu
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_dead_share=st.sampled_from([0.0, 0.3, 1.0]))
def test_rows_that_no_window_reaches_are_given_up_without_changing_a_bit(seed: int, max_dead_share: float) -> None:
    tree_model = tree_model_of("llama")
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcad_mlx.models.slots.WINDOW_SLACK", 16)
        use = RandomUse(tree_model, Reference(tree_model), rng, int(rng.integers(30, 90)), max_dead_share, 6)
        use.append()
        for _ in range(20):
            use.step()
        assert use.difference == 0.0
        cache, (first, second) = use.cache, use.cache.stores
        assert (first.window, second.window, cache.front(None)) == (WINDOW, None, (0, 0))
        tokens = cache.front(WINDOW).tokens
        assert tokens % 16 == 0
        assert cache.least_length == (tokens + WINDOW - 1 if tokens else 0)
        if cache.length >= window_rows(WINDOW) + 16:
            assert 0 < tokens <= cache.length - WINDOW
        # A copy goes on alike, and so does what is left after the most that can be taken back.
        copied = tree_model.new_cache()
        copied.restore(cache.states(cache.length), cache.length)
        cache.rollback()
        for other in (cache, copied):
            for most in (True, False):
                length = other.length if most else max(other.least_length, 1)
                path = use.committed[:length]
                other.truncate(length)
                row = np.array(tree_model.forward([5, 7], other, [-1, -1]).logits[1])
                assert np.array_equal(row, use.reference((*path, 7)))
                other.rollback()


def test_a_window_holds_no_more_than_the_plan_counts() -> None:
    """Prompts in chunks, and rounds that leave many dead slots; the other layer goes on holding everything."""
    tree_model = tree_model_of("llama")
    cache = tree_model.new_cache()
    assert isinstance(cache, LazyKVCache)
    context, nodes, chunk = 4096, 64, 256
    cache.expected_slots = context + nodes
    tree_model.prefill([5] * 10, cache)
    token = TokenBytes.of(cache.token_nbytes)
    rng = np.random.default_rng(3)
    most = 0
    while cache.length < context - 300:
        tree_model.prefill(rng.integers(1, VOCAB, 200).tolist(), cache, chunk)
        for _ in range(12):
            start = cache.num_slots
            parents = [-1, *(start + int(rng.integers(0, row)) for row in range(1, nodes))]
            slots_of_tree = cache.append(parents, nodes)
            for store in cache.stores:
                rows = mx.zeros((1, *store.keys.shape[1:2], nodes, store.keys.shape[3]))
                store.update_and_fetch(rows, rows)
            mx.eval(cache.arrays())
            cache.commit(slots_of_tree[:1])
            most = max(most, sum(store.keys.nbytes + store.values.nbytes for store in cache.stores))
        held = cache.num_slots - cache.front(WINDOW).slot
        assert held <= window_rows(WINDOW) + most_window_dead(WINDOW) + nodes
    full, windowed = (store.keys.shape[2] for store in reversed(cache.stores))
    assert windowed < full / 4
    assert most <= token.room(context, nodes, chunk) < token.total * context


def test_dead_slots_stay_until_the_share_is_reached() -> None:
    cache = LazyKVCache()
    cache.max_dead_share, cache.min_dead = 0.5, 3
    slots = cache.append([-1, -1, -1], 3)
    cache.commit(slots[2:])  # two dead of three: below min_dead
    assert (cache.num_dead, cache.num_slots) == (2, 3)
    slots = cache.append([-1, -1], 2)
    cache.commit(slots[1:])  # three dead of five
    assert (cache.num_dead, cache.num_slots, cache.live_slots().tolist()) == (0, 2, [0, 1])


def test_masks_of_chains_keep_the_fast_kernels() -> None:
    cache = LazyKVCache([None, 4])
    cache.append(None, 4)
    assert cache.layers[0].make_mask(4) == "causal"
    assert cache.layers[1].make_mask(4, window_size=4) == "causal"  # the window reaches everything
    array = cache.layers[0].make_mask(4, return_array=True)
    assert isinstance(array, mx.array)
    assert array.tolist() == [[np.tri(4, dtype=bool).tolist()]]
    cache.commit(range(4))
    cache.append(None, 1)
    assert cache.layers[0].make_mask(1, return_array=True) is None
    windowed = cache.layers[1].make_mask(1)
    assert isinstance(windowed, mx.array)
    assert windowed.tolist() == [[[[False, True, True, True, True]]]]
    assert cache.layers[1].make_mask(1) is windowed  # built once for all layers


@pytest.mark.parametrize("linear", [False, True])
def test_an_accepted_line_keeps_the_fast_kernels(linear: bool) -> None:
    cache = LazyKVCache(linear=linear)
    cache.commit(cache.append(None, 3))
    cache.append(None, 4)
    if not linear:
        cache.append([3, 3], 2)  # siblings behind it
    assert cache.commit([3], keep=[4, 5]) == [4, 5]
    assert (cache.length, cache.num_slots, cache.num_dead) == (4, 6, 0)
    cache.append([5], 1)
    assert cache.layers[0].make_mask(1) is None


@settings(max_examples=80, deadline=None)
@given(data=st.data(), window=st.sampled_from([None, 1, 3, 6]))
def test_attention_plan_says_what_the_mask_says(data: st.DataObject, window: int | None) -> None:
    """Also where rows have been given up: none of those that a row may see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcad_mlx.models.slots.WINDOW_SLACK", 16)
        plan_and_mask(data, window)


def plan_and_mask(data: st.DataObject, window: int | None) -> None:
    cache = LazyKVCache([window])
    slots: list[int] = []
    if before := data.draw(st.sampled_from([0, 36, 60])):
        cache.commit(cache.append(None, before))
    for commits in range(data.draw(st.integers(0, 3)) + 1):
        for _ in range(data.draw(st.integers(1, 2))):
            size, start = data.draw(st.integers(1, 4)), cache.num_slots
            choices = [[-1, *slots, *range(start, start + row)] for row in range(size)]
            slots += cache.append([data.draw(st.sampled_from(options)) for options in choices], size)
        if commits:
            break
        path = path_to(cache, data.draw(st.sampled_from(slots)), slots)
        keep: list[int] = []
        for slot in slots:
            if int(cache._parents[slot]) in [path[-1], *keep] and data.draw(st.booleans()):
                keep.append(slot)
        slots = cache.commit(path, keep)
    if not cache.num_appended:
        cache.append([slots[-1] if slots else -1, -1], 2)
    plan, visible = cache.attention_plan(window), cache.visible(window)
    front = cache.front(window)
    assert cache.length - front.tokens < 40 or window is None
    assert plan.positions.tolist() == (cache.appended_positions() - front.tokens).tolist()
    prefix = np.concatenate([np.arange(first, first + length) for first, length in plan.runs])
    ends = [0, *plan.own_ends.tolist()]
    for row in range(cache.num_appended):
        seen = prefix[plan.first_visible[row] :].tolist() + plan.own[ends[row] : ends[row + 1]].tolist()
        if plan.causal:
            seen = list(range(int(plan.first_visible[row]), int(plan.slots[row]) + 1))
        assert [slot + front.slot for slot in seen] == np.flatnonzero(visible[row]).tolist()


def test_wrong_use_is_refused() -> None:
    cache = LazyKVCache()
    layer = cache.stores[0]
    with pytest.raises(RuntimeError, match="before the first forward"):
        layer.keys_and_values()
    cache.commit(cache.append(None, 3))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: cache.append([-1], 2), "2 tokens with 1 parents"),
        (lambda: cache.append([0], 1), "neither the last committed"),
        (lambda: cache.append([3], 1), "neither the last committed"),  # itself
    ]
    for use, message in refused:
        with pytest.raises(ValueError, match=message):
            use()
    cache.append([-1, -1], 2)
    refused = [
        (lambda: cache.commit([3, 4]), "not a path"),
        (lambda: cache.commit([7]), "not a path"),
        (lambda: cache.commit([3], keep=[4]), "not a tree below"),  # its sibling
        (lambda: cache.commit([3], keep=[3]), "not a tree below"),
        (lambda: cache.commit([], keep=[5]), "not a tree below"),
        (lambda: cache.truncate(9), "cannot keep 9 of 3"),
        (lambda: layer.make_mask(5), "announced with append"),
        (lambda: layer.update_and_fetch(*[mx.zeros((1, 1, 5, 2))] * 2), "announced with append"),
        (lambda: LazyKVCache.like(make_prompt_cache(build("mamba"))), "ArraysCache cannot be rolled back"),
    ]
    for use, message in refused:
        with pytest.raises((ValueError, RuntimeError), match=message):
            use()
    assert (cache.length, cache.num_slots) == (3, 5)
    cache.commit([4])
    with pytest.raises(ValueError, match="neither the last committed"):
        cache.append([3], 1)  # dead
    with pytest.raises(ValueError, match="chains only"):
        LazyKVCache(linear=True).append([-1, -1], 2)


def test_capacity_grows_past_a_step_without_changing_a_bit() -> None:
    tree_model = tree_model_of("llama")
    tokens = (np.arange(700) * 7 % (VOCAB - 2) + 1).tolist()
    cache = tree_model.new_cache()
    done: list[int] = []
    tree_model.prefill(tokens[:-1], cache, chunk=100, on_progress=done.append)
    assert done == [*range(100, 700, 100), 699]
    row = np.array(tree_model.forward(tokens[-1:], cache).logits[0])
    expected = np.array(tree_model.model(mx.array([tokens]))[0, -1])
    assert np.abs(row - expected).max() < 1e-5
    if sys.platform == "linux":
        assert np.array_equal(row, expected)


def test_prefill_survives_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    tree_model = tree_model_of("llama")
    cache = tree_model.new_cache()

    def interrupt(*done: object) -> None:
        if done[0] != 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tree_model.prefill(range(1, 31), cache, 8, interrupt)
    assert (cache.length, cache.num_slots) == (16, 16)
    with monkeypatch.context() as patch:
        patch.setattr("llmcad_mlx.models.tree_model.mx.eval", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tree_model.prefill(range(1, 31), cache, chunk=8)
    assert (cache.length, cache.num_slots) == (16, 16)


def test_the_probe_sees_wrong_positions_and_wrong_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these two the probe's trees must fail; a probe that accepts everything proves nothing."""
    report = tree_model_of("llama").report
    assert (report.capability, report.vocab_size, report.body_prefills) == ("tree", VOCAB, True)
    with monkeypatch.context() as patch:
        patch.setattr(LazyKVCache, "offset", property(lambda cache: int(cache.appended_positions()[0])))
        report = tree_model_of("llama").report
    assert (report.capability, report.reason.split(":")[0]) == ("chain", "positions")

    def all_see_all(cache: LazyKVCache, window: int | None = None) -> np.ndarray:
        return np.tri(cache.num_appended, cache.num_slots, cache.first_appended, dtype=bool)

    with monkeypatch.context() as patch:
        patch.setattr(LazyKVCache, "visible", all_see_all)
        report = tree_model_of("llama").report
    assert (report.capability, report.reason.split(":")[0]) == ("chain", "masks")


@pytest.mark.parametrize("expected", [0, 100])
def test_a_cache_makes_room_for_what_it_expects_at_once(expected: int) -> None:
    model = tree_model_of("llama")
    cache = model.new_cache()
    assert isinstance(cache, LazyKVCache)
    cache.expected_slots = expected
    model.prefill([1, 2, 3], cache)
    first = cache.stores[0].keys.shape
    logits = model.forward([4], cache).logits
    assert np.array_equal(np.array(logits[0]), Reference(model)((1, 2, 3, 4)))
    cache.rollback()
    model.prefill([5] * 90, cache)
    assert (cache.stores[0].keys.shape == first) == (expected == 100)


def test_compaction_copies_no_whole_buffer() -> None:
    """What is added to memory for a time: the rows of one layer that move. (All layers' buffers were copied.)"""
    layers, length, capacity = 6, 400, 512
    cache = LazyKVCache((None,) * layers)
    cache.expected_slots = capacity
    rows = mx.random.normal((1, 2, length, 64))
    mx.eval(rows)
    slots = cache.append([-1, *range(99), *([99] * 300)], length)  # 100 in a line, then 300 that branch
    for store in cache.layers:
        store.update_and_fetch(rows, rows)
    mx.eval(cache.arrays())
    buffer = cache.layers[0].keys.nbytes
    before = np.array(cache.layers[3].keys)
    mx.clear_cache()
    limit = mx.set_cache_limit(0)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    cache.commit([*slots[:100], slots[399]])
    peak = mx.get_peak_memory() - active
    mx.set_cache_limit(limit)
    assert (cache.num_slots, cache.num_dead) == (101, 0)
    assert np.array_equal(np.array(cache.layers[3].keys)[:, :, :101], before[:, :, [*range(100), 399]])
    assert peak < buffer / 4
