"""Whose turn it is: one generation at a time computes with an engine's models and caches, whatever thread asks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmcad_mlx.errors import UsageError


class Turn:
    """A generation's claim to the engine, from its first step to its end; made by the thread that asks for it.
    `latest`: the thread of its last step."""

    def __init__(self) -> None:
        self.creator = self.latest = threading.current_thread()


class Turns:
    """Hands out turns. Steps never overlap: caches and books stand for one thread at a time.

    A turn that is still running makes callers in other threads wait until it ends. In a program of one thread
    nobody but the caller could end it, so there a newer turn takes its place, as it does where the thread that ran
    it has ended; the older one is told at its next step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: Turn | None = None
        self._stepping: threading.Thread | None = None
        self._process = os.getpid()

    @contextmanager
    def step(self, turn: Turn, first: bool = False) -> Iterator[None]:
        """Compute for `turn`. The first step waits until the engine is free, and takes it; the next ones raise
        UsageError where another turn has taken its place."""
        with self._computing(turn, wait=first):
            if first:
                self._running = turn
            if self._running is not turn:
                raise UsageError("this generation ended when a newer one began; run one at a time")
            yield

    @contextmanager
    def between(self) -> Iterator[None]:
        """Compute between generations, or between the steps of one in the same thread, which goes on."""
        with self._computing(Turn(), wait=True):
            yield

    def end(self, turn: Turn | None = None) -> None:
        """`turn` is over, if it has not been taken already; None: whichever is running."""
        with self._changed:
            if turn is None or self._running is turn:
                self._running = None
                self._changed.notify_all()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Wait for the step that is being computed, not for the turn it belongs to, and end that."""
        with self._computing(Turn(), wait=False):
            self._running = None
            yield

    @contextmanager
    def _computing(self, turn: Turn, wait: bool) -> Iterator[None]:
        """Let nobody else compute meanwhile. wait: until other threads' turns have ended, too."""
        if os.getpid() != self._process:
            raise UsageError("this engine was loaded before the process forked; load the model in this process")
        here = threading.current_thread()
        if self._stepping is here:
            raise UsageError("the engine was called from inside its own generation; wait until that has answered")
        with self._changed:
            while self._stepping is not None or (wait and not self._is_free_for(here)):
                self._changed.wait()
            self._stepping = turn.latest = here
        try:
            yield
        finally:
            with self._changed:
                self._stepping = None
                self._changed.notify_all()

    def _is_free_for(self, here: threading.Thread) -> bool:
        running = self._running
        return running is None or running.creator is running.latest is here or not running.latest.is_alive()
