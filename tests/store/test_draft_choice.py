"""The draft that `tune` has chosen for a target: where it is kept, whom it serves, and what "auto" makes of it;
and copies of drafts by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.loader import conditions
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.names import PairPaths, device_name, find_pair
from llmcad_mlx.store.profile import Conditions, DraftChoice, find_choice, save_choice
from tests.support.tiny_folder import copy_folder, make_folder

pytestmark = pytest.mark.usefixtures("own_home")

NEAR = "near"
HERE = Conditions(device_name())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a draft."""
    folder = tmp_path_factory.mktemp("models")
    make_folder(folder / "target", seed=3)
    make_folder(folder / NEAR, seed=3, noise=0.02)
    return folder


@pytest.fixture
def target(models: Path, tmp_path: Path) -> Path:
    """One of its own for each test: choices are kept by folder."""
    return copy_folder(models / "target", tmp_path / "target")


def choice_of(draft: str, **conditions: Any) -> DraftChoice:
    return DraftChoice(draft, replace(HERE, **conditions), 12.5)


def test_a_choice_is_kept_for_its_target_and_leaves_the_model_as_it_is(
    models: Path, tmp_path: Path, own_home: Path
) -> None:
    bundle = tmp_path / "bundle"
    convert_folder(models / "target", bundle, 8, 32)
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    choice = choice_of("ngram")
    file = save_choice(bundle, choice)
    assert json.loads(file.read_text()) == {"target": str(bundle), "drafts": [choice.to_dict()]}
    assert [entry for entry in own_home.rglob("*") if entry.is_file()] == [file]
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    assert find_choice(bundle, HERE) == choice
    assert find_choice(models / "target", HERE) is None


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


def test_auto_means_the_chosen_draft(models: Path, target: Path) -> None:
    assert find_pair(str(target), "auto", False).draft_path is None
    near = str(models / NEAR)
    save_choice(target, choice_of(near))
    assert find_pair(str(target), "auto", False) == PairPaths(target, near, models / NEAR)
    assert find_pair(str(target), "ngram", False).draft_name == "ngram"
    streaming = conditions(MemoryOptions(pinned=0))
    assert find_pair(str(target), "auto", False, streaming).draft_path is None
    save_choice(target, choice_of(f"4bit:{near}"))
    found = find_pair(str(target), "auto", False)
    assert found.draft_name == f"4bit:{near}"
    assert found.draft_path == find_pair(str(target), f"4bit:{near}", False).draft_path


def test_a_chosen_draft_that_is_gone_is_an_error_that_says_what_to_do(target: Path, tmp_path: Path) -> None:
    save_choice(target, choice_of(str(tmp_path / "gone")))
    with pytest.raises(
        ModelError, match=r"gone'.*`llmcad-mlx tune` chose this draft .* run it again, or give --draft"
    ):
        find_pair(str(target), "auto", False)
    assert find_pair(str(target), "none", False).draft_name == "none"


@pytest.mark.parametrize("draft", ["5bit:x", "16bit:x", "04bit:x"])
def test_copies_of_other_bits_are_refused_before_the_target_is_looked_for(draft: str) -> None:
    with pytest.raises(UsageError, match=r"is not one of 2bit:DRAFT, 3bit:DRAFT, 4bit:DRAFT, 8bit:DRAFT"):
        find_pair("/nowhere", draft, False)


def test_a_copy_needs_a_draft_of_more_bits(models: Path, target: Path, tmp_path: Path) -> None:
    convert_folder(models / NEAR, tmp_path / "four", 4, 32)
    with pytest.raises(UsageError, match=r"8bit:.*four needs a model of more bits, and .*four has 4"):
        find_pair(str(target), f"8bit:{tmp_path / 'four'}", False)
    table = tmp_path / "small.ngrams.safetensors"
    table.write_bytes(b"")
    for other in (str(table), "ngram", f"8bit:{table}"):
        with pytest.raises(UsageError, match=r"is no draft model; leave '(8bit|trimmed:9):' out"):
            find_pair(str(target), f"trimmed:9:{other}" if other != "ngram" else f"8bit:{other}", False)
