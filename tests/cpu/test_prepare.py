"""Models made ready for their device: usable in any thread, wherever their arrays are kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from llmcad_mlx import cpu, load
from llmcad_mlx.cpu import prepare_for_device
from tests.support.tiny_folder import change_config, copy_folder

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("kernels", ["ours", "MLX's"])
@pytest.mark.parametrize("pinned", ["auto", 0])
@pytest.mark.usefixtures("own_home", "streams_small_matrices")
def test_a_model_may_be_loaded_in_one_thread_and_used_in_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, pinned: str | int
) -> None:
    """The second time, too: the first time the probe computes with all that the model has, then it is cached."""
    if kernels == "MLX's":
        monkeypatch.setattr(cpu, "cpu_kernels_wanted", lambda: False)
    scaled = copy_folder(folder, tmp_path / "scaled")
    change_config(scaled, rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    texts = []
    for _ in range(2):
        with ThreadPoolExecutor(1) as other:
            engine = other.submit(load, scaled, None, pinned=pinned).result()
        with engine:
            texts.append(engine.generate([5, 6, 7], max_tokens=8).tokens)
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
