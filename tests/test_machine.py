"""What the system says of this process: asked on Linux, and of a fake macOS."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import psutil
import pytest

from llmcad_mlx import machine
from llmcad_mlx.machine import ProcessMemory, footprint_of_process, memory_of_process

# The fields of rusage_info_v4 after its UUID, as macOS's sys/resource.h has them.
FIELDS = (
    "user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size",
    "phys_footprint", "proc_start_abstime", "proc_exit_abstime", "child_user_time", "child_system_time",
    "child_pkg_idle_wkups", "child_interrupt_wkups", "child_pageins", "child_elapsed_abstime", "diskio_bytesread",
    "diskio_byteswritten", "cpu_time_qos_default", "cpu_time_qos_maintenance", "cpu_time_qos_background",
    "cpu_time_qos_utility", "cpu_time_qos_legacy", "cpu_time_qos_user_initiated", "cpu_time_qos_user_interactive",
    "billed_system_time", "serviced_system_time", "logical_writes", "lifetime_max_phys_footprint", "instructions",
    "cycles", "billed_energy", "serviced_energy", "interval_max_phys_footprint", "runnable_time",
)  # fmt: skip


class _Info(ctypes.Structure):
    _fields_ = [("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in FIELDS)]


class FakeLibrary:
    """macOS's C library, as far as it is asked."""

    def __init__(self, now: int, peak: int, result: int = 0) -> None:
        self.now, self.peak, self.result = now, peak, result

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        assert (pid, flavor) == (os.getpid(), 4)
        info = _Info.from_buffer(buffer)
        assert ctypes.sizeof(buffer) == ctypes.sizeof(info)
        info.phys_footprint, info.lifetime_max_phys_footprint = self.now, self.peak
        info.resident_size = info.interval_max_phys_footprint = 1
        return self.result


def test_the_footprint_is_read_from_its_place() -> None:
    assert footprint_of_process(FakeLibrary(7 << 30, 9 << 30)) == ProcessMemory(7 << 30, 9 << 30)


@pytest.mark.parametrize("library", [FakeLibrary(7, 9, result=-1), FakeLibrary(0, 0), object()])
def test_a_call_that_fails_has_no_footprint(library: Any) -> None:
    assert footprint_of_process(library) is None


def test_a_mac_counts_its_footprint_and_else_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    here = memory_of_process()
    monkeypatch.setattr(machine.psutil, "MACOS", True)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeLibrary(7 << 30, 9 << 30))
    assert (machine.resident_bytes(), machine.peak_rss_bytes()) == (7 << 30, 9 << 30)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())
    assert machine.resident_bytes() == pytest.approx(here.now, rel=0.2)


def test_only_some_devices_recommend_a_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for info, expected in (({"device_name": "x"}, None), ({"max_recommended_working_set_size": 12}, 12)):
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        assert machine.working_set_bytes() == expected


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the peak is the process's own")
def test_the_peak_is_not_that_of_who_started_the_process() -> None:
    """As `ru_maxrss` is on Linux: a program that holds a large model starts others with small budgets."""
    large = bytearray(b"x") * (400 << 20)
    code = "from llmcad_mlx.machine import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(large) // 2
