"""What this process runs on: platform, processor, memory, versions. Needs no MLX."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # psutil knows no peak on macOS
    return peak if psutil.MACOS else peak * 1024


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
