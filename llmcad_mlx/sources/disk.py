"""Room on the disk: asked for before a long job, and one clear error when it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from llmcad_mlx.errors import LlmcadError

RESERVE_BYTES = 64 << 20


class DiskError(LlmcadError):
    """The disk is full or cannot be written."""


def require_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise DiskError unless the disk of the existing `folder` has room for `num_bytes` and a little more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVE_BYTES:
        raise DiskError(
            f"{folder}: {_gigabytes(num_bytes + RESERVE_BYTES)} are needed for {what}, "
            f"{_gigabytes(free)} are free; make room or set LLMCAD_MLX_HOME to another disk"
        )


def full_disk_error(error: OSError, path: Path) -> DiskError:
    """The one-line error for a write to `path` that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"{path}: the disk is full; make room or set LLMCAD_MLX_HOME to another disk")
    return DiskError(f"{path}: cannot be written ({error.strerror or error})")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
