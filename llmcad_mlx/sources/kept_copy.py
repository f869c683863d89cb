"""Copies of models that are made once and kept in the cache folder.

```
<kind>/<model>-<state>-<what>    model: digest of the folder's path; state: of its files' sizes and times
```
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from llmcad_mlx.models.loading import check_weight_files, read_config
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.pull import locked


def kept_copy(source: Path, kind: str, what: str, make: Callable[[Path], object]) -> Path:
    """The folder of the copy `what` of the model in `source`; make(folder) writes it where it is not there yet.

    make: lets the folder appear whole or not at all. The same copy of what the model was before it changed is
    removed. Raises ModelError for a source that is no model folder, DiskError, and what `make` raises.
    """
    identity, state = digest(str(source.resolve())), _state(source)
    folder = home_folder() / kind / f"{identity}-{state}-{what}"
    if folder.exists():  # complete, because it got its name last
        return folder
    with locked(folder):
        if not folder.exists():
            for old in folder.parent.glob(f"{identity}-*-{what}"):
                shutil.rmtree(old, ignore_errors=True)
            make(folder)
    return folder


def digest(text: str) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _state(source: Path) -> str:
    """Changes with the weights and the configuration, by sizes and times: hashing them would take minutes."""
    read_config(source)
    files = [source / "config.json", *check_weight_files(source)]
    stats = [(file.name, file.stat()) for file in files]
    return digest("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))
