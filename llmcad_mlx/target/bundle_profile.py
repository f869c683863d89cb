"""What was measured with a bundle, kept in its `llmcad.json` under "profile"."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcad_mlx.target.bundle import FILE


def read_profile(folder: Path) -> dict[str, Any] | None:
    """The profile of the bundle in `folder`; None where there is no bundle, or its file cannot be read: then the
    loader has its own words for it."""
    content = _read(folder)
    profile = None if content is None else content.get("profile")
    return profile if isinstance(profile, dict) else None


def write_profile(folder: Path, profile: Mapping[str, Any]) -> bool:
    """Put `profile` in the place of the bundle's, whole or not at all; the rest of the file stays as it is.

    False where there is no bundle, or its folder cannot be written.
    """
    content = _read(folder)
    if content is None:
        return False
    text = json.dumps({**content, "profile": dict(profile)}, indent=1) + "\n"
    try:
        mode = (folder / FILE).stat().st_mode
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, mode & 0o777)
        os.replace(name, folder / FILE)
    except OSError:
        os.unlink(name)
        return False
    except BaseException:
        os.unlink(name)
        raise
    return True


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("profile"), dict) else None
