"""Run a language model larger than the memory it may use, fast, without changing a token of its output."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from llmcad_mlx.errors import (
    BudgetError,
    ContextLengthError,
    DownloadError,
    GenerationError,
    LlmcadError,
    ModelError,
    RemoteError,
    StorageError,
    UsageError,
    VocabularyError,
)
from llmcad_mlx.process import MlxLmFinder

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine, Response
    from llmcad_mlx.remote import RemoteEngine
    from llmcad_mlx.results import GenerationStats, Result

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ContextLengthError",
    "DownloadError",
    "Engine",
    "GenerationError",
    "GenerationStats",
    "LlmcadError",
    "ModelError",
    "RemoteEngine",
    "RemoteError",
    "Response",
    "Result",
    "StorageError",
    "UsageError",
    "VocabularyError",
    "__version__",
    "load",
]

sys.meta_path.insert(0, MlxLmFinder)  # every module below may be the first that imports mlx-lm

# Imported on first use: `llmcad-mlx --help`, `doctor` and engines on another machine must work without MLX.
_MODULES = {
    "Engine": "api",
    "Response": "api",
    "RemoteEngine": "remote",
    "GenerationStats": "results",
    "Result": "results",
}


def load(
    target: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = "auto",
    *,
    memory: int | str | None = None,
    pinned: int | str = "auto",
    context: int | None = None,
    read_bandwidth: float | str | None = None,
    verify: bool = False,
    progress: bool = False,
    api_key: str | None = None,
) -> Engine | RemoteEngine:
    """Load a target and its draft, or connect to a server that has: target is then "http://mac.local:8080".

    For a model, draft and options are those of `llmcad_mlx.api.load`. For a server there is only api_key (None:
    that of the environment's LLMCAD_MLX_API_KEY); what it serves, it was told when it was started.

    Raises UsageError for an option that is out of range or does not belong to the target, and what
    `llmcad_mlx.api.load` and `RemoteEngine` raise.
    """
    options: dict[str, Any] = {
        "memory": memory, "pinned": pinned, "context": context, "read_bandwidth": read_bandwidth, "verify": verify,
        "progress": progress,
    }  # fmt: skip
    if isinstance(target, str) and target.lower().startswith(("http://", "https://")):
        parameters = signature(load).parameters
        for option, value in {"draft": draft, **options}.items():
            if value != parameters[option].default:
                raise UsageError(f"{option}: the server at {target} has decided that; leave it out")
        from llmcad_mlx.remote import RemoteEngine

        return RemoteEngine(target, api_key)
    if api_key is not None:
        raise UsageError('api_key: only a server asks for one; give its address as target, "http://…"')
    try:
        from llmcad_mlx.api import load as load_here
    except ModuleNotFoundError as error:
        raise UsageError(
            f"target: models cannot run on this device ({error}); "
            'give the address of one that runs `llmcad-mlx serve`: load("http://mac.local:8080")'
        ) from error
    return load_here(target, draft, **options)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"llmcad_mlx.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'llmcad_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
