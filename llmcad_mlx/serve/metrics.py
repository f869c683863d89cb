"""What the server has done since it began, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from llmcad_mlx.machine import peak_rss_bytes, resident_bytes
from llmcad_mlx.results import GenerationStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "llmcad_mlx_"

# where a generation's record has a number: what its total is called, and what it counts
_TOTALS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "reused_tokens": ("cached_tokens", "Tokens of prompts taken from a cache."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "target_passes": ("target_passes", "Passes of the target."),
    "drafted": ("drafted_tokens", "Tokens drafted."),
    "tested": ("tested_tokens", "Drafted tokens that the target tested."),
    "accepted": ("accepted_tokens", "Drafted tokens that became output."),
    "streamed_bytes": ("streamed_bytes", "Bytes of weights read for passes."),
    "prompt_s": ("prompt_seconds", "Seconds spent on prompts."),
    "decode_s": ("decode_seconds", "Seconds spent on decoding."),
    "draft_s": ("draft_seconds", "Seconds spent on drafting."),
    "verify_s": ("verify_seconds", "Seconds spent on verifying."),
    "io_wait_s": ("io_wait_seconds", "Seconds spent waiting for weights."),
}


class Metrics:
    """Counters in a registry of their own. Safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._totals = {
            attribute: Counter(_PREFIX + name, text, registry=self._registry)
            for attribute, (name, text) in _TOTALS.items()
        }
        self._waiting = self._gauge("requests_waiting", "Requests in the queue.")
        self._running = self._gauge("requests_running", "Generations that run.")
        self._gauge("resident_memory_bytes", "Memory of the process.").set_function(resident_bytes)
        peak = self._gauge("peak_resident_memory_bytes", "Most memory the process ever had.")
        peak.set_function(lambda: max(peak_rss_bytes(), resident_bytes()))
        self._num_generations = 0
        self.mean_generation_s = 1.0
        """How long the last ten or so generations took."""

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(_PREFIX + name, text, registry=self._registry)

    def count_request(self, endpoint: str, status: int) -> None:
        """A request was answered. `endpoint`: one of the server's own paths, or "other"."""
        self._requests.labels(endpoint, str(status)).inc()

    def count_generation(self, stats: GenerationStats, seconds: float) -> None:
        """A generation ended, however it ended, after `seconds`. Only the worker calls it."""
        for attribute, total in self._totals.items():
            total.inc(getattr(stats, attribute))
        self._num_generations += 1
        self.mean_generation_s += (seconds - self.mean_generation_s) / min(self._num_generations, 10)

    def text(self, num_waiting: int, num_running: int) -> bytes:
        """All metrics, with the queue as it is now."""
        self._waiting.set(num_waiting)
        self._running.set(num_running)
        return generate_latest(self._registry)
