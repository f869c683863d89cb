"""Models made ready for their device: usable in any thread, wherever their arrays are kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from llmcad_mlx import cpu, load, mlx_lm_plugin
from llmcad_mlx.cpu import prepare_for_device
from tests.support.tiny_folder import family_folder

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PRIVATE_ARRAYS = {  # models whose ropes keep frequencies of their own, by the kind of rope
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "yarn": ("gpt_oss", {"rope_scaling": YARN}),
    "su": ("minicpm3", {}),
    "yarn in part": ("deepseek_v2", {}),
    "two ropes": ("gemma3_text", {}),
}


@pytest.mark.parametrize("kernels", ["auto", "mlx"])
@pytest.mark.parametrize("role", ["target", "streamed", "draft"])
@pytest.mark.parametrize("kind", PRIVATE_ARRAYS)
@pytest.mark.usefixtures("own_home", "streams_small_matrices")
def test_a_model_may_be_loaded_in_one_thread_and_used_in_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, role: str, kind: str
) -> None:
    """The second time, too: the first time the probe computes with all that the model has, then it is cached."""
    monkeypatch.setenv(cpu.SWITCH, kernels)
    family, changes = PRIVATE_ARRAYS[kind]
    model = family_folder(tmp_path / "model", family, **changes)
    target, draft = (folder, model) if role == "draft" else (model, None)
    texts = []
    for _ in range(2):
        with ThreadPoolExecutor(1) as other:
            options: dict[str, Any] = {"pinned": 0} if role == "streamed" else {}
            engine = other.submit(load, target, draft, **options).result()
        with engine:
            stats = engine.generate([5, 6, 7], max_tokens=8, tree_nodes=8).stats
            assert (stats.drafted > 0) == (role == "draft")
            texts.append(engine.generate([5, 6, 7], max_tokens=8).tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kernels", ["auto", "mlx"])
@pytest.mark.parametrize("kind", PRIVATE_ARRAYS)
@pytest.mark.usefixtures("own_home")
def test_a_model_of_mlx_lms_may_be_used_in_one_thread_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, kind: str
) -> None:
    """By the plugin, which makes it ready in the first."""
    monkeypatch.setenv(cpu.SWITCH, kernels)
    family, changes = PRIVATE_ARRAYS[kind]

    def answer(model: Any, tokenizer: Any) -> list[int]:
        return [part.token for part in mlx_lm_plugin.stream_generate(model, tokenizer, [5, 6, 7], max_tokens=8)]

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        loaded = first.submit(
            mlx_lm_plugin.load, str(family_folder(tmp_path / "model", family, **changes))
        ).result()
        texts = [thread.submit(answer, *loaded[:2]).result() for thread in (first, second)]
    assert texts[0] == texts[1]


class Scattered(nn.Module):
    """Keeps arrays wherever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.made(1)
        self._private = self.made(2)
        self._nested = [{"one": (self.made(3),)}]
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.layers[0]._hidden = self.made(4)
        self.other: Any = type("Plain", (), {})()
        self.other.array = self.made(5)
        self.other.owner = self  # in a circle

    @staticmethod
    def made(value: float) -> mx.array:
        return mx.array(value) * mx.ones((2,))

    def __call__(self) -> mx.array:
        parts = [self._private, self._nested[0]["one"][0], self.inner.layers[0]._hidden, self.other.array]
        return sum(parts, start=self.weight)


def test_arrays_are_found_wherever_a_module_keeps_them() -> None:
    def prepared() -> Scattered:
        model = Scattered()
        prepare_for_device(model)
        return model

    with ThreadPoolExecutor(1) as other:
        model = other.submit(prepared).result()
    assert np.array(model()).tolist() == [15.0, 15.0]
