"""A hub of the test's own, empty, and a cache for what comes from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.support.hub_stand_in import HubStandIn, hub_stand_in


@pytest.fixture
def hub(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_stand_in() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
