"""`kernel`, numba's compiler as all kernels use it, and where it keeps what it has compiled."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache

from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import home_folder
from llmcad_mlx.machine import resident_bytes
from llmcad_mlx.process import COMPILER_BYTES, UNFINISHED


class _Cache(FunctionCache):
    """What cannot be read or kept, on a full disk or a damaged one, is compiled again: that takes time."""

    def save_overload(self, sig: Any, data: Any) -> None:
        """Ends a process that only compiles, and has taken what it may."""
        super().save_overload(sig, data)
        limit = os.environ.get(COMPILER_BYTES)
        if limit is not None and resident_bytes() > int(limit):
            os._exit(UNFINISHED)

    def _guard_against_spurious_io_errors(self) -> AbstractContextManager[None]:
        return suppress(Exception)


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit` without bounds checks and without the interpreter's lock; options are numba's.

    Machine code is kept beside the source or in the user's cache, as numba does. Where neither can be written, as
    in an installation of the system's without a home, it is kept in the home folder; failing that, nowhere.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, boundscheck=False, **options)(function)
        with suppress(RuntimeError):  # numba finds no place
            dispatcher._cache = _Cache(function)
            return dispatcher
        usual = config.CACHE_DIR
        try:
            config.CACHE_DIR = str(home_folder() / "kernels")
            dispatcher._cache = _Cache(function)
        except (RuntimeError, UsageError):
            _tell_that_none_is_kept()
        finally:
            config.CACHE_DIR = usual
        return dispatcher

    return compiled


@cache
def _tell_that_none_is_kept() -> None:
    """Once."""
    logging.getLogger(__name__).warning(
        "machine code cannot be kept, so each start takes half a minute longer; "
        "set LLMCAD_MLX_HOME to a folder that can be written"
    )
