"""What the command line says about itself: every `--help` at every width, the version, and shell completion."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pexpect
import pytest
import shellingham
from typer.main import get_command

from llmcad_mlx import __version__
from llmcad_mlx.cli.main import app, run
from tests.support.command_line import ENTRY, finished, read_all

ROOT: Any = get_command(app)
COMMANDS = sorted(ROOT.commands)
PAGES = [[], *([command] for command in COMMANDS)]
WIDTHS = (60, 80, 120)
BETWEEN = "=====\n"
# All pages at all widths in one process: each start takes a second.
ALL_PAGES = f"""
import os
from llmcad_mlx.cli.main import run
for width in {WIDTHS}:
    os.environ["COLUMNS"] = str(width)
    for words in {PAGES}:
        assert run([*words, "--help"]) == 0
        print({BETWEEN!r}, end="", flush=True)
"""


@cache
def pages(on_terminal: bool) -> list[str]:
    """Every help text, in the order of `ALL_PAGES`."""
    reading, writing = pty.openpty() if on_terminal else os.pipe()
    child = subprocess.Popen([sys.executable, "-c", ALL_PAGES], stdout=writing, stderr=writing)
    os.close(writing)
    read = read_all(reading)
    assert child.wait(timeout=60) == 0, read.decode()
    return read.decode().replace("\r\n", "\n").split(BETWEEN)[:-1]


def test_the_commands_are_there() -> None:
    assert set(COMMANDS) == {"bench", "chat", "convert", "doctor", "generate", "plan", "pull", "serve", "tune"}


@pytest.mark.parametrize("on_terminal", [False, True], ids=["piped", "terminal"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", PAGES, ids=lambda words: " ".join(words) or "root")
def test_every_help_is_whole_and_fits(words: list[str], width: int, on_terminal: bool) -> None:
    page = pages(on_terminal)[WIDTHS.index(width) * len(PAGES) + PAGES.index(words)]
    text = re.sub(r"\x1b\[[0-9;]*m", "", page)
    assert text.startswith(" ".join(["Usage: llmcad-mlx", *words]))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # nothing is cut off
    assert "..." not in text.replace("[ARGS]...", "")
    command = ROOT.commands[words[0]] if words else ROOT
    said = re.sub(r"\s+", "", text)  # lines are also broken at hyphens
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        for name in names:
            assert re.search(rf"(?<![\w-]){name}(?![\w-])", text), f"{name} is broken or missing"
        assert parameter.help, f"{parameter.name} has no help"
        assert re.sub(r"\s+", "", parameter.help) in said, f"{parameter.name}'s help is not whole"
    for name in () if words else COMMANDS:
        assert re.search(rf"^  {name} +\w.*\.$", text, re.MULTILINE), f"{name} is not explained in one line"


def test_a_pipe_gets_no_colours_and_a_terminal_the_same_text() -> None:
    for piped, shown in zip(pages(False), pages(True), strict=True):
        assert "\x1b" not in piped
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == piped


def test_no_command_shows_the_help_and_version_the_version(output: Callable[..., tuple[str, str]]) -> None:
    assert "Commands" in output(code=2)[0]
    version = f"llmcad-mlx {__version__}\n"
    assert output("--version") == (version, "")
    words = [sys.executable, "-m", "llmcad_mlx", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == version


# --- Completion ---------------------------------------------------------------------------------------------


def ask(home: Path, *words: str, **environment: str) -> str:
    """What the command line prints in a process of its own, with a home of its own."""
    done = finished(*words, env={**os.environ, "HOME": str(home), **environment})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/llmcad-mlx.sh"),
        ("zsh", ".zfunc/_llmcad-mlx"),
        ("fish", ".config/fish/completions/llmcad-mlx.fish"),
    ],
)
def test_a_shell_gets_its_script_and_its_answers(tmp_path: Path, shell: str, file: str) -> None:
    shown = ask(tmp_path, "--show-completion", shell)
    assert f"_LLMCAD_MLX_COMPLETE=complete_{shell}" in shown
    assert file in ask(tmp_path, "--install-completion", shell).replace("\n", "")
    written = (tmp_path / file).read_text()
    assert written.startswith(shown.strip())
    assert ("funcstack" in written) == (shell == "zsh")  # or the first Tab of a session would do nothing
    line = "llmcad-mlx generate --tem"
    answer = ask(
        tmp_path, _LLMCAD_MLX_COMPLETE=f"complete_{shell}", COMP_WORDS=line, COMP_CWORD="2",
        _TYPER_COMPLETE_ARGS=line, _TYPER_COMPLETE_FISH_ACTION="get-args",
    )  # fmt: skip
    assert "--temp" in re.split(r"[\s\"(]+", answer)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_tab_completes_in_bash(tmp_path: Path) -> None:
    ask(tmp_path, "--install-completion", "bash")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "llmcad-mlx").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{ENTRY}' \"$@\"\n")
    (programs / "llmcad-mlx").chmod(0o755)
    environment: Any = {
        **os.environ, "HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}", "TERM": "dumb",
    }  # fmt: skip
    shell = pexpect.spawn(
        "bash", ["--rcfile", str(tmp_path / ".bashrc"), "-i"], env=environment, timeout=60, encoding="utf-8"
    )
    try:
        shell.send("llmcad-mlx gener\t")
        shell.expect_exact("llmcad-mlx generate ")
        shell.send("--read-b\t")
        shell.expect_exact("--read-bandwidth ")
    finally:
        shell.close(force=True)


def test_the_shell_in_use_is_meant_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], output: Callable[..., tuple[str, str]]
) -> None:
    detect = Mock(return_value=("fish", "/usr/bin/fish"))
    monkeypatch.setattr(shellingham, "detect_shell", detect)
    with pytest.raises(SystemExit) as ended:
        run(["--show-completion"])
    assert ended.value.code == 0
    assert "complete_fish" in capfd.readouterr().out
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in output("--show-completion", "tcsh", code=2)[1]
    detect.return_value = ("tcsh", "/bin/tcsh")
    told = "tcsh is not one of bash, zsh, fish; name one, like --install-completion bash"
    assert output("--install-completion", code=2)[1] == f"error: --install-completion: {told}\n"
    detect.side_effect = shellingham.ShellDetectionFailure
    assert "the shell in use is not one of" in output("--show-completion", code=2)[1]
