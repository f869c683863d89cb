"""Shell completion: `--install-completion` and `--show-completion`, for the shell in use or a named one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
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


InstallCompletion = Annotated[
    Shell | None,
    typer.Option(
        INSTALL, metavar="[SHELL]", callback=install_callback, is_eager=True, expose_value=False,
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
