"""`load`: an engine in this process, or one on another machine. Importable where MLX is absent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmcad_mlx.errors import UsageError

if TYPE_CHECKING:
    from llmcad_mlx.api import Engine
    from llmcad_mlx.remote.engine import RemoteEngine


def load(
    target: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = "auto",
    *,
    api_key: str | None = None,
    **options: Any,
) -> Engine | RemoteEngine:
    """Load a target and its draft, or connect to a server that has: target is then "http://mac.local:8080".

    For a model, draft and options are those of `llmcad_mlx.api.load`: memory, pinned, context, read_bandwidth,
    verify and progress. For a server there is only api_key (None: that of the environment's LLMCAD_MLX_API_KEY);
    what it serves, it was told when it was started.

    Raises UsageError for an option that is out of range or does not belong to the target, and what
    `llmcad_mlx.api.load` and `RemoteEngine` raise.
    """
    if isinstance(target, str) and target.lower().startswith(("http://", "https://")):
        given = ["draft"] if draft != "auto" else list(options)
        if given:
            raise UsageError(f"{given[0]}: the server at {target} has decided that; leave it out")
        from llmcad_mlx.remote.engine import RemoteEngine

        return RemoteEngine(target, api_key)
    if api_key is not None:
        raise UsageError('api_key: only a server asks for one; give its address as target, "http://…"')
    try:
        from llmcad_mlx.api import load as load_here
    except ModuleNotFoundError as error:
        raise UsageError(
            f"target: models cannot run on this device ({error}); "
            'give the address of one that runs `llmcad-mlx serve`: load("http://mac.local:8080")'
        ) from error
    return load_here(target, draft, **options)
