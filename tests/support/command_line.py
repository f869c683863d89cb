"""The command line in processes of its own, and what stands for a terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

ENTRY = "from llmcad_mlx.cli.main import main; main()"
# Also where the tests run in the background, whose processes ignore Ctrl-C.
CHILD = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {ENTRY}"


class TerminalText(io.StringIO):
    """Keeps what is written to a terminal."""

    def isatty(self) -> bool:
        return True


def start(*argv: object, **pipes: Any) -> subprocess.Popen[bytes]:
    """The command line, to be read from and interrupted."""
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, argv)], stdout=subprocess.PIPE, **pipes)


def finished(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line run to its end; options as for `subprocess.run`."""
    words = [sys.executable, "-c", CHILD, *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def read_all(reading: int) -> bytes:
    """Everything from a pipe or terminal until its other end is closed; closes this one."""
    read = b""
    try:
        while more := os.read(reading, 65536):
            read += more
    except OSError:  # how Linux says that a terminal's other end is closed
        pass
    os.close(reading)
    return read
