"""Who proposes: prompt lookup, the draft model and its cache, ranked candidates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.drafting import Drafter
from llmcad_mlx.drafting import model as candidates
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.errors import GenerationError
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.calibration import ngram_confidence
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import SamplingSettings
from llmcad_mlx.tree.token_tree import DROPPED, MODEL, NGRAM, ROOT, TokenTree
from tests.support.tiny import VOCAB, tiny_tree_model


@functools.cache
def model() -> TreeModel:
    return tiny_tree_model()


def sampler(temperature: float = 0.0, vocab_size: int = VOCAB) -> TargetSampler:
    return TargetSampler(SamplingSettings(temperature=temperature, seed=11), vocab_size)


def tree_after(tokens: Sequence[int]) -> TokenTree:
    return TokenTree(tokens[-1], len(tokens) - 1)


def proposed(drafter: Drafter, tokens: Sequence[int], branch: Sequence[int] = ()) -> Candidates:
    """Candidates below `branch` in a round after the sequence `tokens`."""
    tree, leaf = tree_after(tokens), ROOT
    for token in branch:
        leaf = tree.add(leaf, token, 0.5)
    drafter.begin(tokens, sampler())
    (found,) = drafter.expand(tree, [leaf])
    return found


# -- n-gram ------------------------------------------------------------------------------------------------


def fresh_lookup(tokens: Sequence[int], branch: Sequence[int] = ()) -> Candidates:
    return proposed(NgramDrafter(), tokens, branch)


@pytest.mark.parametrize(
    ("tokens", "branch", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [], [4]),
        ([1, 2, 3, 4, 5, 1, 2], [3], [4]),
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5], [1]),
        ([1, 2, 3, 4, 5, 1, 2], [9], []),
        ([3, 3, 3], [], [3]),  # a repeating token matches itself
        ([1, 2, 3, 4, 2], [], []),  # a single token in common is no match
    ],
)
def test_what_followed_the_last_time_is_proposed(
    tokens: list[int], branch: list[int], expected: list[int]
) -> None:
    found = fresh_lookup(tokens, branch)
    assert list(found.tokens) == expected
    assert len(found.confidences) == len(expected)
    assert found.source == NGRAM


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_index_that_grew_and_shrank_equals_a_new_one(data: st.DataObject) -> None:
    tokens_of = st.lists(st.integers(0, 3), max_size=12)
    drafter = NgramDrafter()
    tokens = [*data.draw(tokens_of), 0]
    drafter.prefill(tokens)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            tokens = tokens[: data.draw(st.integers(0, len(tokens)))]
            drafter.truncate(len(tokens))
        tokens = [*tokens, *data.draw(tokens_of), data.draw(st.integers(0, 3))]
        for branch in ([], [0], [1, 2], [3, 3, 0]):
            assert proposed(drafter, tokens, branch) == fresh_lookup(tokens, branch)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=80), branch=st.lists(st.integers(0, 2), max_size=3))
def test_proposals_are_what_followed_the_longest_of_the_latest_matches(
    tokens: list[int], branch: list[int]
) -> None:
    """Against looking through the text from end to start."""
    end = [*tokens, *branch]
    lengths: dict[int, int] = {}
    looked_at = 0
    for place in range(len(tokens) - 1, 1, -1):
        length = 0
        while length < min(place, len(end), 32) and tokens[place - 1 - length] == end[-1 - length]:
            length += 1
        if length >= 2 and looked_at < 8:
            looked_at += 1
            lengths[tokens[place]] = max(length, lengths.get(tokens[place], 0))
    found = fresh_lookup(tokens, branch)
    expected = sorted(lengths.items(), key=lambda item: -item[1])
    assert list(found.tokens) == [token for token, _ in expected]
    assert list(found.confidences) == sorted(found.confidences, reverse=True)
    assert sum(found.confidences) <= 1.0
    if expected:
        assert found.confidences[0] == ngram_confidence(min(expected[0][1], 32))


# -- model -------------------------------------------------------------------------------------------------


def reference(tokens: Sequence[int], temperature: float = 0.0) -> Candidates:
    """Candidates after `tokens`, from a fresh forward of all of them."""
    logits = model().forward(tokens, model().new_cache()).logits[-1:]
    (found,) = candidates.top_candidates(
        logits, [len(tokens)], sampler(temperature), 8, on_host=cpu_kernels_wanted()
    )
    return found


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 1.0]), min_dead=st.sampled_from([1, 5, 99]))
def test_any_order_and_batching_gives_the_candidates_of_fresh_forwards(
    seed: int, temperature: float, min_dead: int
) -> None:
    """Bit for bit, over rounds that go on with what survived or start anew, some without drafting or broken off,
    with compactions, and with accepted nodes and survivors that nobody had fed."""
    random = np.random.default_rng(seed)
    drafter = ModelDrafter(model())
    drafter.cache.max_dead_share, drafter.cache.min_dead = 0.1, min_dead
    tokens = random.integers(0, VOCAB, int(random.integers(1, 12))).tolist()
    tree, expanded, survivors = tree_after(tokens), set[int](), None
    for _ in range(8):
        if random.random() < 0.15:  # broken off: the round starts again with a new tree
            drafter.begin(tokens, sampler(temperature), tree)
            drafter.expand(tree, [node for node in range(len(tree)) if node not in expanded][:3])
            tree, expanded, survivors = tree_after(tokens), set[int](), None
        drafter.begin(tokens, sampler(temperature), tree if survivors or random.random() < 0.5 else None)
        for _ in range(int(random.integers(1, 14))):
            tree.add(int(random.integers(0, len(tree))), int(random.integers(0, VOCAB)), 0.5)
        nodes = [node for node in random.permutation(len(tree)).tolist() if node not in expanded]
        nodes = nodes[: int(random.integers(0, len(nodes) + 1))]
        expanded.update(nodes)
        while nodes:
            width = int(random.integers(1, 5))
            batch, nodes = nodes[:width], nodes[width:]
            for leaf, proposal in zip(batch, drafter.expand(tree, batch), strict=True):
                assert proposal == reference([*tokens, *tree.path_tokens(leaf)], temperature)
        last = int(random.integers(0, len(tree)))
        bonus = tree.children(last)[0] if tree.has_children(last) and random.random() < 0.8 else None
        survivors = None if bonus is None else tree.reroot(bonus)
        drafter.commit(tree, tree.path(last), survivors)
        tokens += tree.path_tokens(last if bonus is None else bonus)
        tokens += [int(random.integers(0, VOCAB))] if bonus is None else []
        assert drafter.cache.length < len(tokens)
        if survivors is None:
            assert drafter.cache.num_appended == 0
            tree, expanded = tree_after(tokens), set[int]()
        else:
            tree = survivors.tree
            expanded = {survivors.old_to_new[node] for node in expanded} - {DROPPED}
            fed = {above for node in expanded for above in (ROOT, *tree.path(node))}
            assert drafter.cache.num_slots - drafter.cache.num_dead - drafter.cache.length >= len(fed)


@pytest.mark.parametrize("ended_by", ["another tree", "no tree", "truncate", "prefill"])
def test_survivors_that_are_not_taken_up_are_forgotten(ended_by: str) -> None:
    drafter, tokens = ModelDrafter(model()), [1, 2, 3]
    tree = tree_after(tokens)
    drafter.begin(tokens, sampler(), tree)
    a = tree.add(ROOT, 4, 0.9)
    drafter.expand(tree, [tree.add(a, 5, 0.5)])
    survivors = tree.reroot(a)
    drafter.commit(tree, [], survivors)
    assert drafter.cache.num_slots == 5
    new = TokenTree(4, 3) if ended_by == "another tree" else survivors.tree
    if ended_by in ("truncate", "prefill"):
        drafter.truncate(3)
    if ended_by == "prefill":
        drafter.prefill([1, 2, 3, 4])
    drafter.begin([*tokens, 4], sampler(), None if ended_by == "no tree" else new)
    assert drafter.cache.num_slots == drafter.cache.length == 3
    assert drafter.expand(new, [ROOT]) == [reference([1, 2, 3, 4])]
    assert drafter.rows_fed == 1


def test_a_prompt_can_be_read_in_pieces_and_interrupted() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 650).tolist()
    drafter = ModelDrafter(model())

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drafter.prefill(tokens, stop)
    lengths = [drafter.cache.length]
    while drafter.prefill(tokens, limit=64):
        lengths.append(drafter.cache.length)
    assert [*lengths, drafter.cache.length] == [512, 576, 640, 649]
    assert proposed(drafter, tokens) == reference(tokens)
    lookups = NgramDrafter()
    assert not lookups.prefill([1, 2, 3, 1, 2], limit=1)
    assert list(proposed(lookups, [1, 2, 3, 1, 2]).tokens) == [3]


def test_rows_fed_counts_the_rows_of_the_last_forward_only() -> None:
    drafter = ModelDrafter(model())
    drafter.begin([1, 2, 3], sampler())
    assert drafter.rows_fed == 0
    tree = tree_after([1, 2, 3])
    a = tree.add(ROOT, 4, 0.9)
    drafter.expand(tree, [tree.add(a, 5, 0.9)])  # with everything above it
    assert drafter.rows_fed == 5
    assert drafter.expand(tree, [a]) == [reference([1, 2, 3, 4])]
    assert drafter.rows_fed == 0  # was computed on the way
    drafter.begin(range(30), sampler())
    tree = tree_after(range(30))
    drafter.expand(tree, [ROOT])
    assert drafter.rows_fed is None  # the time of a catch-up is not filed as that of a step
    drafter.expand(tree, [tree.add(ROOT, 3, 0.5)])
    assert drafter.rows_fed == 1


@pytest.mark.parametrize("missed", [1, 5, 6, 20, 31, 32, 33, 600])
def test_rounds_without_drafting_are_caught_up_with(missed: int) -> None:
    """In full after a short break, from the last tokens alone after a long one."""
    tokens = np.random.default_rng(missed).integers(0, VOCAB, 10 + missed).tolist()
    drafter = ModelDrafter(model())
    drafter.prefill(tokens[:10])
    for end in range(10, len(tokens), 7):  # rounds that draft nothing
        drafter.begin(tokens[:end], sampler())
        drafter.commit(tree_after(tokens[:end]), [])
    read = tokens if missed < 32 else tokens[-32:]
    for token in (3, 17):  # the round of the catch-up, and one after it
        drafter.begin(tokens, sampler())
        tree = tree_after(tokens)
        assert drafter.expand(tree, [ROOT]) == [reference(read)]
        node = tree.add(ROOT, token, 0.5)
        assert drafter.expand(tree, [node]) == [reference([*read, token])]
        drafter.commit(tree, [node])
        tokens, read = [*tokens, token, 5], [*read, token, 5]
        assert drafter.cache.length == len(read) - 1


@pytest.mark.parametrize("kept", [0, 50, 68, 69, 80, 99, 100])
@pytest.mark.parametrize("prefilled", [True, False])
def test_after_a_long_break_a_new_prompt_is_read_in_full_and_an_edit_from_where_it_was(
    kept: int, prefilled: bool
) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    drafter = ModelDrafter(model())
    proposed(drafter, tokens)
    drafter.commit(tree_after(tokens), [])
    assert drafter.cache.length == 32  # it has read the last ones only
    drafter.truncate(kept)
    start, edited = 0, [*tokens[:kept], 7, 8]
    if prefilled:
        drafter.prefill(edited)
        assert drafter.cache.length == len(edited) - 1
    else:
        start = 68 if kept > 68 else max(len(edited) - 32, 0)
    assert proposed(drafter, edited) == reference(edited[start:])


def test_an_interrupted_round_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, tokens = ModelDrafter(model()), [1, 2, 3]
    tree = tree_after(tokens)
    drafter.begin(tokens, sampler())
    drafter.expand(tree, [ROOT])

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(candidates, "top_candidates", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drafter.expand(tree, [tree.add(ROOT, token, 0.3) for token in (4, 5)])
    drafter.begin(tokens, sampler())
    assert drafter.cache.length == 0
    for path in ([], [9]):
        assert proposed(drafter, tokens, path) == reference([*tokens, *path])


# -- candidates --------------------------------------------------------------------------------------------


# What is done on the host, and what a GPU runs, here on the CPU.
WAYS = [
    pytest.param(functools.partial(candidates.top_candidates, on_host=on_host), id=name)
    for name, on_host in (("host", True), ("device", False))
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 5, 40, 4095, 4096, 5000, 50_000, 151_936])
@pytest.mark.parametrize("levels", [None, 400, 3, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_candidates_equal_a_full_sort(way: Any, size: int, levels: int | None, temperature: float) -> None:
    """`levels`: how many different values there are, so that ties run across every border. Padding, which has the
    largest ones, is never proposed."""
    random = np.random.default_rng(size)
    if levels is None:
        logits = random.standard_normal((3, size)) * 5
    else:
        logits = random.integers(0, levels, (3, size)) * 0.5
    logits = logits.astype(np.float32)
    sampler_ = sampler(temperature, size)
    padded = np.concatenate([logits, np.full((3, 14), 500.0, np.float32)], axis=1)
    found = way(mx.array(padded), [7, 8, 7], sampler_, 8)
    for row, position, proposal in zip(logits, [7, 8, 7], found, strict=True):
        scores = sampler_.draft_scores(row, position)
        exact = scores.astype(np.float64)
        top = np.sort(exact)[::-1][:8]
        assert list(proposal.tokens) == np.argsort(-scores, kind="stable")[:8].tolist()  # equal ones by their ids
        shares = np.exp(top - top[0]) / np.exp(exact - top[0]).sum()
        np.testing.assert_allclose(proposal.confidences, shares, rtol=1e-3, atol=1e-30)
        assert proposal.source == MODEL


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 32), peak=st.integers(0, 4999))
def test_the_best_are_found_wherever_they_lie(seed: int, count: int, peak: int) -> None:
    """Neighbouring peaks, which share a piece of the row, and peaks in the last, incomplete piece."""
    random = np.random.default_rng(seed)
    row = random.standard_normal(5000).astype(np.float32)
    row[peak : peak + count] += 20
    for on_host in (True, False):
        (found,) = candidates.top_candidates(mx.array(row[None]), [0], sampler(0.0, 5000), count, None, on_host)
        assert list(found.tokens) == np.argsort(-row, kind="stable")[:count].tolist()


def test_on_a_device_no_whole_row_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal sorts more than 2,048 numbers in many passes over memory, and partitions by sorting."""
    sorted_sizes = []
    for name in ("sort", "argsort", "partition", "argpartition"):
        real = getattr(mx, name)
        monkeypatch.setattr(
            candidates.mx, name, lambda x, *a, real=real, **k: sorted_sizes.append(x.shape[-1]) or real(x, *a, **k)
        )
    for size in (32_000, 151_936, 151_665, 262_144):
        candidates.top_candidates(mx.zeros((2, size)), [0, 1], sampler(0.0, size), 8, None, False)
    assert max(sorted_sizes) <= 2048


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gap", [5.0, 17.0, 40.0, 1e5])
def test_confidences_stay_probabilities_when_one_token_is_certain(way: Any, gap: float) -> None:
    logits = np.zeros((1, 5000), np.float32)
    logits[0, 77] = gap
    (found,) = way(mx.array(logits), [0], sampler(0.0, 5000), 8)
    assert found.tokens[0] == 77
    assert all(0.0 <= confidence <= 1.0 for confidence in found.confidences)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", [40, 5000])
def test_a_broken_draft_is_named(way: Any, bad: float, size: int) -> None:
    logits = np.zeros((2, size), np.float32)
    logits[1, 3] = bad
    with pytest.raises(GenerationError, match="draft"):
        way(mx.array(logits), [0, 1], sampler(0.0, size), 8)
