"""Ctrl-C in long jobs."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from llmcad_mlx.progress import interruptible


@pytest.fixture(autouse=True)
def _usual_handler() -> None:
    """Also where the tests run in the background, whose processes ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_that_a_library_swallows_comes_again() -> None:
    with interruptible() as check:
        check()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_raised_at_once_and_the_next_block_begins_anew() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    with interruptible() as check:
        check()
