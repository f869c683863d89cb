"""The corpus: texts of the target, on request with activations that a student can be trained on, in shards.

A shard is a safetensors file: `tokens` (N,) int32 of all texts one after the other; `ends` (S,) int64, where each
text ends; `given` (S,) int64, how many of its first tokens were given (chat header and prompt); `hidden_D` and
`final` (N, H) float16, the target's activations after its first D layers and before its head. Shard i depends on
the seed and on i alone, but for the passages that prompts are about, which are answers of shard i - 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.files.atomic import new_file

from .prompts import openings
from .writing import Text, Writer

_MOST_PASSAGE_CHARACTERS = 600
_QUESTION_TOKENS = 64
_SHARE_GREEDY = 0.75
_TEMPERATURE = 0.8  # of the other answers
_LEAST_ANSWER = 4


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
    """How a corpus is written. `batch` texts are written at once, one shard each time."""

    depths: tuple[int, ...]
    batch: int = 128
    max_tokens: int = 256
    seed: int = 0


def write_shard(
    number: int,
    folder: Path,
    writer: Writer,
    questions: Writer,
    tokenizer: Any,
    settings: CorpusSettings,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write shard `number` under its final name, whole; returns its path."""
    form = ChatForm.of(tokenizer)
    rng = np.random.default_rng([settings.seed, number])
    beginnings = openings(settings.batch, rng, _passages(shard_path(folder, number - 1), tokenizer))
    texts, whole = [], []
    for words, complete in beginnings:
        ids = [*form.before, *tokenizer.encode(words, add_special_tokens=False)]
        texts.append(Text(ids, len(ids), temperature=1.0))
        whole.append(complete)
    unfinished = [text for text, complete in zip(texts, whole, strict=True) if not complete]
    stops = set(tokenizer.eos_token_ids)
    if unfinished:
        questions.write(unfinished, _QUESTION_TOKENS, int(rng.integers(2**31)), on_tokens)
    answers = []
    for text in texts:
        body = text.tokens[:-1] if text.tokens[-1] in stops else text.tokens
        if len(body) == len(form.before):  # it asked nothing
            continue
        ids = [*body, *form.after]
        greedy = rng.random() < _SHARE_GREEDY
        answers.append(Text(ids, len(ids), temperature=0.0 if greedy else _TEMPERATURE))
    writer.write(answers, settings.max_tokens, int(rng.integers(2**31)), on_tokens)
    kept = [text for text in answers if len(text.tokens) - text.num_given >= _LEAST_ANSWER]
    path = shard_path(folder, number)
    _save(path, kept, settings.depths)
    return path


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"corpus-{number:05d}.safetensors"


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
    found = []
    for tokens, given in texts_of(shard):
        text = tokenizer.decode(tokens[given:-1].tolist()).strip()
        if len(text) >= 80:
            found.append(text[:_MOST_PASSAGE_CHARACTERS].rsplit(" ", 1)[0])
    return found


def texts_of(shard: Path) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """Tokens of each text, and how many of them were given."""
    arrays: Any = mx.load(str(shard))
    tokens, ends, given = (np.asarray(arrays[name]) for name in ("tokens", "ends", "given"))
    for start, end, count in zip([0, *ends[:-1]], ends, given, strict=True):
        yield tokens[start:end], int(count)


def write_corpus(
    folder: Path,
    num_tokens: int,
    writer: Writer,
    questions: Writer,
    tokenizer: Any,
    settings: CorpusSettings,
    report: Callable[[str], None] = print,
) -> None:
    """Write shards until they hold `num_tokens` answered tokens; shards that are there already count."""
    folder.mkdir(parents=True, exist_ok=True)
    number = done = 0
    while (path := shard_path(folder, number)).exists():
        done += sum(len(tokens) - given for tokens, given in texts_of(path))
        number += 1
    while done < num_tokens:
        started, written = time.perf_counter(), [0]

        def count(tokens: int, written: list[int] = written) -> None:
            written[0] += tokens

        path = write_shard(number, folder, writer, questions, tokenizer, settings, count)
        done += sum(len(tokens) - given for tokens, given in texts_of(path))
        rate = written[0] / (time.perf_counter() - started)
        report(f"{path.name}: {done:,} of {num_tokens:,} tokens, {rate:.0f} tokens/s")
        number += 1
