"""What many folders of tests share: a home of their own, and a tiny target and draft as model folders.

A module that wants other ones defines fixtures of the same names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llmcad_mlx import Engine

if device := os.environ.get("LLMCAD_MLX_TEST_DEVICE"):  # cpu where there is a GPU that does not compute
    import mlx.core as mx

    mx.set_default_device(getattr(mx, device))

# Loading a model sets it; kernel tests call the kernels without. It must be there before numba's threads start.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LLMCAD_MLX_HOME of the module's own, and one kernel thread: ``pytestmark = usefixtures("tiny_home")``."""
    from tests.support.tiny_folder import tiny_environment

    home = tmp_path_factory.mktemp("home")
    with tiny_environment(home):
        yield home


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As `tiny_home`, for each test its own; files are written however full the disk is."""
    from llmcad_mlx import files
    from tests.support.tiny_folder import tiny_environment

    monkeypatch.setattr(files, "RESERVE_BYTES", 0)
    with tiny_environment(tmp_path / "home"):
        yield tmp_path / "home"


@pytest.fixture(scope="module")
def streams_small_matrices() -> Iterator[None]:
    """All matrices of a tiny model are small, and small ones stay in memory: here they are streamed as well."""
    from llmcad_mlx.streaming import weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SMALL_BYTES", 0)
        yield


@pytest.fixture
def output(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run a command of the command line, to exit code 0 or `code`; its standard output and error."""
    from llmcad_mlx.cli.main import run

    def call(*argv: object, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        assert run([str(word) for word in argv]) == code
        return capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny target. Shared: copy it (`copy_folder`) before you change a file."""
    from tests.support.tiny_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def draft(folder: Path) -> Path:
    """The folder of a draft that is right now and then, beside the target's. Shared as well."""
    from tests.support.tiny_folder import make_folder

    return make_folder(folder.parent / "draft", noise=0.02)


@pytest.fixture(scope="session")
def endless(folder: Path) -> Path:
    """A target that never ends a text by itself, with room for as many tokens as a test wants to interrupt."""
    from tests.support.tiny_folder import make_folder, without_end

    return without_end(make_folder(folder.parent / "endless", context=10_000_000))


@pytest.fixture(scope="module")
def engine(tiny_home: Path, folder: Path, draft: Path) -> Iterator[Engine]:
    """The two loaded. Shared on purpose: every test meets the caches that another one left."""
    from llmcad_mlx import load

    with load(folder, draft) as loaded:
        yield loaded
