"""What the doctor finds, and that what is broken is told and never raised."""

from __future__ import annotations

import importlib
import json
import os
import sys
from unittest.mock import Mock

import pytest

from llmcad_mlx import doctor as module
from llmcad_mlx import loader, machine
from llmcad_mlx.cpu import SWITCH, cpu_kernels_wanted
from llmcad_mlx.doctor import diagnose, supported_versions
from llmcad_mlx.files.bundle import read_bundle
from tests.support.command_line import TerminalText
from tests.support.tiny_folder import VOCAB, write_bundle

KEYS = {
    "platform", "python", "cpu", "num_cores", "memory_bytes", "available_bytes", "versions", "device",
    "host_kernels", "kernels", "models_folder", "models_folder_free_bytes", "mlx_lm_tested", "model", "problems",
}  # fmt: skip


def told(out: str) -> dict[str, str]:
    """What is printed for people, by name."""
    return {name: value.strip() for name, value in (line.split("  ", 1) for line in out.splitlines())}


def test_a_sound_installation_has_no_problems(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCAD_MLX_HOME", str(tmp_path / "not" / "there" / "yet"))
    found = diagnose()
    assert found.problems == ()
    assert set(found.to_dict()) == KEYS
    assert found.device
    assert found.host_kernels == cpu_kernels_wanted()
    assert found.machine.versions["mlx"]
    assert found.machine.memory_bytes > found.machine.available_bytes > 0
    assert found.models_folder == tmp_path / "not" / "there" / "yet"
    assert found.models_folder_free_bytes > 0
    assert found.mlx_lm_tested


def test_what_is_told_of_a_model(own_home, folder, output):
    found = diagnose(str(folder)).model
    assert (found.path, found.capability, found.reason) == (str(folder), "tree", "")
    assert (found.vocab_size, found.context_length, found.num_layers) == (VOCAB, 512, 2)
    assert found.num_host_layers == (2 if cpu_kernels_wanted() else 0)
    assert found.weight_bytes > 0
    assert found.max_difference < 1e-3
    assert found.probe_s > 0
    again = diagnose(str(folder)).model
    assert (again.probe_s, again.load_s > 0) == (0.0, True)  # what the first one found is kept
    lines = told(output("doctor", folder)[0])
    assert lines["capability"] == "tree"
    assert lines["vocabulary"] == f"{VOCAB} logits"
    assert "on host kernels" in lines["layers"]
    out, err = output("doctor", folder, "--json")
    report = json.loads(out)
    assert set(report) == KEYS
    assert report["model"]["capability"] == "tree"
    assert report["model"]["checksums_verified"] is None  # a stock folder has none
    assert err == ""


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(tmp_path, output):
    out, err = output("doctor", tmp_path / "missing", code=1)
    assert "back end" in out
    (problem,) = err.splitlines()
    assert problem.startswith("problem: model: ")
    assert "missing" in problem
    assert len(json.loads(output("doctor", tmp_path / "missing", "--json", code=1)[0])["problems"]) == 1


def test_a_broken_mlx_is_told_with_its_reason_in_one_line(monkeypatch):
    broken = Mock(side_effect=ImportError("libsomething.so: cannot open\nshared object file"))
    monkeypatch.setattr(importlib, "import_module", broken)
    found = diagnose("some-model")
    assert (found.device, found.host_kernels, found.model) == (None, False, None)
    (problem,) = found.problems
    assert problem == "mlx: does not work (libsomething.so: cannot open shared object file); install it again"


@pytest.mark.skipif(not cpu_kernels_wanted(), reason="the host kernels are for Linux CPUs")
def test_broken_host_kernels_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcad_mlx.cpu.kernels", None)
    found = diagnose()
    assert not found.host_kernels
    assert "numba" in found.problems[0]


def test_mlx_s_own_kernels_may_be_asked_for(monkeypatch, output):
    monkeypatch.setenv(SWITCH, "mlx")
    assert not cpu_kernels_wanted()
    assert told(output("doctor")[0])["host kernels"] == f"off ({SWITCH}=mlx)"
    found = json.loads(output("doctor", "--json")[0])
    assert (found["host_kernels"], found["kernels"]) == (False, "mlx")
    assert "MLX's kernels" in found["device"] or "(gpu)" in found["device"]  # they are not measured together
    for unset in ("", "auto"):
        monkeypatch.setenv(SWITCH, unset)
        assert json.loads(output("doctor", "--json")[0])["kernels"] == "auto"


@pytest.mark.parametrize("command", [["doctor"], ["doctor", "--json"], ["generate", "hello"], ["plan"]])
def test_unknown_kernels_are_one_line_and_exit_code_2(monkeypatch, own_home, folder, output, command):
    monkeypatch.setenv(SWITCH, "metal")
    target = [] if command[0] == "doctor" else ["--target", folder]
    out, err = output(*command, *target, code=2)
    assert out == ""
    assert err == f"error: {SWITCH}: 'metal' is neither auto nor mlx; unset it, or set one of them\n"


@pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("0.33.0", "0.33.0 is not tested")])
def test_another_mlx_lm_is_a_problem(monkeypatch, installed, words):
    real = machine.package_version
    monkeypatch.setattr(machine, "package_version", lambda name: installed if name == "mlx-lm" else real(name))
    (problem,) = diagnose().problems
    assert words in problem
    assert "pip install" in problem


def test_supported_versions_come_from_the_requirement_that_applies_here(monkeypatch):
    lines = ['mlx-lm<9; sys_platform == "nowhere"', "mlx-lm-extra<1", "mlx-lm<0.33,>=0.32.2"]
    monkeypatch.setattr(module, "requires", lambda name: lines)
    assert supported_versions("mlx-lm") == "<0.33,>=0.32.2"
    assert supported_versions("mlx") == ""


@pytest.fixture
def bundle(own_home, folder, tmp_path):
    write_bundle(folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_bytes_of_a_bundle_are_verified(bundle, output, monkeypatch):
    out, err = output("doctor", bundle)
    assert told(out)["checksums"] == "verified: every byte is as it was written"
    assert err == ""  # the bar is for terminals
    terminal = TerminalText()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert diagnose(str(bundle), show_progress=True).model.checksums_verified
    assert "checking bundle" in terminal.getvalue()


def test_altered_bytes_are_one_line_with_file_and_layer(bundle, monkeypatch, output):
    file = bundle / "model.safetensors"
    (layer,) = (layer for layer in read_bundle(bundle).layers if layer.name == "layer 1")
    data = bytearray(file.read_bytes())
    data[layer.offset + 5] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(loader, "load_tree_model", None)  # not loaded either
    (problem,) = output("doctor", bundle, code=1)[1].splitlines()
    assert problem.startswith(f"problem: model: {file}: layer 1 was altered")


def test_memory_of_this_process_and_machine():
    here = machine.this_machine()
    assert here.memory_bytes == machine.physical_memory_bytes()
    assert 10**7 < machine.resident_bytes() <= machine.peak_rss_bytes() * 1.05 < here.memory_bytes
    assert 0 < here.num_cores <= os.cpu_count()
