"""What users import: `load` and the `Engine` it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from llmcad_mlx.conversations.file import SavedConversation, save_conversation
from llmcad_mlx.conversations.restore import restore_caches
from llmcad_mlx.conversations.snapshot import Snapshot, put_snapshot, take_snapshot
from llmcad_mlx.drafting.user import OwnDrafter, Propose
from llmcad_mlx.engine.policies import make_policy
from llmcad_mlx.engine.session import Round, SpeculativeEngine
from llmcad_mlx.engine.text import Piece, TextStream
from llmcad_mlx.errors import ContextLengthError, UsageError
from llmcad_mlx.loader import LoadedPair, MemoryOptions, load_pair
from llmcad_mlx.policy.fixed import ChainPolicy
from llmcad_mlx.policy.policy import GrowthPolicy
from llmcad_mlx.prompt import Prompt, encode_prompt
from llmcad_mlx.results import GenerationStats, Result
from llmcad_mlx.sampling import SamplingSettings, TargetSampler
from llmcad_mlx.settings import SpeculationSettings, StopSettings, stop_settings
from llmcad_mlx.sizes import parse_rate, parse_size
from llmcad_mlx.tree.token_tree import COMMITTED, MODEL

Progress = Callable[[int, int], None]

_SAMPLING = {f.name for f in fields(SamplingSettings)}
_SPECULATION = {f.name for f in fields(SpeculationSettings)}
_STOPPING = {"max_tokens", "stop", "stop_tokens"}


@dataclass
class Response(GenerationResponse):
    """One token of a generation; extends mlx-lm's `GenerationResponse`.

    `logprobs` (V,) float32 are the target's log probabilities before penalties and temperature; they hold on to
    the pass's logits, so keep the token instead of the response where many are kept. `stats` is the live record of
    the whole generation.
    """

    stats: GenerationStats | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options of one generation, checked."""

    sampling: SamplingSettings
    speculation: SpeculationSettings
    stopping: StopSettings

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationOptions:
        """Sort keyword options into their records. Raises UsageError for an unknown one."""
        for name in options:
            if name not in _SAMPLING | _SPECULATION | _STOPPING:
                known = ", ".join(sorted(_SAMPLING | _SPECULATION | _STOPPING))
                raise UsageError(f"{name}: unknown option; the options are {known}")
        return cls(
            SamplingSettings(**{k: v for k, v in options.items() if k in _SAMPLING}),
            SpeculationSettings(**{k: v for k, v in options.items() if k in _SPECULATION}),
            stop_settings(**{k: v for k, v in options.items() if k in _STOPPING}),
        )


def load(
    target: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = "auto",
    *,
    memory: int | str | None = None,
    pinned: int | str = "auto",
    context: int | None = None,
    read_bandwidth: float | str | None = None,
    verify: bool = False,
    progress: bool = False,
) -> Engine:
    """Load a target and its draft.

    target: a local mlx-lm folder, a hub repository ("org/name") or a preset; None is the embedded default.
    draft: the same kinds for a draft model (which the n-gram drafter then assists), the file of an n-gram table,
    "self:4" (or 3, 2) for the target itself in so many bits, "4bit:DRAFT" (or 2, 3, 8) for another draft in so
    many, "trimmed:8192:DRAFT" for one that proposes only so many usual tokens, "ngram" for prompt lookup alone,
    None or "none" for plain decoding, "auto" for what `llmcad-mlx tune` has chosen, else what the target's
    preset names, else "ngram".
    memory: what the whole process may use, in bytes or as text ("6GB"); target weights that do not fit are read
    from the disk on every pass. None: everything in memory if it fits into 70 % of physical memory, else that
    budget. pinned: how much of the target stays in memory ("auto": as much as fits). context: tokens to make room
    for under a budget (4096, or what the model was made for). read_bandwidth: bytes per second or "250MB/s", to
    emulate slower storage. verify: check all of a bundle at load, what is streamed on every read. progress: show
    download progress on a terminal.

    Raises UsageError for an option that is out of range, BudgetError (one) for a budget that cannot work,
    ModelError, VocabularyError or DownloadError, each with one line that says what to do.
    """
    options = memory_options(memory, pinned, context, read_bandwidth, verify)
    return Engine(load_pair(_name("target", target), _name("draft", draft), progress, options))


def memory_options(
    memory: int | str | None = None,
    pinned: int | str = "auto",
    context: int | None = None,
    read_bandwidth: float | str | None = None,
    verify: bool = False,
) -> MemoryOptions:
    """The memory options of `load`, checked. Raises UsageError naming the one that is wrong."""
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise UsageError(f"context: {context!r} is not a number of tokens above 0")
    rate = read_bandwidth
    if isinstance(rate, str):
        rate = parse_rate(rate, "read-bandwidth")
    elif rate is not None and (isinstance(rate, bool) or not 0 < rate < float("inf")):
        raise UsageError(f"read-bandwidth: {rate!r} is not a number of bytes per second above 0")
    return MemoryOptions(
        memory=None if memory is None else _size("memory", memory, 1),
        pinned=None if pinned == "auto" else _size("pinned", pinned, 0),
        context=context,
        read_bandwidth=rate,
        verify=verify,
    )


def _size(option: str, value: int | str, least: int) -> int:
    if isinstance(value, str):
        value = parse_size(value, option)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{option}: {value!r} is not a number of bytes; give one, or text like 6GB")
    return value


class Engine:
    """A loaded target with its draft. Keeps one conversation's caches, so a next turn only pays for new tokens.

    Not thread-safe: one generation at a time. A context manager; `close` frees memory and saves what was
    learned about the pair.
    """

    def __init__(self, pair: LoadedPair) -> None:
        self.pair = pair
        self.tokenizer = pair.tokenizer
        self._policies: dict[SpeculationSettings, GrowthPolicy] = {}
        self._engine: SpeculativeEngine | None = SpeculativeEngine(
            pair.target, pair.drafters, ChainPolicy(0), pair.profile.costs, clock=pair.clock
        )
        self._running: TextStream | None = None
        """The latest generation's stream: who may run rounds."""
        self._owner = object()
        """Whose snapshots are taken back."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save the pair's profile and free models and caches. A closed engine cannot generate; closing it again
        does nothing."""
        if self._engine is None:
            return
        self.pair.profile.save()
        self._engine = self._running = None
        self.pair.release()
        mx.clear_cache()

    def generate(self, prompt: Prompt, on_progress: Progress | None = None, **options: Any) -> Result:
        """Generate to the end; options as for `stream_generate`."""
        pieces, tokens = [], []
        for response in self.stream_generate(prompt, on_progress, **options):
            pieces.append(response.text)
            tokens.append(response.token)
        assert response.stats is not None  # at least one token was asked for
        return Result("".join(pieces), tokens, str(response.finish_reason), response.stats)

    def stream_generate(
        self,
        prompt: Prompt,
        on_progress: Progress | None = None,
        on_round: Callable[[Round], None] | None = None,
        **options: Any,
    ) -> Iterator[Response]:
        """Generate, one `Response` per token; the last one has a `finish_reason` ("stop" or "length").

        prompt: text, token ids, or chat messages ({"role", "content"}). on_progress(done, total) counts prompt
        tokens; on_round gets every round's tree.

        options: `max_tokens` (256; -1: no limit), `stop` (strings), `stop_tokens` (ids), those of
        `SamplingSettings` (temperature, top_p, top_k, min_p, seed, penalties, logit_bias, logits_processors) and
        of `SpeculationSettings` (policy, tree_nodes, pipeline, tree, fallback). The same seed gives the same text
        under every policy.

        A new generation ends one that is still running. Whatever ends a generation early, closing the iterator and
        exceptions included, the next one works, and reuses what both prompts begin with.

        Raises UsageError, which is a ValueError, naming the option; ContextLengthError for a prompt longer than
        the model's context. A generation that reaches the end of the context ends with "length".
        """
        self._open_engine()
        checked = self.check_options(**options)
        sampler = TargetSampler(checked.sampling, self.pair.vocab_size)
        tokens = self.encode(prompt)
        limit = self._token_limit(len(tokens), checked.stopping.max_tokens)
        stream = TextStream(self.tokenizer, checked.stopping, self.tokenizer.eos_token_ids, limit)
        policy = self._policy(checked.speculation)
        return self._run(tokens, policy, sampler, stream, on_progress or (lambda done, total: None), on_round)

    def _run(
        self,
        prompt: list[int],
        policy: GrowthPolicy,
        sampler: TargetSampler,
        stream: TextStream,
        on_progress: Progress,
        on_round: Callable[[Round], None] | None,
    ) -> Iterator[Response]:
        # No local name for the engine: a generation that is left standing must not keep a closed one in memory.
        stats, clock = GenerationStats(), self.pair.clock
        self._open_engine().policy = policy
        self._running = stream
        self._open_engine(stream).start(prompt, stats, on_progress)
        while stream.finish_reason is None:
            before, started = stats.decode_s, clock()
            try:
                done = self._open_engine(stream).round(sampler, stats, stream.push)
                responses = _responses(stream.take(), done, stats)
            finally:
                stats.decode_s = before + clock() - started
            if on_round is not None:
                on_round(done)
            yield from responses

    def _open_engine(self, stream: TextStream | None = None) -> SpeculativeEngine:
        """The engine, for anyone or for the generation of `stream`. Raises UsageError when it is not to be had."""
        if self._engine is None:
            raise UsageError("this engine is closed; load the model again")
        if stream is not None and stream is not self._running:
            raise UsageError("this generation ended when a newer one began; run one at a time")
        return self._engine

    def check_options(self, **options: Any) -> GenerationOptions:
        """The options of `stream_generate`, checked as there. Raises UsageError naming the one that is wrong."""
        checked = GenerationOptions.of(options)
        for token in checked.stopping.stop_tokens:
            if token >= self.pair.vocab_size:
                raise UsageError(f"stop_tokens: {token} is not in the vocabulary of {self.pair.vocab_size}")
        if (checked.speculation.tree_nodes or 0) > self.pair.max_nodes and self.pair.plan is not None:
            raise UsageError(
                f"tree_nodes: the memory plan has room for {self.pair.max_nodes} nodes a pass, not "
                f"{checked.speculation.tree_nodes}; give more memory or fewer nodes"
            )
        return checked

    def add_drafter(self, name: str, propose: Propose) -> None:
        """Let a function of yours draft too, from the next generation on. No text changes by it: the target
        verifies its tokens as it verifies all others.

        name: what the nodes' `source` says; how far it can be believed is learned, and kept, under this name.
        propose: gets a list of all tokens so far, prompt included, and gives pairs of a next token's id and how
        sure that is, from 0 to 1; none where it has no idea. It is asked for many branches of each round's tree,
        so it should take microseconds; what it takes is counted as drafting.

        The policies "paper" and "chain", which listen to one drafter, listen to it where there is neither a draft
        model nor a table. Raises UsageError for a name that is taken and a target that verifies no drafts; a
        generation raises it for what is no proposal.
        """
        self._open_engine()
        drafters = self.pair.drafters
        if not isinstance(name, str) or not name:
            raise UsageError(f"name: {name!r} is no name for a drafter; give one like 'phrases'")
        if name in {COMMITTED, MODEL, *(drafter.source for drafter in drafters)}:
            raise UsageError(f"name: {name!r} is taken; give the drafter another name")
        if not callable(propose):
            raise UsageError(f"propose: {propose!r} cannot be called; give a function of a list of tokens")
        if self.pair.target.capability == "plain":
            raise UsageError("propose: this target verifies no drafts; `llmcad-mlx doctor` says why")
        first_model = next((i for i, d in enumerate(drafters) if d.source == MODEL), len(drafters))
        drafters.insert(first_model, OwnDrafter(name, propose, self.pair.vocab_size))
        self._policies.clear()  # they were made for the drafters of before

    def snapshot(self) -> Snapshot | None:
        """A copy of the conversation's caches, to go on from there later; None where nothing was read yet, or the
        model keeps a state that cannot be copied. `nbytes` of it says what keeping it costs."""
        return take_snapshot(self.pair, self._open_engine().tokens, self._owner)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Go on from a snapshot; None forgets what was read. A generation that is still running ends.

        No text changes by it: the next prompt is read from where it differs from what the snapshot holds.
        Raises UsageError for another engine's snapshot.
        """
        engine = self._open_engine()
        if snapshot is not None and snapshot.owner is not self._owner:
            raise UsageError("snapshot: it is another engine's; restore it there")
        self._running = None
        put_snapshot(self.pair, engine, snapshot)

    def save_conversation(self, path: str | os.PathLike[str], data: Mapping[str, Any]) -> int:
        """Write `data`, which must be JSON, and the conversation's caches to a file; returns its bytes.

        Whole or not at all. `llmcad_mlx.conversations.file.read_conversation` reads it. Raises UsageError for a
        path that cannot be used, DiskError when the disk has no room.
        """
        return save_conversation(Path(path), data, self.pair, self._open_engine().tokens)

    def restore_conversation(self, saved: SavedConversation) -> list[str]:
        """Put a saved conversation's caches back where they fit this engine's models; returns one line for each
        that does not, and why. Then the next prompt is read again: no text changes by it."""
        engine = self._open_engine()
        self._running = None
        return restore_caches(saved, self.pair, engine)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises UsageError for an empty or malformed one."""
        return encode_prompt(prompt, self.tokenizer, self.pair.vocab_size)

    def _token_limit(self, prompt_tokens: int, max_tokens: int) -> int | None:
        context = self.pair.context_length
        if context is not None and prompt_tokens >= context:
            raise ContextLengthError(
                f"prompt: its {prompt_tokens} tokens leave no room in the model's context of {context}; shorten it"
            )
        room = None if context is None else context - prompt_tokens
        wanted = None if max_tokens == -1 else max_tokens
        return min((n for n in (room, wanted) if n is not None), default=None)

    def _policy(self, settings: SpeculationSettings) -> GrowthPolicy:
        if settings not in self._policies:
            self._policies[settings] = make_policy(
                settings, self.pair.drafters, self.pair.profile, self.pair.max_nodes
            )
        return self._policies[settings]


def _responses(pieces: Sequence[Piece], done: Round, stats: GenerationStats) -> list[Response]:
    """One response for each token of a round."""
    before = stats.generated_tokens - len(done.walk.tokens)
    responses = []
    for index, piece in enumerate(pieces):
        logits = done.verification.logits[done.walk.visited[index]]
        responses.append(
            Response(
                text=piece.text,
                token=piece.token,
                logprobs=logits - mx.logsumexp(logits),  # computed when somebody looks
                from_draft=index < done.walk.num_accepted,
                prompt_tokens=stats.prompt_tokens,
                prompt_tps=stats.prompt_tokens_per_s,
                generation_tokens=before + index + 1,
                generation_tps=stats.tokens_per_s,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=piece.finish_reason,
                stats=stats,
            )
        )
    return responses


def _name(option: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise UsageError(f"{option}: give a folder, repository or preset, not {value!r}")


__all__ = ["Engine", "GenerationOptions", "Prompt", "Response", "Result", "load"]
