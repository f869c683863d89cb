"""What surrounds the program: folders, limits, locales, closed streams. Each case is one that people had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.request import proxy_bypass

import pytest

from llmcad_mlx import UsageError, load
from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.files import home_folder
from llmcad_mlx.process import prepare_process
from tests.support.command_line import ENTRY

PROMPT = [{"role": "user", "content": "Straße"}]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

pytestmark = pytest.mark.usefixtures("tiny_home")


def run(command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A shell command, in which `$MAIN` is the command line."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", **options.pop("env", {})}
    main = f"{sys.executable} -c '{ENTRY}'"
    words = ["bash", "-c", command.replace("$MAIN", main)]
    return subprocess.run(words, capture_output=True, timeout=120, check=False, env=environment, **options)


# Folders


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, "~/.cache/llmcad-mlx"),
        ({"XDG_CACHE_HOME": "/scratch"}, "/scratch/llmcad-mlx"),
        ({"XDG_CACHE_HOME": "scratch"}, "~/.cache/llmcad-mlx"),  # the standard: must be absolute, else ignored
        ({"XDG_CACHE_HOME": ""}, "~/.cache/llmcad-mlx"),
        ({"XDG_CACHE_HOME": "/scratch", "LLMCAD_MLX_HOME": "/models"}, "/models"),
        ({"LLMCAD_MLX_HOME": "~/models"}, "~/models"),
        ({"LLMCAD_MLX_HOME": "models"}, "~/here/models"),
        ({"LLMCAD_MLX_HOME": ""}, "~/.cache/llmcad-mlx"),
    ],
)
def test_where_models_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], expected: str
) -> None:
    for name in ("XDG_CACHE_HOME", "LLMCAD_MLX_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **named}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert home_folder() == Path(expected.replace("~", str(tmp_path)))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, output: Callable[..., tuple[str, str]]) -> None:
    for name in ("XDG_CACHE_HOME", "LLMCAD_MLX_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UsageError, match="LLMCAD_MLX_HOME: is not set, and this user has no home; name a folder"):
        home_folder()
    assert "LLMCAD_MLX_HOME: is not set" in output("generate", "hi", code=2)[1]


def test_a_path_in_the_home_of_nobody(folder: Path, output: Callable[..., tuple[str, str]]) -> None:
    path = "~nobody-of-this-name/model"
    for words in (["--target", path], ["--target", str(folder), "--draft", path]):
        assert "no such folder, preset" in output("generate", "hi", *words, code=1)[1]
    assert "there is no folder" not in output("chat", "--load", path, code=2)[1]


def test_a_home_that_cannot_be_written_is_no_reason_to_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCAD_MLX_HOME", "/dev/null/home")
    with load(folder, "ngram") as engine:
        assert engine.generate(PROMPT, max_tokens=2).tokens


KERNEL = """
from llmcad_mlx.cpu.compiling import kernel

@kernel()
def add(a, b):
    return a + b
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")
@pytest.mark.parametrize("place", ["beside", "home", "nowhere", "lost", "damaged"])
def test_kernels_run_wherever_their_code_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """As in an installation of the system's, used by somebody without a home."""
    source, home = tmp_path / "package" / "kernels.py", tmp_path / "home"
    source.parent.mkdir()
    source.write_text(KERNEL)
    if place != "beside":
        (source.parent / "__pycache__").touch()  # so nothing can be written there
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("LLMCAD_MLX_HOME", "/dev/null" if place == "nowhere" else str(home))

    def added() -> int:
        spec = spec_from_file_location("kernels", source)
        assert spec is not None
        module = module_from_spec(spec)
        assert spec.loader is not None
        spec.loader.exec_module(module)
        if place == "lost":
            (home / "kernels").rename(tmp_path / "gone")
            (home / "kernels").touch()
        return int(module.add(1, 2))

    assert added() == 3
    assert ("set LLMCAD_MLX_HOME to a folder that can be written" in caplog.text) == (place == "nowhere")
    kept = [*(source.parent / "__pycache__").glob("*.nbi"), *home.rglob("*.nbi")]
    assert [file.is_relative_to(home) for file in kept] == {
        "beside": [False],
        "home": [True],
        "damaged": [True],
    }.get(place, [])
    if place == "damaged":
        kept[0].write_bytes(b"damaged")
        assert added() == 3


# Open files

LIMITS = """
import resource
kind = resource.RLIMIT_NOFILE
resource.setrlimit(kind, (300, min(1000, resource.getrlimit(kind)[1])))
{imports}
from llmcad_mlx.process import prepare_process
print(resource.getrlimit(kind)[0], resource.getrlimit(kind)[1] <= 1000)
resource.setrlimit(kind, (400, resource.getrlimit(kind)[1]))
print(resource.getrlimit(kind)[0])
prepare_process()
print(resource.getrlimit(kind)[0] == resource.getrlimit(kind)[1])
"""


@pytest.mark.parametrize(
    "imports", ["import llmcad_mlx.api", "import llmcad_mlx.mlx_lm_plugin", "import llmcad_mlx; import mlx_lm"]
)
def test_an_import_leaves_the_limit_of_open_files(imports: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITS.format(imports=imports)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("300 True\n400\nTrue\n", "")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((256, -1), (4096, -1)), ((256, 1024), (1024, 1024)), ((9999, 9999), None), ((-1, -1), None)],
)
def test_the_program_takes_what_it_may(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    """-1: no limit."""
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: taken.append(limits))
    monkeypatch.setattr("resource.RLIM_INFINITY", -1)
    prepare_process()
    assert taken == ([] if expected is None else [expected])


# Bytes


def test_text_is_utf8_in_every_locale(folder: Path) -> None:
    """Typed as an argument, a system message, on standard input, and as lines of a chat."""
    with load(folder, None) as engine:
        text = engine.generate(PROMPT, max_tokens=4).text
    words = f"--target '{folder}' --draft none -m 4"
    for command in (
        f"$MAIN generate Straße {words}",
        f"printf Straße | $MAIN generate - {words}",
        f"printf 'Straße\\n' | $MAIN chat {words}",
    ):
        done = run(command, env=ASCII)
        assert (done.returncode, done.stdout.decode().rstrip("\n")) == (0, text.rstrip("\n")), done.stderr


def test_bytes_that_are_no_text_are_told(folder: Path) -> None:
    words = f"--target '{folder}' --draft none -m 4"
    done = run(f"printf 'caf\\xe9' | $MAIN generate - {words}", env={"LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (2, b"error: prompt: is not UTF-8 text\n")


def test_a_temporary_folder_that_is_not_there(folder: Path) -> None:
    words = f"--target '{folder}' --draft none -m 4"
    assert run(f"$MAIN generate hi {words}", env={"TMPDIR": "/nowhere"}).returncode == 0


@pytest.mark.skipif(not cpu_kernels_wanted(), reason="elsewhere MLX needs none")
@pytest.mark.parametrize(
    ("named", "usable"),
    [
        ({"TMPDIR": "/nowhere"}, False), ({"TMPDIR": ""}, False), ({"TMPDIR": "/dev/null"}, False),
        ({"TMP": "/nowhere"}, False), ({"TMPDIR": "/tmp", "TMP": "/nowhere"}, True), ({}, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("memory", [None, "8GB"])
def test_a_program_around_us_is_told_of_its_temporary_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], usable: bool, memory: str | None
) -> None:
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    if usable:
        load(folder, None, memory=memory).close()
        return
    ((name, value),) = named.items()
    with pytest.raises(
        UsageError, match=f"{name}: '{value}' is no folder for temporary files; name another, or un"
    ):
        load(folder, None, memory=memory)


# Proxies


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({"NO_PROXY": "a.test"}, None),
        ({"HTTPS_PROXY": "http://p:1"}, "localhost,127.0.0.1,::1"),
        ({"all_proxy": "http://p:1", "NO_PROXY": "a.test"}, "a.test,localhost,127.0.0.1,::1"),
        (
            {"HTTP_PROXY": "http://p:1", "no_proxy": "b.test", "NO_PROXY": "a.test"},
            "b.test,localhost,127.0.0.1,::1",
        ),
    ],
)
def test_the_program_asks_no_proxy_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None
) -> None:
    """huggingface_hub would, for a copy of the hub that is served here."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")  # so that it is put back at the end
    monkeypatch.delenv("no_proxy")
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    prepare_process()
    assert os.environ.get("no_proxy") == after
    if after is not None:
        assert all(proxy_bypass(host) for host in ("localhost", "127.0.0.1:80"))
        assert not proxy_bypass("huggingface.co")


# Streams


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">&-", 0, b"["),
        ("2>&-", 0, b""),
        ("<&- >&- 2>&-", 0, b""),
        (">/dev/full", 1, b"error: OSError: [Errno 28] No space left on device"),
    ],
)
def test_closed_streams(folder: Path, tmp_path: Path, redirection: str, code: int, error: bytes) -> None:
    words = f"--target '{folder}' --draft none -m 4"
    done = run(f"$MAIN generate hi {words} {redirection}", cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert done.stderr.count(b"\n") == bool(error)
    assert b"[" not in done.stdout  # figures go where errors go, or nowhere
