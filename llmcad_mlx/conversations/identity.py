"""What a saved cache belongs to: versions, device and models that must be the same when it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmcad_mlx.loader import LoadedPair, device_name
from llmcad_mlx.machine import package_version
from llmcad_mlx.models.host import host_kernels_wanted


def belongings(pair: LoadedPair) -> dict[str, str | None]:
    """What must be the same for a cache to be used; the names end the sentence "it is from another …"."""
    versions = [f"{name} {package_version(name)}" for name in ("llmcad-mlx", "mlx", "mlx-lm")]
    kernels = "host kernels" if host_kernels_wanted() else "MLX"
    return {
        "version": ", ".join(versions),
        "device": f"{device_name()}, {kernels}",
        "model": _model_digest(pair.target_path),
        "draft": draft_digest(pair),
    }


def draft_digest(pair: LoadedPair) -> str | None:
    """The draft model's digest; None where no model drafts."""
    path = pair.draft_path
    return _model_digest(path) if path is not None and path.is_dir() else None


def _model_digest(folder: Path) -> str:
    """Digest of a folder's config and of what lies where in its weight files; the weights' own bytes left out."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
    return digest.hexdigest()
