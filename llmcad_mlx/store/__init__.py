"""Models by name, and where they live: one folder, `files.home_folder`.

```
files/<sha256>.gguf          fetched sources, deleted once converted; <sha256>.gguf.part while they arrive
models/<preset>/target       converted mlx-lm folders
models/<preset>/draft
self-drafts/  drafts/  trimmed-drafts/     copies to draft with
profiles/                    what was learned about pairs of models
```
Hub repositories stay in the hub's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from llmcad_mlx.files import full_disk_error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder; the others wait and find it done. Raises DiskError."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise full_disk_error(error, folder) from None
    try:
        yield
    finally:
        lock.release()
