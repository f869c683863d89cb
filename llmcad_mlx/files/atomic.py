"""A folder that appears complete or not at all, whatever happens while it is written.

Room on the disk: asked for before a long job, and one clear error when it runs out all the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcad_mlx.errors import LlmcadError, UsageError

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


_REMEDY = "make room or choose a folder on another disk"


@contextmanager
def new_folder(dest: Path, num_bytes: int, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its place when the block ends well, else disappears.

    num_bytes: what will be written, checked beforehand. replace: an existing folder gives way at the end.
    What killed processes have left of earlier tries is removed. Raises UsageError for a destination that is there
    and not empty, DiskError when there is no room or the disk cannot be written.
    """
    dest = Path(os.path.abspath(dest))
    _check_free(dest, replace)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(dest)
        require_free_space(dest.parent, num_bytes, f"the model {dest.name}", _REMEDY)
        folder, lock = _locked_folder(dest)
    except OSError as error:
        raise full_disk_error(error, dest, _REMEDY) from None
    try:
        yield folder
        folder.chmod(0o755)
        _take_place(folder, dest, replace)
    except OSError as error:
        raise full_disk_error(error, dest, _REMEDY) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_destination(dest: Path) -> None:
    """Raise UsageError unless `dest` is free: not there, or an empty folder."""
    _check_free(dest, replace=False)


def _check_free(dest: Path, replace: bool) -> None:
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UsageError(f"{dest}: is a file; choose a new or empty folder")
    if not replace and any(dest.iterdir()):
        raise UsageError(f"{dest}: already exists and is not empty; choose a new or empty folder")


def _prefix(dest: Path) -> str:
    return f".{dest.name}.partial-"


def _locked_folder(dest: Path) -> tuple[Path, int]:
    """A new folder, and a descriptor whose lock says that its maker lives; it ends with the process."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix(dest)}{os.getpid()}-", dir=dest.parent))
        lock = os.open(folder, os.O_RDONLY)
        if _try_lock(lock) and folder.exists():  # else another process took it for a leftover
            return folder, lock
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks
        return True
    return True


def _remove_leftovers(dest: Path) -> None:
    for entry in dest.parent.iterdir():
        if not entry.name.startswith(_prefix(dest)) or not entry.is_dir():
            continue
        try:
            lock = os.open(entry, os.O_RDONLY)
        except OSError:
            continue
        try:
            if _try_lock(lock):
                shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(lock)


def _take_place(folder: Path, dest: Path, replace: bool) -> None:
    """Rename; an old folder is moved away first, because a rename onto a folder with files fails."""
    if replace and dest.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{_prefix(dest)}old-", dir=dest.parent))
        os.rename(dest, old / "folder")
        os.rename(folder, dest)
        shutil.rmtree(old, ignore_errors=True)
        return
    _check_free(dest, replace)  # another process may have made it meanwhile
    os.rename(folder, dest)
