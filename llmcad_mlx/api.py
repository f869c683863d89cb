"""What users import: `load` and the `Engine` it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import GenerationResponse

from llmcad_mlx.conversations.file import SavedConversation, restore_caches, save_conversation
from llmcad_mlx.conversations.snapshot import Snapshot, put_snapshot, take_snapshot
from llmcad_mlx.detokenizer import Detokenizer, TokenTexts, cleans_up
from llmcad_mlx.drafting.lookup import OwnDrafter, Propose
from llmcad_mlx.engine.growth import make_policy
from llmcad_mlx.engine.round import Round, run_round
from llmcad_mlx.engine.session import Session
from llmcad_mlx.engine.text import Piece, TextStream
from llmcad_mlx.engine.turns import Turn, Turns
from llmcad_mlx.errors import ContextLengthError, UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.policy import GrowthPolicy
from llmcad_mlx.prompt import Prompt, encode_prompt
from llmcad_mlx.results import GenerationStats, Result
from llmcad_mlx.sampling import TargetSampler
from llmcad_mlx.settings import GenerationOptions, MemoryOptions, SpeculationSettings
from llmcad_mlx.tree.token_tree import COMMITTED, MODEL

Progress = Callable[[int, int], None]


@dataclass(repr=False)
class Response(GenerationResponse):
    """One token of a generation; extends mlx-lm's `GenerationResponse`.

    `logprobs` (V,) float32 are the target's log probabilities before penalties and temperature, made when somebody
    looks, in any thread; they hold on to the pass's logits, so keep the token instead of the response where many
    are kept. `stats` is the live record of the whole generation.
    """

    stats: GenerationStats | None = None

    def __repr__(self) -> str:
        """Without the log probabilities, of which there are as many as tokens in the vocabulary."""
        return f"Response({self.text!r}, token={self.token}, finish_reason={self.finish_reason!r})"

    @property
    def logprobs(self) -> mx.array:
        """(V,) float32."""
        # From numbers on the host: an array that MLX has yet to compute belongs to the thread that made it.
        return mx.array(TargetSampler.logprobs(self._logits))

    @logprobs.setter
    def logprobs(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits = logits


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
    budget; on a Mac into 85 % of what Metal recommends, with 35 % of memory left over. pinned: how much of the
    target stays in memory ("auto": as much as fits). context: tokens to make room for under a budget (4096, or
    what the model was made for). read_bandwidth: bytes per second or "250MB/s", to emulate slower storage.
    verify: check all of a bundle at load, what is streamed on every read. progress: show download progress on a
    terminal.

    Raises UsageError for an option that is out of range, BudgetError (one) for a budget that cannot work,
    ModelError, VocabularyError or DownloadError, each with one line that says what to do.
    """
    options = MemoryOptions.of(memory, pinned, context, read_bandwidth, verify)
    return Engine(load_pair(_name("target", target), _name("draft", draft), progress, options))


class Engine:
    """A loaded target with its draft. Keeps one conversation's caches, so a next turn only pays for new tokens.

    One generation at a time. A call from another thread waits until the generation that is running has ended; in
    the same thread a new one ends it. After `os.fork` it works only in the process that has loaded it. A context
    manager; `close` frees memory and saves what was learned about the pair.
    """

    def __init__(self, pair: LoadedPair) -> None:
        self.pair = pair
        self.tokenizer = pair.tokenizer
        self._policies: dict[SpeculationSettings, GrowthPolicy] = {}
        self._session: Session | None = Session(pair.target, pair.drafters, pair.profile.costs, pair.clock)
        # Found out once: encoding is for one thread at a time.
        self._cleans_up = cleans_up(pair.tokenizer)
        self.token_texts = TokenTexts(pair.tokenizer)
        self._turns = Turns()
        self._owner = object()
        """Whose snapshots are taken back."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Save the pair's profile and free models and caches. A closed engine cannot generate; closing it again
        does nothing. A generation that is running in another thread is told at its next token."""
        if self._session is None:
            return
        with self._turns.closing():
            self.pair.profile.save()
            self._session = None
            self.pair.release()
            mx.clear_cache()

    def generate(
        self,
        prompt: Prompt,
        on_progress: Progress | None = None,
        *,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Result:
        """Generate to the end; arguments as for `stream_generate`."""
        pieces, tokens = [], []
        for response in self.stream_generate(prompt, on_progress, options=options, **keywords):
            pieces.append(response.text)
            tokens.append(response.token)
        assert response.stats is not None  # at least one token was asked for
        return Result("".join(pieces), tokens, str(response.finish_reason), response.stats)

    def stream_generate(
        self,
        prompt: Prompt,
        on_progress: Progress | None = None,
        on_round: Callable[[Round], None] | None = None,
        *,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Iterator[Response]:
        """Generate, one `Response` per token; the last one has a `finish_reason` ("stop" or "length").

        prompt: text, token ids, or chat messages ({"role", "content"}). on_progress(done, total) counts prompt
        tokens; on_round gets every round's tree.

        keywords: `max_tokens` (256; -1: no limit), `stop` (strings), `stop_tokens` (ids), those of
        `SamplingSettings` (temperature, top_p, top_k, min_p, seed, penalties, logit_bias, logits_processors) and
        of `SpeculationSettings` (policy, tree_nodes, pipeline, tree, fallback). options: the same as a record.
        The same seed gives the same text under every policy.

        It begins with the first response that is asked for. In the same thread a new generation ends one that is
        still running; in another thread it waits until that is over. Whatever ends a generation early, closing the
        iterator and exceptions included, the next one works, and reuses what both prompts begin with.

        Raises UsageError, which is a ValueError, naming the option; ContextLengthError for a prompt longer than
        the model's context. A generation that reaches the end of the context ends with "length".
        """
        self._open_session()
        checked = self.check_options(options, **keywords)
        sampler = TargetSampler(checked.sampling, self.pair.vocab_size, self.pair.target.rounding)
        tokens = self.encode(prompt)
        limit = self._token_limit(len(tokens), checked.stopping.max_tokens)
        detokenizer = Detokenizer(self.tokenizer, self._cleans_up)
        stream = TextStream(detokenizer, checked.stopping, self.tokenizer.eos_token_ids, limit)
        policy = self._policies.get(checked.speculation)
        if policy is None:
            profile, drafters = self.pair.profile, self.pair.drafters
            policy = make_policy(
                checked.speculation, drafters, profile.costs, profile.calibration, self.pair.max_nodes
            )
            self._policies[checked.speculation] = policy
        on_progress = on_progress or (lambda done, total: None)
        return self._run(tokens, policy, sampler, stream, Turn(), on_progress, on_round)

    def _run(
        self,
        prompt: list[int],
        policy: GrowthPolicy,
        sampler: TargetSampler,
        stream: TextStream,
        turn: Turn,
        on_progress: Progress,
        on_round: Callable[[Round], None] | None,
    ) -> Iterator[Response]:
        # No local name for the session: a generation that is left standing must not keep a closed one in memory.
        stats = GenerationStats()
        try:
            with self._turns.step(turn, first=True):
                self._open_session().start(prompt, policy, stats, on_progress)
            while stream.finish_reason is None:
                self._open_session()  # a closed engine says so, and not that the turn is lost
                with self._turns.step(turn):
                    done = run_round(self._open_session(), policy, sampler, stats, stream.push)
                responses = _responses(stream.take(), done, stats)
                if on_round is not None:
                    on_round(done)
                yield from responses
        finally:
            self._turns.end(turn)

    def _open_session(self) -> Session:
        """Raises UsageError where the engine is closed."""
        if self._session is None:
            raise UsageError("this engine is closed; load the model again")
        return self._session

    def check_options(self, options: GenerationOptions | None = None, **keywords: Any) -> GenerationOptions:
        """The options of `stream_generate`, checked as there. Raises UsageError naming the one that is wrong."""
        if options is not None and keywords:
            raise UsageError(f"{next(iter(keywords))}: give it in `options`, or leave `options` out")
        checked = GenerationOptions.of(**keywords) if options is None else options
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
        self._open_session()
        drafters = self.pair.drafters
        if not isinstance(name, str) or not name:
            raise UsageError(f"name: {name!r} is no name for a drafter; give one like 'phrases'")
        if name in {COMMITTED, MODEL, *(drafter.source for drafter in drafters)}:
            raise UsageError(f"name: {name!r} is taken; give the drafter another name")
        if not callable(propose):
            raise UsageError(f"propose: {propose!r} cannot be called; give a function of a list of tokens")
        if self.pair.target.cache.capability == "plain":
            raise UsageError("propose: this target verifies no drafts; `llmcad-mlx doctor` says why")
        with self._turns.between():
            first_model = next((i for i, d in enumerate(drafters) if d.source == MODEL), len(drafters))
            drafters.insert(first_model, OwnDrafter(name, propose, self.pair.vocab_size))
            self._policies.clear()  # they were made for the drafters of before

    @property
    def tokens(self) -> tuple[int, ...]:
        """The conversation so far, prompt and output: what the next prompt is compared with."""
        return tuple(self._open_session().tokens)

    def snapshot(self) -> Snapshot | None:
        """A copy of the conversation's caches, to go on from there later; None where nothing was read yet, or the
        model keeps a state that cannot be copied. `nbytes` of it says what keeping it costs."""
        with self._turns.between():
            return take_snapshot(self.pair, self._open_session().tokens, self._owner)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Go on from a snapshot; None forgets what was read. A generation that is still running ends.

        No text changes by it: the next prompt is read from where it differs from what the snapshot holds.
        Raises UsageError for another engine's snapshot.
        """
        session = self._open_session()
        if snapshot is not None and snapshot.owner is not self._owner:
            raise UsageError("snapshot: it is another engine's; restore it there")
        with self._turns.between():
            self._turns.end()
            put_snapshot(self.pair, session, snapshot)

    def save_conversation(self, path: str | os.PathLike[str], data: Mapping[str, Any]) -> int:
        """Write `data`, which must be JSON, and the conversation's caches to a file; returns its bytes.

        Whole or not at all. `llmcad_mlx.conversations.file.read_conversation` reads it. Raises UsageError for a
        path that cannot be used, DiskError when the disk has no room.
        """
        with self._turns.between():
            return save_conversation(Path(path), data, self.pair, self._open_session().tokens)

    def restore_conversation(self, saved: SavedConversation) -> list[str]:
        """Put a saved conversation's caches back where they fit this engine's models; returns one line for each
        that does not, and why. Then the next prompt is read again: no text changes by it."""
        session = self._open_session()
        with self._turns.between():
            self._turns.end()
            return restore_caches(saved, self.pair, session)

    def encode(self, prompt: Prompt, template_options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt. template_options: variables of the chat template, {"enable_thinking": False} for
        example. Raises UsageError for an empty or malformed prompt."""
        return encode_prompt(prompt, self.tokenizer, self.pair.vocab_size, template_options=template_options)

    def _token_limit(self, prompt_tokens: int, max_tokens: int) -> int | None:
        context = self.pair.context_length
        if context is not None and prompt_tokens >= context:
            raise ContextLengthError(
                f"prompt: its {prompt_tokens} tokens leave no room in the {self.pair.context_in_words}; shorten it"
            )
        room = None if context is None else context - prompt_tokens
        wanted = None if max_tokens == -1 else max_tokens
        return min((n for n in (room, wanted) if n is not None), default=None)


def _responses(pieces: Sequence[Piece], done: Round, stats: GenerationStats) -> list[Response]:
    """One response for each token of a round."""
    before = stats.generated_tokens - len(done.walk.tokens)
    return [
        Response(
            text=piece.text,
            token=piece.token,
            logprobs=done.verification.row(done.walk.visited[index]),
            from_draft=index < done.walk.num_accepted,
            prompt_tokens=stats.prompt_tokens,
            prompt_tps=stats.prompt_tokens_per_s,
            generation_tokens=before + index + 1,
            generation_tps=stats.tokens_per_s,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=piece.finish_reason,
            stats=stats,
        )
        for index, piece in enumerate(pieces)
    ]


def _name(option: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise UsageError(f"{option}: give a folder, repository or preset, not {value!r}")


__all__ = ["Engine", "GenerationOptions", "Prompt", "Response", "Result", "load"]
