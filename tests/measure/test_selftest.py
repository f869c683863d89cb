"""The self-test: what holds is told with a figure, and each thing that could be broken is found when it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import psutil
import pytest

from llmcad_mlx.api import Engine
from llmcad_mlx.files import home_folder, read_object
from llmcad_mlx.measure import selftest
from llmcad_mlx.measure.selftest import Check, self_test
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.store.names import find_pair, pair_profile_path
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.streaming.storage import FileStorage, ReadWay
from llmcad_mlx.streaming.ways import WAYS
from tests.support.tiny_folder import family_folder

NAMES = [
    "machine", "reading while computing", "kernels", "tree against plain", "second thread", "disk", "pass times",
    "same text", "memory against plan", "reads above 2 GiB",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    monkeypatch.setattr(selftest, "_ROUNDS", 40)
    monkeypatch.setattr(selftest, "NUM_TOKENS", 24)
    monkeypatch.setattr(selftest, "_LARGE_READ", 1 << 20)
    monkeypatch.setattr(selftest, "_DISK_S", 0.1)


def found(check: str, folder: Path | None = None) -> Check:
    (only,) = self_test(None if folder is None else str(folder), (check,))
    return only


def test_ten_checks_pass_in_order(endless: Path, own_home: Path, output: Callable[..., tuple[str, str]]) -> None:
    out, _ = output("doctor", endless, "--self-test", "--json")
    report = json.loads(out)
    assert "back end" in report["installation"]
    assert [check["name"] for check in report["checks"]] == NAMES
    assert [check["name"] for check in report["checks"] if check["passed"] is False] == []
    text = {check["name"]: check["finding"] for check in report["checks"]}
    assert "24 tokens, all as plain decoding" in text["same text"]
    assert "24 tokens, all as plain decoding" in text["memory against plan"]
    assert "bit for bit" in text["tree against plain"]
    assert "GB/s" in text["disk"]
    assert str(endless) not in out
    assert str(own_home) not in out


def test_a_buffer_that_is_refilled_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read_into = FileStorage.read_into

    def altered(self: FileStorage, file: Path, offset: int, out: memoryview) -> None:
        read_into(self, file, offset, out)
        out[0] = (out[0] + (offset == 3 * selftest._UNIT_BYTES)) % 256

    monkeypatch.setattr(FileStorage, "read_into", altered)
    check = found("reading while computing")
    assert check.passed is False
    assert "unit 3" in check.finding


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "rope"])
def test_a_kernel_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(mx.fast, name)

    def wrong(x: mx.array, *args: Any, **options: Any) -> mx.array:
        return right(x, *args, **options) * (1.01 if x.dtype == mx.float32 else 1.0)

    monkeypatch.setattr(mx.fast, name, wrong)
    check = found("kernels")
    assert check.passed is False
    assert "float32 1.0e-02" in check.finding


def test_a_text_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, endless: Path) -> None:
    forward = TreeModel.forward

    def wrong(self: TreeModel, tokens: Any, cache: Any, parents: Any = None) -> Any:
        result = forward(self, tokens, cache, parents)
        if len(tokens) > 1:  # a model that computes several rows in another way
            return type(result)(result.slots, result.logits[:, ::-1])
        return result

    monkeypatch.setattr(TreeModel, "forward", wrong)
    check = found("same text", endless)
    assert check.passed is False
    assert "is not plain decoding's" in check.finding


def test_a_model_that_its_own_thread_alone_can_use_is_found(
    monkeypatch: pytest.MonkeyPatch, endless: Path
) -> None:
    generate = Engine.generate

    def elsewhere(self: Engine, *args: Any, **options: Any) -> Any:
        import threading

        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("There is no Stream(cpu, 0) in current thread.")
        return generate(self, *args, **options)

    monkeypatch.setattr(Engine, "generate", elsewhere)
    check = found("second thread", endless)
    assert check.passed is False
    assert "no Stream(cpu, 0)" in check.finding


def test_passes_are_timed_as_tune_does_and_their_times_kept(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = [(rows, rows / 100, rows / 100) for rows in (1, 2, 33)]
    with monkeypatch.context() as patch:
        patch.setattr(selftest, "time_passes", lambda pair, most_s: timed)
        check = found("pass times", endless)
    assert check.finding.startswith("ms by rows: 1 10, 2 20, 33 330; a")
    verify = PairProfile(pair_profile_path(find_pair(str(endless), "auto", False), None, None)).costs.verify
    assert verify.times_seen(33) == 1
    whole = self_test(str(endless), ("pass times", "same text"))
    assert [check.passed for check in whole] == [True, True]  # the passes leave nothing behind
    chains = found("pass times", family_folder(tmp_path / "chains", "gpt2", max_position_embeddings=512))
    assert chains.passed
    assert "64 " in chains.finding
    monkeypatch.setattr(selftest, "_PASSES_S", 0.0)  # slow kernels: no further sizes
    assert re.match(r"ms by rows: 1 [\d.]+; ", found("pass times", endless).finding)


def test_memory_beyond_the_plan_is_found(monkeypatch: pytest.MonkeyPatch, endless: Path) -> None:
    report = {"peak_rss_bytes": 2_000_000, "budget_bytes": 1_000_000, "target_passes": 3, "tokens": []}
    done = SimpleNamespace(returncode=0, stdout=json.dumps(report))
    monkeypatch.setattr(selftest.subprocess, "run", lambda *args, **options: done)
    check = found("memory against plan", endless)
    assert check.passed is False
    assert check.finding.startswith("peak 2 MB of 1 MB planned")


def test_a_large_read_is_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30))
    check = found("reads above 2 GiB")
    assert check.passed is None
    assert "not tried" in check.finding


def test_a_large_read_that_the_system_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: FileStorage, file: Path, offset: int, out: memoryview) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(FileStorage, "read_into", refused)
    assert found("reads above 2 GiB").passed is False


def test_a_simulated_mac_tells_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"sysctl.proc_translated": "0", "iogpu.wired_limit_mb": "0"}
    monkeypatch.setattr(psutil, "MACOS", True)
    monkeypatch.setattr(selftest, "_sysctl", settings.get)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 11_453_251_584})
    assert "recommended working set 11.45 GB" in selftest._machine()
    settings["sysctl.proc_translated"] = "1"
    with pytest.raises(Exception, match="Rosetta"):
        selftest._machine()


def test_the_best_way_to_read_is_kept_where_a_gpu_computes(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kept" not in found("disk", endless).finding
    assert not (home_folder() / "reading.json").exists()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(selftest._Model, "engine", None)
    model = selftest._Model(str(endless))
    model.engine = SimpleNamespace(pair=SimpleNamespace(names=SimpleNamespace(target_path=endless)))
    assert "; kept" in model.disk()
    kept = read_object(home_folder() / "reading.json")["disks"]
    assert [ReadWay(**disk["way"]) in WAYS for disk in kept.values()] == [True]


def test_a_failure_is_exit_code_1(
    endless: Path, monkeypatch: pytest.MonkeyPatch, output: Callable[..., tuple[str, str]]
) -> None:
    checks = [Check("disk", None, "not measured", 0.0), Check("kernels", False, "wrong", 0.0)]
    monkeypatch.setattr(selftest, "self_test", lambda model: checks)
    out, _ = output("doctor", endless, "--self-test", code=1)
    assert out.splitlines()[-2:] == ["skipped disk (0.0 s): not measured", "FAILED  kernels (0.0 s): wrong"]
