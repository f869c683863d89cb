"""What was learned about models on this machine, kept between runs; none of it affects the text.

Of a pair: step times and calibration, in `profiles/<models and device>.json` of the cache folder. Of a target: the
drafts that `llmcad-mlx tune` chose, which are what `--draft auto` means from then on, one for each way of running,
as `drafts` in `profiles/drafts-<target>.json`, the newest last:
```
{"draft": "ngram", "device": "cpu", "memory": null, "pinned": null, "read_bandwidth": null, "tokens_per_s": 70.1}
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcad_mlx.files import full_disk_error, home_folder, read_object, write_text
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel

_FORMAT_VERSION = 2


class PairProfile:
    """Costs and calibration of one pair, in a small JSON file.

    A missing, damaged or outdated file means starting afresh.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: where to keep it; None: nowhere."""
        self.path = path
        self.costs = CostModel()
        self.calibration = Calibration()
        data = {} if path is None else read_object(path)
        if data.get("version") != _FORMAT_VERSION:
            return
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError):
            costs = CostModel.from_dict(data.get("costs"))
            self.calibration = Calibration.from_dict(data.get("calibration"))
            self.costs = costs

    def save(self) -> None:
        """Write the file, whole or not at all. A folder that cannot be written is no reason to fail."""
        if self.path is None:
            return
        learned = {"costs": self.costs.to_dict(), "calibration": self.calibration.to_dict()}
        with contextlib.suppress(OSError):
            write_text(self.path, json.dumps({"version": _FORMAT_VERSION, **learned}))


def profile_path(models: Sequence[Path | str], device: str) -> Path:
    """The file for these models (folders, or names such as "ngram") on `device`."""
    key = "\n".join([device, *(str(model) for model in models)])
    return home_folder() / "profiles" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.json"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a choice was made for: the device, and the memory options as they were given; None: not given."""

    device: str
    memory: int | None = None
    pinned: int | None = None
    read_bandwidth: float | None = None

    def serve(self, now: Conditions) -> bool:
        """Whether a choice made for these is one for `now`: all is the same, or there is more memory."""
        same = (self.device, self.pinned, self.read_bandwidth) == (now.device, now.pinned, now.read_bandwidth)
        return same and self.memory_limit <= now.memory_limit

    @property
    def memory_limit(self) -> float:
        return math.inf if self.memory is None else self.memory


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """`draft`: as `--draft` takes it. `tokens_per_s`: what was measured with it."""

    draft: str
    conditions: Conditions
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return {"draft": self.draft, **asdict(self.conditions), "tokens_per_s": self.tokens_per_s}

    @staticmethod
    def of(entry: object) -> DraftChoice | None:
        """From `to_dict`; None for what is no such entry."""
        if not isinstance(entry, Mapping):
            return None
        draft, device, speed = (entry.get(name) for name in ("draft", "device", "tokens_per_s"))
        if not (isinstance(draft, str) and draft and isinstance(device, str) and isinstance(speed, int | float)):
            return None
        numbers = [entry.get(name) for name in ("memory", "pinned", "read_bandwidth")]
        if not all(number is None or isinstance(number, int | float) for number in numbers):
            return None
        return DraftChoice(draft, Conditions(device, *numbers), float(speed))


def find_choice(target: Path, now: Conditions) -> DraftChoice | None:
    """The choice for the target in the folder `target`; of several that serve, the one made with most memory.

    What cannot be read is no choice.
    """
    serving = [choice for choice in _choices(target) if choice.conditions.serve(now)]
    return max(serving, key=lambda choice: choice.conditions.memory_limit, default=None)


def save_choice(target: Path, choice: DraftChoice) -> Path:
    """Keep `choice` in place of an earlier one for the same conditions; returns the file it went to.

    Raises DiskError where nothing can be written.
    """
    kept = [known for known in _choices(target) if known.conditions != choice.conditions]
    entries = [known.to_dict() for known in (*kept, choice)]
    file = _choices_file(target)
    try:
        write_text(file, json.dumps({"target": str(target.resolve()), "drafts": entries}))
    except OSError as error:
        raise full_disk_error(error, file) from None
    return file


def _choices(target: Path) -> list[DraftChoice]:
    entries = read_object(_choices_file(target)).get("drafts")
    found = [DraftChoice.of(entry) for entry in entries] if isinstance(entries, list) else []
    return [choice for choice in found if choice is not None]


def _choices_file(target: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:16]
    return home_folder() / "profiles" / f"drafts-{digest}.json"
