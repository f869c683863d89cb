"""Where models live: one folder, named by LLMCAD_MLX_HOME.

```
files/<sha256>.gguf          fetched sources, deleted once converted; <sha256>.gguf.part while they arrive
models/<preset>/target       converted mlx-lm folders
models/<preset>/draft
```
Hub repositories stay in the hub's own cache.
"""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "LLMCAD_MLX_HOME"


def home_folder() -> Path:
    """The folder named by LLMCAD_MLX_HOME, else ~/.cache/llmcad-mlx. It may not exist yet."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "llmcad-mlx"


def files_folder() -> Path:
    """Where fetched files wait for conversion."""
    return home_folder() / "files"


def model_folder(preset_name: str, part: str) -> Path:
    """The converted model of a preset; `part` is "target" or "draft"."""
    return home_folder() / "models" / preset_name / part
