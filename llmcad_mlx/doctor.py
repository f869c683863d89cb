"""What a user reports when something does not work: this machine, this installation, and a model on it."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llmcad_mlx.errors import LlmcadError, UsageError
from llmcad_mlx.files import home_folder
from llmcad_mlx.machine import Machine, this_machine


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """What loading a model showed.

    `checksums_verified`: every byte of the weights was compared with its checksum; None: a stock folder has none.
    `drafts_only`: why this can only be a draft; "" where it can also be a target. `max_difference`: of tree to
    sequential logits, 0.0 is bit for bit. `num_host_layers` run on the CPU kernels' decoder block.
    """

    path: str
    checksums_verified: bool | None
    drafts_only: str
    capability: str
    reason: str
    max_difference: float
    vocab_size: int
    context_length: int | None
    num_layers: int
    num_host_layers: int
    weight_bytes: int
    load_s: float
    probe_s: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings; `problems` has a line for each thing that is broken. `device`: what MLX computes on, None when
    it does not. `host_kernels`: whether models run on our kernels for CPUs; `kernels`: "mlx" where the environment
    asks for MLX's own, else "auto". `mlx_lm_tested`: the tested versions, e.g. "<0.33,>=0.32.2"."""

    machine: Machine
    device: str | None
    host_kernels: bool
    kernels: str
    models_folder: Path
    models_folder_free_bytes: int | None
    mlx_lm_tested: str
    model: ModelFindings | None
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the machine's facts beside the others, an object for the model."""
        found = asdict(self)
        return {**found.pop("machine"), **found, "models_folder": str(self.models_folder)}


def diagnose(model: str | None = None, show_progress: bool = False) -> Diagnosis:
    """Examine the installation and, if one is named, a model: a folder, a preset or a hub repository.

    A preset or repository that is not there yet is fetched first. What is broken becomes a line of `problems`.
    Raises UsageError for an environment that asks for kernels that are not known.
    """
    machine, home, tested = this_machine(), home_folder(), supported_versions("mlx-lm")
    device, host_kernels, kernels, problem = _examine_backend()
    problems, findings = [problem] if problem else [], None
    installed = machine.versions["mlx-lm"]
    if installed is None or not SpecifierSet(tested).contains(installed, prereleases=True):
        what = "not installed" if installed is None else f"version {installed} is not tested"
        problems.append(f"mlx-lm: {what}; install it with: pip install 'mlx-lm{tested}'")
    if model is not None and device is not None:
        try:
            findings = _examine_model(model, show_progress)
        except LlmcadError as error:
            problems.append(f"model: {_line(error)}")
        except Exception as error:
            problems.append(f"model: {model}: cannot be loaded ({type(error).__name__}: {_line(error)})")
    free = None
    for place in (home, *home.parents):  # where it is or would be created
        with suppress(OSError):
            free = shutil.disk_usage(place).free
            break
    return Diagnosis(machine, device, host_kernels, kernels, home, free, tested, findings, tuple(problems))


def supported_versions(package: str) -> str:
    """The versions of `package` that this one was tested with, from its own metadata; "" if it says nothing."""
    with suppress(PackageNotFoundError):
        for requirement in map(Requirement, requires("llmcad-mlx") or ()):
            if requirement.name == package and (requirement.marker is None or requirement.marker.evaluate()):
                return str(requirement.specifier)
    return ""


def _examine_backend() -> tuple[str | None, bool, str, str | None]:
    """Import MLX, compute something, and import what the CPU kernels need: the device, None where MLX does not
    work, whether the kernels do, which were asked for, and the problem, if there is one."""
    device, kernels = None, "auto"
    what = "mlx: does not work"
    try:
        mx = importlib.import_module("mlx.core")
        mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
        what = "llmcad-mlx: does not load"
        importlib.import_module("llmcad_mlx.loader")  # and with it all that a model needs
        cpu = importlib.import_module("llmcad_mlx.cpu")
        kernels = cpu.chosen_kernels()
        wanted: bool = cpu.cpu_kernels_wanted()
        device = importlib.import_module("llmcad_mlx.store.names").device_name()
        what = "host kernels: numba does not work"
        if wanted:
            importlib.import_module("llmcad_mlx.cpu.kernels")
    except UsageError:
        raise
    except Exception as error:  # a broken native library fails in its own ways
        return device, False, kernels, f"{what} ({_line(error)}); install it again"
    return device, wanted, kernels, None


def _examine_model(name: str, show_progress: bool) -> ModelFindings:
    """Raises what loading raises. Nothing is loaded from a bundle whose bytes were altered."""
    from llmcad_mlx.files.bundle import read_bundle, verify_bundle
    from llmcad_mlx.loader import load_tree_model
    from llmcad_mlx.models.adapt import computes_in_float32
    from llmcad_mlx.progress import progress_for
    from llmcad_mlx.store.names import resolve_target

    path = resolve_target(name, show_progress)
    bundle = read_bundle(path)
    if bundle is not None:
        progress = progress_for(show_progress and sys.stderr.isatty())  # elsewhere a problem stays one line
        with progress.stage(f"checking {path.name}", bundle.num_bytes) as advance:
            verify_bundle(path, advance)
    started = time.perf_counter()
    loaded, model = load_tree_model(path, alone=True)
    return ModelFindings(
        path=str(path),
        checksums_verified=None if bundle is None else True,
        drafts_only=loaded.drafts_only,
        capability=model.capability,
        reason=model.report.reason,
        max_difference=model.report.max_difference,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        num_layers=len(model.model.layers),
        num_host_layers=sum(map(computes_in_float32, model.model.layers)),
        weight_bytes=model.weight_bytes,
        load_s=time.perf_counter() - started - model.report.seconds,
        probe_s=model.report.seconds,
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
