"""What was learned about a pair of models on this machine: step times and calibration, kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcad_mlx.files.atomic import write_text
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel

_FORMAT_VERSION = 2


class PairProfile:
    """Costs and calibration of one pair, in a small JSON file.

    A missing, damaged or outdated file means starting afresh: nothing in it affects the text.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: where to keep it; None: nowhere."""
        self._path = path
        data = _read(path)
        self.costs = CostModel()
        self.calibration = Calibration()
        if data is not None:
            try:
                costs = CostModel.from_dict(data.get("costs"))
                self.calibration = Calibration.from_dict(data.get("calibration"))
                self.costs = costs
            except (ValueError, TypeError, OverflowError):
                self.calibration = Calibration()

    def save(self) -> None:
        """Write the file, whole or not at all. A folder that cannot be written is no reason to fail."""
        if self._path is None:
            return
        data = {
            "version": _FORMAT_VERSION,
            "costs": self.costs.to_dict(),
            "calibration": self.calibration.to_dict(),
        }
        with contextlib.suppress(OSError):
            write_text(self._path, json.dumps(data))


def profile_path(home: Path, models: Sequence[Path | str], device: str) -> Path:
    """The file for these models (folders, or names such as "ngram") on `device`."""
    key = "\n".join([device, *(str(model) for model in models)])
    return home / "profiles" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("version") == _FORMAT_VERSION else None
