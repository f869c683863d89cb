"""How often each token occurs in a corpus, and which are worth a row in a draft's head.

A corpus is text files, read as UTF-8, and token shards: safetensors files with `tokens` (N,) of integers, as
`convert/distill_draft.py` writes them. Without one the tokenizer's own order decides: tokenizers number tokens by
how frequent they were in what they were trained on. A corpus of the target's own text is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from llmcad_mlx.errors import UsageError
from llmcad_mlx.files.safetensors import read_tensors
from llmcad_mlx.models.draft_folder import TokenList
from llmcad_mlx.progress import NoProgress, Progress

SHARD = ".safetensors"
TEXTS = (".txt", ".md", ".rst", ".py")
"""What is taken from a folder, shards apart; a file that is named is taken whatever its name ends in."""

_PIECE = 1 << 16  # characters encoded at once, up to the end of a line

Counts = npt.NDArray[np.int64]
"""(V,) occurrences by token."""


def usual_tokens(
    tokenizer: Any, num_tokens: int, corpus: Sequence[Path] = (), progress: Progress | None = None
) -> TokenList:
    """The `num_tokens` tokens of mlx-lm's `tokenizer` that are worth a row, ascending; special ones among them.

    corpus: files and folders; empty: the lowest ids. Raises UsageError and ModelError as `corpus_files`,
    `count_tokens` and `most_frequent` do.
    """
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    special = special_tokens(tokenizer)
    lowest = most_frequent(np.zeros(vocab_size, np.int64), num_tokens, special)
    if not corpus:
        return lowest
    counts = count_tokens(corpus_files(corpus), tokenizer, vocab_size, progress)
    return most_frequent(counts, num_tokens, special)


def corpus_files(paths: Sequence[Path]) -> list[Path]:
    """The files of a corpus given as files and folders. Raises UsageError for a path that has none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found = [file for file in inside if file.suffix in (*TEXTS, SHARD) and ".part" not in file.suffixes]
        else:
            found = [path] if path.is_file() else []
        if not found:
            what = f"has no {', '.join(TEXTS)} or {SHARD} files" if path.is_dir() else "no such file"
            raise UsageError(f"--corpus: {path}: {what}; give text files, token shards or a folder of them")
        files += found
    return files


def count_tokens(
    files: Iterable[Path], tokenizer: Any, vocab_size: int, progress: Progress | None = None
) -> Counts:
    """Occurrences of each of `vocab_size` tokens in `files`. tokenizer: what encodes texts.

    Raises UsageError for a file that is no text, or a shard of other tokens; ModelError for a damaged shard.
    """
    files = list(files)
    counts = np.zeros(vocab_size, np.int64)
    with (progress or NoProgress()).stage(
        f"counting tokens in {len(files)} files", sum(file.stat().st_size for file in files)
    ) as advance:
        for file in files:
            for tokens in [_shard(file)] if file.suffix == SHARD else _encoded(file, tokenizer):
                beyond = tokens[(tokens < 0) | (tokens >= vocab_size)]
                if len(beyond):
                    raise UsageError(f"--corpus: {file}: token {beyond[0]} is not one of {vocab_size}")
                counts += np.bincount(tokens, minlength=vocab_size)
            advance(file.stat().st_size)
    return counts


def most_frequent(counts: Counts, num_tokens: int, always: Iterable[int] = ()) -> TokenList:
    """The `num_tokens` most frequent tokens in ascending order, those of `always` among them.

    Of tokens that are equally frequent, in particular of those that do not occur, the lowest ids are taken: a
    tokenizer trained by merging has numbered its tokens by frequency. Raises UsageError where `num_tokens` is more
    than there are or leaves no room for `always`.
    """
    needed = np.unique(np.array(list(always), np.int64))
    if not max(len(needed), 1) <= num_tokens <= len(counts):
        raise UsageError(
            f"--tokens: {num_tokens} is out of range; the model has {len(counts)} tokens, of which "
            f"{len(needed)} special ones are always kept"
        )
    weights = counts.copy()
    weights[needed] = np.iinfo(np.int64).max
    order = np.argsort(-weights, kind="stable")
    return np.sort(order[:num_tokens]).astype(np.int32)


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids of tokens that end, begin or structure a text, of mlx-lm's tokenizer."""
    found = {int(token) for token in (*tokenizer.eos_token_ids, *tokenizer.all_special_ids)}
    added = tokenizer.added_tokens_decoder
    return found | {int(token) for token, entry in added.items() if entry.special}


def _shard(file: Path) -> npt.NDArray[np.int64]:
    read_tensors(file)  # MLX trusts what it says
    array: Any = mx.load(str(file)).get("tokens")  # type: ignore[union-attr]
    if array is None or array.ndim != 1 or not mx.issubdtype(array.dtype, mx.integer):
        raise UsageError(f"--corpus: {file}: no list of integers 'tokens'; give text files or token shards")
    return np.array(array).astype(np.int64)


def _encoded(file: Path, tokenizer: Any) -> Iterator[npt.NDArray[np.int64]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--corpus: {file}: {reason}; give text files or token shards") from None
    return (_encode(piece, tokenizer) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """Cut at line ends: some tokenizers take much longer for one long text."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def _encode(text: str, tokenizer: Any) -> npt.NDArray[np.int64]:
    # verbose: it would warn about texts longer than the model's context.
    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int64)
