"""Shell completion: `--install-completion` and `--show-completion`, for the shell in use or a named one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.completion import install_callback, show_callback

from llmcad_mlx.errors import UsageError

INSTALL, SHOW = "--install-completion", "--show-completion"


class Shell(StrEnum):
    """Whose completion was tried."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


# zsh runs the file when Tab is pressed for the first time, and takes what it defines for the second time only.
_FIRST_TAB = """
if [ "$funcstack[1]" = "_llmcad-mlx" ]; then
  _llmcad_mlx_completion "$@"
fi
"""


def _install(context: typer.Context, parameter: typer.CallbackParam, shell: Shell | None) -> None:
    try:
        install_callback(context, parameter, shell)  # ends the program when it has installed something
    except SystemExit as done:
        if shell is Shell.zsh and done.code == 0:
            with (Path.home() / ".zfunc" / "_llmcad-mlx").open("a", encoding="utf-8") as file:
                file.write(_FIRST_TAB)
        raise


InstallCompletion = Annotated[
    Shell | None,
    typer.Option(
        INSTALL, metavar="[SHELL]", callback=_install, is_eager=True, expose_value=False,
        help="Complete commands and options with Tab from now on, in this shell or in bash, zsh or fish.",
    ),
]  # fmt: skip
ShowCompletion = Annotated[
    Shell | None,
    typer.Option(
        SHOW, metavar="[SHELL]", callback=show_callback, is_eager=True, expose_value=False,
        help="Print what does that, to put it somewhere yourself.",
    ),
]  # fmt: skip


def with_shell(arguments: Sequence[str]) -> list[str]:
    """The command line with the shell in use named where it asks for completion and names none.

    Raises UsageError where that shell is not to be found out, or is another one.
    """
    words = list(arguments)
    if words and words[-1] in (INSTALL, SHOW):
        words.append(_shell_in_use(words[-1]))
    return words


def _shell_in_use(option: str) -> Shell:
    import shellingham  # type: ignore[import-untyped]  # what Typer asks, too

    try:
        name, _ = shellingham.detect_shell()
    except shellingham.ShellDetectionFailure:
        name = "the shell in use"
    if name not in list(Shell):
        raise UsageError(f"{option}: {name} is not one of {', '.join(Shell)}; name one, like {option} bash")
    return Shell(name)
