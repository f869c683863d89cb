"""What this process runs on: platform, processor, memory, versions. MLX is asked for the GPU's memory only.

Memory of the process is its resident set, on macOS its footprint: the resident set leaves out compressed pages and
what only the GPU has mapped (0.1 GB was seen where 102 GB were taken), and counts pages of files. No part of this
program asks the system by itself, so tests put another `memory_of_process` in the place of this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "llmcad-mlx", "mlx", "mlx-lm", "numba", "numpy", "transformers", "huggingface-hub", "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts for people. `num_cores`: processors this process may use. `available_bytes`: memory that could be
    taken now without swapping. `versions` has a package's version, None where it is not installed."""

    platform: str
    python: str
    cpu: str
    num_cores: int
    memory_bytes: int
    available_bytes: int
    versions: dict[str, str | None]


def this_machine() -> Machine:
    """Look around. A processor whose name cannot be found out is "unknown"."""
    memory = psutil.virtual_memory()
    return Machine(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        num_cores=len(psutil.Process().cpu_affinity() or ()) if psutil.LINUX else psutil.cpu_count() or 1,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        versions={name: package_version(name) for name in PACKAGES},
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None when there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def physical_memory_bytes() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes that a process takes `now`, and the most it ever took."""

    now: int
    peak: int


def memory_of_process() -> ProcessMemory:
    """This process's."""
    if psutil.MACOS and (footprint := footprint_of_process(ctypes.CDLL(None))) is not None:
        return footprint
    return ProcessMemory(int(psutil.Process().memory_info().rss), _peak_resident_bytes())


def _peak_resident_bytes() -> int:
    """psutil knows none. Linux's `ru_maxrss` begins with what the process took that has started this one, so it is
    the last resort there."""
    with contextlib.suppress(OSError):
        if found := re.search(rb"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_bytes(), re.MULTILINE):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


# rusage_info_v4 of macOS's sys/resource.h: a UUID of 16 bytes, then 35 numbers of 64 bits.
_RUSAGE_INFO_V4, _NUM_WORDS = 4, 37
_PHYS_FOOTPRINT, _LIFETIME_MAX_PHYS_FOOTPRINT = 9, 30


def footprint_of_process(library: Any) -> ProcessMemory | None:
    """What macOS counts against this process, by `proc_pid_rusage` of its C library; None where it cannot be had.

    `ri_phys_footprint` is what `task_info` calls `phys_footprint`; one call gives it and its peak. Written from
    the public headers; never run on macOS.
    """
    words = (ctypes.c_uint64 * _NUM_WORDS)()
    try:
        failed = library.proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, words)
    except (AttributeError, OSError):
        return None
    now, peak = int(words[_PHYS_FOOTPRINT]), int(words[_LIFETIME_MAX_PHYS_FOOTPRINT])
    return None if failed or not now else ProcessMemory(now, max(now, peak))


def resident_bytes() -> int:
    """Memory of this process now."""
    return memory_of_process().now


def peak_rss_bytes() -> int:
    """The most memory this process ever took."""
    return memory_of_process().peak


def trim_heap() -> None:
    """Give memory that the C library holds free back to the system, where it can (Linux)."""
    if psutil.LINUX:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def working_set_bytes() -> int | None:
    """How much the GPU recommends to keep in use; None where it does not say, as all do that are not Metal's."""
    import mlx.core as mx

    try:
        recommended: Any = mx.device_info().get("max_recommended_working_set_size")
    except (RuntimeError, ValueError):  # no such device
        return None
    return int(recommended) if recommended else None


def _cpu_name() -> str:
    """The processor as its maker calls it, which psutil does not tell."""
    try:
        if psutil.MACOS:
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        else:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
            name = found[1].strip() if found else ""
    except (OSError, subprocess.SubprocessError):
        name = ""
    return name or platform.processor() or platform.machine() or "unknown"
