"""What a finished generation returns, from an engine here or on another machine: its text, counts and times."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 60  # characters of a text in a repr


@dataclass(slots=True)
class GenerationStats:
    """What a generation did. Seconds are wall seconds of the computing thread.

    `drafted` nodes were created by a drafter, `tested` were sent to the target, `accepted` became output.
    `path_tested` counts the drafted tokens the target's own path came to, the acceptance rate's denominator.
    `provisional` of the drafted nodes were created while the target waited for weights, in `provisional_passes` of
    the passes; after `survived` of the passes a drafted subtree was left to start the next round with.

    `draft_s` is all drafting, `hidden_draft_s` the part of it done while the target waited for weights.
    `decode_s` is all of the rounds, from growing a tree to the text of its tokens.
    `streamed_bytes` were read for the target's passes, prompt left out.
    `near_ties`: tokens that another number of rows in a pass, which rounds in another way, could have made others;
    0 where passes of all sizes agree bit for bit.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    target_passes: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    path_tested: int = 0
    provisional: int = 0
    provisional_passes: int = 0
    survived: int = 0
    streamed_bytes: int = 0
    near_ties: int = 0
    prompt_s: float = 0.0
    draft_s: float = 0.0
    hidden_draft_s: float = 0.0
    verify_s: float = 0.0
    io_wait_s: float = 0.0
    decode_s: float = 0.0

    @property
    def other_s(self) -> float:
        """Decoding time outside model forwards and reads."""
        return max(self.decode_s - self.draft_s - self.verify_s - self.io_wait_s, 0.0)

    @property
    def tokens_per_pass(self) -> float:
        """Generated tokens / target passes, bonus tokens included; 0.0 before the first pass."""
        return self.generated_tokens / self.target_passes if self.target_passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested-path tokens; 0.0 when nothing was tested."""
        return self.accepted / self.path_tested if self.path_tested else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of decoding."""
        return self.generated_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens per second of prompt processing, those taken over from the last turn left out."""
        fresh = self.prompt_tokens - self.reused_tokens
        return fresh / self.prompt_s if self.prompt_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. `tokens` are all generated tokens, a final end-of-sequence token included."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: GenerationStats

    def __repr__(self) -> str:
        """One line: the text's beginning, and how many tokens there are."""
        text = repr(self.text) if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]!r}…"
        return f"Result({text}, {len(self.tokens)} tokens, {self.finish_reason!r})"
