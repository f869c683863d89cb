"""The target writes many texts at once: each is a branch of one token tree, so a forward serves all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.models.adapt import Adaptation, adapt, restore
from llmcad_mlx.models.cache import ModelCache
from llmcad_mlx.models.tree_model import TreeModel, body_of

Halves = npt.NDArray[np.float16]

_PREFILL_ROWS = 512
_LOOP_EVERY = 16  # tokens between two searches for loops
_LOOP_TOKENS = 48  # a text that has repeated itself for so long says nothing new
_LONGEST_LOOP = 24


@dataclass(slots=True)
class Text:
    """One text: `tokens` from the very first one, `num_given` of them given. `hidden[name]` (T, H) float16 are the
    activations after the layers that were asked for, one row for each token that was fed."""

    tokens: list[int]
    num_given: int
    temperature: float = 0.0
    hidden: dict[str, list[Halves]] = field(default_factory=dict)

    def stacked(self, name: str) -> Halves:
        """(T, H) float16."""
        return np.concatenate(self.hidden[name])


class _Tap(Adaptation):
    """Keeps what a module puts out."""

    _outputs: list[mx.array]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        self._outputs.append(out)
        return out


@contextmanager
def tapped(modules: dict[str, Any]) -> Iterator[dict[str, list[mx.array]]]:
    """Keep the outputs of `modules` by name while the block runs; the reader empties the lists."""
    taps: dict[str, list[mx.array]] = {name: [] for name in modules}
    for name, module in modules.items():
        adapt(module, _Tap, _outputs=taps[name])
    try:
        yield taps
    finally:
        for module in modules.values():
            restore(module, _Tap)


def tap_points(model: TreeModel, depths: Sequence[int]) -> dict[str, Any]:
    """The modules to tap: after the first `depths[i]` layers, and "final" before the head.

    Raises ValueError for a depth the model has not.
    """
    layers, body = model.model.layers, body_of(model.model)
    if body is None or "norm" not in body or any(not 1 <= depth <= len(layers) for depth in depths):
        raise ValueError(f"no layers {depths} or no final norm in this model of {len(layers)} layers")
    return {str(depth): layers[depth - 1] for depth in depths} | {"final": body.norm}


class Writer:
    """Continues texts with the target's own choices."""

    def __init__(self, model: TreeModel, stop_tokens: Iterable[int], vocab_size: int) -> None:
        """Raises ValueError for a model that takes no trees."""
        if model.capability != "tree":
            raise ValueError(f"this model cannot write many texts at once: {model.report.reason}")
        self.model = model
        self._stop = frozenset(stop_tokens)
        self._vocab_size = vocab_size

    def write(self, texts: Sequence[Text], max_tokens: int, seed: int, depths: Sequence[int] = ()) -> int:
        """Append up to `max_tokens` tokens to each text, until a stop token or a loop; returns how many in all.

        depths: layers whose activations are kept, besides the final ones; none at all when empty. Raises
        ValueError for a depth the model has not.
        """
        rng = np.random.default_rng(seed)
        cache = self.model.new_cache()
        written = 0
        with tapped(tap_points(self.model, depths) if depths else {}) as taps:
            slots, logits = self._begin(cache, texts, taps)
            live = list(texts)
            for count in range(1, max_tokens + 1):
                going = []
                for i, token in enumerate(_choose(logits[:, : self._vocab_size], live, rng).tolist()):
                    live[i].tokens.append(token)
                    if token not in self._stop and (count % _LOOP_EVERY or not loops(live[i].tokens)):
                        going.append(i)
                written += len(live)
                if not going or count == max_tokens:
                    break
                live = [live[i] for i in going]
                result = self.model.forward([text.tokens[-1] for text in live], cache, [slots[i] for i in going])
                slots, logits = list(result.slots), np.asarray(result.logits.astype(mx.float32))
                _keep(taps, live, range(1, len(live) + 1))
        return written

    def _begin(
        self, cache: ModelCache, texts: Sequence[Text], taps: dict[str, list[mx.array]]
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Feed what is given; returns each text's last slot and the logits (S, V) after it."""
        common = _common_prefix([text.tokens for text in texts])
        prefix = self.model.forward(texts[0].tokens[:common], cache)
        mx.eval(cache.arrays())
        for name, outputs in taps.items():
            rows = np.asarray(outputs.pop()[0]).astype(np.float16)
            for text in texts:
                text.hidden[name] = [rows]
        cache.commit(list(prefix.slots))
        slots, logits = [], []
        waiting: list[Text] = []
        for number, text in enumerate(texts, 1):
            waiting.append(text)
            if sum(len(t.tokens) - common for t in waiting) < _PREFILL_ROWS and number < len(texts):
                continue
            first = cache.num_slots
            tokens: list[int] = []
            parents: list[int] = []
            ends: list[int] = []
            for own in (text.tokens[common:] for text in waiting):
                parents += [-1, *range(first + len(tokens), first + len(tokens) + len(own) - 1)]
                tokens += own
                ends.append(len(tokens))
            result = self.model.forward(tokens, cache, parents)
            slots += [result.slots[end - 1] for end in ends]
            logits.append(np.asarray(result.logits[mx.array(ends) - 1].astype(mx.float32)))
            _keep(taps, waiting, ends)
            waiting = []
        return slots, np.concatenate(logits)


def _keep(taps: dict[str, list[mx.array]], texts: Sequence[Text], ends: Sequence[int]) -> None:
    """File the rows that were just computed: each text has those up to its end."""
    for name, outputs in taps.items():
        rows = np.asarray(outputs.pop()[0]).astype(np.float16)
        for text, start, end in zip(texts, [0, *ends[:-1]], ends, strict=True):
            text.hidden[name].append(rows[start:end])


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with; each keeps one of its own, and there is at least one."""
    shortest = min(map(len, texts)) - 1
    length = next((i for i in range(shortest) if any(t[i] != texts[0][i] for t in texts)), shortest)
    if length < 1:
        raise ValueError("the texts must begin with the same token and have two at least")
    return length


def _choose(logits: npt.NDArray[np.float32], texts: Sequence[Text], rng: np.random.Generator) -> npt.NDArray[Any]:
    """The best token of each row, or one drawn at the text's temperature."""
    chosen = logits.argmax(axis=1)
    for row, text in enumerate(texts):
        if text.temperature > 0.0:
            scores = np.exp((logits[row] - logits[row, chosen[row]]) / text.temperature)
            sums = np.cumsum(scores, dtype=np.float64)
            chosen[row] = min(int(np.searchsorted(sums, rng.random() * sums[-1])), len(sums) - 1)
    return chosen


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last tokens repeat a short piece over and over."""
    tail = list(tokens[-_LOOP_TOKENS:])
    if len(tail) < _LOOP_TOKENS:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_LOOP + 1))
