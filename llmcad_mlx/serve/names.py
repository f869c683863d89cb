"""What models are called towards clients: never by a path of this machine."""

from __future__ import annotations

from pathlib import Path

from llmcad_mlx.sources.resolve import DEFAULT_PRESET


def public_name(name: str | None) -> str:
    """A preset's or repository's name as it is, a local file or folder by its last part; None: the default target.

    A prefix like "4bit:" stays.
    """
    if name is None:
        return DEFAULT_PRESET
    head, colon, rest = name.rpartition(":")
    path = Path(rest).expanduser()
    is_local = path.is_absolute() or rest.startswith(("~", ".")) or path.exists()
    return f"{head}{colon}{path.resolve().name or 'model'}" if is_local else name
