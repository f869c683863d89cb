"""What this process runs on: platform, processor, memory, versions. For reports; nothing depends on it."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "llmcad-mlx", "mlx", "mlx-lm", "numba", "numpy", "transformers", "huggingface-hub", "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts for people. `versions` has a package's version, None where it is not installed."""

    platform: str
    python: str
    cpu: str
    num_cores: int
    """Processors this process may use."""
    memory_bytes: int | None
    available_bytes: int | None
    """Memory that could be taken without swapping, now."""
    versions: dict[str, str | None]


def this_machine() -> Machine:
    """Look around. Needs no MLX; what cannot be found out is None, or "unknown" for the processor."""
    return Machine(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_physical_memory(),
        available_bytes=_available_memory(),
        versions={name: package_version(name) for name in PACKAGES},
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None when there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parse_meminfo(text: str) -> int | None:
    """Available bytes from the text of Linux's /proc/meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def parse_vm_stat(text: str) -> int | None:
    """Available bytes from the output of macOS's vm_stat: pages that are free or given up on demand."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _available_memory() -> int | None:
    if platform.system() == "Darwin":
        return parse_vm_stat(_output("vm_stat"))
    return parse_meminfo(_text("/proc/meminfo"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    text = _text("/proc/self/statm")
    if text:
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid())).strip() or 0) * 1024
