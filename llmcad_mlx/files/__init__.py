"""Files and folders that appear complete or not at all, whatever happens while they are written.

Room on the disk is asked for before a long job; when it runs out all the same, there is one clear error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmcad_mlx.errors import LlmcadError, StorageError, UsageError

RESERVE_BYTES = 64 << 20
MAX_IO_BYTES = (2 << 30) - (16 << 10)
"""Read or written by one call. macOS refuses 2 GiB, Linux gives a page less; a multiple of what direct reads
need."""

HOME_REMEDY = "set LLMCAD_MLX_HOME to another disk"
"""What to do when the folder of models is full or cannot be written."""

_POINTER_START = b"version https://git-lfs"
_REMEDY = "choose a folder on another disk"

POINTER = "is a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder"
"""What is wrong with a file for which `is_pointer` holds, and what to do."""


def is_pointer(file: Path) -> bool:
    """Whether git-lfs has not yet put the file in the place of its pointer, which is a short text."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_POINTER_START)) == _POINTER_START
    except OSError:
        return False


def user_path(text: str) -> Path:
    """What a user wrote as a path, with a home folder for "~" where there is one."""
    return Path(os.path.expanduser(text))


def home_folder() -> Path:
    """The folder named by LLMCAD_MLX_HOME, else llmcad-mlx in XDG_CACHE_HOME or ~/.cache. It may not exist yet.

    Raises UsageError where nothing tells.
    """
    if named := os.environ.get("LLMCAD_MLX_HOME"):
        return user_path(named).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the standard says to ignore others
        cache = user_path("~/.cache")
    if not cache.is_absolute():
        raise UsageError("LLMCAD_MLX_HOME: is not set, and this user has no home; name a folder to keep models in")
    return cache / "llmcad-mlx"


class DiskError(LlmcadError):
    """The disk is full or cannot be written."""


def require_free_space(folder: Path, num_bytes: int, what: str, remedy: str = HOME_REMEDY) -> None:
    """Raise DiskError unless the disk of the existing `folder` has room for `num_bytes` and a little more.

    remedy: what the user can do, the end of the message.
    """
    needed, free = num_bytes + RESERVE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e9:.2f} GB are needed for {what}, {free / 1e9:.2f} GB are free"
        raise DiskError(f"{folder}: {sizes}; make room or {remedy}")


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk_error(error: OSError, path: Path | str, remedy: str = HOME_REMEDY) -> DiskError:
    """The one-line error for a write to `path` that failed."""
    if is_full(error):
        return DiskError(f"{path}: the disk is full; make room or {remedy}")
    return DiskError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


def check_open_files(error: OSError, file: Path) -> None:
    """Raise StorageError where a file could not be opened because too many are open: nothing is wrong with it."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise StorageError(f"{file}: cannot be opened, too many files are; raise the limit (ulimit -n)") from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file, or it holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(dest: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; see `new_file`. Makes the folder. Raises OSError."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with new_file(dest) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def new_file(dest: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary file beside `dest`, of the same suffix, that replaces it if the block ends well, or disappears.

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


@contextmanager
def new_folder(dest: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `dest` that takes its place when the block ends well, else disappears.

    num_bytes: what will be written, checked beforehand. What killed processes have left is removed. Raises
    UsageError for a destination that is not empty, DiskError for a disk that has no room or cannot be written.
    """
    dest = Path(os.path.abspath(dest))
    check_destination(dest)
    prefix = f".{dest.name}.partial-"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        for leftover in dest.parent.iterdir():
            with suppress(OSError):
                if leftover.name.startswith(prefix) and (lock := _lock(leftover)) is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    os.close(lock)
        require_free_space(dest.parent, num_bytes, f"the model {dest.name}", _REMEDY)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=dest.parent))
            lock = _lock(folder)
            if lock is not None and folder.exists():  # else another process has taken it for a leftover
                break
        try:
            yield folder
            folder.chmod(0o755)
            check_destination(dest)  # another process may have made it meanwhile
            os.rename(folder, dest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise full_disk_error(error, dest, _REMEDY) from None


def check_destination(dest: Path) -> None:
    """Raise UsageError unless `dest` is free: not there, or an empty folder."""
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{dest}: is a file; choose a new or empty folder")
    if dest.exists() and any(dest.iterdir()):
        raise UsageError(f"{dest}: already exists and is not empty; choose a new or empty folder")


def _lock(folder: Path) -> int | None:
    """A descriptor whose lock says that the maker of `folder` lives; it ends with the process.

    None where another process has the lock. Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # some network disks have no locks
    return descriptor
