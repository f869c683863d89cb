"""Drafts with a trimmed head: what they propose, whose embedding they use, how they are made and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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
from mlx_lm.utils import load_model

from convert.trim_vocabulary import count_tokens
from llmcad_mlx import Engine, load
from llmcad_mlx import files as disk
from llmcad_mlx.cli.main import run as run_cli
from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.doctor import diagnose
from llmcad_mlx.drafting import model as candidates
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.errors import ModelError, UsageError, VocabularyError
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.loader import load_tree_model, plan_pair
from llmcad_mlx.models.draft_folder import FILE, check_same_tokens
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import Candidates
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.progress import Progress
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import MemoryOptions, SamplingSettings
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.copies import DerivedDraft, usual_tokens, write_trimmed_draft
from llmcad_mlx.store.names import find_pair
from llmcad_mlx.store.pull import DEFAULT_PRESET, resolve_target
from llmcad_mlx.streaming.modules import SequentialFeed
from llmcad_mlx.tree.token_tree import ROOT, TokenTree
from tests.support.architecture_configs import build, config_of
from tests.support.real_text import PROMPTS, compare
from tests.support.tiny import VOCAB, tiny_llama, tiny_tree_model
from tests.support.tiny_folder import EOS, change_config, copy_folder, make_folder, write_folder
from tests.support.tiny_folder import VOCAB as FOLDER_VOCAB
from tests.test_lossless import FakeClock, make_engine, make_policy, plain, run

REPOSITORY = Path(__file__).parents[2]
PROMPT = [5, 9, 30, 31, 12]
NO_END: dict[str, Any] = {"logit_bias": {EOS: -100.0}}
LIST = [0, 1, 5, 9, 12, 17, 23, 30, 31, 33, 40, 41, 58, 77, 90]
TIED = {"tie_word_embeddings": True}


pytestmark = pytest.mark.usefixtures("own_home", "streams_small_matrices")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", layers=3)


def trimmed(source: Path, dest: Path, tokens: Sequence[int] = LIST) -> Path:
    write_trimmed_draft(source, dest, np.array(sorted(tokens), np.int32))
    return dest


def family(path: Path, name: str, **changes: Any) -> Path:
    changes = {"vocab_size": FOLDER_VOCAB, "max_position_embeddings": 512, **changes}
    return write_folder(path, build(name, **changes), {**config_of(name), **changes})


def quantised(path: Path, *, tied: bool = False) -> Path:
    source = family(path.with_name("plain"), "qwen2", hidden_size=64, tie_word_embeddings=tied)
    convert_folder(source, path, 4, 32)
    return path


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


def sampler(temperature: float, vocab_size: int) -> TargetSampler:
    return TargetSampler(SamplingSettings(temperature=temperature, seed=11), vocab_size)


def on_device(logits: mx.array, positions: Any, own: TargetSampler, count: int, tokens: Any) -> Any:
    """What a GPU runs, on the CPU."""
    found = candidates._on_device(logits, positions, own, count, tokens)
    return [Candidates(tokens[list(row.tokens)].tolist(), row.confidences) for row in found]


@pytest.mark.parametrize("way", [candidates.top_candidates, on_device])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kept", [1, 5, 600, 4999, 5000])
def test_candidates_are_the_full_ones_restricted_to_the_list(way: Any, temperature: float, kept: int) -> None:
    """The same scores at the same tokens, noise included, and a softmax over the list alone."""
    random = np.random.default_rng(kept)
    logits = (random.standard_normal((3, 5000)) * 4).astype(np.float32)
    tokens = np.sort(random.choice(5000, kept, replace=False)).astype(np.int32)
    positions = [7, 8, 7]
    own = sampler(temperature, 5000)
    found = way(mx.array(logits[:, tokens]), positions, own, 8, tokens)
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


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kept", [5, 7, 8, 13, 39])
def test_a_trimmed_model_proposes_what_the_full_one_does_within_the_list(
    monkeypatch: pytest.MonkeyPatch, temperature: float, kept: int
) -> None:
    """Through the model and its kernels, at odd numbers of rows."""
    monkeypatch.setattr(candidates, "_NUM_CANDIDATES", VOCAB)
    tokens = np.sort(np.random.default_rng(kept).choice(VOCAB, kept, replace=False)).astype(np.int32)
    proposals = []
    for drafter in (ModelDrafter(tiny_tree_model(3)), ModelDrafter(cut(3, tokens), tokens)):
        drafter.begin([4, 7, 3, 9], sampler(temperature, VOCAB))
        proposals += drafter.expand(TokenTree(9, 3), [ROOT])
    full, own = proposals
    inside = [
        (token, share) for token, share in zip(full.tokens, full.confidences, strict=True) if token in tokens
    ]
    assert list(own.tokens) == [token for token, _ in inside]
    shares = np.array([share for _, share in inside])
    np.testing.assert_allclose(own.confidences, shares / shares.sum(), rtol=1e-3)


def cut(seed: int, tokens: np.ndarray, noise: float = 0.0) -> TreeModel:
    """A tiny model with the head's rows of `tokens`."""
    model = tiny_llama(seed)
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(weight.shape[1], len(tokens), bias=False)
    model.lm_head.weight = weight[mx.array(tokens)] + noise
    prepare_for_device(model)
    return TreeModel(model, {"model_type": "llama", "max_position_embeddings": 4096})


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
        assert drafter.model.weight_bytes == full - (FOLDER_VOCAB - len(kept)) * 64 * 4
        if engine.pair.plan is not None:
            assert engine.pair.plan.draft_bytes >= drafter.model.weight_bytes
    assert found.tokens == expected
    assert found.stats.accepted > 30  # the draft is the target, and has all tokens of this text


# -- an embedding that is the target's ---------------------------------------------------------------------

SHARED: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: make_folder(path, layers=3),
    "tied": lambda path: family(path, "qwen2", **TIED),
    "quantised": lambda path: quantised(path, tied=True),
    "scaled": lambda path: family(path, "gemma3_text"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_embedding_gives_the_text_of_an_own_one(tmp_path: Path, kind: str) -> None:
    """In memory, pinned, and looked up row by row while the target's layers are read."""
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


def test_a_shared_embedding_while_layers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provisional nodes are looked up in the middle of the target's pass, its head's pieces included."""
    take = SequentialFeed.take

    def drafting_first(feed: SequentialFeed, unit: int) -> int:  # however fast the disk is
        if feed._background is not None:
            feed._background(float("inf"))
        return take(feed, unit)

    monkeypatch.setattr(SequentialFeed, "take", drafting_first)
    untied = make_folder(tmp_path / "untied", layers=6)
    tied = family(tmp_path / "tied", "qwen2", num_hidden_layers=6, **TIED)
    for name, folder in (("untied", untied), ("tied", tied)):
        draft = without_embedding(trimmed(folder, tmp_path / f"{name} draft"))
        with load(folder, "none") as engine:
            expected = engine.generate(PROMPT, max_tokens=32, **NO_END).tokens
        with load(folder, draft, pinned=0) as engine:
            found = engine.generate(PROMPT, max_tokens=32, tree_nodes=6, **NO_END)
        assert found.tokens == expected
        assert found.stats.provisional > 0


def test_an_embedding_of_another_width_is_refused(target: Path, tmp_path: Path) -> None:
    draft = without_embedding(trimmed(make_folder(tmp_path / "wide", hidden=128), tmp_path / "draft"))
    with pytest.raises(ModelError, match="draft: uses its target's embedding and needs one 128 wide, not 64;"):
        load(target, draft)


# -- refused -----------------------------------------------------------------------------------------------


def save(folder: Path, **arrays: mx.array) -> None:
    mx.save_safetensors(str(folder / FILE), arrays)


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
    "cut off": (lambda f: cut_off(f / FILE), "download it again"),
    "no safetensors": (lambda f: replaced(f / FILE), "not a safetensors file, or cut off"),
    "a folder": (lambda f: replaced(f / FILE, folder=True), "cannot be read"),
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
    assert f"damaged/{FILE}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_without_a_head_of_its_own_is_refused(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = family(tmp_path / "tied", "qwen2", **TIED)
    shutil.copy(draft / FILE, folder)
    with pytest.raises(ModelError, match=r"draft_tokens.safetensors: the model has no head of its own"):
        load(target, folder)


def test_tokens_that_the_target_has_no_text_for_are_not_proposed(target: Path, tmp_path: Path) -> None:
    """Padding: the head has such rows, the tokenizer has no such tokens."""
    padded = tiny_llama(0, vocab=FOLDER_VOCAB + 20)
    args = {k: v for k, v in vars(padded.args).items() if v is not None and k != "layer_types"}
    padded.lm_head.weight = padded.lm_head.weight[:3]
    folder = write_folder(tmp_path / "padded", padded, {**args, "max_position_embeddings": 512})
    save(folder, tokens=mx.array([0, 1, FOLDER_VOCAB + 3]))
    with pytest.raises(ModelError, match=rf"{FILE}: token {FOLDER_VOCAB + 3} is not in the vocabulary of"):
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


def test_the_vocabularies_must_still_be_the_same(target: Path, draft: Path, tmp_path: Path) -> None:
    folder = copy_folder(draft, tmp_path / "other tokens")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="the draft's tokens are not the target's: token"):
        load(target, folder)


# -- doctor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_doctor_says_what_it_is(
    target: Path, draft: Path, tmp_path: Path, shared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_embedding(copy_folder(draft, tmp_path / "shared")) if shared else draft
    found = diagnose(str(folder)).model
    assert found is not None
    assert (found.capability, found.vocab_size) == ("tree", len(LIST))
    assert f"its head has {len(LIST)} of {FOLDER_VOCAB} tokens" in found.drafts_only
    assert ("uses its target's embedding" in found.drafts_only) == shared
    assert run_cli(["doctor", str(folder)]) == 0
    assert f"a draft, not a target: {found.drafts_only}" in capsys.readouterr().out
    assert load_model_folder(target).drafts_only == ""


# -- the recipe --------------------------------------------------------------------------------------------


def logits(folder: Path, tokens: Sequence[int] = (3, 17, 5, 40, 2)) -> np.ndarray:
    return np.array(load_model_folder(folder).model(mx.array([list(tokens)]))[0])


FAMILIES = {
    "llama": {},
    "qwen2": TIED,
    "qwen3": TIED,
    "smollm3": TIED,
    "gemma3_text": {},
    "phi3": {},
    "starcoder2": TIED,
    "olmo2": TIED,
    "granite": TIED,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_full_ones_at_the_kept_tokens(tmp_path: Path, name: str) -> None:
    source = family(tmp_path / "source", name, **FAMILIES[name])
    draft = trimmed(source, tmp_path / "draft")
    assert verify_bundle(draft) is not None
    full, own = logits(source), logits(draft)
    assert own.shape == (5, len(LIST))
    np.testing.assert_allclose(own, full[:, LIST], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_rows_are_copied_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    source = quantised(tmp_path / "four", tied=tied)
    draft = trimmed(source, tmp_path / "draft")
    before, after = (dict(mx.load(str(f / "model.safetensors"))) for f in (source, draft))  # type: ignore[call-overload]
    head = "model.embed_tokens" if tied else "lm_head"
    for name in ("weight", "scales", "biases"):
        rows = before[f"{head}.{name}"][mx.array(LIST)]
        assert mx.array_equal(after[f"lm_head.{name}"], rows)
    for name in before.keys() & after.keys() - {f"lm_head.{n}" for n in ("weight", "scales", "biases")}:
        assert mx.array_equal(before[name], after[name]), name
    np.testing.assert_allclose(logits(draft), logits(source)[:, LIST], rtol=1e-4, atol=1e-4)


def test_an_embedding_of_other_bits_gives_a_head_of_these(tmp_path: Path) -> None:
    """Settings of single modules: the head is read with those of the embedding."""
    source = family(tmp_path / "source", "qwen2", hidden_size=64, intermediate_size=64, **TIED)
    model, config = load_model(source)
    eight = {"group_size": 32, "bits": 8}
    nn.quantize(
        model, 32, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and (eight if "embed" in p else True)
    )
    settings_ = {"group_size": 32, "bits": 4, "model.embed_tokens": eight}
    mixed = write_folder(tmp_path / "mixed", model, {**config, "quantization": settings_})
    draft = trimmed(mixed, tmp_path / "draft")
    written = json.loads((draft / "config.json").read_text())["quantization"]
    assert written["lm_head"] == eight
    np.testing.assert_allclose(logits(draft), logits(mixed)[:, LIST], rtol=1e-4, atol=1e-4)


def test_a_trimmed_draft_can_be_quantised(target: Path, draft: Path, tmp_path: Path) -> None:
    convert_folder(draft, tmp_path / "eight", 8, 32)
    assert (tmp_path / "eight" / FILE).read_bytes() == (draft / FILE).read_bytes()
    with load(target, "none") as engine:
        expected = engine.generate(PROMPT, max_tokens=24, **NO_END).tokens
    with load(target, tmp_path / "eight") as engine:
        found = engine.generate(PROMPT, max_tokens=24, tree_nodes=4, **NO_END)
    assert found.tokens == expected
    assert found.stats.drafted > 0


def test_copies_are_kept_and_made_once(target: Path, tmp_path: Path) -> None:
    source = copy_folder(target, tmp_path / "source")
    many, few = (DerivedDraft("source", tokens=count) for count in (15, 5))
    first = many.make(source)
    assert first.parent == tmp_path / "home" / "trimmed-drafts"
    written = (first / FILE).stat().st_mtime_ns
    assert many.make(source) == first
    assert (first / FILE).stat().st_mtime_ns == written
    other = few.make(source)
    assert other != first
    change_config(source, note=1)
    assert many.make(source) not in (first, other)
    assert not first.exists()
    assert other.exists()


def test_what_cannot_be_trimmed(target: Path, draft: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    always_tied = family(tmp_path / "gemma2", "gemma2")
    for source, tokens, message in (
        (
            target,
            [4, FOLDER_VOCAB],
            f"token {FOLDER_VOCAB} is not in the vocabulary of {FOLDER_VOCAB}",
        ),
        (draft, LIST[:3], "is trimmed already"),
        (always_tied, LIST, "'gemma2' has no head of its own"),
        (tmp_path / "nothing", LIST, "no such model folder"),
    ):
        with pytest.raises(ModelError, match=message):
            trimmed(source, dest, tokens)
        assert not dest.exists()


def test_a_full_disk_leaves_nothing(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(disk.DiskError):
        trimmed(target, tmp_path / "new" / "dest")
    assert list((tmp_path / "new").iterdir()) == []


# -- which tokens ------------------------------------------------------------------------------------------


def test_the_most_frequent_tokens_with_special_ones(target: Path) -> None:
    tokenizer = load_model_folder(target, lazy=True).tokenizer
    counts = np.zeros(FOLDER_VOCAB, np.int64)
    counts[[5, 6, 7, 9]] = 5, 9, 5, 7
    # Of equals the lowest; 0 and 1 are special.
    assert usual_tokens(tokenizer, 5, counts).tolist() == [0, 1, 5, 6, 9]
    assert usual_tokens(tokenizer, 9).tolist() == list(range(9))  # by the tokenizer's own order
    assert usual_tokens(tokenizer, FOLDER_VOCAB).dtype == np.int32
    for count in (0, 1, FOLDER_VOCAB + 1):
        with pytest.raises(UsageError, match=f"--tokens: {count} is out of range"):
            usual_tokens(tokenizer, count)


def test_tokens_are_counted_in_texts_and_shards(target: Path, tmp_path: Path) -> None:
    tokenizer = load_model_folder(target, lazy=True).tokenizer
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    (corpus / "a.txt").write_text("z\n" * 3)
    (corpus / "image.png").write_bytes(b"\xff")
    z = tokenizer.encode("z", add_special_tokens=False)[0]
    q, newline = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "q\n")
    mx.save_safetensors(str(corpus / "inner" / "b.safetensors"), {"tokens": mx.array([q] * 5)})
    for path, expected in ((corpus, {z: 3, q: 5, newline: 3}), (corpus / "inner", {q: 5})):
        counts = count_tokens([path], tokenizer, Progress())
        assert len(counts) == FOLDER_VOCAB
        assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == expected
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    mx.save_safetensors(str(tmp_path / "beyond.safetensors"), {"tokens": mx.array([FOLDER_VOCAB])})
    mx.save_safetensors(str(tmp_path / "floats.safetensors"), {"tokens": mx.array([1.0])})
    (tmp_path / "void").mkdir()
    for name, message in (
        ("bad.txt", "not UTF-8 text"),
        ("beyond.safetensors", f"token {FOLDER_VOCAB} is not one of {FOLDER_VOCAB}"),
        ("floats.safetensors", "no list of integers 'tokens'"),
        ("void", "has no .txt"),
        ("missing", "no such file"),
    ):
        with pytest.raises(UsageError, match=f"--corpus: .*{name}: {message}"):
            count_tokens([tmp_path / name], tokenizer, Progress())


def test_from_the_command_line(target: Path, tmp_path: Path) -> None:
    """Made, examined and drafting; refused with one line where it cannot be."""

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convert.trim_vocabulary", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the one ran in and then the other one\n" * 20)
    made = call(target, tmp_path / "draft", "--tokens", 21, "--corpus", corpus)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{tmp_path / 'draft'}: 21 of {FOLDER_VOCAB} output tokens\n"
    assert "counting tokens in 1 files" in made.stderr
    with load(target, "none") as engine:
        expected = engine.generate("then the other", max_tokens=24).tokens
    with load(target, tmp_path / "draft") as engine:
        found = engine.generate("then the other", max_tokens=24, tree_nodes=4)
    assert found.tokens == expected
    assert found.stats.drafted > 0
    for words, code, message in (
        ([target, tmp_path / "draft", "--tokens", 21], 2, "already exists and is not empty"),
        (
            [target, tmp_path / "new", "--tokens", 10**6, "--corpus", corpus],
            2,
            "--tokens: 1000000 is out of range",
        ),
        ([tmp_path / "draft", tmp_path / "new", "--tokens", 9], 1, "is trimmed already"),
    ):
        refused = call(*words)
        assert refused.returncode == code
        assert refused.stdout == ""
        assert refused.stderr.splitlines()[-1].startswith("error: ")
        assert message in refused.stderr
        assert not (tmp_path / "new").exists()


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
    check_same_tokens(TOKENS, dict(reversed(TOKENS.items())))
    check_same_tokens({**TOKENS, "alias": 1}, {**TOKENS, "alias": 1})


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({**TOKENS, "b": 3, "ab": 2}, "token 2 is 'b' in the target and 'ab' in the draft"),
        ({"<s>": 0, "a": 1, "b": 2}, "token 3 is 'ab' in the target and missing in the draft"),
        ({**TOKENS, "c": 4}, "token 4 is missing in the target and 'c' in the draft"),
        ({**TOKENS, "b": 9, "c": 2}, "token 2 is 'b' in the target and 'c' in the draft"),
        ({}, "token 0 is '<s>' in the target and missing in the draft"),
    ],
)
def test_the_first_differing_token_is_named(draft: dict[str, int], message: str) -> None:
    with pytest.raises(VocabularyError, match=message) as error:
        check_same_tokens(TOKENS, draft)
    assert "\n" not in str(error.value)
