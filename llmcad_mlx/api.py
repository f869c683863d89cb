"""What users import: `load` and the `Engine` it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.engine import Round, SpeculativeEngine
from llmcad_mlx.errors import ContextLengthError, UsageError
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.sampling import SamplingSettings, TargetSampler
from llmcad_mlx.settings import DEFAULT_CHAIN_LENGTH, SpeculationSettings, StopSettings, stop_settings
from llmcad_mlx.stats import GenerationStats
from llmcad_mlx.text_stream import Piece, TextStream
from llmcad_mlx.tree.fixed import ChainPolicy
from llmcad_mlx.tree.paper import PaperPolicy
from llmcad_mlx.tree.policy import GrowthPolicy
from llmcad_mlx.tree.throughput import DEFAULT_MAX_NODES, ThroughputPolicy
from llmcad_mlx.tree.token_tree import MODEL, NGRAM

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
Progress = Callable[[int, int], None]

_SAMPLING = {f.name for f in fields(SamplingSettings)}
_SPECULATION = {f.name for f in fields(SpeculationSettings)}
_STOPPING = {"max_tokens", "stop", "stop_tokens"}


@dataclass
class Response(GenerationResponse):
    """One token of a generation; extends mlx-lm's `GenerationResponse`.

    `logprobs` (V,) are the target's log probabilities before penalties and temperature. `stats` is the live
    record of the whole generation.
    """

    stats: GenerationStats | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. `tokens` are all generated tokens, a final end-of-sequence token included."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: GenerationStats


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
            stop_settings(options.get("max_tokens", 256), options.get("stop"), options.get("stop_tokens")),
        )


def load(target: str | None = None, draft: str | None = "auto", *, progress: bool = False) -> Engine:
    """Load a target and its draft.

    target: a local mlx-lm folder, a hub repository ("org/name") or a preset; None is the embedded default.
    draft: the same kinds for a draft model (which the n-gram drafter then assists), "ngram" for prompt lookup
    alone, None or "none" for plain decoding, "auto" for what the target's preset names, else "ngram".
    progress: show download progress on a terminal.

    Raises ModelError, VocabularyError or DownloadError, each with one line that says what to do.
    """
    return Engine(load_pair(target, draft, progress))


class Engine:
    """A loaded target with its draft. Keeps one conversation's caches, so a next turn only pays for new tokens.

    Not thread-safe: one generation at a time. A context manager; `close` frees memory and saves what was
    learned about the pair.
    """

    def __init__(self, pair: LoadedPair) -> None:
        self.pair = pair
        self.tokenizer = pair.tokenizer
        self._policies: dict[SpeculationSettings, GrowthPolicy] = {}
        self._engine = SpeculativeEngine(
            pair.target, pair.drafters, ChainPolicy(0), pair.profile.costs, clock=pair.clock
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save the pair's profile and free models and caches. A closed engine cannot generate."""
        if self._engine is None:
            return
        self.pair.profile.save()
        self._engine = None  # type: ignore[assignment]
        self.pair.release()
        mx.clear_cache()

    def generate(self, prompt: Prompt, on_progress: Progress | None = None, **options: Any) -> Result:
        """Generate to the end; options as for `stream_generate`."""
        responses = list(self.stream_generate(prompt, on_progress, **options))
        stats = responses[-1].stats
        assert stats is not None
        return Result(
            "".join(r.text for r in responses),
            [r.token for r in responses],
            str(responses[-1].finish_reason),
            stats,
        )

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
        of `SpeculationSettings` (policy, tree_nodes). The same seed gives the same text under every policy.

        Raises UsageError, which is a ValueError, naming the option; ContextLengthError for a prompt longer than
        the model's context. A generation that reaches the end of the context ends with "length".
        """
        if self._engine is None:
            raise UsageError("this engine is closed; load it again")
        checked = GenerationOptions.of(options)
        tokens = self.encode(prompt)
        limit = self._token_limit(len(tokens), checked.stopping.max_tokens)
        return self._run(tokens, checked, limit, on_progress, on_round)

    def _run(
        self,
        tokens: list[int],
        options: GenerationOptions,
        limit: int | None,
        on_progress: Progress | None,
        on_round: Callable[[Round], None] | None,
    ) -> Iterator[Response]:
        engine, stats = self._engine, GenerationStats()
        engine.policy = self._policy(options.speculation)
        sampler = TargetSampler(options.sampling, self.pair.vocab_size)
        stream = TextStream(self.tokenizer, options.stopping, self.tokenizer.eos_token_ids, limit)
        engine.start(tokens, stats, on_progress or (lambda done, total: None))
        while stream.finish_reason is None:
            done = engine.round(sampler, stats, stream.push)
            if on_round is not None:
                on_round(done)
            accepted = done.walk.num_accepted
            for index, piece in enumerate(stream.take()):
                yield _response(piece, index < accepted, done, index, stats)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises UsageError for an empty or malformed one."""
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token
            special = bos is None or not prompt.startswith(bos)
            tokens = list(self.tokenizer.encode(prompt, add_special_tokens=special)) if prompt else []
        elif prompt and all(isinstance(item, Mapping) for item in prompt):
            tokens = self._encode_chat([dict(item) for item in prompt])  # type: ignore[arg-type]
        else:
            tokens = [_checked_token(item, self.pair.vocab_size) for item in prompt]
        if not tokens:
            raise UsageError("prompt: it is empty; give text, messages or at least one token")
        return tokens

    def _encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise UsageError('prompt: every message needs "role" and "content"')
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("prompt: this model has no chat template; give the prompt as text")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

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
            self._policies[settings] = make_policy(settings, self.pair.drafters, self.pair)
        return self._policies[settings]


def make_policy(settings: SpeculationSettings, drafters: Sequence[Drafter], pair: LoadedPair) -> GrowthPolicy:
    """The growth policy that `settings` name, learning into the pair's profile."""
    profile = pair.profile
    if settings.policy == "throughput":
        return ThroughputPolicy(
            profile.costs, profile.calibration, settings.tree_nodes, max_nodes=DEFAULT_MAX_NODES
        )
    sources = [d.source for d in drafters]
    main = MODEL if MODEL in sources else NGRAM
    if settings.policy == "paper":
        return PaperPolicy(settings.tree_nodes or DEFAULT_MAX_NODES, main)
    if settings.policy == "plain":
        return ChainPolicy(0)
    return ChainPolicy(DEFAULT_CHAIN_LENGTH if settings.tree_nodes is None else settings.tree_nodes - 1, main)


def _response(piece: Piece, from_draft: bool, done: Round, index: int, stats: GenerationStats) -> Response:
    logits = done.verification.logits[done.walk.visited[index]]
    fresh = stats.generated_tokens
    return Response(
        text=piece.text,
        token=piece.token,
        logprobs=logits - mx.logsumexp(logits),
        from_draft=from_draft,
        prompt_tokens=stats.prompt_tokens,
        prompt_tps=stats.prompt_tokens_per_s,
        generation_tokens=fresh - len(done.walk.tokens) + index + 1,
        generation_tps=stats.tokens_per_s,
        peak_memory=mx.get_peak_memory() / 1e9,
        finish_reason=piece.finish_reason,
        stats=stats,
    )


def _checked_token(item: Any, vocab_size: int) -> int:
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise UsageError(f"prompt: {item!r} is neither a token id nor a message")
    token = int(item)
    if not 0 <= token < vocab_size:
        raise UsageError(f"prompt: token {token} is not in the vocabulary of {vocab_size}")
    return token


__all__ = ["Engine", "GenerationOptions", "Prompt", "Response", "Result", "load", "make_policy"]
