"""The corpus: texts of the target, on request with activations that a student can be trained on, in shards.

A shard is a safetensors file: `tokens` (N,) int32 of all texts one after the other; `ends` (S,) int64, where each
text ends; `given` (S,) int64, how many of its first tokens were given (chat header and prompt); `hidden_D` and
`final` (N, H) float16, the target's activations after its first D layers and before its head. Shard i depends on
the seed and on i alone, but for the passages that prompts are about, which are answers of shard i - 1.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from distill.prompts import openings
from distill.writing import Text, Writer
from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import new_file

Ids = npt.NDArray[np.int32]

_MOST_PASSAGE_CHARACTERS = 600
_QUESTION_TOKENS = 64
_SHARE_GREEDY = 0.75
_TEMPERATURE = 0.8  # of the other answers
_LEAST_ANSWER = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as it was read. `starts` follow from `ends`; `arrays` are the activations that were asked for."""

    tokens: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def load(cls, path: Path, keys: Sequence[str] = ()) -> Shard:
        """Activations that the file lacks are left out."""
        loaded: Any = mx.load(str(path))
        tokens, ends, given = (np.asarray(loaded[name]) for name in ("tokens", "ends", "given"))
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        return cls(tokens, starts, ends, given, {key: np.asarray(loaded[key]) for key in keys if key in loaded})

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each text."""
        return self.ends - self.starts

    @property
    def num_answered(self) -> int:
        """Tokens that the target chose."""
        return int((self.lengths - self.given).sum())

    def texts(self) -> Iterator[tuple[Ids, int]]:
        """Tokens of each text, and how many of them were given."""
        for start, end, given in zip(self.starts, self.ends, self.given, strict=True):
            yield self.tokens[start:end], int(given)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"corpus-{number:05d}.safetensors"


def shards_in(folder: Path) -> list[Path]:
    """The shards that are there, whole, in order."""
    return list(itertools.takewhile(Path.exists, (shard_path(folder, number) for number in itertools.count())))


def shards_to_learn_from(folder: Path) -> list[Path]:
    """All shards; the first is kept for testing. Raises UsageError for a corpus too small to keep one."""
    found = shards_in(folder)
    if len(found) < 2:
        raise UsageError(f"{folder}: fewer than two shards; run the corpus step first")
    return found


@dataclass(frozen=True, slots=True)
class ChatForm:
    """Token ids around a user's turn in the model's chat template."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatForm:
        """Raises ValueError for a template in which the user's text cannot be found."""
        mark = "XQX"
        messages = [{"role": "user", "content": mark}]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, found, after = whole.partition(mark)
        if not found:
            raise ValueError("the chat template does not show the user's text")
        encode = tokenizer.encode
        return cls(tuple(encode(before, add_special_tokens=False)), tuple(encode(after, add_special_tokens=False)))


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """How a corpus is written. `depths`: layers whose activations are kept, and the final ones then, too.
    `batch` texts are written at once, one shard each time; an answer has up to `max_tokens` tokens."""

    depths: tuple[int, ...] = ()
    batch: int = 128
    max_tokens: int = 256
    seed: int = 0


def write_corpus(
    folder: Path,
    num_tokens: int,
    writer: Writer,
    tokenizer: Any,
    settings: CorpusSettings,
    report: Callable[[str], None] = print,
) -> None:
    """Write shards until they hold `num_tokens` answered tokens; shards that are there already count."""
    folder.mkdir(parents=True, exist_ok=True)
    there = shards_in(folder)
    done = sum(Shard.load(path).num_answered for path in there)
    for number in itertools.count(len(there)):
        if done >= num_tokens:
            return
        started = time.perf_counter()
        written = write_shard(number, folder, writer, tokenizer, settings)
        rate = written / (time.perf_counter() - started)
        path = shard_path(folder, number)
        done += Shard.load(path).num_answered
        report(f"{path.name}: {done:,} of {num_tokens:,} tokens, {rate:.0f} tokens/s")


def write_shard(number: int, folder: Path, writer: Writer, tokenizer: Any, settings: CorpusSettings) -> int:
    """Write shard `number` under its final name, whole; returns how many tokens the target wrote, questions
    included."""
    form = ChatForm.of(tokenizer)
    rng = np.random.default_rng([settings.seed, number])
    texts, unfinished = [], []
    for words, complete in openings(settings.batch, rng, _passages(shard_path(folder, number - 1), tokenizer)):
        ids = [*form.before, *tokenizer.encode(words, add_special_tokens=False)]
        texts.append(Text(ids, len(ids), temperature=1.0))
        if not complete:
            unfinished.append(texts[-1])
    written = 0
    if unfinished:
        written += writer.write(unfinished, _QUESTION_TOKENS, int(rng.integers(2**31)))
    answers = []
    for text in texts:
        body = text.tokens[:-1] if text.tokens[-1] in tokenizer.eos_token_ids else text.tokens
        if len(body) == len(form.before):  # it asked nothing
            continue
        ids = [*body, *form.after]
        greedy = rng.random() < _SHARE_GREEDY
        answers.append(Text(ids, len(ids), temperature=0.0 if greedy else _TEMPERATURE))
    written += writer.write(answers, settings.max_tokens, int(rng.integers(2**31)), settings.depths)
    kept = [text for text in answers if len(text.tokens) - text.num_given >= _LEAST_ANSWER]
    _save(shard_path(folder, number), kept, settings.depths)
    return written


def _save(path: Path, texts: Sequence[Text], depths: Sequence[int]) -> None:
    # The last token of a text was never fed, so nothing is known after it: its row repeats the one before.
    arrays: dict[str, Any] = {}
    for name in [*map(str, depths), "final"] if depths else []:
        rows = []
        for text in texts:
            hidden = text.stacked(name)[: len(text.tokens)]
            missing = len(text.tokens) - len(hidden)
            rows.append(np.concatenate([hidden, np.repeat(hidden[-1:], missing, axis=0)]))
        arrays["final" if name == "final" else f"hidden_{name}"] = mx.array(np.concatenate(rows))
    arrays["tokens"] = mx.array(np.concatenate([np.array(t.tokens, np.int32) for t in texts]))
    arrays["ends"] = mx.array(np.cumsum([len(t.tokens) for t in texts]).astype(np.int64))
    arrays["given"] = mx.array(np.array([t.num_given for t in texts], np.int64))
    with new_file(path) as file:
        mx.save_safetensors(str(file), arrays)


def _passages(shard: Path, tokenizer: Any) -> list[str]:
    """Answers of a shard, for prompts about a text."""
    if not shard.exists():
        return []
    answers = (tokenizer.decode(ids[given:-1].tolist()).strip() for ids, given in Shard.load(shard).texts())
    return [text[:_MOST_PASSAGE_CHARACTERS].rsplit(" ", 1)[0] for text in answers if len(text) >= 80]
