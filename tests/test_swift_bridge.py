"""The Swift package, built and tested: its client and its server launcher against this package's own server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tiny_folder import make_folder

PACKAGE = Path(__file__).parent.parent / "Package.swift-bridge"

pytestmark = pytest.mark.skipif(
    shutil.which("swift") is None, reason="swift is not installed: see swift.org/install"
)


def swift(subcommand: str, scratch: Path, *options: str, **variables: str) -> str:
    """Run `swift build` or `swift test` and return all it printed; fail the test with that when it fails."""
    command = ["swift", subcommand, "--package-path", str(PACKAGE), "--scratch-path", str(scratch)]
    done = subprocess.run(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout


@dataclass(frozen=True)
class Build:
    scratch: Path
    printed: str


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest) -> Build:
    """The package, built once; kept in pytest's cache, so that the next run builds only what changed."""
    cache = request.config.cache
    assert cache is not None
    scratch = cache.mkdir("swift-build")
    return Build(scratch, swift("build", scratch, "--build-tests"))


def test_builds_without_a_warning(build: Build) -> None:
    assert "warning:" not in build.printed, build.printed


def test_passes_its_tests_with_a_real_server(build: Build, tmp_path: Path) -> None:
    target = make_folder(tmp_path / "target", context=8192)
    draft = make_folder(tmp_path / "draft", noise=0.02, context=8192)
    printed = swift(
        "test",
        build.scratch,
        "--skip-build",
        "--disable-swift-testing",
        LLMCAD_MLX_HOME=str(tmp_path / "home"),
        LLMCAD_SERVER_COMMAND=str(Path(sys.executable).with_name("llmcad-mlx")),
        LLMCAD_SERVER_ARGUMENTS="\n".join(["--target", str(target), "--draft", str(draft)]),
    )
    assert "skipped" not in printed.lower(), printed
    suite = re.search(r"'RealServerTests' passed.*\n\s*Executed (\d+) tests, with 0 failures", printed)
    assert suite is not None, printed
    assert int(suite[1]) >= 8
