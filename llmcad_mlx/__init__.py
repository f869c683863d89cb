"""Run a language model larger than the memory it may use, fast, without changing a token of its output."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine as Engine
    from llmcad_mlx.api import Response as Response
    from llmcad_mlx.errors import ContextLengthError as ContextLengthError
    from llmcad_mlx.errors import DownloadError as DownloadError
    from llmcad_mlx.errors import GenerationError as GenerationError
    from llmcad_mlx.errors import LlmcadError as LlmcadError
    from llmcad_mlx.errors import ModelError as ModelError
    from llmcad_mlx.errors import RemoteError as RemoteError
    from llmcad_mlx.errors import UsageError as UsageError
    from llmcad_mlx.errors import VocabularyError as VocabularyError
    from llmcad_mlx.local_or_remote import load as load
    from llmcad_mlx.remote.engine import RemoteEngine as RemoteEngine
    from llmcad_mlx.results import GenerationStats as GenerationStats
    from llmcad_mlx.results import Result as Result

__version__ = "0.1.0"

# Imported on first use: `llmcad-mlx --help`, `doctor` and engines on another machine must work without MLX.
_MODULES = {
    "Engine": "api",
    "Response": "api",
    "Result": "results",
    "RemoteEngine": "remote.engine",
    "load": "local_or_remote",
    "GenerationStats": "results",
    "ContextLengthError": "errors",
    "DownloadError": "errors",
    "GenerationError": "errors",
    "LlmcadError": "errors",
    "ModelError": "errors",
    "RemoteError": "errors",
    "UsageError": "errors",
    "VocabularyError": "errors",
}

__all__ = [
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
    "UsageError",
    "VocabularyError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"llmcad_mlx.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'llmcad_mlx' has no attribute {name!r}")
