"""Counters in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from llmcad_mlx.machine import peak_rss_bytes, resident_bytes
from llmcad_mlx.results import GenerationStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "llmcad_mlx_"

# name of a counter: what it counts, and where a generation's record has it
_TOTALS: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("Tokens of prompts.", "prompt_tokens"),
    "cached_tokens": ("Tokens of prompts taken from a cache.", "reused_tokens"),
    "generated_tokens": ("Tokens generated.", "generated_tokens"),
    "target_passes": ("Passes of the target.", "target_passes"),
    "drafted_tokens": ("Tokens drafted.", "drafted"),
    "tested_tokens": ("Drafted tokens that the target tested.", "tested"),
    "accepted_tokens": ("Drafted tokens that became output.", "accepted"),
    "streamed_bytes": ("Bytes of weights read for passes.", "streamed_bytes"),
    "prompt_seconds": ("Seconds spent on prompts.", "prompt_s"),
    "decode_seconds": ("Seconds spent on decoding.", "decode_s"),
    "draft_seconds": ("Seconds spent on drafting.", "draft_s"),
    "verify_seconds": ("Seconds spent on verifying.", "verify_s"),
    "io_wait_seconds": ("Seconds spent waiting for weights.", "io_wait_s"),
}


class Metrics:
    """What the server has done since it began. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: Counter[str] = Counter()
        self._generations = 0
        self._mean_s = 1.0

    def count_request(self, endpoint: str, status: int) -> None:
        """A request was answered. `endpoint`: one of the server's own paths, or "other"."""
        with self._lock:
            self._requests[endpoint, status] += 1

    def count_generation(self, stats: GenerationStats, seconds: float) -> None:
        """A generation ended, however it ended, after `seconds`."""
        with self._lock:
            for name, (_, attribute) in _TOTALS.items():
                self._totals[name] += getattr(stats, attribute)
            self._generations += 1
            self._mean_s += (seconds - self._mean_s) / min(self._generations, 10)

    @property
    def mean_generation_s(self) -> float:
        """How long the last ten or so generations took."""
        return self._mean_s

    def text(self, waiting: int, running: int) -> str:
        """All figures, with the queue as it is now."""
        with self._lock:
            lines = [*self._lines(waiting, running)]
        return "\n".join(lines) + "\n"

    def _lines(self, waiting: int, running: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests by path and status.")
        for (endpoint, status), count in sorted(self._requests.items()):
            yield f'{_PREFIX}requests_total{{path="{endpoint}",status="{status}"}} {count}'
        for name, (text, _) in _TOTALS.items():
            yield from _head(f"{name}_total", "counter", text)
            yield f"{_PREFIX}{name}_total {self._totals[name]}"
        resident = resident_bytes()
        gauges = {
            "requests_waiting": ("Requests in the queue.", waiting),
            "requests_running": ("Generations that run.", running),
            "resident_memory_bytes": ("Memory of the process.", resident),
            "peak_resident_memory_bytes": ("Most memory the process ever had.", max(peak_rss_bytes(), resident)),
        }
        for name, (text, value) in gauges.items():
            yield from _head(name, "gauge", text)
            yield f"{_PREFIX}{name} {value}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"
