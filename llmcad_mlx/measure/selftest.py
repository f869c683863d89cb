"""`llmcad-mlx doctor --self-test`: whether what the engine relies on holds on this machine.

Ten checks, each with a figure, on any platform: what MLX promises (a buffer may be refilled while another is
computed with, kernels agree with float64, arrays made in one thread serve in another), what the disk gives, what a
pass costs, whether memory stays within its plan, and whether the text stays the same. What is found out about
reading and about step times is kept, and used from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import psutil
from mlx.nn.layers.containers import Sequential
from mlx.nn.layers.quantized import QuantizedLinear

from llmcad_mlx.api import Engine, load
from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.files.safetensors import read_weights
from llmcad_mlx.loader import plan_pair
from llmcad_mlx.measure.tune import time_passes
from llmcad_mlx.models.probe import probe
from llmcad_mlx.prompt import Prompt
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name, find_pair, public_name
from llmcad_mlx.streaming.storage import FileStorage, ReadWay
from llmcad_mlx.streaming.stream import Read, Unit, WeightStream
from llmcad_mlx.streaming.ways import best_way, keep_way, measure_ways, reads_of

PROMPT = "Write a Python function that merges two sorted lists, and explain it."
NUM_TOKENS = 200
_ROUNDS = 1000  # of the reading check
_UNITS, _UNIT_BYTES = 8, 1 << 20
_ROWS = (1, 2, 5, 8, 9, 16, 32, 64)
_HEAD_DIMS = (64, 128, 256)
_LARGE_READ = (2 << 30) + 1
_DISK_S = 20.0  # for 12 ways, alone and beside a busy thread, three times
_PASSES_S = 12.0  # after which no more passes are timed: on MLX's CPU kernels one of 64 rows takes 6 s
_KERNEL_LIMITS = {mx.float32: 2e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}
"""Of kernels' errors, relative to the largest value; wrong ones are off by about 1. MLX's CPU back end sums 16-bit
products in 16 bits (7e-3 and 6e-2 were seen), and GPUs may round float32's to 10 bits (TF32)."""
_TIME_PER_RUN_S = 15.0  # of generating; slow kernels end with fewer tokens, and the line says how many


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found, in one line. passed: None where it does not apply here."""

    name: str
    passed: bool | None
    finding: str
    seconds: float


class _FailedError(Exception):
    """What was found to be wrong."""


class _NotHereError(Exception):
    """Why a check does not apply."""


def self_test(model: str | None = None, names: Container[str] | None = None) -> Iterator[Check]:
    """Run the ten checks one after the other; a failure does not end them. model: a folder, preset or repository,
    which should be one that this machine is to run; None: the embedded default. names: only these checks."""
    tests = _Model(model)
    checks: Sequence[tuple[str, Callable[[], str]]] = (
        ("machine", _machine),
        ("reading while computing", _reading_while_computing),
        ("kernels", _kernels),
        ("tree against plain", tests.tree),
        ("second thread", tests.second_thread),
        ("disk", tests.disk),
        ("pass times", tests.pass_times),
        ("same text", tests.same_text),
        ("memory against plan", tests.memory),
        ("reads above 2 GiB", _large_read),
    )
    try:
        for name, check in checks:
            if names is not None and name not in names:
                continue
            started = time.perf_counter()
            try:
                passed, finding = True, check()
            except _NotHereError as why:
                passed, finding = None, str(why)
            except (_FailedError, LlmcadError) as error:
                passed, finding = False, str(error)
            except Exception as error:  # a broken back end fails in its own ways
                passed, finding = False, f"{type(error).__name__}: {error}"
            finding = " ".join(finding.replace(str(Path.home()), "~").split())  # no one's paths
            yield Check(name, passed, finding, time.perf_counter() - started)
    finally:
        tests.close()


def _machine() -> str:
    facts = [platform.machine(), device_name()]
    if psutil.MACOS:
        if _sysctl("sysctl.proc_translated") == "1":
            raise _FailedError("this Python runs under Rosetta, without Metal; install an arm64 one")
        facts.insert(0, f"macOS {platform.mac_ver()[0]}")
        facts.append(f"iogpu.wired_limit_mb {_sysctl('iogpu.wired_limit_mb') or 'unknown'}")
    working_set = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
    if working_set:
        facts.append(f"recommended working set {format_size(int(working_set))}")
    return ", ".join([*facts, f"{format_size(psutil.virtual_memory().total)} memory"])


def _sysctl(name: str) -> str:
    """A setting of macOS's kernel; "" where there is none of that name."""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    return done.stdout.strip()


def _reading_while_computing() -> str:
    """A reader fills one buffer while MLX computes with another: every sum and every checksum must be right."""
    numbers = np.random.default_rng(0)
    contents = [numbers.integers(0, 256, _UNIT_BYTES, np.uint8) for _ in range(_UNITS)]
    sums = [int(content.sum()) for content in contents]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "units"
        file.write_bytes(b"".join(map(bytes, contents)))
        units = [
            Unit(
                f"unit {i}",
                (Read(file, i * _UNIT_BYTES, _UNIT_BYTES, 0),),
                hashlib.sha256(bytes(content)).hexdigest(),
            )
            for i, content in enumerate(contents)
        ]
        buffers = [mx.zeros((_UNIT_BYTES,), mx.uint8) for _ in range(3)]
        mx.eval(buffers)
        stream = WeightStream(units, [memoryview(np.asarray(buffer)) for buffer in buffers], FileStorage())  # type: ignore[arg-type]
        wrong = 0
        try:
            for round_number in range(_ROUNDS):
                found = mx.sum(buffers[stream.wait()].astype(mx.int32))
                wrong += found.item() != sums[round_number % _UNITS]
                stream.release()
        finally:
            stream.close()
    if wrong:
        raise _FailedError(f"{wrong} of {_ROUNDS} sums over a buffer were wrong while another was read into")
    return f"{_ROUNDS} buffers of {format_size(_UNIT_BYTES)}, all sums and checksums right"


def _kernels() -> str:
    """Quantised products, attention under a mask and rotary positions for each row, against float64."""
    found = []
    for dtype, limit in _KERNEL_LIMITS.items():
        error = max(_product_error(dtype), _attention_error(dtype), _rope_error(dtype))
        found.append((str(dtype).removeprefix("mlx.core."), error, limit))
    text = ", ".join(f"{name} {error:.1e}" for name, error, _ in found)
    if any(not error <= limit for _, error, limit in found):
        limits = ", ".join(f"{limit:.0e}" for limit in _KERNEL_LIMITS.values())
        raise _FailedError(f"largest errors relative to float64: {text}; at most {limits} is rounding")
    return f"largest errors relative to float64: {text}"


def _product_error(dtype: mx.Dtype) -> float:
    """Of quantised linear layers as models run them here, for all `_ROWS`."""
    mx.random.seed(0)
    worst = 0.0
    for bits in (4, 8):
        layer: Any = QuantizedLinear(512, 768, bias=False, group_size=64, bits=bits)
        layer.scales, layer.biases = layer.scales.astype(dtype), layer.biases.astype(dtype)
        weights = mx.dequantize(
            layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), 64, bits
        )
        exact = np.array(weights, np.float64)
        model: Any = Sequential(layer)  # type: ignore[no-untyped-call]
        prepare_for_device(model)
        for rows in _ROWS:
            x = mx.random.normal((1, rows, 512)).astype(dtype)
            worst = max(worst, _error(model(x), np.array(x.astype(mx.float32), np.float64) @ exact.T))
    return worst


def _attention_error(dtype: mx.Dtype) -> float:
    """Of attention with grouped heads under a random mask, for all `_ROWS` and `_HEAD_DIMS`."""
    numbers = np.random.default_rng(0)
    worst = 0.0
    for dim in _HEAD_DIMS:
        for rows in _ROWS:
            mask = numbers.random((rows, 300)) < 0.5
            mask[:, 0] = True
            q, k, v = (
                mx.array(numbers.standard_normal((1, heads, length, dim)), mx.float32).astype(dtype)
                for heads, length in ((4, rows), (2, 300), (2, 300))
            )
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask=mx.array(mask))
            q64, k64, v64 = (np.array(array.astype(mx.float32), np.float64) for array in (q, k, v))
            scores = q64 @ np.repeat(k64, 2, 1).swapaxes(-1, -2) * dim**-0.5
            weights = np.exp(np.where(mask, scores, -np.inf))
            weights /= weights.sum(-1, keepdims=True)
            worst = max(worst, _error(out, weights @ np.repeat(v64, 2, 1)))
    return worst


def _rope_error(dtype: mx.Dtype) -> float:
    """Of rotary positions that differ from row to row."""
    numbers = np.random.default_rng(0)
    positions, dim = np.array([5, 6, 6, 7, 40, 300]), 64
    x = mx.array(numbers.standard_normal((len(positions), 4, 1, dim)), mx.float32).astype(dtype)
    out = mx.fast.rope(
        x, dim, traditional=False, base=10000.0, scale=1.0, offset=mx.array(positions.astype(np.int32))
    )
    x64 = np.array(x.astype(mx.float32), np.float64)
    angles = positions[:, None, None, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    first, second = x64[..., : dim // 2], x64[..., dim // 2 :]
    cos, sin = np.cos(angles), np.sin(angles)
    return _error(out, np.concatenate([first * cos - second * sin, first * sin + second * cos], -1))


def _error(found: mx.array, exact: npt.NDArray[np.float64]) -> float:
    """Largest difference relative to the largest value."""
    difference = np.abs(np.array(found.astype(mx.float32), np.float64) - exact)
    return float(difference.max() / np.abs(exact).max())


def _large_read() -> str:
    """macOS refuses single reads above 2 GiB - 1."""
    if psutil.virtual_memory().available < 2 * _LARGE_READ:
        raise _NotHereError(
            f"not tried: takes {format_size(_LARGE_READ)} of memory, and less than twice that is free"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sparse"
        with file.open("wb") as out:
            out.seek(_LARGE_READ - 1)
            out.write(b"\x07")
        storage, data = FileStorage(), np.empty(_LARGE_READ, np.uint8)
        try:
            storage.read_into(file, 0, memoryview(data))  # type: ignore[arg-type]
        finally:
            storage.close()
        if data[-1] != 7:
            raise _FailedError("the last byte is not what the file holds")
    return f"{format_size(_LARGE_READ)} in one piece, read"


class _Model:
    """The checks that need a model; loaded with its draft when the first of them asks."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._engine: Engine | None = None
        self._plain: list[int] = []
        self._drafted: list[int] = []

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = load(self._name)
        return self._engine

    @property
    def prompt(self) -> Prompt:
        """As `generate` makes it of what is typed."""
        is_chat = self.engine.tokenizer.has_chat_template
        return [{"role": "user", "content": PROMPT}] if is_chat else PROMPT

    def tree(self) -> str:
        """Token trees against one token at a time through mlx-lm's own cache."""
        model = self.engine.pair.target.model
        report = model.report if self.engine.pair.plan is not None else probe(model.model)
        if report.capability == "plain":
            raise _NotHereError(f"{public_name(self._name)} takes no drafts: {report.reason}")
        exact = ", bit for bit" if report.max_difference == 0.0 else ""
        return (
            f"{public_name(self._name)}: {report.capability}, logits differ by {report.max_difference:.2g}{exact}"
        )

    def second_thread(self) -> str:
        """A model loaded in one thread, its probe's report kept from before, generates in another."""
        found: list[Any] = []

        def generate() -> None:
            try:
                found.append(self.engine.generate(self.prompt, max_tokens=8, policy="plain").tokens)
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=generate)
        self.engine  # noqa: B018  loaded here
        thread.start()
        thread.join()
        here = self.engine.generate(self.prompt, max_tokens=8, policy="plain").tokens
        if found != [here]:
            raise _FailedError(f"loaded in one thread, used in another: {found[0]}, not {here}")
        return "loaded in one thread, generated in another: 8 tokens, the same"

    def disk(self) -> str:
        """The best way to read the model's files, alone and beside a busy Python thread. It is kept where a GPU
        computes; a processor that computes loses to further readers what they gain (see `DEFAULT_WAY`)."""
        reads = reads_of(read_weights(self.engine.pair.names.target_path))
        rates = measure_ways(reads, _DISK_S)
        best = best_way(rates)
        is_kept = mx.default_device() != mx.Device(mx.cpu)
        if is_kept:
            keep_way(reads[0].file, best)
        slowest = min(rates, key=lambda rate: rate.bytes_per_s)
        beside = best.beside_python_bytes_per_s / best.bytes_per_s
        source = "" if best.from_disk else ", from the page cache: the model is too small or was just read"
        return (
            f"{_way(best.way)}: {best.bytes_per_s / 1e9:.2f} GB/s, {beside:.0%} of it beside a busy Python thread"
            f"{source}{'; kept' if is_kept else ''}; the worst of {len(rates)} ways, {_way(slowest.way)}: "
            f"{slowest.bytes_per_s / 1e9:.2f}"
        )

    def pass_times(self) -> str:
        """Passes of the target by rows as `tune` times them, a step of the draft, and a lone evaluation.
        The times of passes are kept with what the pair has learned."""
        pair, costs = self.engine.pair, self.engine.pair.profile.costs
        self.engine.generate(self.prompt, max_tokens=2)  # drafts
        self.engine.restore(None)  # the passes need the target's cache
        passes = time_passes(pair, _PASSES_S)
        for timed in passes:
            costs.observe_pass(*timed)
        step = costs.draft.predict(1) if costs.draft else None
        one, evaluations = mx.array(1.0), []
        for _ in range(50):
            started = time.perf_counter()
            mx.eval(one + one)
            evaluations.append(time.perf_counter() - started)
        by_rows = ", ".join(f"{rows} {seconds * 1e3:.3g}" for rows, seconds, _ in passes)
        drafting = "" if not step else f"; a draft step {step * 1e3:.3g} ms"
        return f"ms by rows: {by_rows}{drafting}; an evaluation {median(evaluations) * 1e6:.0f} us"

    def same_text(self) -> str:
        """In memory, drafted and plain."""
        self._plain = self._tokens("plain")
        self._drafted = self._tokens("throughput")
        return self._compared("with drafts", self._drafted)

    def _tokens(self, policy: str) -> list[int]:
        started, tokens = time.perf_counter(), []
        for response in self.engine.stream_generate(
            self.prompt, max_tokens=NUM_TOKENS, policy=policy, temperature=0.0
        ):
            tokens.append(response.token)
            if time.perf_counter() - started > _TIME_PER_RUN_S:
                break
        return tokens

    def _compared(self, what: str, tokens: list[int]) -> str:
        """How many tokens differ from plain decoding's; on a GPU near-ties may flip, and are counted."""
        count = min(len(tokens), len(self._plain))
        same = next((i for i in range(count) if tokens[i] != self._plain[i]), count)
        exact = mx.default_device() == mx.Device(mx.cpu) and not psutil.MACOS
        if same < count and exact:
            raise _FailedError(f"{what}: token {same} of {count} is not plain decoding's")
        return f"{what}: {count} tokens, " + (
            "all as plain decoding" if same == count else f"the first {same} as plain decoding, then a near-tie"
        )

    def memory(self) -> str:
        """A process of its own, everything streamed, in just the memory that its plan asks for."""
        options = MemoryOptions(pinned=0)
        names = find_pair(self._name, "auto", False)
        self.close()
        self._engine = None
        budget = plan_pair(names, options).plan.total_bytes
        swapped = psutil.swap_memory().sout
        command = [
            sys.executable, "-m", "llmcad_mlx", "generate", PROMPT, "--target", str(names.target_path),
            *(("--draft", str(names.draft_path or names.draft_name))), "--pinned", "0", "--json",
            "--memory", f"{-(-budget // 10**6)}MB", "-m", str(max(len(self._plain), 20)),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
        if done.returncode:
            raise _FailedError(f"streamed: {done.stderr.strip()[-300:]}")
        report = json.loads(done.stdout)
        swapped = psutil.swap_memory().sout - swapped
        text = (
            f"peak {format_size(report['peak_rss_bytes'])} of {format_size(report['budget_bytes'])} planned, "
            f"{report['target_passes']} passes, {format_size(swapped)} swapped out; "
        ) + self._compared("streamed", report["tokens"])
        if report["peak_rss_bytes"] > report["budget_bytes"]:
            raise _FailedError(text)
        return text


def _way(way: ReadWay) -> str:
    readers = "one reader" if way.num_readers == 1 else f"{way.num_readers} readers"
    return f"{'direct' if way.direct else 'buffered'}, {readers} of {way.piece_bytes >> 20} MB"
