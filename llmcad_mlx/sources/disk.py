"""Room on the disk: asked for before a long job, and one clear error when it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from llmcad_mlx.errors import LlmcadError

RESERVE_BYTES = 64 << 20
HOME_REMEDY = "make room or set LLMCAD_MLX_HOME to another disk"
"""What to do when the folder of models is full."""


class DiskError(LlmcadError):
    """The disk is full or cannot be written."""


def require_free_space(folder: Path, num_bytes: int, what: str, remedy: str = HOME_REMEDY) -> None:
    """Raise DiskError unless the disk of the existing `folder` has room for `num_bytes` and a little more.

    remedy: what the user can do, the end of the message.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVE_BYTES:
        raise DiskError(
            f"{folder}: {_gigabytes(num_bytes + RESERVE_BYTES)} are needed for {what}, "
            f"{_gigabytes(free)} are free; {remedy}"
        )


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk_error(error: OSError, path: Path | str, remedy: str = HOME_REMEDY) -> DiskError:
    """The one-line error for a write to `path` that failed."""
    if is_full(error):
        return DiskError(f"{path}: the disk is full; {remedy}")
    return DiskError(f"{path}: cannot be written ({error.strerror or error})")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
