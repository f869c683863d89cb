"""Drafts by name: copies of a model in fewer bits, and the draft that `tune` chose, which "auto" stands for."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from llmcad_mlx import load
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.loader import conditions
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.copies import DerivedDraft
from llmcad_mlx.store.names import PairPaths, device_name, find_pair
from llmcad_mlx.store.profile import Conditions, DraftChoice, find_choice, save_choice
from tests.support.tiny_folder import EOS, change_config, copy_folder, make_folder

pytestmark = pytest.mark.usefixtures("own_home")

PROMPT = [5, 9, 30, 31, 12]
NO_END: dict[str, Any] = {"logit_bias": {EOS: -100.0}, "max_tokens": 60}
CHAIN: dict[str, Any] = {"policy": "chain", "tree_nodes": 4}
HERE = Conditions(device_name())


@pytest.fixture
def target(folder: Path, tmp_path: Path) -> Path:
    """One of its own for each test: choices and copies are kept by folder."""
    return copy_folder(folder, tmp_path / "target")


@pytest.fixture
def eight(folder: Path, tmp_path: Path) -> Path:
    convert_folder(folder, tmp_path / "eight", 8, 32)
    return tmp_path / "eight"


def self_draft(source: Path, bits: int) -> Path:
    return DerivedDraft(None, bits).make(source)


def weights(folder: Path) -> dict[str, mx.array]:
    """All weights at full precision."""
    model, _ = load_model(folder)
    return dict(tree_flatten(dequantize_model(model).parameters()))


def copies(home: Path) -> list[str]:
    return sorted(file.name for file in (home / "self-drafts").glob("[!.]*"))


@pytest.mark.parametrize(("bits", "memory"), [(2, {}), (3, {}), (4, {}), (4, {"pinned": 0})])
def test_the_text_is_the_plain_text(target: Path, bits: int, memory: dict[str, int]) -> None:
    with load(target, draft="none") as plain, load(target, draft=f"self:{bits}", **memory) as speculating:
        for seed, temperature in enumerate((0.0, 0.8)):
            options = {**NO_END, "temperature": temperature, "seed": seed}
            found = speculating.generate(PROMPT, **options, **CHAIN)
            assert found.tokens == plain.generate(PROMPT, **options).tokens
            assert found.stats.drafted > 0


@pytest.mark.parametrize(("source", "bits"), [("target", 2), ("target", 3), ("target", 4), ("eight", 4)])
def test_the_copy_is_the_target_rounded(request: pytest.FixtureRequest, source: str, bits: int) -> None:
    """A quantised one anew: scales of 8 and of 4 bits have the same shape and must not be taken over."""
    folder = request.getfixturevalue(source)
    copy = self_draft(folder, bits)
    config = json.loads((copy / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert verify_bundle(copy) is not None
    rounded = weights(copy)
    for name, array in weights(folder).items():
        expected = mx.dequantize(*mx.quantize(array, 32, bits), 32, bits) if array.ndim == 2 else array
        assert mx.array_equal(rounded[name], expected), name


def test_the_copy_is_made_once_for_each_state_of_the_target(target: Path, own_home: Path) -> None:
    first = find_pair(str(target), "self:4", False)
    assert first.draft_path is not None
    written = first.draft_path.stat().st_mtime_ns
    assert find_pair(str(target), "self:4", False) == first
    assert first.draft_path.stat().st_mtime_ns == written
    other = self_draft(target, 2)
    os.utime(target / "model.safetensors", ns=(1, 1))  # other weights
    second = self_draft(target, 4)
    assert second != first.draft_path
    assert copies(own_home) == sorted([second.name, other.name])


@pytest.mark.parametrize("stored", ["float32", "8 bits"])
def test_the_copy_is_made_tensor_by_tensor(tmp_path: Path, stored: str) -> None:
    folder = make_folder(tmp_path / "deep", layers=12, hidden=256)
    if stored == "8 bits":
        convert_folder(folder, tmp_path / "quantised", 8, 32)
        folder = tmp_path / "quantised"
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    self_draft(folder, 4)
    all_weights, largest = 12 * 2.2e6, 512 * 256 * 4
    assert mx.get_peak_memory() - before < 6 * largest < 0.2 * all_weights


SELF, COPY = "self:2, self:3, self:4", "2bit:DRAFT, 3bit:DRAFT, 4bit:DRAFT, 8bit:DRAFT"


@pytest.mark.parametrize(
    ("draft", "choices"),
    [(f"self:{bits}", SELF) for bits in ("5", "8", "", "four", "04", "4 ")]
    + [(f"{bits}bit:x", COPY) for bits in ("5", "16", "04")],
)
def test_other_bits_are_refused_before_the_target_is_looked_for(draft: str, choices: str) -> None:
    with pytest.raises(UsageError, match=rf"draft: '{draft}' is not one of {choices}"):
        find_pair("/nowhere", draft, False)


@pytest.mark.parametrize(("bits", "remedy"), [(4, "fewer bits or another draft"), (3, "another draft")])
def test_a_target_of_no_more_bits_is_refused(target: Path, bits: int, remedy: str) -> None:
    folder = self_draft(target, bits)
    with pytest.raises(
        UsageError, match=rf"draft: self:{bits} needs a model of more bits, .* has {bits}; .*{remedy}"
    ):
        self_draft(folder, bits)
    assert self_draft(folder, 2).exists()


def test_targets_that_cannot_be_copied(target: Path, tmp_path: Path) -> None:
    narrow = make_folder(tmp_path / "narrow", hidden=40)
    with pytest.raises(ModelError, match="no weights divide into groups of 32; choose another draft"):
        self_draft(narrow, 4)
    change_config(target, model_type=None)
    with pytest.raises(ModelError, match=r"target/config\.json: no model_type"):
        self_draft(target, 4)


def test_a_copy_needs_a_draft_model(target: Path, eight: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"8bit:.*eight needs a model of more bits, and .*eight has 8"):
        find_pair(str(target), f"8bit:{eight}", False)
    table = tmp_path / "small.ngrams.safetensors"
    table.write_bytes(b"")
    for prefix, source in (("trimmed:9:", str(table)), ("8bit:", "ngram"), ("trimmed:9:8bit:", str(table))):
        with pytest.raises(UsageError, match=r"is no draft model; leave '(trimmed:9|8bit):' out"):
            find_pair(str(target), prefix + source, False)


def choice_of(draft: str, **conditions: Any) -> DraftChoice:
    return DraftChoice(draft, replace(HERE, **conditions), 12.5)


def test_a_choice_is_kept_for_its_target_and_leaves_the_model_as_it_is(
    folder: Path, eight: Path, own_home: Path
) -> None:
    before = {file.name: file.read_bytes() for file in eight.iterdir()}
    choice = choice_of("ngram")
    file = save_choice(eight, choice)
    assert json.loads(file.read_text()) == {"target": str(eight), "drafts": [choice.to_dict()]}
    assert [entry for entry in own_home.rglob("*") if entry.is_file()] == [file]
    assert {file.name: file.read_bytes() for file in eight.iterdir()} == before
    assert find_choice(eight, HERE) == choice
    assert find_choice(folder, HERE) is None


def test_a_choice_serves_the_same_conditions_and_more_memory(target: Path) -> None:
    gigabyte = 10**9
    for draft, where in (
        ("one", {"memory": gigabyte}), ("two", {"memory": 2 * gigabyte}), ("slow", {"read_bandwidth": 1e8}),
        ("pinned", {"pinned": 0}), ("elsewhere", {"device": "Apple M3 (gpu)"}),
    ):  # fmt: skip
        save_choice(target, choice_of(draft, **where))

    def chosen(**conditions: Any) -> str | None:
        found = find_choice(target, replace(HERE, **conditions))
        return None if found is None else found.draft

    assert chosen(memory=gigabyte // 2) is None
    assert chosen(memory=gigabyte) == chosen(memory=2 * gigabyte - 1) == "one"
    assert chosen(memory=3 * gigabyte) == chosen() == "two"
    assert chosen(read_bandwidth=1e8) == "slow"
    assert chosen(read_bandwidth=2e8) is None
    assert chosen(pinned=0) == "pinned"
    save_choice(target, choice_of("later", memory=gigabyte))
    assert chosen(memory=gigabyte) == "later"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"drafts": 3}', '{"drafts": [3, {}, {"draft": 1, "device": "cpu", "tokens_per_s": 1}]}',
     '{"drafts": [{"draft": "x", "device": "cpu", "tokens_per_s": 1, "memory": "all"}]}'],
)  # fmt: skip
def test_what_cannot_be_read_is_no_choice(target: Path, content: str) -> None:
    save_choice(target, choice_of("ngram")).write_text(content)
    assert find_choice(target, HERE) is None
    assert find_pair(str(target), "auto", False).draft_name == "ngram"


def test_auto_means_the_chosen_draft(target: Path, draft: Path) -> None:
    assert find_pair(str(target), "auto", False).draft_path is None
    save_choice(target, choice_of(str(draft)))
    assert find_pair(str(target), "auto", False) == PairPaths(target, str(draft), draft)
    assert find_pair(str(target), "ngram", False).draft_name == "ngram"
    streaming = conditions(MemoryOptions(pinned=0))
    assert find_pair(str(target), "auto", False, streaming).draft_path is None
    save_choice(target, choice_of(f"4bit:{draft}"))
    found = find_pair(str(target), "auto", False)
    assert found == find_pair(str(target), f"4bit:{draft}", False)
    assert found.draft_name == f"4bit:{draft}"


def test_a_chosen_draft_that_is_gone_is_an_error_that_says_what_to_do(target: Path, tmp_path: Path) -> None:
    save_choice(target, choice_of(str(tmp_path / "gone")))
    with pytest.raises(
        ModelError, match=r"gone'.*`llmcad-mlx tune` chose this draft .* run it again, or give --draft"
    ):
        find_pair(str(target), "auto", False)
    assert find_pair(str(target), "none", False).draft_name == "none"
