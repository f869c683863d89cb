"""The worker: the one thread that loads and runs the model, for MLX's streams belong to a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

import numpy as np

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.conversations.snapshot import Snapshot
from llmcad_mlx.engine.round import Round
from llmcad_mlx.engine.session import common_prefix, reusable_prefix
from llmcad_mlx.errors import UsageError
from llmcad_mlx.machine import peak_rss_bytes, physical_memory_bytes
from llmcad_mlx.models.folder import own_sampling
from llmcad_mlx.report import Answer
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.serve.jobs import FairQueue, FinishedEvent, Job, PromptEvent, RoundEvent, TokenEvent, TokenLogprob
from llmcad_mlx.serve.metrics import Metrics
from llmcad_mlx.serve.protocol import ApiError, internal_error, refused, shutting_down
from llmcad_mlx.sizes import parse_size
from llmcad_mlx.tree.token_tree import COMMITTED

_log = logging.getLogger(__name__)
_REPORT_FROM = "seed"  # the report's keys before it are said elsewhere in OpenAI's answer
_LEAST_LOGPROB = -9999.0  # what OpenAI gives for a token that cannot come; JSON has no infinity
_CACHE_SHARE = 0.05  # of the budget, or of the machine's memory
_MOST_CACHE = 1 << 30
_WORTH_KEEPING = 32  # tokens; fewer are read again faster than they are copied there and back


class Generation:
    """One job on the engine: rounds in, events out. Keeps count of what was done, however it ends."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.answer = Answer(finish_reason="stop")
        self.has_begun = False  # whether the engine has left what it was at before
        self._engine = engine
        self._job = job
        self._num_rounds = 0
        self._texts = engine.token_texts

    def run(self) -> FinishedEvent:
        """Generate to the end. Raises CancelledError, and what the engine raises."""
        rounds: list[Round] = []
        responses = self._engine.stream_generate(
            self._job.prompt, self._on_progress, rounds.append, options=self._job.request.options
        )
        batch: list[TokenEvent] = []
        for response in responses:
            self.answer.add(response)
            batch.append(self._token(response))
            if rounds and len(batch) == len(rounds[-1].walk.tokens):
                self._job.send(RoundEvent(batch, self._tree(rounds.pop())))
                batch = []
                self.check_cancelled()
                if self._job.is_complete:
                    break
        return FinishedEvent(self.answer.finish_reason, self._usage())

    def _on_progress(self, done: int, total: int) -> None:
        self.has_begun = True
        self.check_cancelled()
        self._job.send(PromptEvent(done, total))

    def check_cancelled(self) -> None:
        """Raise CancelledError once the job is cancelled."""
        if self._job.cancelled is not None:
            raise CancelledError

    def _token(self, response: Response) -> TokenEvent:
        logprobs: list[TokenLogprob] = []
        if (count := self._job.request.top_logprobs) is not None:
            row = np.asarray(response.logprobs)[: self._engine.pair.vocab_size]
            likeliest = np.argsort(-row, kind="stable")[:count].tolist() if count else []
            for token in (response.token, *likeliest):
                is_chosen = token == response.token
                text = response.text if is_chosen else self._texts.text(token)
                content = self._bytes_shown(token) if is_chosen else self._texts.bytes_of(token)
                logprobs.append(TokenLogprob(token, text, content, max(float(row[token]), _LEAST_LOGPROB)))
        return TokenEvent(response.token, response.text, response.from_draft, logprobs)

    def _bytes_shown(self, token: int) -> bytes:
        """What the latest token gives to the answer's bytes: none where it ends the text, and without the blank
        that some tokenizers take off the beginning of a text."""
        tokenizer = self._engine.tokenizer
        if token in tokenizer.eos_token_ids:
            return b""
        if len(self.answer.tokens) == 1 and "\ufffd" not in (text := str(tokenizer.decode([token]))):
            return text.encode()
        return self._texts.bytes_of(token)

    def _tree(self, done: Round) -> dict[str, Any] | None:
        """The round as the contract has it, where asked for: nodes as drafted, parents first."""
        if not self._job.request.show_trees:
            return None
        self._num_rounds += 1
        tree, bonus, plan = done.drafted, done.bonus_token, self._engine.pair.plan
        nodes = [
            {
                "id": token, "text": self._texts.text(token), "parent": tree.parents[node],
                "confidence": tree.confidences[node],
                "source": "target" if tree.sources[node] == COMMITTED else tree.sources[node],
                "state": state,
            }
            for node, (token, state) in enumerate(zip(tree.tokens, done.states(), strict=True))
        ]  # fmt: skip
        return {
            "index": self._num_rounds - 1,
            "nodes": nodes,
            "bonus": None if bonus is None else {"id": bonus, "text": self._texts.text(bonus)},
            "tokens_per_s": self.answer.stats.tokens_per_s,
            "tokens_per_pass": self.answer.stats.tokens_per_pass,
            "peak_rss_bytes": peak_rss_bytes(),
            "budget_bytes": None if plan is None else plan.budget_bytes,
        }

    def _usage(self) -> dict[str, Any]:
        report = self.answer.report(self._engine, self._job.request.options)
        speculation = dict(dropwhile(lambda figure: figure[0] != _REPORT_FROM, report.items()))
        prompt, completion = self.answer.stats.prompt_tokens, len(self.answer.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.answer.stats.reused_tokens},
            "speculation": speculation,
        }


class PromptCache:
    """The caches of several conversations: the engine keeps one, the others wait here as copies.

    A request that goes on with one of them reads only what is new, whoever asked in between. The copies take at
    most `limit_bytes`; the least recently used goes first.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: list[Snapshot] = []  # the latest last

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(snapshot.nbytes for snapshot in self._kept)

    def switch(self, engine: Engine, prompt: Sequence[int]) -> None:
        """Bring the engine to the conversation that `prompt` goes on with; what that loses is kept, if it fits."""
        present = engine.tokens
        common = reusable_prefix(present, prompt, engine.pair.target.cache.least_length)
        best = max(self._kept, key=lambda kept: kept.reusable(prompt), default=None)
        found = 0 if best is None else best.reusable(prompt)
        if best is not None and found < common + _WORTH_KEEPING:
            best = None
        lost = len(present) - (common if best is None else 0)
        if lost >= _WORTH_KEEPING:
            self._keep(engine, len(present), best)
        if best is None:
            return
        engine.restore(best)
        self._kept = [kept for kept in self._kept if kept is not best]
        if len(best.tokens) - found >= _WORTH_KEEPING:
            self._kept.append(best)  # another conversation that begins alike; it may go on too

    def _keep(self, engine: Engine, num_tokens: int, needed: Snapshot | None) -> None:
        """Copy the `num_tokens` that the engine holds; `needed` stays, whatever has to go for it."""
        # Known beforehand, so that the limit holds.
        caches = [engine.pair.target.cache, *(drafter.cache for drafter in engine.pair.drafters)]
        size = sum(cache.states_nbytes for cache in caches if cache is not None)
        if size + (0 if needed is None else needed.nbytes) > self._limit:
            return
        for oldest in [kept for kept in self._kept if kept is not needed]:
            if self.nbytes + size <= self._limit:
                break
            self._kept.remove(oldest)
        snapshot = engine.snapshot()
        if snapshot is None:
            return
        # A copy that begins another is the same conversation, earlier.
        tokens = snapshot.tokens
        self._kept = [kept for kept in self._kept if common_prefix(kept.tokens, tokens) < len(kept.tokens)]
        self._kept.append(snapshot)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What others may know of the loaded pair."""

    name: str
    draft: str
    context_length: int | None
    vocab_size: int
    tokenizer: Any
    """mlx-lm's TokenizerWrapper. One thread at a time may encode."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """The model's own."""
    context_advice: str = ""
    """How to get more context."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What the end of the server cost: answers broken off, waiting requests refused."""

    broken_off: int
    refused: int


class Worker:
    """Owns the engine. `load` runs on the worker's thread, and what it raises comes out of `start`."""

    def __init__(self, load: Callable[[], Engine], settings: ServerSettings, metrics: Metrics, name: str) -> None:
        """`name`: what the model is called towards clients."""
        self.queue = FairQueue(settings.max_queue)
        self._load = load
        self._metrics = metrics
        self._name = name
        self._prompt_cache = PromptCache(settings.prompt_cache_bytes)
        self._model: Future[ServedModel] = Future()
        self.running: Job | None = None
        """The one whose turn it is."""
        # A daemon: an interrupt while a model loads must not wait for the rest of it.
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> ServedModel:
        """Load the model and begin to serve the queue. Raises what loading raises."""
        self._thread.start()
        return self._model.result()

    @property
    def is_alive(self) -> bool:
        """Whether generations can still run."""
        return self._thread.is_alive()

    def close(self) -> Ending:
        """Refuse what waits, end what runs and free the model. Blocks for a round: call it off the event loop."""
        waiting, running = self.queue.close(), self.running
        for job in waiting if running is None else [*waiting, running]:
            job.cancel(shutting_down())
            job.send(shutting_down())
        self._thread.join()
        return Ending(int(running is not None), len(waiting))

    def _run(self) -> None:
        try:
            engine = self._load()
            pair, draft = engine.pair, engine.pair.names.draft_label
            sampling = own_sampling(pair.names.target_path)
            model = ServedModel(
                self._name, draft, pair.context_length, pair.vocab_size, engine.tokenizer, sampling,
                pair.context_advice,
            )  # fmt: skip
        except BaseException as error:
            self._model.set_exception(error)
            return
        self._model.set_result(model)
        with engine:
            while (job := self.queue.take()) is not None:
                self.running = job
                try:
                    self._serve(engine, job)
                finally:
                    self.running = None
                del job  # the last one must not keep its prompt while the worker waits

    def _serve(self, engine: Engine, job: Job) -> None:
        generation = Generation(engine, job)
        started = time.perf_counter()
        end: FinishedEvent | ApiError
        try:
            generation.check_cancelled()
            self._prompt_cache.switch(engine, job.prompt)
            end = generation.run()
        except CancelledError:
            end = job.cancelled or shutting_down()
        except Exception as error:
            # Only what a client can change is said to it; files and code are the log's business.
            end = refused(error) if isinstance(error, UsageError) else internal_error(error)
        if generation.has_begun:  # counted before the client hears of the end, so that it finds itself counted
            self._metrics.count_generation(generation.answer.stats, time.perf_counter() - started)
            _log.info("%s: %s", job.request.kind, _summary(generation, end))
        job.send(end)


def _summary(generation: Generation, end: FinishedEvent | ApiError) -> str:
    num_tokens, stats = len(generation.answer.tokens), generation.answer.stats
    why = end.finish_reason if isinstance(end, FinishedEvent) else "broken off"
    return (
        f"{stats.prompt_tokens} prompt tokens ({stats.reused_tokens} cached), {num_tokens} generated, "
        f"{stats.tokens_per_s:.1f} tokens/s, {stats.tokens_per_pass:.2f} per pass, {why}"
    )


def cache_limit(size: str, budget_bytes: int | None) -> int:
    """Bytes for copies: "auto" is a twentieth of the budget, else of the machine's memory, but not above 1 GiB.
    Raises UsageError for what is no size."""
    if size != "auto":
        return parse_size(size, "prompt-cache")
    memory = physical_memory_bytes() if budget_bytes is None else budget_bytes
    return min(round(memory * _CACHE_SHARE), _MOST_CACHE)
