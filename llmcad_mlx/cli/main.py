"""The `llmcad-mlx` command: collects the commands, turns errors into one line and an exit code, completes for
shells."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import CallbackParam, Context, Exit, Option, Typer, TyperException
from typer.completion import get_completion_inspect_parameters, install_callback, show_callback
from typer.main import get_command

from llmcad_mlx.cli.chat import chat
from llmcad_mlx.cli.generate import generate
from llmcad_mlx.cli.measure import bench, plan, tune
from llmcad_mlx.cli.models import convert, doctor, pull
from llmcad_mlx.cli.options import with_options
from llmcad_mlx.cli.serve import serve
from llmcad_mlx.errors import LlmcadError, UsageError, is_out_of_memory
from llmcad_mlx.process import prepare_process

NAME = "llmcad-mlx"
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
_INSTALL, _SHOW = "--install-completion", "--show-completion"

app = Typer(
    name=NAME,
    help="Run a language model faster with a draft, without changing a token of its output.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut off long names on narrow terminals
    add_completion=False,  # its options take no shell's name
)
COMMANDS: dict[Callable[..., None], str] = {
    chat: "Talk with a model.",
    generate: "Answer one prompt.",
    serve: "Serve OpenAI's HTTP API and a chat page.",
    plan: "Show what a memory budget is spent on.",
    tune: "Measure drafts and remember the best.",
    bench: "Compare ways of decoding.",
    pull: "Fetch a model and make it ready.",
    convert: "Make a bundle that streams well.",
    doctor: "Check this machine or a model.",
}
for command, in_short in COMMANDS.items():
    app.command(short_help=in_short)(with_options(command))


Shell = StrEnum("Shell", ["bash", "zsh", "fish"])  # those whose completion was tried
# zsh runs the file when Tab is pressed for the first time, and takes what it defines for the second time only.
_FIRST_TAB_IN_ZSH = """
if [ "$funcstack[1]" = "_llmcad-mlx" ]; then
  _llmcad_mlx_completion "$@"
fi
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmcad_mlx import __version__

        print(f"{NAME} {__version__}")
        raise Exit


def _install(context: Context, parameter: CallbackParam, shell: Shell | None) -> None:
    try:
        install_callback(context, parameter, shell)  # ends the program when it has installed something
    except SystemExit as done:
        if shell is Shell.zsh and done.code == 0:
            with (Path.home() / ".zfunc" / "_llmcad-mlx").open("a", encoding="utf-8") as file:
                file.write(_FIRST_TAB_IN_ZSH)
        raise


@app.callback()
def _root(
    debug: bool = Option(False, "--debug", help="Show the traceback of an error; goes with every command."),
    version: bool = Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
    install_completion: Annotated[Shell | None, Option(
        metavar="[SHELL]", callback=_install, is_eager=True, expose_value=False,
        help="Complete commands and options with Tab from now on, in this shell or in bash, zsh or fish.",
    )] = None,
    show_completion: Annotated[Shell | None, Option(
        metavar="[SHELL]", callback=show_callback, is_eager=True, expose_value=False,
        help="Print what does that, to put it somewhere yourself.",
    )] = None,
) -> None: ...  # fmt: skip


def main() -> None:
    prepare_process()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: else the next file that is opened would be taken for it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - to the end
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is typed is UTF-8 all the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # it was told; Python would complain again
        _drop_output()
    sys.exit(code)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    `--debug` is taken wherever it stands.
    """
    try:
        return _invoke([word for word in argv if word != "--debug"])
    except BrokenPipeError:
        _drop_output()  # the reader went away (`| head`): not an error
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(_line(error), file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        return USAGE if isinstance(error, UsageError | TyperException) else FAILED


def _invoke(words: list[str]) -> int:
    """Not Typer's own `main`: it has its own mind about Ctrl-C and broken pipes."""
    root = get_command(app)
    if "_LLMCAD_MLX_COMPLETE" in os.environ:
        get_completion_inspect_parameters()  # by which Typer gets to know the shells
        root.main(prog_name=NAME)  # answers the shell's question and exits
    arguments = words or ["--help"]
    if arguments[-1] in (_INSTALL, _SHOW):
        arguments = [*arguments, _shell_in_use(arguments[-1])]
    try:
        with root.make_context(NAME, list(arguments)) as context:  # Typer uses its list up
            root.invoke(context)
    except Exit as done:
        return done.exit_code if words else USAGE
    finally:
        sys.stdout.flush()  # here, where a broken pipe is caught
    return DONE


def _shell_in_use(option: str) -> Shell:
    """Raises UsageError where it is not to be found out, or is one without completion."""
    import shellingham  # type: ignore[import-untyped]  # what Typer asks, too

    try:
        name, _ = shellingham.detect_shell()
    except shellingham.ShellDetectionFailure:
        name = "the shell in use"
    if name not in list(Shell):
        raise UsageError(f"{option}: {name} is not one of {', '.join(Shell)}; name one, like {option} bash")
    return Shell(name)


def _line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        return f"error: {_joined(error.format_message())}; see {context.command_path if context else NAME} --help"
    if isinstance(error, LlmcadError):
        return f"error: {_joined(str(error))}"
    if is_out_of_memory(error):
        return "error: there is not enough memory; give a smaller --memory or --context, or a smaller model"
    kind = type(error).__name__
    return f"error: {kind}: {_joined(str(error)) or 'no message'}; run again with --debug for details"


def _joined(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
