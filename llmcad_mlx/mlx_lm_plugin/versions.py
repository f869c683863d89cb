"""Which mlx-lm this plugin was tested with. Its internals move between minor versions."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

TESTED = ">=0.32.2,<0.33"


def check_mlx_lm(version: str | None = None) -> None:
    """Raise ImportError, one line, unless mlx-lm (`version`; None: the installed one) is in the tested range."""
    if version is None:
        version = metadata.version("mlx-lm")
    if not SpecifierSet(TESTED).contains(version, prereleases=True):
        raise ImportError(
            f"llmcad_mlx.mlx_lm_plugin is tested with mlx-lm {TESTED}, not {version}; "
            f"run: pip install 'mlx-lm{TESTED}'"
        )
