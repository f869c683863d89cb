"""The CPU kernels: right to float32 rounding, and the same bits whatever comes with a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.rope_utils import initialize_rope

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import adaptations
from llmcad_mlx.models.cache import LazyKVCache
from llmcad_mlx.models.slots import SlotTable

numba = pytest.importorskip("numba", reason="the CPU kernels need numba, a dependency on Linux only")
if not cpu_kernels_wanted():
    pytest.skip("the CPU kernels are for Linux CPUs", allow_module_level=True)

from llmcad_mlx.cpu import attention as cpu_attention  # noqa: E402
from llmcad_mlx.cpu import block as cpu_block  # noqa: E402
from llmcad_mlx.cpu import linear as cpu_linear  # noqa: E402

MAX_ROWS = 40
ERROR = 5e-7
DTYPES = {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}
QUANTIZED = [(bits, group, dtype) for bits in (4, 8) for group in (32, 64, 128) for dtype in DTYPES]
QUANTIZED += [(5, 32, "fp16"), (6, 32, "fp16"), (5, 128, "fp16"), (6, 64, "fp16")]
STORAGES = [*QUANTIZED, *((None, 32, dtype) for dtype in DTYPES)]
# Output sizes that fill no block, down to the smallest, and one; inputs of one group, and beyond 32 chunks.
SHAPES = [(1, 4), (2, 7), (3, 8), (3, 13), (9, 30), (36, 11)]


def make_linear(
    bits: int | None, group: int, dtype: str, num_in: int, num_out: int, bias: bool = False
) -> nn.Module:
    """A linear layer with the storage asked for, in MLX's own class."""
    random = np.random.default_rng(num_in * 1000 + num_out)
    layer: Any = nn.Linear(num_in, num_out, bias=bias)
    layer.weight = mx.array(random.standard_normal((num_out, num_in)).astype(np.float32))
    if bias:
        layer.bias = mx.array(random.standard_normal(num_out).astype(np.float32))
    layer.set_dtype(DTYPES[dtype])
    return layer if bits is None else nn.QuantizedLinear.from_linear(layer, group, bits)


def on_kernels(layer: nn.Module) -> nn.Module:
    cpu_linear.install_cpu_linears(nn.Sequential(layer))
    assert isinstance(layer, cpu_linear.CpuLinear | cpu_linear.CpuEmbedding)
    return layer


def exact_weights(layer: Any) -> np.ndarray:
    """The layer's weights (N, K) in float64, unpacked by hand."""
    if "scales" not in layer:
        return np.array(layer.weight.astype(mx.float32), np.float64)
    scales, biases = (np.array(layer[n].astype(mx.float32), np.float64) for n in ("scales", "biases"))
    stream = np.unpackbits(np.array(layer.weight).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(layer.weight.shape[0], -1, layer.bits) @ (1 << np.arange(layer.bits))
    return codes * np.repeat(scales, layer.group_size, 1) + np.repeat(biases, layer.group_size, 1)


def rows_of(num_in: int, count: int = MAX_ROWS) -> np.ndarray:
    return np.random.default_rng(num_in).standard_normal((count, num_in)).astype(np.float32)


def apply(layer: Any, x: np.ndarray) -> np.ndarray:
    return np.array(layer(mx.array(x)))


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def on_one_and_two_threads(compute: Callable[[], np.ndarray]) -> list[np.ndarray]:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor only")
    before, results = numba.get_num_threads(), []
    try:
        for count in (1, 2):
            numba.set_num_threads(count)
            cpu_linear.num_threads.cache_clear()
            results.append(compute())
    finally:
        numba.set_num_threads(before)
        cpu_linear.num_threads.cache_clear()
    return results


# -- matmul ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "dtype"), STORAGES)
def test_matmul_is_right_and_rows_do_not_depend_on_their_company(bits: int | None, group: int, dtype: str) -> None:
    for groups, num_out in SHAPES:
        num_in = groups * group
        layer = on_kernels(make_linear(bits, group, dtype, num_in, num_out))
        x = rows_of(num_in)
        exact = x.astype(np.float64) @ exact_weights(layer).T
        alone = np.concatenate([apply(layer, x[i : i + 1]) for i in range(MAX_ROWS)])
        assert relative_error(alone, exact) <= ERROR
        for count in range(2, MAX_ROWS + 1):
            first = (7 * count) % (MAX_ROWS - count + 1)
            together = apply(layer, x[first : first + count])
            np.testing.assert_array_equal(together, alone[first : first + count], f"{count} rows of {num_in}")


@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, 64, "fp16"), (8, 32, "bf16"), (None, 32, "fp32")])
def test_matmul_does_not_depend_on_threads(bits: int | None, group: int, dtype: str) -> None:
    x = rows_of(5 * group)
    layers = [on_kernels(make_linear(bits, group, dtype, 5 * group, num_out)) for num_out in (4, 37, 200)]
    results = on_one_and_two_threads(
        lambda: np.concatenate([apply(layer, x[:count]).ravel() for layer in layers for count in (1, 5, 6, 7, 40)])
    )
    np.testing.assert_array_equal(*results)


def test_a_row_never_leaks_into_another() -> None:
    layer = on_kernels(make_linear(4, 64, "fp32", 256, 13))
    x = rows_of(256)
    clean = apply(layer, x)
    for count in (3, 6, 7, 20, 40):
        dirty = x[:count].copy()
        dirty[1] = np.nan
        found = apply(layer, dirty)
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(np.delete(found, 1, 0), np.delete(clean[:count], 1, 0))


@pytest.mark.parametrize("bits", [4, None])
def test_bias_and_leading_dimensions(bits: int | None) -> None:
    layer = on_kernels(make_linear(bits, 64, "bf16", 128, 9, bias=True))
    x = rows_of(128, 6)
    exact = x.astype(np.float64) @ exact_weights(layer).T + np.array(layer.bias, np.float64)
    flat = apply(layer, x)
    assert relative_error(flat, exact) <= ERROR
    np.testing.assert_array_equal(apply(layer, x.reshape(2, 3, 128)), flat.reshape(2, 3, 9))
    transposed = mx.array(np.ascontiguousarray(x.T)).T  # not row-contiguous in MLX's memory
    np.testing.assert_array_equal(np.array(layer(transposed)), flat)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tied_head_uses_the_kernels(quantized: bool) -> None:
    embedding: Any = nn.Embedding(50, 64)
    embedding.set_dtype(mx.float16)
    if quantized:
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, 64, 4)
    on_kernels(embedding)
    assert embedding(mx.array([3])).dtype == mx.float32
    x = rows_of(64)
    found = np.array(embedding.as_linear(mx.array(x)))
    exact = x.astype(np.float64) @ exact_weights(embedding).T
    assert relative_error(found, exact) <= ERROR
    np.testing.assert_array_equal(np.array(embedding.as_linear(mx.array(x[5:6]))), found[5:6])


def test_layers_the_kernels_cannot_take_keep_mlx_kernels() -> None:
    odd_input, too_small = nn.Linear(40, 8), nn.Linear(64, 3)
    three_bits = nn.QuantizedLinear.from_linear(nn.Linear(128, 8), 64, 3)
    model = nn.Sequential(odd_input, too_small, three_bits)
    cpu_linear.install_cpu_linears(model)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.Linear, nn.QuantizedLinear]


# -- attention ---------------------------------------------------------------------------------------------


class Nodes:
    """Made-up queries, keys and values, one of each per node of a tree of tokens."""

    def __init__(self, heads: int, kv_heads: int, dim: int, seed: int) -> None:
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.scale = dim**-0.5
        self.random = np.random.default_rng(seed)
        self.parents: list[int] = []
        self.queries: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, parent: int) -> int:
        self.parents.append(parent)
        self.queries.append(2 * self.random.standard_normal((self.heads, self.dim)).astype(np.float32))
        self.keys.append(2 * self.random.standard_normal((self.kv_heads, self.dim)).astype(np.float32))
        self.values.append(self.random.standard_normal((self.kv_heads, self.dim)).astype(np.float32))
        return len(self.parents) - 1

    def path(self, node: int) -> list[int]:
        """From the first token to `node`, both included."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def exact(self, node: int, window: int | None) -> np.ndarray:
        """Attention of `node` over its path in float64, (heads, dim)."""
        path = self.path(node)[-window if window else None :]
        keys, values = (np.array([a[n] for n in path], np.float64) for a in (self.keys, self.values))
        out = np.empty((self.heads, self.dim))
        for head in range(self.heads):
            kv = head * self.kv_heads // self.heads
            scores = keys[:, kv] @ self.queries[node][head].astype(np.float64) * self.scale
            weights = np.exp(scores - scores.max())
            out[head] = weights @ values[:, kv] / weights.sum()
        return out


class KernelCache:
    """A slot table with keys and values in numpy. What was never written, or is dead, holds NaN."""

    def __init__(self, nodes: Nodes, window: int | None) -> None:
        self.nodes, self.window = nodes, window
        self.table = SlotTable()
        self.slots: dict[int, int] = {-1: -1}
        shape = (nodes.kv_heads, 1024, nodes.dim)
        self.keys, self.values = (np.full(shape, np.nan, np.float32) for _ in range(2))

    def forward(self, rows: Sequence[int]) -> np.ndarray:
        """Attention (N, heads, dim) of the nodes `rows`, whose parents are in the cache or among them."""
        start = self.table.num_slots
        for offset, node in enumerate(rows):
            self.slots[node] = start + offset
            self.keys[:, start + offset] = self.nodes.keys[node]
            self.values[:, start + offset] = self.nodes.values[node]
        self.table.append([self.slots[self.nodes.parents[node]] for node in rows], len(rows))
        queries = np.stack([self.nodes.queries[node] for node in rows])
        out = np.empty_like(queries)
        plan, scale = self.table.attention_plan(self.window), np.float32(self.nodes.scale)
        cpu_attention.attention(queries, self.keys, self.values, plan, scale, out)
        return out

    def commit(self, path: Sequence[int]) -> None:
        pending = range(self.table.last_slot + 1, self.table.num_slots)
        kept = [self.slots[node] for node in path]
        self.table.commit(kept)
        for slot in set(pending) - set(kept):
            self.keys[:, slot] = self.values[:, slot] = np.nan


def sequential(nodes: Nodes, node: int, window: int | None) -> np.ndarray:
    """The attention of `node`, its path fed one token at a time: plain decoding."""
    cache = KernelCache(nodes, window)
    out = np.empty(0)
    for ancestor in nodes.path(node):
        out = cache.forward([ancestor])[0]
        cache.commit([ancestor])
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    window=st.sampled_from([None, None, 1, 5, 16, 23]),
    shape=st.sampled_from([(1, 1, 32), (4, 2, 32), (3, 1, 64), (2, 2, 96), (4, 1, 128)]),
)
def test_attention_over_trees_equals_plain_decoding_bit_for_bit(
    seed: int, window: int | None, shape: tuple[int, int, int]
) -> None:
    random = np.random.default_rng(seed)
    nodes = Nodes(*shape, seed)
    cache = KernelCache(nodes, window)
    tip = -1
    for _ in range(int(random.integers(1, 5))):
        first = len(nodes.parents)
        chain = random.random() < 0.3
        for _ in range(int(random.integers(1, 3))):  # appends of this round
            rows = []
            for _ in range(int(random.integers(1, 18))):
                last = len(nodes.parents) - 1 if len(nodes.parents) > first else tip
                above = last if chain else int(random.choice([tip, last, *range(first, len(nodes.parents))]))
                rows.append(nodes.add(above))
            out = cache.forward(rows)
            for row, node in enumerate(rows):
                exact = nodes.exact(node, window)
                assert np.abs(out[row] - exact).max() <= 2e-6 * np.abs(exact).max()
                np.testing.assert_array_equal(out[row], sequential(nodes, node, window))
        accepted = [n for n in nodes.path(int(random.integers(first, len(nodes.parents)))) if n >= first]
        cache.commit(accepted)
        tip = accepted[-1]


def test_attention_survives_extreme_scores() -> None:
    """Softmax is shifted by the largest score: no overflow, and far smaller ones vanish."""
    nodes = Nodes(2, 1, 32, 3)
    rows = [nodes.add(i - 1) for i in range(20)]
    for node in rows:
        nodes.queries[node] *= 60
    out = KernelCache(nodes, None).forward(rows)
    for node in rows:
        assert np.abs(out[node] - nodes.exact(node, None)).max() <= 1e-3  # scores near 1e3 have few bits left


def test_attention_does_not_depend_on_threads() -> None:
    nodes = Nodes(4, 2, 64, 1)
    rows = [nodes.add(max(i // 2, i - 4) - 1) for i in range(30)]
    np.testing.assert_array_equal(*on_one_and_two_threads(lambda: KernelCache(nodes, None).forward(rows)))


# -- whole blocks ------------------------------------------------------------------------------------------

_ARGS: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 40, "head_dim": 32, "rope_theta": 10000.0,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def make_model(family: Any, **changes: Any) -> Any:
    """A random model of `family`, biases and norms included, the same each time."""
    config = {**_ARGS, "model_type": family.__name__.rsplit(".", 1)[-1], **changes}
    model = family.Model(family.ModelArgs.from_dict(config))
    random = np.random.default_rng(0)
    for module in model.modules():
        own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
        for name, value in own.items():
            around = 1.0 if value.ndim == 1 and name == "weight" else 0.0
            module[name] = mx.array((around + 0.2 * random.standard_normal(value.shape)).astype(np.float32))
    return model


# A prompt, two trees with dead slots between them, single tokens, and a prompt past the positions that rotation
# tables grow by: each row's parent (-1: the last committed token, else an earlier row) and the rows accepted.
_FORWARDS = (
    (range(-1, 11), range(12)),
    ([-1, 0, 0, 1, 2, -1, 3, 5], [0, 2, 4]),
    ([-1, 0, -1, 2], [2, 3]),
    ([-1], [0]),
    ([-1], [0]),
    (range(-1, 1099), range(1100)),
)


def block_outputs(block: Any, forwards: Any = _FORWARDS, window: int | None = None) -> list[np.ndarray]:
    cache = LazyKVCache([window])
    random = np.random.default_rng(1)
    outputs = []
    for parents, accepted in forwards:
        first, count = cache.num_slots, len(parents)
        slots = cache.append([first + p if p >= 0 else -1 for p in parents], count)
        x = mx.array(random.standard_normal((1, count, 64)).astype(np.float32))
        outputs.append(np.array(block(x, cache.mask(count, window, False), cache.layers[0])))
        cache.commit([slots[row] for row in accepted])
    return outputs


def assert_same_outputs(block: Any, original: Any) -> None:
    for ours, theirs in zip(block_outputs(block), block_outputs(original), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def by_name(bits: dict[str, int], path: str, layer: nn.Module) -> bool | dict[str, int]:
    """How `nn.quantize` treats a layer: in the bits of its name, the others in 4."""
    name = path.rpartition(".")[2]
    return hasattr(layer, "to_quantized") and {"group_size": 32, "bits": bits.get(name, 4)}


def two_models(
    family: Any = llama,
    bits: int | dict[str, int] | None = None,
    dtype: str = "fp32",
    rope: Callable[[], nn.Module] | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """One model twice: its linear layers on our kernels, and wholly on MLX's in fp32."""
    models = [make_model(family, **changes) for _ in range(2)]
    for model in models:
        for layer in model.layers:
            layer.self_attn.rope = rope() if rope is not None else layer.self_attn.rope
        model.set_dtype(DTYPES[dtype])
        if isinstance(bits, dict):
            nn.quantize(model, 32, 4, class_predicate=partial(by_name, bits))
        elif bits is not None:
            nn.quantize(model, 32, bits)
    ours, theirs = models
    cpu_linear.install_cpu_linears(ours)
    theirs.set_dtype(mx.float32)
    positions.install(theirs)
    return ours, theirs


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "partial rotation": {"rope": lambda: nn.RoPE(16)},
    "traditional rotation": {"rope": lambda: nn.RoPE(32, traditional=True)},
    "partial traditional rotation": {"rope": lambda: nn.RoPE(16, traditional=True)},
    "one rotated pair": {"rope": lambda: nn.RoPE(2)},
    "one traditional pair": {"rope": lambda: nn.RoPE(2, traditional=True)},
    "linear scaling": {"rope": lambda: nn.RoPE(32, scale=0.25)},
    "traditional rotation by little": {"rope": lambda: nn.RoPE(32, traditional=True, base=5e8, scale=0.125)},
    "llama3 scaling": {"rope": lambda: initialize_rope(32, 500000.0, False, _LLAMA3)},
    "yarn scaling": {"rope": lambda: initialize_rope(32, 10000.0, False, _YARN)},
    "qwen2": {"family": qwen2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"family": qwen3},
    "wide qwen3": {"family": qwen3, "head_dim": 128, "num_attention_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no groups": {"num_key_value_heads": 4},
    "one group": {"num_key_value_heads": 1, "head_dim": 96},
    "4 bits and bf16": {"bits": 4, "dtype": "bf16"},
    "8 bits and fp16": {"bits": 8, "dtype": "fp16"},
    "mixed bits": {"bits": {"v_proj": 6, "o_proj": 5, "down_proj": 8}, "dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_equal_mlx_blocks(case: str) -> None:
    ours, theirs = two_models(**BLOCKS[case])
    cpu_block.install_cpu_blocks(ours)
    for block, original in zip(ours.layers, theirs.layers, strict=True):
        assert isinstance(block, cpu_block.CpuBlock)
        assert_same_outputs(block, original)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("bits", "dtype"), [(4, "bf16"), (8, "fp16"), (None, "fp32")])
def test_a_block_gives_a_row_the_same_bits_however_the_prompt_is_cut(
    monkeypatch: pytest.MonkeyPatch, bits: int | None, dtype: str, window: int | None
) -> None:
    """Cut in pieces, what no window reaches is given up on the way; as a whole, nothing is."""
    monkeypatch.setattr("llmcad_mlx.models.slots.WINDOW_SLACK", 16)
    ours, theirs = two_models(bits=bits, dtype=dtype, attention_bias=True)
    cpu_block.install_cpu_blocks(ours)
    assert isinstance(ours.layers[0], cpu_block.CpuBlock)

    def outputs(model: Any, size: int) -> np.ndarray:
        counts = [min(size, 300 - start) for start in range(0, 300, size)]
        chains = [(range(-1, count - 1), range(count)) for count in counts]
        return np.concatenate(block_outputs(model.layers[0], chains, window), axis=1)

    whole, exact = outputs(ours, 300), outputs(theirs, 300)
    assert np.abs(whole - exact).max() <= 1e-4 * np.abs(exact).max()
    for size in (128, 21, 20, 7, 1):
        np.testing.assert_array_equal(outputs(ours, size), whole)


class ReluMLP(llama.MLP):
    """Has everything a SwiGLU has, and computes something else."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.relu(self.gate_proj(x)) * self.up_proj(x))


def _capped(layer: Any) -> None:
    class Scaled(type(layer)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return 0.5 * super().__call__(x, mask, cache)

    layer.__class__ = Scaled


MISFITS: dict[str, Callable[[Any], Any]] = {
    "another activation": lambda layer: layer.update_modules(
        {"mlp": ReluMLP(llama.ModelArgs.from_dict({**_ARGS, "model_type": "llama"}))}
    ),
    "capped outputs": _capped,
    "another norm": lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(64)),
    "one norm more": lambda layer: setattr(layer, "pre_feedforward_layernorm", nn.RMSNorm(64)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_block_that_does_not_fit_is_left_alone(misfit: str) -> None:
    model, untouched = make_model(llama), make_model(llama)
    for changed in (model, untouched):
        MISFITS[misfit](changed.layers[0])
    untouched.update(model.parameters())
    cpu_linear.install_cpu_linears(model)
    cpu_block.install_cpu_blocks(model)
    assert [adaptations(layer) for layer in model.layers] == [[], [cpu_block.CpuBlock]]  # the second is as usual
    positions.install(model)
    positions.install(untouched)
    assert_same_outputs(model.layers[0], untouched.layers[0])


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 16}, {"head_dim": 48}, {"intermediate_size": 40}, {"hidden_size": 80, "head_dim": 32}],
)
def test_shapes_the_kernels_cannot_take_are_left_alone(changes: dict[str, Any]) -> None:
    model, _ = two_models(**changes)
    cpu_block.install_cpu_blocks(model)
    assert [adaptations(layer) for layer in model.layers] == [[], []]


def test_layers_that_rotate_alike_share_their_tables() -> None:
    """Tables of its own for each of 900 layers took more memory than the plan had."""
    bases = itertools.count(7)
    for rope, shared in ((None, True), (lambda: nn.RoPE(32, base=float(next(bases))), False)):
        model, _ = two_models(rope=rope)
        cpu_block.install_cpu_blocks(model)
        first, second = (layer._cpu_block.rotation for layer in model.layers)
        assert (first is second) == shared
