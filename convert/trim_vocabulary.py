"""A draft that proposes frequent tokens only: its head gets a few thousand rows, and a step becomes cheaper.

python -m convert.trim_vocabulary SOURCE DEST --tokens 8192 --corpus work/corpus
python -m convert.trim_vocabulary smollm2-135m small-draft --tokens 4096
llmcad-mlx generate --target TARGET --draft DEST "Hello"

SOURCE is a model folder or a preset; DEST becomes a bundle that can only draft, because `draft_tokens.safetensors`
says which tokens its head is for. Rows are copied from the head, or from the embedding where that is the head;
quantised ones bit for bit. Text stays the target's: what the draft cannot propose, the target writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convert import exit_code_of
from llmcad_mlx.files.atomic import check_destination
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.progress import progress_for
from llmcad_mlx.store.copies import write_trimmed_draft
from llmcad_mlx.store.pull import resolve_draft
from llmcad_mlx.store.token_counts import usual_tokens


def trim(source: str, dest: Path, num_tokens: int, corpus: list[Path], show_progress: bool = True) -> int:
    """Write `dest` and return how many output tokens the model had before.

    Raises the errors of `resolve_draft`, `usual_tokens` and `write_trimmed_draft`.
    """
    check_destination(dest)
    folder = resolve_draft(source, show_progress)
    progress = progress_for(show_progress)
    tokenizer = load_model_folder(folder, lazy=True, alone=True).tokenizer
    tokens = usual_tokens(tokenizer, num_tokens, corpus, progress)
    write_trimmed_draft(folder, dest, tokens, progress)
    return len(tokenizer.get_vocab())


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
