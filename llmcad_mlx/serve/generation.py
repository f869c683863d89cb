"""One job on the engine: rounds in, events out. Runs on the worker's thread, the only one that touches MLX."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.engine import Round
from llmcad_mlx.machine import peak_rss_bytes
from llmcad_mlx.report import generation_report
from llmcad_mlx.serve.events import FinishedEvent, PromptEvent, RoundEvent, TokenEvent, TokenLogprob
from llmcad_mlx.serve.job import Job
from llmcad_mlx.stats import GenerationStats
from llmcad_mlx.tree.token_tree import COMMITTED, DROPPED, ROOT

_REPORT_FROM = "seed"  # the report's keys before it are said elsewhere in OpenAI's answer
_LEAST_LOGPROB = -9999.0  # what OpenAI gives for a token that cannot come; JSON has no infinity


class CancelledError(Exception):
    """The job was cancelled; its generation is over."""


class Generation:
    """Runs one job and keeps count of what was done, however it ends."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.stats = GenerationStats()
        self.tokens: list[int] = []
        self.has_begun = False  # whether the engine has left what it was at before
        self._engine = engine
        self._job = job
        self._latest: Round | None = None
        self._num_rounds = 0
        self._texts: dict[int, str] = {}

    def run(self) -> FinishedEvent:
        """Generate to the end. Raises CancelledError, and what the engine raises."""
        responses = self._engine.stream_generate(
            self._job.prompt, self._on_progress, self._on_round, **self._job.request.options
        )
        batch: list[TokenEvent] = []
        reason = "stop"
        for response in responses:
            self.stats = response.stats or self.stats
            self.tokens.append(response.token)
            batch.append(self._token(response))
            reason = response.finish_reason or reason
            if self._latest is not None and len(batch) == len(self._latest.walk.tokens):
                self._send_round(self._latest, batch)
                self._latest, batch = None, []
                self._check_cancelled()
        return FinishedEvent(reason, self._usage(reason))

    def _on_progress(self, done: int, total: int) -> None:
        self.has_begun = True
        self._check_cancelled()
        self._job.send(PromptEvent(done, total))

    def _on_round(self, done: Round) -> None:
        self._latest = done

    def _check_cancelled(self) -> None:
        if self._job.cancelled:
            raise CancelledError

    def _token(self, response: Response) -> TokenEvent:
        own: TokenLogprob | None = None
        top: tuple[TokenLogprob, ...] = ()
        if (count := self._job.request.top_logprobs) is not None:
            row = np.asarray(response.logprobs)[: self._engine.pair.vocab_size]
            own = self._logprob(response.token, row)
            order = np.argsort(-row, kind="stable")[:count] if count else ()
            top = tuple(self._logprob(int(token), row) for token in order)
        return TokenEvent(response.token, response.text, response.from_draft, response.finish_reason, own, top)

    def _logprob(self, token: int, row: Any) -> TokenLogprob:
        return TokenLogprob(token, self._text_of(token), max(float(row[token]), _LEAST_LOGPROB))

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._engine.tokenizer.decode([token]))
        return self._texts[token]

    def _send_round(self, done: Round, tokens: list[TokenEvent]) -> None:
        tree = self._tree(done) if self._job.request.show_trees else None
        self._num_rounds += 1
        self._job.send(RoundEvent(tokens, tree))

    def _tree(self, done: Round) -> dict[str, Any]:
        """The round as the contract has it: nodes as drafted, parents first."""
        tree, accepted = done.drafted, set(done.walk.nodes)
        nodes = []
        for node, token in enumerate(tree.tokens):
            tested = done.selection.old_to_new[node]
            state = "rejected"
            if node == ROOT:
                state = "root"
            elif tested == DROPPED:
                state = "provisional"
            elif tested in accepted:
                state = "accepted"
            source = tree.sources[node]
            nodes.append({
                "id": token, "text": self._text_of(token), "parent": tree.parents[node],
                "confidence": tree.confidences[node], "source": "target" if source == COMMITTED else source,
                "state": state,
            })  # fmt: skip
        has_bonus = len(done.walk.tokens) > done.walk.num_accepted
        bonus = done.walk.tokens[-1]
        plan = self._engine.pair.plan
        return {
            "index": self._num_rounds,
            "nodes": nodes,
            "bonus": {"id": bonus, "text": self._text_of(bonus)} if has_bonus else None,
            "tokens_per_s": self.stats.tokens_per_s,
            "tokens_per_pass": self.stats.tokens_per_pass,
            "peak_rss_bytes": peak_rss_bytes(),
            "budget_bytes": None if plan is None else plan.budget_bytes,
        }

    def _usage(self, reason: str) -> dict[str, Any]:
        report = generation_report(self._engine, "", self.tokens, reason, self.stats, self._job.request.options)
        names = list(report)
        speculation = {name: report[name] for name in names[names.index(_REPORT_FROM) :]}
        prompt, completion = self.stats.prompt_tokens, len(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.stats.reused_tokens},
            "speculation": speculation,
        }
