"""The `llmcad-mlx` command: collects the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys

import typer
from click.exceptions import ClickException, Exit
from typer.main import get_command

from llmcad_mlx.cli.bench import bench
from llmcad_mlx.cli.convert import convert
from llmcad_mlx.cli.doctor import doctor
from llmcad_mlx.cli.generate import generate
from llmcad_mlx.cli.pull import pull
from llmcad_mlx.errors import LlmcadError, UsageError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="llmcad-mlx",
    help="Run a language model faster with a draft, without changing a token of its output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
for command in (generate, bench, pull, convert, doctor):
    app.command()(command)


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from llmcad_mlx import __version__

        typer.echo(f"llmcad-mlx {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the command line."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    `--debug` is taken wherever it stands.
    """
    debug = "--debug" in argv
    arguments = [word for word in argv if word != "--debug"]
    try:
        result = get_command(app).main(args=arguments, prog_name="llmcad-mlx", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exit as done:
        return done.exit_code
    except ClickException as error:
        print(f"error: {_line(error.format_message())}; see llmcad-mlx --help", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # The reader went away (`| head`): not an error. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LlmcadError as error:
        if debug:
            raise
        print(f"error: {_line(str(error))}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    except Exception as error:
        if debug:
            raise
        text = _line(str(error)) or type(error).__name__
        print(f"error: {type(error).__name__}: {text}; run again with --debug for details", file=sys.stderr)
        return FAILED


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
