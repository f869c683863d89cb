"""A draft that proposes frequent tokens only: its head gets a few thousand rows, and a step becomes cheaper.

python -m convert.trim_vocabulary SOURCE DEST --tokens 8192 --corpus work/corpus
python -m convert.trim_vocabulary smollm2-135m small-draft --tokens 4096
llmcad-mlx generate --target TARGET --draft DEST "Hello"

SOURCE is a model folder or a preset; DEST becomes a bundle that can only draft, because
`draft_tokens.safetensors` says which tokens its head is for. A corpus is text files, read as UTF-8, and token
shards: safetensors files with `tokens` (N,) of integers, as `python -m distill corpus` writes them. Rows are
copied from the head, or from the embedding where that is the head; quantised ones bit for bit. Text stays the
target's: what the draft cannot propose, the target writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from convert import exit_code_of
from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import check_destination
from llmcad_mlx.files.safetensors import read_tensors
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.progress import Progress, progress_for
from llmcad_mlx.store.copies import num_ids, usual_tokens, write_trimmed_draft
from llmcad_mlx.store.names import resolve_draft

Tokens = npt.NDArray[np.int64]

SHARD = ".safetensors"
TEXTS = (".txt", ".md", ".rst", ".py")
"""What is taken from a folder, shards apart; a file that is named is taken whatever its name ends in."""
PIECE = 1 << 16  # characters encoded at once, up to the end of a line


def trim(source: str, dest: Path, num_tokens: int, corpus: list[Path], show_progress: bool = True) -> int:
    """Write `dest` and return how many output tokens the model had before.

    Raises the errors of `resolve_draft`, `usual_tokens`, `count_tokens` and `write_trimmed_draft`.
    """
    check_destination(dest)
    folder = resolve_draft(source, show_progress)
    progress = progress_for(show_progress)
    tokenizer = load_model_folder(folder, lazy=True, alone=True).tokenizer
    tokens = usual_tokens(tokenizer, num_tokens)
    if corpus:
        tokens = usual_tokens(tokenizer, num_tokens, count_tokens(corpus, tokenizer, progress))
    write_trimmed_draft(folder, dest, tokens, progress)
    return len(tokenizer.get_vocab())


def count_tokens(corpus: Sequence[Path], tokenizer: Any, progress: Progress) -> Tokens:
    """(V,) occurrences of each token in the files and folders of a corpus. tokenizer: mlx-lm's, encodes texts.

    Raises UsageError for a path without files, a file that is no text and a shard of other tokens, ModelError
    for a damaged shard.
    """
    files = [file for path in corpus for file in _files(path)]
    counts = np.zeros(num_ids(tokenizer), np.int64)
    sizes = [file.stat().st_size for file in files]
    with progress.stage(f"counting tokens in {len(files)} files", sum(sizes)) as advance:
        for file, num_bytes in zip(files, sizes, strict=True):
            for tokens in [_shard(file)] if file.suffix == SHARD else _encoded(file, tokenizer):
                beyond = tokens[(tokens < 0) | (tokens >= len(counts))]
                if len(beyond):
                    raise UsageError(f"--corpus: {file}: token {beyond[0]} is not one of {len(counts)}")
                counts += np.bincount(tokens, minlength=len(counts))
            advance(num_bytes)
    return counts


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
    found = [file for file in inside if file.suffix in (*TEXTS, SHARD) and ".part" not in file.suffixes]
    if not found:
        what = f"has no {', '.join(TEXTS)} or {SHARD} files" if path.is_dir() else "no such file"
        raise UsageError(f"--corpus: {path}: {what}; give text files, token shards or a folder of them")
    return found


def _shard(file: Path) -> Tokens:
    read_tensors(file)  # MLX trusts what it says
    array: Any = mx.load(str(file)).get("tokens")  # type: ignore[union-attr]
    if array is None or array.ndim != 1 or not mx.issubdtype(array.dtype, mx.integer):
        raise UsageError(f"--corpus: {file}: no list of integers 'tokens'; give text files or token shards")
    return np.array(array).astype(np.int64)


def _encoded(file: Path, tokenizer: Any) -> Iterator[Tokens]:
    """Tokens of a text, cut at line ends: some tokenizers take much longer for one long text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--corpus: {file}: {reason}; give text files or token shards") from None
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + PIECE) + 1
        end = end if end > start else start + PIECE
        # verbose: it would warn about texts longer than the model's context.
        ids = tokenizer.encode(text[start:end], add_special_tokens=False, verbose=False)
        yield np.array(ids, np.int64)
        start = end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a model folder, a hub repository or a preset")
    parser.add_argument("dest", type=Path, help="the draft to make; a new or empty folder")
    parser.add_argument("--tokens", type=int, required=True, help="rows to keep, special tokens included")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        default=[],
        help="text files, token shards of `python -m distill corpus`, or folders of them, to count tokens in; "
        "without it: the tokens with the lowest ids, which most tokenizers give to the most frequent ones",
    )
    given = parser.parse_args()
    before = trim(given.source, given.dest, given.tokens, given.corpus)
    print(f"{given.dest}: {given.tokens:,} of {before:,} output tokens")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
