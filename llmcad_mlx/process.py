"""What this process may have of the system. A library takes what it finds; mlx-lm, when imported, does not."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_MODULE = "mlx_lm.utils"
_LOCAL = "localhost,127.0.0.1,::1"
_WANTED = 4096  # a large model lies in some hundred files, and a server has a socket for each client

COMPILER_BYTES = "LLMCAD_MLX_COMPILER_BYTES"
"""Environment variable: what a process that only compiles may take before it ends, for another one to go on."""

UNFINISHED = 75
"""Its exit code then: EX_TEMPFAIL."""


class MlxLmFinder:
    """Finds `mlx_lm.utils` for Python's import, and keeps it from setting the limit of open files to a fixed pair:
    where less is allowed that is an error, elsewhere it takes from the program around us what it had."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing for any other module."""
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        import resource

        set_limit: Callable[..., None] = resource.setrlimit

        def for_others(*limits: Any) -> None:
            """Whoever calls it meanwhile, in another thread."""
            if sys._getframe(1).f_globals is not vars(module):
                set_limit(*limits)

        resource.setrlimit = for_others
        try:
            super().exec_module(module)
        finally:
            resource.setrlimit = set_limit


def prepare_process() -> None:
    """For a program of its own: as many open files as a large model takes, where the system allows it, a folder
    for temporary files that can be used (MLX fails where TMPDIR names another), and no proxy for this machine,
    where a copy of the hub may be served."""
    import resource

    names = {name.lower() for name in os.environ}
    if names & {"http_proxy", "https_proxy", "all_proxy"}:  # else a system's own settings would no longer count
        own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = f"{own},{_LOCAL}" if own else _LOCAL

    with suppress(OSError):  # no folder can be
        os.environ["TMPDIR"] = tempfile.gettempdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
