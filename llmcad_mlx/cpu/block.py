"""A whole decoder block on the CPU kernels: no crossing between MLX and numpy inside a forward.

MLX's CPU back end runs normalisation, rotation, softmax and activation one scalar at a time and hands each
evaluation to another thread; on a 135M model that was 80 % of the time. A block of the usual build (RMS norm,
grouped attention with rotary positions, SwiGLU) is therefore computed here as one call. Structure tells
candidates, numbers decide: `install_cpu_blocks` keeps a block only where it agrees with MLX's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.normalization import RMSNorm

from llmcad_mlx.cpu import attention as cpu_attention
from llmcad_mlx.cpu import kernels as cpu_kernels
from llmcad_mlx.cpu.compiling import kernel
from llmcad_mlx.cpu.linear import CpuLinear, num_threads
from llmcad_mlx.models.adapt import Adaptation, adapt, restore
from llmcad_mlx.models.cache import Floats, LayerCache, LazyKVCache
from llmcad_mlx.models.probe import layer_kind

_ROTATION_STEP = 512  # positions added to a rotation table at a time
_TOLERANCE = 1e-4  # against MLX's block, relative to the largest output


@kernel()
def _add_bias(out, bias):  # type: ignore[no-untyped-def]
    if bias.size:
        for m in range(out.shape[0]):
            for i in range(out.shape[1]):
                out[m, i] += bias[i]


@kernel()
def _linear(x, layer, threads, out):  # type: ignore[no-untyped-def]
    weight, scales, biases, shift, split, bias = layer
    if x.shape[0] <= cpu_kernels.FEW_ROWS:
        cpu_kernels.matmul_few(x, weight, scales, biases, shift, split, out)
    else:
        cpu_kernels.matmul_many(x, weight, scales, biases, shift, split, threads, out)
    _add_bias(out, bias)


@kernel()
def _linear_three(x, first, second, third, threads, out1, out2, out3):  # type: ignore[no-untyped-def]
    """The third may be of no rows."""
    if x.shape[0] <= cpu_kernels.FEW_ROWS and first[4] == second[4] == third[4]:
        cpu_kernels.matmul_few_three(x, first, second, third, out1, out2, out3)
        _add_bias(out1, first[5])
        _add_bias(out2, second[5])
        _add_bias(out3, third[5])
    else:
        _linear(x, first, threads, out1)
        _linear(x, second, threads, out2)
        if out3.size:
            _linear(x, third, threads, out3)


@kernel()
def _rotate(x, heads, dim, positions, cos, sin, traditional, out, slots):  # type: ignore[no-untyped-def]
    """Rotate rows (M, heads * dim) into out (M, heads, dim), or with `slots` into out (heads, slot, dim)."""
    half = cos.shape[1]
    for m in range(x.shape[0]):
        p = positions[m]
        for h in range(heads):
            target = out[h, slots[m]] if slots.size else out[m, h]
            source = x[m, h * dim : (h + 1) * dim]
            for i in range(half):
                a = 2 * i if traditional else i
                b = 2 * i + 1 if traditional else i + half
                target[a] = source[a] * cos[p, i] - source[b] * sin[p, i]
                target[b] = source[a] * sin[p, i] + source[b] * cos[p, i]
            for i in range(2 * half, dim):
                target[i] = source[i]


@kernel()
def _norm_heads(x, heads, dim, weight, eps):  # type: ignore[no-untyped-def]
    if weight.size:
        rows = x.reshape(x.shape[0] * heads, dim)
        cpu_attention.rms_norm(rows, weight, eps, rows)


@kernel()
def _block(h, attention_weights, mlp_weights, norms, rotation, cache, plan, heads, dim, scale, threads):  # type: ignore[no-untyped-def]
    """One decoder block over h (M, hidden), in place. See `CpuBlock` for what the tuples hold."""
    wq, wk, wv, wo = attention_weights
    gate, up, down = mlp_weights
    norm1, eps1, norm2, eps2, q_norm, k_norm, head_eps = norms
    cos, sin, traditional = rotation
    keys, values = cache
    positions, slots = plan.positions, plan.slots
    num_rows, hidden = h.shape
    kv_heads = keys.shape[0]
    x = np.empty((num_rows, hidden), np.float32)
    cpu_attention.rms_norm(h, norm1, eps1, x)
    q = np.empty((num_rows, heads * dim), np.float32)
    k = np.empty((num_rows, kv_heads * dim), np.float32)
    v = np.empty((num_rows, kv_heads * dim), np.float32)
    _linear_three(x, wq, wk, wv, threads, q, k, v)
    _norm_heads(q, heads, dim, q_norm, head_eps)
    _norm_heads(k, kv_heads, dim, k_norm, head_eps)
    none = slots[:0]
    rotated = np.empty((num_rows, heads, dim), np.float32)
    _rotate(q, heads, dim, positions, cos, sin, traditional, rotated, none)
    _rotate(k, kv_heads, dim, positions, cos, sin, traditional, keys, slots)
    for m in range(num_rows):
        for head in range(kv_heads):
            values[head, slots[m]] = v[m, head * dim : (head + 1) * dim]
    mixed = np.empty((num_rows, heads, dim), np.float32)
    cpu_attention.attention(rotated, keys, values, plan, scale, mixed)
    _linear(mixed.reshape(num_rows, heads * dim), wo, threads, x)
    h += x
    cpu_attention.rms_norm(h, norm2, eps2, x)
    wide = np.empty((num_rows, gate[0].shape[0]), np.float32)
    wider = np.empty((num_rows, gate[0].shape[0]), np.float32)
    nothing = (up[0][:0], up[1], up[2], up[3], up[4], up[5])
    _linear_three(x, gate, up, nothing, threads, wide, wider, wider[:, :0])
    cpu_attention.silu_times(wide, wider, threads)
    _linear(wide, down, threads, x)
    h += x


class _Rotation:
    """cos and sin tables read off a rope module, whatever its scaling: it is a rotation of pairs."""

    def __init__(self, rope: Any, dim: int) -> None:
        self._rope, self._dim, self._size = rope, dim, 0
        self.traditional = False
        self.cos: Floats = np.zeros((0, 0), np.float32)
        self.sin: Floats = np.zeros((0, 0), np.float32)

    def between(self, start: int, position: int) -> tuple[Floats, Floats, bool]:
        """Tables (P, pairs) from position ``start`` on, with P > position - start."""
        while self._size <= position:
            self.traditional, pairs = self._layout()
            first = np.arange(pairs) * 2 if self.traditional else np.arange(pairs)
            second = first + (1 if self.traditional else pairs)
            probe = np.zeros((1, 1, _ROTATION_STEP, self._dim), np.float32)
            probe[..., first] = 1.0
            turned = np.asarray(self._rope(mx.array(probe), offset=self._size))[0, 0]
            cos, sin = turned[:, first], turned[:, second]
            if self._size:
                cos, sin = np.concatenate([self.cos, cos]), np.concatenate([self.sin, sin])
            self.cos, self.sin = np.ascontiguousarray(cos), np.ascontiguousarray(sin)
            self._size += _ROTATION_STEP
        return self.cos[start:], self.sin[start:], self.traditional

    def _layout(self) -> tuple[bool, int]:
        """Whether pairs are neighbours, and how many pairs are rotated: where element 0's turn shows up."""
        probe = np.zeros((1, 1, 2, self._dim), np.float32)
        probe[..., 0] = 1.0
        turned = np.asarray(self._rope(mx.array(probe), offset=0))[0, 0, 1]
        partner = np.flatnonzero(turned[1:])
        if len(partner) == 0:
            return False, 0
        if partner[0] == 0 and self._dim > 2:
            # Neighbours; a pair turns where its second element shows up in its first, however little.
            probe[..., 0::2], probe[..., 1::2] = 0.0, 1.0
            turned = np.asarray(self._rope(mx.array(probe), offset=0))[0, 0, 1]
            return True, int(np.flatnonzero(turned[0::2]).max()) + 1
        return False, int(partner[0]) + 1


def _weights_of(layer: Any) -> tuple[Any, ...]:
    """A linear layer as `_linear` takes it."""
    bias = layer.get("bias")
    vector = np.zeros(0, np.float32) if bias is None else np.array(bias, np.float32)
    return (*layer._cpu_weights.of(layer), vector)


def _norm_of(module: Any) -> tuple[Floats, float]:
    return np.array(module["weight"], np.float32), float(module.eps)


def _rope_key(rope: Any, dim: int) -> Hashable:
    """Equal for rope modules that rotate alike; None where that cannot be told."""
    own = {name: value for name, value in {**vars(rope), **rope}.items() if name not in ("_no_grad", "_training")}
    arrays = {name: value for name, value in own.items() if isinstance(value, mx.array)}
    plain = {name: value for name, value in own.items() if name not in arrays}
    if not all(isinstance(value, bool | int | float | str | None) for value in plain.values()):
        return None
    values = tuple((name, np.array(value.astype(mx.float32)).tobytes()) for name, value in sorted(arrays.items()))
    return type(rope), dim, tuple(sorted(plain.items(), key=lambda item: item[0])), values


class _BlockState:
    """What a block needs besides its parameters; views are made again when parameters change.

    rotations: tables that layers share: each with its own, a deep model needs more memory than for its weights.
    """

    def __init__(self, block: Any, rotations: dict[Hashable, _Rotation]) -> None:
        attention = block.self_attn
        self.heads, self.kv_heads = attention.n_heads, attention.n_kv_heads
        self.dim = attention.q_proj["weight"].shape[0] // attention.n_heads
        self.scale = float(attention.scale)
        key = _rope_key(attention.rope, self.dim)
        own = _Rotation(attention.rope, self.dim)
        self.rotation = own if key is None else rotations.setdefault(key, own)
        self._weights: tuple[Any, Any, Any] | None = None
        self._source: Any = None

    def forget(self) -> None:
        self._weights = self._source = None

    def weights(self, block: Any) -> tuple[Any, Any, Any]:
        """Attention's and MLP's matrices and the norms of `block`, always the same one."""
        source = block.mlp.down_proj["weight"]
        if self._weights is None or self._source is not source:
            attention, mlp = block.self_attn, block.mlp
            none = np.zeros(0, np.float32)
            q_norm, head_eps = _norm_of(attention.q_norm) if "q_norm" in attention else (none, 0.0)
            k_norm = _norm_of(attention.k_norm)[0] if "k_norm" in attention else none
            norms = (*_norm_of(block.input_layernorm), *_norm_of(block.post_attention_layernorm))
            self._weights = (
                tuple(_weights_of(attention[n]) for n in ("q_proj", "k_proj", "v_proj", "o_proj")),
                tuple(_weights_of(mlp[n]) for n in ("gate_proj", "up_proj", "down_proj")),
                (*norms, q_norm, k_norm, head_eps),
            )
            self._source = source
        return self._weights


class CpuBlock(Adaptation):
    """A decoder block on the CPU kernels for our cache, on MLX's code for others."""

    in_float32 = True

    _cpu_block: _BlockState

    def forget_weights(self) -> None:
        self._cpu_block.forget()
        super().forget_weights()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        if not isinstance(cache, LayerCache) or kwargs:
            return super().__call__(x, mask, cache, **kwargs)
        state = self._cpu_block
        h = np.array(np.asarray(x)[0], np.float32)  # a copy: the block works in place
        keys_and_values = cache.kernel_buffers(state.kv_heads, state.dim)
        plan = cache.owner.attention_plan(cache.window)
        attention_weights, mlp_weights, norms = state.weights(self)
        front = cache.owner.front(cache.window).tokens  # from which the plan's positions count
        rotation = state.rotation.between(front, front + int(plan.positions.max()))
        _block(
            h, attention_weights, mlp_weights, norms, rotation, keys_and_values, plan,
            state.heads, state.dim, state.scale, num_threads(),
        )  # fmt: skip
        return mx.array(h[None])


def _is_candidate(block: Any) -> bool:
    names = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if not isinstance(block, Module) or set(block.children()) != names:
        return False
    attention, mlp = block.self_attn, block.mlp
    linears = [attention.get(n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [mlp.get(n) for n in ("gate_proj", "up_proj", "down_proj")]
    norms = [block.input_layernorm, block.post_attention_layernorm]
    norms += [attention[n] for n in ("q_norm", "k_norm") if n in attention]
    if not (
        all(isinstance(m, CpuLinear) for m in linears)
        and all(isinstance(m, RMSNorm) for m in norms)
        and all(hasattr(attention, n) for n in ("n_heads", "n_kv_heads", "scale", "rope"))
        and attention.n_heads % attention.n_kv_heads == 0
    ):
        return False
    dim = attention.q_proj["weight"].shape[0] // attention.n_heads
    hidden = block.input_layernorm["weight"].shape[0]
    return dim % 32 == 0 and hidden % 32 == 0 and mlp.gate_proj["weight"].shape[0] % 16 == 0


def _agrees(block: Any, original: Any) -> bool:
    """Run the block with its own and with MLX's ``__call__``, `original`: a random prompt, then a single token."""
    hidden = block.input_layernorm["weight"].shape[0]
    rng = np.random.default_rng(0)
    outputs: list[list[Floats]] = []
    inputs = [mx.array(rng.standard_normal((1, n, hidden)).astype(np.float32)) for n in (9, 1)]
    try:
        for call in (type(block).__call__, original):
            cache = LazyKVCache()
            parts = []
            for x in inputs:
                slots = cache.append(None, x.shape[1])
                parts.append(np.array(call(block, x, cache.mask(x.shape[1], None, False), cache.layers[0])))
                cache.commit(list(slots))
            outputs.append(parts)
    except (TypeError, ValueError, AttributeError, IndexError):
        return False
    return all(
        np.allclose(ours, reference, rtol=0, atol=_TOLERANCE * float(np.abs(reference).max()))
        for ours, reference in zip(*outputs, strict=True)
    )


def install_cpu_blocks(model: Module, loaded: Callable[[int], AbstractContextManager[None]] | None = None) -> None:
    """Let the model's decoder blocks compute on the CPU kernels where both ways agree. loaded: see
    `cpu.use_cpu_blocks`."""
    agreed: dict[Hashable, bool] = {}
    rotations: dict[Hashable, _Rotation] = {}
    for number, block in enumerate(getattr(model, "layers", [])):
        if not _is_candidate(block):
            continue
        original = type(block).__call__
        kind = layer_kind(block) if loaded is not None else number
        adapt(block, CpuBlock, _cpu_block=_BlockState(block, rotations))
        if kind not in agreed:
            with nullcontext() if loaded is None else loaded(number):
                agreed[kind] = _agrees(block, original)
        if not agreed[kind]:
            restore(block, CpuBlock)
