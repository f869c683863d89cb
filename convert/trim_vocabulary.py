"""A draft that proposes frequent tokens only: its head gets a few thousand rows, and a step becomes cheaper.

python convert/trim_vocabulary.py SOURCE DEST --tokens 8192 --corpus work/corpus
python convert/trim_vocabulary.py smollm2-135m small-draft --tokens 4096
llmcad-mlx generate --target TARGET --draft DEST "Hello"

SOURCE is a model folder or a preset; DEST becomes a bundle that can only draft, because `draft_tokens.safetensors`
says which tokens its head is for. Rows are copied from the head, or from the embedding where that is the head;
quantised ones bit for bit. Text stays the target's: what the draft cannot propose, the target writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmcad_mlx.errors import LlmcadError, UsageError
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a model folder, a hub repository or a preset")
    parser.add_argument("dest", type=Path, help="the draft to make; a new or empty folder")
    parser.add_argument("--tokens", type=int, required=True, help="rows to keep, special tokens included")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        default=[],
        help="text files, token shards of distill_draft.py, or folders of them, to count tokens in; "
        "without it: the tokens with the lowest ids, which most tokenizers give to the most frequent ones",
    )
    options = parser.parse_args()
    try:
        before = trim(options.source, options.dest, options.tokens, options.corpus)
    except LlmcadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{options.dest}: {options.tokens:,} of {before:,} output tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
