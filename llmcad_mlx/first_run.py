"""Compiling the CPU kernels that a model needs before it is loaded, in processes of their own.

The compiler takes 400 MB, about 20 MB for each kernel, and gives nothing back while its process lives. Of a small
budget that would be the largest part, in the first run of all and in no other. What a process has compiled is kept
on the disk at once, so one that has taken its share can end, and the next goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.files import home_folder, write_text
from llmcad_mlx.files.safetensors import read_weights
from llmcad_mlx.machine import memory_of_process
from llmcad_mlx.memory import MemoryNeeds, make_plan
from llmcad_mlx.models.folder import load_model_folder, read_config
from llmcad_mlx.process import COMPILER_BYTES, UNFINISHED
from llmcad_mlx.streaming.build import Prepared
from llmcad_mlx.verifying import Target

_LEAST_BYTES = 300 << 20  # the compiler's own 255 MB, and a few kernels
_AMPLE_BYTES = 2 << 30  # in so large a budget the compiler is no harm
_RESERVE_BYTES = 32 << 20  # the largest kernel; it is compiled to its end
_MOST_PROCESSES = 16
_ROWS = 40  # more than the kernels for few rows take


def compile_kernels(folders: Iterable[Path], budget: int) -> None:
    """Compile what the models in `folders` need, where it was not done on this machine and would not fit into
    `budget` beside the rest. What fails here is compiled when it is needed."""
    if budget > _AMPLE_BYTES or "numba" in sys.modules or not cpu_kernels_wanted() or not sys.executable:
        return
    for folder in folders:
        with suppress(OSError):
            done = home_folder() / "kernels" / f"{_kind(folder)}.done"
            if not done.exists() and _compile_apart(folder, budget):
                done.parent.mkdir(parents=True, exist_ok=True)
                write_text(done, f"{folder.name}\n")


def _compile_apart(folder: Path, budget: int) -> bool:
    """Whether all is compiled."""
    limit = max(budget - memory_of_process().now - _RESERVE_BYTES, _LEAST_BYTES)
    environment = {**os.environ, COMPILER_BYTES: str(limit), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(_MOST_PROCESSES):
        command = [sys.executable, "-m", "llmcad_mlx.first_run", str(folder)]
        quiet = subprocess.DEVNULL
        code = subprocess.run(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet).returncode
        if code != UNFINISHED:
            return code == 0
    return False


def _kind(folder: Path) -> str:
    """Equal for models that need the same kernels of this version, on this machine."""
    config = read_config(folder)
    sources = sorted((Path(__file__).parent / "cpu").glob("*.py"))
    facts = [
        {name: version(name) for name in ("numba", "llvmlite", "mlx")},
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sources],
        os.environ.get("NUMBA_CACHE_DIR"),
        str(mx.device_info()),
        [config["model_type"], config.get("quantization"), config.get("attention_bias"), config.get("head_dim")],
        sorted({extent.dtype for extent in read_weights(folder).values()}),
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]


def _compile(folder: Path) -> None:
    """Load a model without tokenizer and most of its weights, and let it compute with few rows and with many."""
    loaded = load_model_folder(folder, lazy=True, alone=True, tokenizer=False)
    prepared = Prepared(loaded, home_folder() / "probes")
    needs = MemoryNeeds(prepared.sizes, context=_ROWS, min_context=_ROWS, runtime_bytes=0)
    feed = prepared.build(replace(make_plan(needs, None, pinned=0), num_buffers=2), None)
    target = Target(prepared.model, prepared.model.vocab_size, feed, _ROWS)
    try:
        target.prefill([0] * _ROWS)
        for num_rows in (1, _ROWS):
            with target._working(None):
                mx.eval(target.model.forward([0] * num_rows, target.cache).logits)
            target.cache.rollback()
    finally:
        target.close()


if __name__ == "__main__":
    _compile(Path(sys.argv[1]))
