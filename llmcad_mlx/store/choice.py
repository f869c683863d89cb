"""The draft that `llmcad-mlx tune` chose for a target: what `--draft auto` means from then on.

Kept in the profile of the target's bundle under "drafts"; for a target that is none, or that cannot be written, in
`profiles/drafts-<target>.json` of the cache folder. A list, the newest last:
```
{"draft": "ngram", "device": "cpu", "memory": null, "pinned": null, "read_bandwidth": null, "tokens_per_s": 70.1}
```
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcad_mlx.files.atomic import full_disk_error, write_text
from llmcad_mlx.files.bundle import FILE, read_profile, write_profile
from llmcad_mlx.store.cache_folder import home_folder

_KEY = "drafts"


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
        return same and self._memory <= now._memory

    @property
    def _memory(self) -> float:
        return math.inf if self.memory is None else self.memory


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """`draft`: as `--draft` takes it. `tokens_per_s`: what was measured with it."""

    draft: str
    conditions: Conditions
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `_parse` reads it back."""
        return {"draft": self.draft, **asdict(self.conditions), "tokens_per_s": self.tokens_per_s}


def find_choice(target: Path, now: Conditions) -> DraftChoice | None:
    """The choice for the target in the folder `target`; of several that serve, the one made with most memory.

    What cannot be read is no choice.
    """
    serving = [choice for choice in _choices(target) if choice.conditions.serve(now)]
    return max(serving, key=lambda choice: choice.conditions._memory, default=None)


def save_choice(target: Path, choice: DraftChoice) -> Path:
    """Keep `choice` in place of an earlier one for the same conditions; returns the file it went to.

    Raises DiskError where nothing can be written.
    """
    kept = [known for known in _choices(target) if known.conditions != choice.conditions]
    entries = [known.to_dict() for known in (*kept, choice)]
    profile = read_profile(target)
    if profile is not None and write_profile(target, {**profile, _KEY: entries}):
        return target / FILE
    file = _file(target)
    try:
        write_text(file, json.dumps({"target": str(target.resolve()), _KEY: entries}))
    except OSError as error:
        raise full_disk_error(error, file) from None
    return file


def _choices(target: Path) -> list[DraftChoice]:
    """The bundle's, then those of the cache folder: a bundle may have become unwritable, or the reverse."""
    places = (read_profile(target), _read(_file(target)))
    found: dict[Conditions, DraftChoice] = {}
    for place in places:
        entries = None if place is None else place.get(_KEY)
        for entry in entries if isinstance(entries, list) else ():
            choice = _parse(entry)
            if choice is not None:
                found[choice.conditions] = choice
    return list(found.values())


def _parse(entry: object) -> DraftChoice | None:
    if not isinstance(entry, Mapping):
        return None
    draft, device, speed = (entry.get(name) for name in ("draft", "device", "tokens_per_s"))
    if not (isinstance(draft, str) and draft and isinstance(device, str) and isinstance(speed, int | float)):
        return None
    numbers = [entry.get(name) for name in ("memory", "pinned", "read_bandwidth")]
    if not all(number is None or isinstance(number, int | float) for number in numbers):
        return None
    return DraftChoice(draft, Conditions(device, *numbers), float(speed))


def _file(target: Path) -> Path:
    digest = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    return home_folder() / "profiles" / f"{_KEY}-{digest}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
