"""Drafts with a trimmed head: what they propose, whose embedding they use, how they are made and refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcad_mlx import Engine, load
from llmcad_mlx.cli.main import run as run_cli
from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.doctor import diagnose
from llmcad_mlx.drafting import model as candidates
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.errors import ModelError, VocabularyError
from llmcad_mlx.loader import load_tree_model, plan_pair
from llmcad_mlx.models.folder import DRAFT_TOKENS, check_same_tokens
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import MemoryOptions, SamplingSettings
from llmcad_mlx.store.copies import DerivedDraft, write_trimmed_draft
from llmcad_mlx.store.names import DEFAULT_PRESET, find_pair, resolve_target
from llmcad_mlx.streaming.modules import SequentialFeed
from llmcad_mlx.tree.token_tree import ROOT, TokenTree
from tests.support.real_text import PROMPTS, compare
from tests.support.tiny import VOCAB, WEIGHTS, tiny_llama
from tests.support.tiny_folder import EOS, change_config, copy_folder, family_folder, make_folder, write_folder
from tests.support.tiny_folder import VOCAB as FOLDER_VOCAB
from tests.test_lossless import FakeClock, make_engine, make_policy, plain, run

PROMPT = [5, 9, 30, 31, 12]
NO_END: dict[str, Any] = {"logit_bias": {EOS: -100.0}}
LIST = [0, 1, 5, 9, 12, 17, 23, 30, 31, 33, 40, 41, 58, 77, 90]
TIED = {"tie_word_embeddings": True, "max_position_embeddings": 512}


pytestmark = pytest.mark.usefixtures("own_home", "streams_small_matrices")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", layers=3)


def trimmed(source: Path, dest: Path, tokens: Sequence[int] = LIST) -> Path:
    write_trimmed_draft(source, dest, np.array(sorted(tokens), np.int32))
    return dest


def without_embedding(folder: Path) -> Path:
    """Make a draft of `folder` that uses its target's embedding."""
    file = folder / "model.safetensors"
    arrays: Any = mx.load(str(file))
    kept = {name: array * 1 for name, array in arrays.items() if "embed_tokens" not in name}
    assert len(kept) < len(arrays)
    mx.eval(kept)
    mx.save_safetensors(str(file), kept, {"format": "mlx"})
    (folder / "llmcad.json").unlink(missing_ok=True)
    change_config(folder, llmcad={"shares_embedding": True})
    return folder


# -- candidates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kept", [1, 5, 600, 4999, 5000])
def test_candidates_are_the_full_ones_restricted_to_the_list(on_host: bool, temperature: float, kept: int) -> None:
    """The same scores at the same tokens, noise included, and a softmax over the list alone."""
    random = np.random.default_rng(kept)
    logits = (random.standard_normal((3, 5000)) * 4).astype(np.float32)
    tokens = np.sort(random.choice(5000, kept, replace=False)).astype(np.int32)
    positions = [7, 8, 7]
    own = TargetSampler(SamplingSettings(temperature=temperature, seed=11), 5000)
    found = candidates.top_candidates(mx.array(logits[:, tokens]), positions, own, 8, tokens, on_host)
    for row, position, proposal in zip(logits, positions, found, strict=True):
        scores = own.draft_scores(row, position)
        if temperature:  # as the target does it: the log probabilities of all tokens, and their noise
            np.testing.assert_array_equal(scores, row / np.float32(0.8) + own.noise_at(position))
        inside = np.full(5000, -np.inf)
        inside[tokens] = scores[tokens]
        best = np.argsort(-inside, kind="stable")[: min(8, kept)]
        assert list(proposal.tokens) == best.tolist()
        shares = np.exp(inside - inside.max())
        np.testing.assert_allclose(proposal.confidences, shares[best] / shares.sum(), rtol=1e-4)


def cut(seed: int, tokens: np.ndarray) -> TreeModel:
    """A tiny model with the head's rows of `tokens`."""
    model = tiny_llama(seed)
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(weight.shape[1], len(tokens), bias=False)
    model.lm_head.weight = weight[mx.array(tokens)]
    prepare_for_device(model)
    return TreeModel(model, {"model_type": "llama", "max_position_embeddings": 4096}, probe(model))


# -- the text stays the target's ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB).map(sorted),
    temperature=st.sampled_from([0.0, 0.8]),
    kind=st.sampled_from(["throughput", "forced", "paper", "chain"]),
    seed=st.integers(0, 1000),
)
def test_text_is_the_plain_text_for_any_list(tokens: list[int], temperature: float, kind: str, seed: int) -> None:
    wanted = np.array(tokens, np.int32)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, 6).tolist()
    sampling = SamplingSettings(temperature=temperature, seed=seed)
    costs = CostModel()
    drafter = ModelDrafter(cut(0, wanted), vocabulary=wanted)
    engine = make_engine(True, [drafter], make_policy(kind, costs, 6), costs, FakeClock(seed))
    assert run(engine, prompt, 24, sampling) == plain(prompt, 24, sampling, True)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_that_is_its_target_is_right_whenever_the_list_has_the_token(temperature: float) -> None:
    """With the target's own noise: other noise, or ids of rows for tokens, would be right by chance only."""
    sampling = SamplingSettings(temperature=temperature, seed=5)
    text = plain([3, 1, 4], 60, sampling, True)
    kept = sorted(set(text[:40]))
    assert len(kept) < VOCAB
    wanted = np.array(kept, np.int32)
    drafter = ModelDrafter(cut(0, wanted), vocabulary=wanted)
    tokens = [3, 1, 4, *text]
    own = TargetSampler(sampling, VOCAB)
    hits = 0
    for length in range(3, len(tokens)):
        tree = TokenTree(tokens[length - 1], length - 1)
        drafter.begin(tokens[:length], own)
        (found,) = drafter.expand(tree, [ROOT])
        drafter.commit(tree, [])
        if tokens[length] in kept:
            assert found.tokens[0] == tokens[length]
            hits += 1
    assert hits >= 40


@pytest.mark.parametrize("pinned", ["auto", 0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_folders_draft_in_memory_and_beside_a_streamed_target(
    target: Path, tmp_path: Path, temperature: float, pinned: str | int
) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": temperature, "seed": 3, **NO_END}
    with load(target, "none") as engine:
        expected = engine.generate(PROMPT, **options).tokens
    kept = sorted(set(expected))
    with load(target, trimmed(target, tmp_path / "draft", kept), pinned=pinned) as engine:
        found = engine.generate(PROMPT, tree_nodes=6, **options)
        drafter = engine.pair.drafters[-1]
        assert isinstance(drafter, ModelDrafter)
        assert drafter.model.vocab_size == len(kept)
        full = load_tree_model(target)[1].weight_bytes
        assert drafter.model.weight_bytes == full - (FOLDER_VOCAB - len(kept)) * 64 * WEIGHTS.size
        if engine.pair.plan is not None:
            assert engine.pair.plan.draft_bytes >= drafter.model.weight_bytes
    assert found.tokens == expected
    assert found.stats.accepted > 30  # the draft is the target, and has all tokens of this text


# -- an embedding that is the target's ---------------------------------------------------------------------

SHARED: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: make_folder(path, layers=3),
    "tied": lambda path: family_folder(path, "qwen2", **TIED),
    "quantised": lambda path: family_folder(path, "qwen2", bits=4, hidden_size=64, intermediate_size=64, **TIED),
    "scaled": lambda path: family_folder(path, "gemma3_text", max_position_embeddings=512),
}


def drafting_first(feed: SequentialFeed, unit: int, take: Any = SequentialFeed.take) -> int:
    """Take a layer, but not before something was drafted, however fast the disk is."""
    if feed._background is not None:
        feed._background(float("inf"))
    return int(take(feed, unit))


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_embedding_gives_the_text_of_an_own_one(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, pinned, and looked up row by row before and while the target's layers are read."""
    target = SHARED[kind](tmp_path / "target")
    own = trimmed(target, tmp_path / "own")
    shared = without_embedding(copy_folder(own, tmp_path / "shared"))
    assert (shared / "model.safetensors").stat().st_size < (own / "model.safetensors").stat().st_size
    options: dict[str, Any] = {"max_tokens": 24, "tree_nodes": 6, "pipeline": False, **NO_END}
    with load(target, own) as engine:
        expected = engine.generate(PROMPT, **options)
        bytes_of_own = engine.pair.drafters[-1].model.weight_bytes
    with load(target, shared) as engine:
        found = engine.generate(PROMPT, **options)
        left = engine.pair.drafters[-1].model.weight_bytes
        embedding = engine.pair.target.model.model.model.embed_tokens
        assert left == bytes_of_own - sum(a.nbytes for a in embedding.parameters().values())
    assert found.tokens == expected.tokens
    assert (found.stats.drafted, found.stats.accepted) == (expected.stats.drafted, expected.stats.accepted)
    for pinned in (False, True):
        planned = plan_pair(find_pair(str(target), str(shared), False), MemoryOptions(pinned=0))
        planned.plan = replace(planned.plan, pin_embedding=pinned)
        with Engine(planned.build()) as engine:
            found = engine.generate(PROMPT, **options)
        assert found.tokens == expected.tokens
        assert found.stats.accepted == expected.stats.accepted
    monkeypatch.setattr(SequentialFeed, "take", drafting_first)
    with load(target, shared, pinned=0) as engine:
        found = engine.generate(PROMPT, **{**options, "pipeline": True})
    assert found.tokens == expected.tokens
    assert found.stats.provisional > 0


def test_an_embedding_of_another_width_is_refused(target: Path, tmp_path: Path) -> None:
    draft = without_embedding(trimmed(make_folder(tmp_path / "wide", hidden=128), tmp_path / "draft"))
    with pytest.raises(ModelError, match="draft: uses its target's embedding and needs one 128 wide, not 64;"):
        load(target, draft)


# -- refused -----------------------------------------------------------------------------------------------


def save(folder: Path, **arrays: mx.array) -> None:
    mx.save_safetensors(str(folder / DRAFT_TOKENS), arrays)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "not ascending": (lambda f: save(f, tokens=mx.array([1, 5, 3])), "token 3 comes after 5"),
    "twice": (lambda f: save(f, tokens=mx.array([1, 5, 5])), "token 5 comes after 5"),
    "negative": (lambda f: save(f, tokens=mx.array([-2, 5, 6])), "token -2 is not in the vocabulary"),
    "too large": (lambda f: save(f, tokens=mx.array([1, 5, 4000])), "token 4000 is not in the vocabulary of"),
    "huge": (lambda f: save(f, tokens=mx.array([-(2**31), 5, 2**31 - 1])), "token -2147483648 is not in"),
    "wrong length": (lambda f: save(f, tokens=mx.array([1, 5, 6])), "lists 3 tokens for a head of 15 rows"),
    "wrong type": (lambda f: save(f, tokens=mx.array([1.0, 5.0])), r"must be a list of int32, not float32 \(2,\)"),
    "wrong bits": (lambda f: save(f, tokens=mx.array([1, 5], mx.int64)), "must be a list of int32, not int64"),
    "a matrix": (lambda f: save(f, tokens=mx.array([[1, 5]])), r"must be a list of int32, not int32 \(1, 2\)"),
    "empty": (lambda f: save(f, tokens=mx.zeros((0,), mx.int32)), r"must be a list of int32, not int32 \(0,\)"),
    "foreign": (lambda f: save(f, other=mx.array([1, 5])), "holds no tensor 'tokens'"),
    "cut off": (lambda f: cut_off(f / DRAFT_TOKENS), "download it again"),
    "no safetensors": (lambda f: replaced(f / DRAFT_TOKENS), "not a safetensors file, or cut off"),
    "a folder": (lambda f: replaced(f / DRAFT_TOKENS, folder=True), "cannot be read"),
}


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def replaced(file: Path, folder: bool = False) -> None:
    file.unlink()
    if folder:
        file.mkdir()
    else:
        file.write_text("1 5 9")


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trimmed(target, tmp_path_factory.mktemp("models") / "draft")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lists_are_refused_in_one_line(target: Path, draft: Path, tmp_path: Path, damage: str) -> None:
    folder = copy_folder(draft, tmp_path / "damaged")
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as error:
        load(target, folder)
    assert f"damaged/{DRAFT_TOKENS}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_without_a_head_of_its_own_is_refused(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "tied", "qwen2", **TIED)
    shutil.copy(draft / DRAFT_TOKENS, folder)
    with pytest.raises(ModelError, match=r"draft_tokens.safetensors: the model has no head of its own"):
        load(target, folder)


def test_tokens_that_the_target_has_no_text_for_are_not_proposed(target: Path, tmp_path: Path) -> None:
    """Padding: the head has such rows, the tokenizer has no such tokens."""
    padded = tiny_llama(0, vocab=FOLDER_VOCAB + 20)
    args = {k: v for k, v in vars(padded.args).items() if v is not None and k != "layer_types"}
    padded.lm_head.weight = padded.lm_head.weight[:3]
    folder = write_folder(tmp_path / "padded", padded, {**args, "max_position_embeddings": 512})
    save(folder, tokens=mx.array([0, 1, FOLDER_VOCAB + 3]))
    with pytest.raises(ModelError, match=rf"{DRAFT_TOKENS}: token {FOLDER_VOCAB + 3} is not in the vocabulary of"):
        load(target, folder)


@pytest.mark.parametrize("pinned", ["auto", 0])
@pytest.mark.parametrize("shared", [False, True])
def test_such_a_draft_is_no_target(draft: Path, tmp_path: Path, shared: bool, pinned: str | int) -> None:
    folder = copy_folder(draft, tmp_path / "only drafts")
    if shared:
        without_embedding(folder)
    with pytest.raises(ModelError, match=r"only drafts: .*can only draft.*give it as --draft") as error:
        load(folder, "none", pinned=pinned)
    assert "\n" not in str(error.value)


# -- doctor ------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_it_is(draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = without_embedding(copy_folder(draft, tmp_path / "shared"))
    found = diagnose(str(folder)).model
    assert found is not None
    assert (found.capability, found.vocab_size) == ("tree", len(LIST))
    assert f"its head has {len(LIST)} of {FOLDER_VOCAB} tokens and it uses its target's" in found.drafts_only
    assert run_cli(["doctor", str(folder)]) == 0
    assert f"a draft, not a target: {found.drafts_only}" in capsys.readouterr().out


# -- for real ----------------------------------------------------------------------------------------------


@pytest.mark.embedded
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_embedded_model_trimmed_drafts_for_itself(tmp_path: Path, temperature: float) -> None:
    """4,096 tokens by the tokenizer's order; of these, the draft is right nearly always."""
    target = resolve_target(DEFAULT_PRESET)
    folder = DerivedDraft(DEFAULT_PRESET, tokens=4096).make(target)
    with load(str(target), draft=str(folder)) as engine:
        for seed, prompt in enumerate(PROMPTS[2:4]):
            found = compare(engine, prompt, 48, temperature=temperature, seed=seed, tree_nodes=8)
            assert found.tokens > 20
            assert found.mismatches == 0
            assert found.tokens_per_pass > 1.8


# -- token maps --------------------------------------------------------------------------------------------

TOKENS = {"<s>": 0, "a": 1, "b": 2, "ab": 3}


def test_equal_token_maps_pass_in_any_order_and_with_two_names_for_a_token() -> None:
    check_same_tokens({**TOKENS, "alias": 1}, {"alias": 1, **dict(reversed(TOKENS.items()))})


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({**TOKENS, "b": 3, "ab": 2}, "token 2 is 'b' in the target and 'ab' in the draft"),
        ({"<s>": 0, "a": 1, "b": 2}, "token 3 is 'ab' in the target and missing in the draft"),
        ({**TOKENS, "c": 4}, "token 4 is missing in the target and 'c' in the draft"),
    ],
)
def test_the_first_differing_token_is_named(draft: dict[str, int], message: str) -> None:
    with pytest.raises(VocabularyError, match=message) as error:
        check_same_tokens(TOKENS, draft)
    assert "\n" not in str(error.value)
