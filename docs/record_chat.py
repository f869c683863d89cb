"""Draws the README's picture, docs/chat.svg, from a real chat: python docs/record_chat.py

What `llmcad-mlx chat --target qwen2.5-coder-1.5b --memory 1GB --show-accepted` shows, in a terminal's colours:
green is what the draft wrote. Weights that do not fit are read from the disk on every pass. The pair is fetched
the first time, 1.6 GB.
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llmcad_mlx import Engine, load
from llmcad_mlx.chat.commands import ChatSettings
from llmcad_mlx.chat.screen import TerminalScreen
from llmcad_mlx.chat.session import ChatSession
from llmcad_mlx.report import status_line
from llmcad_mlx.settings import GenerationOptions, StopSettings

FILE = Path(__file__).with_name("chat.svg")
TARGET, MEMORY, MAX_TOKENS = "qwen2.5-coder-1.5b", "1GB", 256
LINES = (
    "Write a Python function that merges two sorted lists. Only the code, no comments.",
    "How long does it take for lists of n and m numbers? Answer in one sentence.",
)
WIDTH = 92


class Recorded(TerminalScreen):
    """A terminal that keeps what it was shown, and shows nothing that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.console = self._console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False)


def main() -> None:
    screen = Recorded()
    with load(TARGET, memory=MEMORY, progress=True) as engine:
        assert isinstance(engine, Engine)
        settings = ChatSettings(GenerationOptions(stopping=StopSettings(MAX_TOKENS)), colour=True)
        session = ChatSession(engine, settings, screen)
        screen.note(f"$ llmcad-mlx chat --target {TARGET} --memory {MEMORY} --show-accepted")
        for line in LINES:
            screen.show(Text.assemble((">>> ", "bold"), line))
            session.handle(line)
            screen.note(status_line(engine, session.stats, WIDTH))
    FILE.write_text(screen.console.export_svg(title="llmcad-mlx chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
