"""Recipes that are run by hand, from the repository: `python -m convert.inflate` and others, see README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llmcad_mlx.errors import LlmcadError, UsageError


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a recipe, errors as one line. As of `llmcad-mlx`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    try:
        command()
    except LlmcadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
