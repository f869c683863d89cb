"""The `llmcad-mlx` command: collects the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

import typer
from typer.completion import get_completion_inspect_parameters
from typer.main import get_command

from llmcad_mlx.cli.bench import bench
from llmcad_mlx.cli.chat import chat
from llmcad_mlx.cli.completion import InstallCompletion, ShowCompletion, with_shell
from llmcad_mlx.cli.convert import convert
from llmcad_mlx.cli.doctor import doctor
from llmcad_mlx.cli.generate import generate
from llmcad_mlx.cli.options import with_options
from llmcad_mlx.cli.plan import plan
from llmcad_mlx.cli.pull import pull
from llmcad_mlx.cli.serve import serve
from llmcad_mlx.cli.tune import tune
from llmcad_mlx.errors import LlmcadError, UsageError

NAME = "llmcad-mlx"
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT

app = typer.Typer(
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


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmcad_mlx import __version__

        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes with every command."),
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
    install_completion: InstallCompletion = None,
    show_completion: ShowCompletion = None,
) -> None: ...


def main() -> None:
    """Entry point of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    `--debug` is taken wherever it stands.
    """
    debug = "--debug" in argv
    try:
        return _invoke([word for word in argv if word != "--debug"])
    except BrokenPipeError:
        # The reader went away (`| head`): not an error. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        print(_line(error), file=sys.stderr)
        return _exit_code(error)


def _invoke(arguments: list[str]) -> int:
    """Not Typer's own `main`: it has its own mind about Ctrl-C and broken pipes."""
    root = get_command(app)
    if "_LLMCAD_MLX_COMPLETE" in os.environ:
        get_completion_inspect_parameters()  # by which Typer gets to know the shells
        root.main(prog_name=NAME)  # answers the shell's question and exits
    try:
        # A copy of the arguments: Typer uses its list up.
        with root.make_context(NAME, with_shell(arguments) or ["--help"]) as context:
            root.invoke(context)
    except typer.Exit as done:
        return done.exit_code if arguments else USAGE
    finally:
        sys.stdout.flush()  # here, where a broken pipe is caught
    return DONE


def _line(error: BaseException) -> str:
    """The one line that says what happened."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        return f"error: {_joined(error.format_message())}; see {context.command_path if context else NAME} --help"
    if isinstance(error, LlmcadError):
        return f"error: {_joined(str(error))}"
    if isinstance(error, MemoryError):
        return "error: there is not enough memory; give a smaller --memory or --context, or a smaller model"
    kind = type(error).__name__
    return f"error: {kind}: {_joined(str(error)) or 'no message'}; run again with --debug for details"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USAGE if isinstance(error, UsageError | typer.TyperException) else FAILED


def _joined(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
