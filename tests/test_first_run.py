"""Kernels are compiled in processes of their own where the budget is small and the compiler is not here yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmcad_mlx import first_run
from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.first_run import compile_kernels
from llmcad_mlx.process import COMPILER_BYTES, UNFINISHED
from tests.support.tiny_folder import change_config, make_folder

pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.skipif(not cpu_kernels_wanted(), reason="there are no kernels to compile"),
]
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", bits=4)


class Processes:
    """Stands in for processes: each one's limit, and the exit codes of the next ones (then 0)."""

    def __init__(self) -> None:
        self.limits: list[int] = []
        self.codes: list[int] = []

    def run(self, command: list[str], env: dict[str, str], **_: Any) -> Any:
        self.limits.append(int(env[COMPILER_BYTES]))
        return SimpleNamespace(returncode=self.codes.pop(0) if self.codes else 0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Processes:
    processes = Processes()
    monkeypatch.setattr(first_run.subprocess, "run", processes.run)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    return processes


def test_once_for_each_kind_of_model(folder: Path, tmp_path: Path, started: Processes) -> None:
    other = make_folder(tmp_path / "other", bits=8)
    compile_kernels([folder], GB)
    compile_kernels([folder, other, folder], GB)
    assert len(started.limits) == 2
    assert all(300 << 20 <= limit < GB for limit in started.limits)
    change_config(other, model_type="qwen2")
    compile_kernels([folder, other], GB)
    assert len(started.limits) == 3


def test_as_many_processes_as_it_takes(folder: Path, started: Processes) -> None:
    started.codes[:] = [UNFINISHED, UNFINISHED, 0]
    compile_kernels([folder], GB)
    assert len(started.limits) == 3
    compile_kernels([folder], GB)
    assert len(started.limits) == 3


def test_what_fails_is_tried_again_another_time(folder: Path, started: Processes) -> None:
    started.codes[:] = [1, *[UNFINISHED] * 100]
    compile_kernels([folder], GB)
    assert len(started.limits) == 1
    compile_kernels([folder], GB)
    assert len(started.limits) == 17
    started.codes.clear()
    compile_kernels([folder], GB)
    assert len(started.limits) == 18


def test_not_where_it_does_not_count(folder: Path, started: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernels([folder], 3 * GB)
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace())  # the compiler's memory is taken already
    compile_kernels([folder], GB)
    assert started.limits == []


def test_a_process_ends_at_its_limit_and_the_next_goes_on(folder: Path, tmp_path: Path) -> None:
    """At a limit that is always passed, each process compiles one kernel."""
    command = [sys.executable, "-m", "llmcad_mlx.first_run", str(folder)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), COMPILER_BYTES: "1"}
    for count in (1, 2):
        assert subprocess.run(command, env=environment).returncode == UNFINISHED
        assert len(list(tmp_path.rglob("*.nbc"))) == count
