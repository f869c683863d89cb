"""Files and folders that appear complete or not at all, whatever happens while they are written.

Room on the disk is asked for before a long job; when it runs out all the same, there is one clear error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def new_file(dest: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary file beside `dest`, with the same suffix, that takes its place when the block ends well, else
    disappears.

    It has the permissions of the file it replaces, or those of any new file; private: it is its owner's alone.
    Raises OSError, and makes no folders.
    """
    temporary = dest.with_name(f".{dest.name}.{os.getpid()}-{secrets.token_hex(4)}.part{dest.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        if not private:
            with suppress(FileNotFoundError):
                temporary.chmod(dest.stat().st_mode & 0o777)
        yield temporary
        os.replace(temporary, dest)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(dest: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; see `new_file`. Makes the folder. Raises OSError."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with new_file(dest) as file:
        file.write_text(text, encoding="utf-8")


_REMEDY = "make room or choose a folder on another disk"


@contextmanager
def new_folder(dest: Path, num_bytes: int, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its place when the block ends well, else disappears.

    num_bytes: what will be written, checked beforehand. replace: an existing folder gives way at the end.
    What killed processes have left of earlier tries is removed. Raises UsageError for a destination that is there
    and not empty, DiskError when there is no room or the disk cannot be written.
    """
    dest = Path(os.path.abspath(dest))
    check_destination(dest, replace)
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


def check_destination(dest: Path, replace: bool = False) -> None:
    """Raise UsageError unless `dest` is free: not there, or an empty folder, or with `replace` any folder."""
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{dest}: is a file; choose a new or empty folder")
    if dest.exists() and not replace and any(dest.iterdir()):
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
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # some network disks have no locks
    return True


def _remove_leftovers(dest: Path) -> None:
    for entry in dest.parent.iterdir():
        if not entry.name.startswith(_prefix(dest)) or not entry.is_dir():
            continue
        with suppress(OSError):
            lock = os.open(entry, os.O_RDONLY)
            try:
                if _try_lock(lock):
                    shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(lock)


def _take_place(folder: Path, dest: Path, replace: bool) -> None:
    """Rename; an old folder is moved away first, because a rename onto a folder with files fails."""
    check_destination(dest, replace)  # another process may have made it meanwhile
    if not (replace and dest.exists()):
        os.rename(folder, dest)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{_prefix(dest)}old-", dir=dest.parent))
    os.rename(dest, old / "folder")
    os.rename(folder, dest)
    shutil.rmtree(old, ignore_errors=True)
