"""The worker: one thread that loads the model and runs one generation after the other.

MLX's streams belong to a thread, so what is loaded here is used here and nowhere else.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmcad_mlx.api import Engine
from llmcad_mlx.errors import UsageError
from llmcad_mlx.serve.errors import ApiError, internal_error, shutting_down
from llmcad_mlx.serve.events import FailedEvent, FinishedEvent
from llmcad_mlx.serve.fair_queue import FairQueue
from llmcad_mlx.serve.generation import CancelledError, Generation
from llmcad_mlx.serve.job import Job
from llmcad_mlx.serve.metrics import Metrics
from llmcad_mlx.serve.names import public_name
from llmcad_mlx.serve.prompt_cache import PromptCache
from llmcad_mlx.serve.requests import refused

_log = logging.getLogger(__name__)
_POLL_S = 0.2  # how soon a Ctrl-C is noticed while a model loads


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What others may know of the loaded pair."""

    name: str
    draft: str
    context_length: int | None
    vocab_size: int
    tokenizer: Any
    """mlx-lm's TokenizerWrapper. One thread at a time may encode."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What the end of the server cost: answers broken off, waiting requests refused."""

    broken_off: int
    refused: int


class Worker:
    """Owns the engine. `load` runs on the worker's thread, and what it raises comes out of `start`."""

    def __init__(
        self,
        load: Callable[[], Engine],
        queue: FairQueue[Job],
        metrics: Metrics,
        name: str,
        prompt_cache: PromptCache,
    ) -> None:
        """`name`: what the model is called towards clients. `prompt_cache`: of conversations that wait."""
        self._load = load
        self._queue = queue
        self._metrics = metrics
        self._name = name
        self._prompt_cache = prompt_cache
        self._model: ServedModel | None = None
        self._error: BaseException | None = None
        self._loaded = threading.Event()
        self._running: Job | None = None
        # A daemon: an interrupt while a model loads must not wait for the rest of it.
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> ServedModel:
        """Load the model and begin to serve the queue. Raises what loading raises."""
        self._thread.start()
        while not self._loaded.wait(_POLL_S):
            pass
        if self._model is None:
            assert self._error is not None
            raise self._error
        return self._model

    @property
    def is_alive(self) -> bool:
        """Whether generations can still run."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Generations that run now: 0 or 1."""
        return int(self._running is not None)

    def close(self) -> Ending:
        """Refuse what waits, end what runs within its round, free the model.

        Clients are told at once; what blocks is the round. Call it off the event loop.
        """
        waiting, running = self._queue.close(), self._running
        for job in waiting if running is None else [*waiting, running]:
            job.cancel(shutting_down())
            job.send(FailedEvent(shutting_down()))
        self._thread.join()
        return Ending(int(running is not None), len(waiting))

    def _run(self) -> None:
        try:
            engine = self._load()
            self._model = ServedModel(
                self._name,
                public_name(engine.pair.draft_name),
                engine.pair.context_length,
                engine.pair.vocab_size,
                engine.tokenizer,
            )
        except BaseException as error:
            self._error = error
            return
        finally:
            self._loaded.set()
        with engine:
            while (job := self._queue.take()) is not None:
                self._running = job
                try:
                    self._serve(engine, job)
                finally:
                    self._running = None
                del job  # the last one must not keep its prompt while the worker waits

    def _serve(self, engine: Engine, job: Job) -> None:
        generation = Generation(engine, job)
        started = time.perf_counter()
        end = self._generate(generation, engine, job)
        if generation.has_begun:  # counted before the client hears of the end, so that it finds itself counted
            self._prompt_cache.ended([*job.prompt, *generation.tokens])
            self._metrics.count_generation(generation.stats, time.perf_counter() - started)
            _log.info("%s: %s", job.request.kind, _summary(generation, end))
        job.send(end)

    def _generate(self, generation: Generation, engine: Engine, job: Job) -> FinishedEvent | FailedEvent:
        """Generate; returns how it ended."""
        try:
            if job.cancelled:
                raise CancelledError
            self._prompt_cache.switch(engine, job.prompt)
            return generation.run()
        except CancelledError:
            return FailedEvent(job.reason or shutting_down())
        except Exception as error:
            return FailedEvent(_told(error))


def _summary(generation: Generation, end: FinishedEvent | FailedEvent) -> str:
    stats = generation.stats
    why = end.finish_reason if isinstance(end, FinishedEvent) else "broken off"
    return (
        f"{stats.prompt_tokens} prompt tokens ({stats.reused_tokens} cached), {len(generation.tokens)} generated, "
        f"{stats.tokens_per_s:.1f} tokens/s, {stats.tokens_per_pass:.2f} per pass, {why}"
    )


def _told(error: Exception) -> ApiError:
    """What a client is told. Only what it can change is said to it; files and code are the log's business."""
    if isinstance(error, UsageError):
        return refused(error)
    error_id = secrets.token_hex(4)
    _log.error("internal error %s", error_id, exc_info=error)
    return internal_error(error_id)
