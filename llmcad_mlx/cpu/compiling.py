"""`kernel`, numba's compiler as all kernels use it, and where it keeps what it has compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache

from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import home_folder


class _Cache(FunctionCache):
    """What cannot be read or kept, on a full disk or a damaged one, is compiled again: that takes time."""

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
        with suppress(RuntimeError, UsageError):
            try:
                config.CACHE_DIR = str(home_folder() / "kernels")
                dispatcher._cache = _Cache(function)
            finally:
                config.CACHE_DIR = usual
        return dispatcher

    return compiled
