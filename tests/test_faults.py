"""What goes wrong around a running model: one line says so, what was finished is kept, and the next run works."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmcad_mlx import Engine, files, load
from llmcad_mlx.cli.main import run
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.store.convert import convert_folder
from tests.memory_limit import LIMIT, NoCgroupError, limited_group
from tests.support.command_line import start
from tests.support.tiny_folder import copy_folder, make_folder, without_end, write_bundle

ROOT = Path(__file__).parents[1]
PROMPT = "then the other one ran in and then the other one"
TOKENS = 40

pytestmark = pytest.mark.usefixtures("tiny_home", "streams_small_matrices", "_small_reserve")


@pytest.fixture(scope="module")
def _small_reserve() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RESERVE_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends a text by itself."""
    return without_end(make_folder(tmp_path_factory.mktemp("models") / "model", layers=6, context=100_000))


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    """The text of the model in memory."""
    with load(model, None) as engine:
        return engine.generate(PROMPT, max_tokens=TOKENS).text


def words(model: Path, *more: object) -> list[str]:
    """Arguments that stream the whole model."""
    return ["generate", "--raw", PROMPT, "--target", str(model), "--pinned", "0", *map(str, more)]


@contextmanager
def at_token(number: int, then: Callable[[], object]) -> Iterator[None]:
    """Let something happen when so many tokens are out."""
    stream_generate = Engine.stream_generate

    def watched(self: Engine, *arguments: Any, **options: Any) -> Iterator[Any]:
        for response in stream_generate(self, *arguments, **options):
            yield response
            if response.generation_tokens == number:
                then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "stream_generate", watched)
        yield


# -- files that fail ---------------------------------------------------------------------------------------


def failing(number: int) -> Callable[..., int]:
    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


disk_error = failing(errno.EIO)


def failing_once(at: int) -> Callable[..., int]:
    """`os.preadv` whose call number `at`, counted from 1, fails."""
    calls, real = itertools.count(1), os.preadv
    return lambda *arguments: disk_error() if next(calls) == at else real(*arguments)


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (disk_error, "cannot be read (Input/output error); check the disk"),
        (failing(errno.ESTALE), "cannot be read (Stale file handle); check the disk"),
        (lambda *arguments: 0, "was cut off while it was in use; fetch the model again"),
    ],
)
def test_a_read_that_fails_keeps_what_was_said(
    model: Path,
    expected: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., int],
    says: str,
    draft: str,
) -> None:
    arguments = words(model, "-m", TOKENS, "--draft", draft)
    before, handles = set(threading.enumerate()), open_files(model)
    with monkeypatch.context() as patch, at_token(12, lambda: patch.setattr(os, "preadv", fault)):
        assert run(arguments) == 1
    assert set(threading.enumerate()) <= before
    assert open_files(model) == handles == 0
    out, err = capfd.readouterr()
    assert err == f"error: {model}/model.safetensors: {says}\n"
    assert out.endswith("\n")
    assert len(out) > 6
    assert expected.startswith(out.removesuffix("\n"))
    assert out.removesuffix("\n") != expected
    assert run(arguments) == 0
    assert capfd.readouterr().out == expected + "\n"


def test_the_page_cache_may_go_at_any_time(model: Path, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Another program needs memory, so the kernel forgets what it had of the file."""
    with (model / "model.safetensors").open("rb") as file:
        forget = lambda: os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # noqa: E731
        with at_token(10, forget):
            assert run(words(model, "-m", TOKENS)) == 0
    assert capfd.readouterr().out == expected + "\n"


# -- Ctrl-C ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_ctrl_c_while_layers_load_keeps_the_text(
    model: Path, capfd: pytest.CaptureFixture[str], draft: str
) -> None:
    arguments = words(model, "-m", 3000, "--draft", draft, "--read-bandwidth", "10MB/s")
    child = start(*arguments, stderr=subprocess.PIPE)
    assert child.stdout is not None
    first = child.stdout.read(5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == b"interrupted\n"
    text = (first + out).decode()
    assert text.endswith("\n")
    with load(model, None) as engine:
        whole = engine.generate(PROMPT, max_tokens=len(text) + 100).text
    assert whole.startswith(text.removesuffix("\n"))
    assert run(words(model, "-m", 5)) == 0
    assert whole.startswith(capfd.readouterr().out.removesuffix("\n"))


# -- memory ------------------------------------------------------------------------------------------------


def test_two_processes_stream_one_bundle(model: Path, expected: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(model, bundle)
    arguments = words(bundle, "-m", TOKENS, "--json", "--read-bandwidth", "50MB/s")
    both = [start(*arguments, stderr=subprocess.PIPE) for _ in range(2)]
    for child in both:
        out, err = child.communicate(timeout=120)
        assert (child.returncode, err) == (0, b"")
        report = json.loads(out)
        assert report["text"] == expected
        assert report["streamed_bytes"] > 0


def test_a_limit_that_another_process_lowers(model: Path, expected: str) -> None:
    """The kernel takes back the page cache, which is all that a streaming process can spare."""
    try:
        with limited_group(2 << 30) as group:
            child = start(
                *words(model, "-m", TOKENS, "--read-bandwidth", "20MB/s"),
                stderr=subprocess.PIPE,
                preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            )
            assert child.stdout is not None
            first = child.stdout.read(2)
            resident = psutil.Process(child.pid).memory_info().rss
            (group / LIMIT).write_text(str(resident + (32 << 20)))
            out, err = child.communicate(timeout=120)
    except NoCgroupError as reason:
        pytest.skip(f"no memory cgroup can be made here: {reason}")
    assert child.returncode == 0, err
    assert (first + out).decode() == expected + "\n"


# -- converting --------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from llmcad_mlx import files
from llmcad_mlx.store import convert as mlx_folder
files.RESERVE_BYTES = 0
name, count = sys.argv[3], int(sys.argv[4])
real = getattr(os, name)
calls = iter(range(1, 1000))
def dying(*arguments):
    if next(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(os, name, dying)
mlx_folder.convert_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("call", "count"), [("pwrite", 1), ("pwrite", 30), ("fsync", 1), ("rename", 1)])
def test_a_conversion_killed_anywhere_never_leaves_half_a_model(
    model: Path, tmp_path: Path, call: str, count: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT, str(model), str(out), call, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had written, under another name
    convert_folder(model, out)
    assert list(tmp_path.iterdir()) == [out]
    assert verify_bundle(out) is not None


def test_a_limit_on_the_size_of_files_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real failing write, of the kernel's making."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code = run(["convert", str(model), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capfd.readouterr().err
    assert code == 1
    said = f"error: {tmp_path / 'out'}: cannot be written (File too large); choose a folder on another disk"
    assert err.splitlines()[-1] == said
    assert list(tmp_path.iterdir()) == []
    assert run(["convert", str(model), str(tmp_path / "out")]) == 0
    assert verify_bundle(tmp_path / "out") is not None


def test_a_source_that_cannot_be_read_while_it_is_converted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_folder(model, tmp_path / "source")
    write_bundle(source, tmp_path / "bundle")  # its weights are copied as bytes next time
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing_once(8))
        with pytest.raises(Exception, match=r"bundle/model\.safetensors: cannot be read \(Input/output error\)"):
            write_bundle(tmp_path / "bundle", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "source"]
    write_bundle(tmp_path / "bundle", tmp_path / "out")
    assert verify_bundle(tmp_path / "out") is not None


# -- loading -----------------------------------------------------------------------------------------------


def test_a_read_error_while_loading_is_one_line(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 9):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing_once(count))
            assert run(words(model, "--pinned", "1MB", "-m", "5")) == 1
        out, err = capfd.readouterr()
        assert out in ("", "\n")
        assert err == f"error: {model}/model.safetensors: cannot be read (Input/output error); check the disk\n"


def open_files(folder: Path) -> int:
    """How many files of the folder this process holds open."""
    gc.collect()  # what belongs to earlier failures
    links = Path("/proc/self/fd")
    if not links.is_dir():
        return 0
    found = 0
    for link in links.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            found += os.readlink(link).startswith(str(folder))
    return found
