"""Every model file of mlx-lm, tiny and random: what it runs with, and that this equals sequential decoding.

``python -m tests.models.test_architectures --write-docs`` writes docs/architectures.md from the same measurements.
"""

from __future__ import annotations

import copy
import pkgutil
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.models.adapt import adaptations
from llmcad_mlx.models.cache import LazyKVCache, PlainCache
from llmcad_mlx.models.probe import _activations_in_float32, probe
from llmcad_mlx.models.tree_model import TreeModel
from tests.models.test_lazy_cache import RandomUse, gap, tree_model_of
from tests.support.architecture_configs import (
    EXPECTED,
    FAMILIES,
    METAL_ONLY,
    MLX_LM_VERSION,
    NOT_MODELS,
    VOCAB,
    WINDOW,
    build,
)

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
EXACT = sys.platform == "linux"  # other CPUs' matrix libraries round one row and several rows differently
RUNNABLE = [name for name in FAMILIES if name not in METAL_ONLY]
SHORT, LONG = 3, 3 * WINDOW + 2  # prompt lengths: below and well past every sliding window


@dataclass(frozen=True, slots=True)
class Measured:
    """What one family did."""

    capability: str
    reason: str
    pad_single: bool
    single_rows: bool
    windows: bool
    """Some layer sees a sliding window, and the test went past it."""
    difference: float
    """Largest difference to the logits of plain decoding, over all nodes."""
    rounding: float
    """The same to logits of mlx-lm's own cache."""
    spread: float
    """Smallest difference between the logits of two siblings: 0 would mean that the test sees nothing."""


class Sequential:
    """Logits of token sequences fed one at a time.

    own: through the model's own cache. Otherwise through ours, each sequence in a cache of its own: plain
    decoding as this package does it.
    """

    def __init__(self, tree_model: TreeModel, own: bool) -> None:
        self.tree_model = tree_model
        self.own = own
        self.caches: dict[tuple[int, ...], Any] = {}
        self.rows: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, path: tuple[int, ...]) -> np.ndarray:
        """(V,) logits after the last token of ``path``."""
        if path not in self.rows:
            if len(path) > 1:
                self(path[:-1])
            cache = copy.deepcopy(self.caches[path[:-1]]) if len(path) > 1 else self._new_cache()
            self.rows[path] = self._step(path[-1], cache)
            self.caches[path] = cache
        return self.rows[path]

    def _new_cache(self) -> Any:
        return make_prompt_cache(self.tree_model.model) if self.own else self.tree_model.new_cache()

    def _step(self, token: int, cache: Any) -> np.ndarray:
        if self.own:
            return np.array(self.tree_model.model(mx.array([[token]]), cache=cache)[0, -1])
        forward = self.tree_model.forward([token], cache)
        cache.commit(forward.slots)
        return np.array(forward.logits[0])


def grow_and_check(tree_model: TreeModel, sequential: Sequential, length: int, seed: int) -> tuple[float, float]:
    """Random trees below a prompt of ``length`` tokens; returns difference and spread."""
    use = RandomUse(tree_model, sequential, np.random.default_rng(seed), length, max_dead_share=0.3, min_dead=4)
    for _ in range(16):
        use.step()
    return use.difference, use.spread


def line_and_check(tree_model: TreeModel, sequential: Sequential, length: int, seed: int) -> tuple[float, float]:
    """Drafted chains, accepted in part, as speculative decoding without trees does; or single tokens where the
    model can take nothing back. The prompt's rows may round differently."""
    rng = np.random.default_rng(seed)
    cache = tree_model.new_cache()
    committed = tuple(rng.integers(1, VOCAB - 1, length).tolist())
    tree_model.prefill(committed, cache, chunk=7)
    rounds = [(1, 1)] * 4 if isinstance(cache, PlainCache) else [(4, 4), (4, 0), (4, 1), (4, 3), (4, 2)]
    found: list[tuple[tuple[int, ...], np.ndarray]] = []
    for drafted, accepted in rounds:
        tokens = rng.integers(1, VOCAB - 1, drafted).tolist()
        forward = tree_model.forward(tokens, cache)
        rows = np.array(forward.logits)
        found += [((*committed, *tokens[: i + 1]), row) for i, row in enumerate(rows)]
        if accepted:
            cache.commit(forward.slots[:accepted])
        else:
            cache.rollback()
        committed = (*committed, *tokens[:accepted])
    assert cache.length == len(committed)
    spread = min(gap(row, other) for (path, row), (before, other) in pairwise(found) if path != before)
    return max(gap(row, sequential(path)) for path, row in found), spread


@cache
def measure(name: str) -> Measured:
    """Build, probe and check one family; once for all tests."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        tree_model = tree_model_of(name)
        check = grow_and_check if tree_model.capability == "tree" else line_and_check
        cache = tree_model.new_cache()
        windows = isinstance(cache, LazyKVCache) and any(store.window for store in cache.stores)
        # A rotating cache sums in another order once it is full, and a padded row in another way: there the
        # model's own cache gives the same logits but for rounding, and ours the same bits.
        same_bits = Sequential(tree_model, own=not windows and not tree_model.report.pad_single)
        found, rounded = [], []
        for seed, length in enumerate((SHORT, LONG)):
            found.append(check(tree_model, same_bits, length, seed))
            rounded.append(check(tree_model, Sequential(tree_model, own=True), length, seed))
    finally:
        mx.set_default_device(device)
    return Measured(
        capability=tree_model.capability,
        reason=tree_model.report.reason,
        pad_single=tree_model.report.pad_single,
        single_rows=tree_model.report.single_rows,
        windows=windows,
        difference=max(difference for difference, _ in found),
        rounding=max(difference for difference, _ in rounded),
        spread=min(spread for _, spread in found),
    )


@pytest.mark.parametrize("name", RUNNABLE)
def test_family(name: str) -> None:
    found = measure(name)
    assert found.capability == EXPECTED.get(name, "tree"), found.reason
    assert 1e-3 < found.spread < np.inf
    assert found.rounding < 1e-4
    if found.capability != "plain" and EXACT:
        assert found.difference == 0.0
    assert (found.reason == "") == (found.capability == "tree")


WINDOWED = (
    "llama", "gemma3_text", "gemma3n", "cohere2", "gpt_oss", "exaone4", "olmo3", "iquestloopcoder", "ministral3",
)  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_families_with_windows_give_up_what_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tree_model = tree_model_of(name)
    outputs = []
    for slack in (1000, 16):
        monkeypatch.setattr("llmcad_mlx.models.slots.WINDOW_SLACK", slack)
        cache = tree_model.new_cache()
        assert isinstance(cache, LazyKVCache)
        rng = np.random.default_rng(1)
        tree_model.prefill(rng.integers(1, VOCAB - 1, 50).tolist(), cache, chunk=33)
        rows = []
        for _ in range(12):
            first, tokens = cache.num_slots, rng.integers(1, VOCAB - 1, 5).tolist()
            parents = [-1, *range(first, first + 4)]
            if cache.capability == "tree":
                parents = [-1, -1, first, first + 1, first + 1]
            forward = tree_model.forward(tokens, cache, parents)
            rows.append(np.array(forward.logits))
            cache.commit([first, first + 2] if cache.capability == "tree" else [first, first + 1])
        outputs.append(np.stack(rows))
        assert (cache.least_length > 50) is (slack == 16)
    assert np.array_equal(*outputs) or not EXACT


SIXTEEN_BITS = (
    "phi3small", "olmo", "gpt2", "nanochat", "llama", "gemma3_text", "cohere2", "phi3", "qwen3_vl",
    "mamba", "mamba2", "plamo2", "nemotron_h", "falcon_h1", "recurrent_gemma", "rwkv7", "lfm2", "qwen3_5",
)  # fmt: skip


def in_16_bits(name: str, dtype: mx.Dtype) -> Any:
    model = build(name)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_in_16_bits_a_model_can_do_what_it_can_in_32(name: str, dtype: mx.Dtype) -> None:
    """phi3small is wrong by less than what 16 bits round; what recurrent models round when they read a prompt at
    once is no reason to read it token by token."""
    found = probe(in_16_bits(name, dtype))
    assert found.capability == EXPECTED.get(name, "tree"), found.reason
    assert found.single_rows == probe(build(name)).single_rows


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3small"])
def test_activations_in_float32_compute_what_a_copy_in_float32_would(name: str) -> None:
    model, copied = in_16_bits(name, mx.bfloat16), in_16_bits(name, mx.bfloat16)
    copied.set_dtype(mx.float32)
    tokens = mx.array([[5, 23, 11]])
    with _activations_in_float32(model):
        found = model(tokens, cache=make_prompt_cache(model))
    assert mx.array_equal(found, copied(tokens, cache=make_prompt_cache(copied)))
    assert not any(map(adaptations, model.modules()))


@pytest.mark.parametrize("name", sorted(METAL_ONLY))
@pytest.mark.skipif(mx.metal.is_available(), reason="runs with Metal")
def test_metal_only_families_fail_in_mlx_lm_itself(name: str) -> None:
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        mx.eval(build(name)(mx.array([[1, 2]])))


@pytest.mark.parametrize("name", ["gpt2", "llama4", "nanochat"])
def test_chain_families_refuse_trees_by_name(name: str) -> None:
    tree_model = tree_model_of(name)
    cache = tree_model.new_cache()
    with pytest.raises(ValueError, match="chains only"):
        tree_model.forward([1, 2, 3], cache, [-1, 0, 0])


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_plain_families_refuse_what_they_cannot_take_back(name: str) -> None:
    tree_model = tree_model_of(name)
    cache = tree_model.new_cache()
    with pytest.raises(ValueError, match="no trees"):
        tree_model.forward([1, 2, 3], cache, [-1, 0, 0])
    slots = tree_model.forward([1, 2, 3], cache).slots
    with pytest.raises(ValueError, match="cannot forget"):
        cache.commit(slots[:2])
    with pytest.raises(ValueError, match="cannot forget"):
        cache.rollback()
    cache.commit(slots)
    with pytest.raises(ValueError, match="all of its tokens or none"):
        cache.truncate(1)
    cache.truncate(0)
    assert cache.length == 0


def test_every_model_file_is_listed() -> None:
    if version("mlx-lm") != MLX_LM_VERSION:
        pytest.skip(f"the list is of mlx-lm {MLX_LM_VERSION}")
    files = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert files == set(FAMILIES) | set(NOT_MODELS)


def test_docs_are_up_to_date() -> None:
    if version("mlx-lm") != MLX_LM_VERSION or not EXACT:
        pytest.skip(f"the page is of mlx-lm {MLX_LM_VERSION} on a Linux CPU")
    assert DOCS.read_text() == docs_page(), "run: python -m tests.models.test_architectures --write-docs"


def docs_page() -> str:
    """The text of docs/architectures.md."""
    measured = {name: measure(name) for name in RUNNABLE}
    by = {c: [n for n, m in measured.items() if m.capability == c] for c in ("tree", "chain", "plain")}
    exact = [name for name in by["tree"] if measured[name].difference == 0]
    windows = sum(measured[name].windows for name in exact)
    lines = [
        "# Model architectures",
        "",
        f"Every model file of mlx-lm {MLX_LM_VERSION}, built tiny with random fp32 weights and checked on a",
        "Linux CPU against the same tokens fed one at a time. Written by",
        "`python -m tests.models.test_architectures --write-docs`; a test fails when this page is out of date.",
        "What a real model does is probed when it is loaded, never concluded from its name.",
        "",
        f"- **Token trees: {len(by['tree'])} families**, {len(exact)} of them bit for bit (difference 0):",
        f"  random trees over several rounds, dead slots, compactions; {windows} of them with sliding",
        "  windows, on sequences shorter and longer than the window.",
        f"- **Chains: {len(by['chain'])} families.** A drafted chain is verified in one pass, its",
        "  rejected end dropped; also bit for bit.",
        f"- **Plain: {len(by['plain'])} families.** Most keep a state that cannot be taken back.",
        "",
        "## Token trees",
        "",
        "| family | sliding window | note |",
        "|---|---|---|",
    ]
    for name in sorted(by["tree"], key=str.lower):
        row = measured[name]
        window = "yes" if row.windows else ""
        note = "a single token goes with a second row: alone it is computed in another way" * row.pad_single
        lines.append(f"| {name} | {window} | {note} |")
    for capability, title in (("chain", "Chains"), ("plain", "Plain decoding")):
        lines += ["", f"## {title}", "", "| family | what is missing |", "|---|---|"]
        for name in sorted(by[capability], key=str.lower):
            row = measured[name]
            note = "; fed one token at a time, prompt included" if row.single_rows else ""
            # By how much depends on the machine.
            reason = re.sub(r" by \d[\d.e+-]*", "", row.reason)
            lines.append(f"| {name} | {reason}{note} |".replace("\n", " "))
    lines += ["", "## Not run here", "", "| file | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in sorted(METAL_ONLY.items())]
    lines += [f"| {name} | holds parts of models |" for name in NOT_MODELS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-docs"]:
        sys.exit("usage: python -m tests.models.test_architectures --write-docs")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(docs_page())
