"""Run a language model larger than the memory it may use, fast, without changing a token of its output."""

from __future__ import annotations

from llmcad_mlx.api import Engine, Response, Result, load
from llmcad_mlx.errors import (
    ContextLengthError,
    DownloadError,
    GenerationError,
    LlmcadError,
    ModelError,
    UsageError,
    VocabularyError,
)
from llmcad_mlx.stats import GenerationStats

__version__ = "0.1.0"

__all__ = [
    "ContextLengthError",
    "DownloadError",
    "Engine",
    "GenerationError",
    "GenerationStats",
    "LlmcadError",
    "ModelError",
    "Response",
    "Result",
    "UsageError",
    "VocabularyError",
    "__version__",
    "load",
]
