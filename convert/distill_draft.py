"""Make a draft for a target from text that the target has written itself.

python convert/distill_draft.py corpus TARGET WORK --tokens 1000000
python convert/distill_draft.py table TARGET WORK DEST.ngrams.safetensors

All state lies in WORK; a corpus that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from distillation.corpus import CorpusSettings, texts_of, write_corpus
from distillation.forecast import tokens_per_pass
from distillation.tables import make_table
from distillation.writing import Writer
from mlx_lm.utils import load_tokenizer

from llmcad_mlx.drafting.ngram_table import vocabulary_hash
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.sources.resolve import TABLE_SUFFIX, resolve_target


def corpus(args: argparse.Namespace) -> None:
    loaded, model = load_tree_model(resolve_target(args.target))
    tokenizer = loaded.tokenizer
    stops, size = sorted(tokenizer.eos_token_ids), len(tokenizer.get_vocab())
    settings = CorpusSettings(tuple(args.depths), args.batch, args.max_tokens, args.seed)
    writer = Writer(model, stops, size, settings.depths)
    questions = Writer(model, stops, size)
    report = lambda line: print(line, flush=True)  # noqa: E731
    write_corpus(args.work / "corpus", args.tokens, writer, questions, tokenizer, settings, report)


def table(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve_target(args.target))
    folder = args.work / "corpus"
    shards = sorted(folder.glob("corpus-[0-9]*.safetensors"))
    shards = [path for path in shards if ".part" not in path.name]
    if len(shards) < 2:
        raise SystemExit(f"{folder}: fewer than two shards; run the corpus step first")
    unseen = [(tokens.tolist(), given) for tokens, given in texts_of(shards[0])]
    texts = [tokens for path in shards[1:] for tokens, _ in texts_of(path)]
    made = make_table(texts, args.order, vocabulary_hash(tokenizer.get_vocab()))
    made.save(args.dest)
    print(f"{args.dest}: {sum(map(len, texts)):,} tokens of {len(texts):,} texts, {made.num_bytes / 1e6:.1f} MB")
    for nodes in (4, 16, 64):
        reached = tokens_per_pass(made, unseen, nodes)
        print(f"{len(unseen)} texts it has not seen, {nodes} nodes: {reached:.2f} tokens per pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("corpus", help="let the target write what the draft is trained on")
    step.set_defaults(run=corpus)
    step.add_argument("target")
    step.add_argument("work", type=Path)
    step.add_argument("--tokens", type=int, default=1_000_000, help="answered tokens to write")
    step.add_argument("--depths", type=int, nargs="+", default=[], help="layers whose activations are kept")
    step.add_argument("--batch", type=int, default=128, help="texts written at once")
    step.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    step.add_argument("--seed", type=int, default=0)
    step = steps.add_parser("table", help="make an n-gram table of the corpus; its first shard is kept to test it")
    step.set_defaults(run=table)
    step.add_argument("target")
    step.add_argument("work", type=Path)
    step.add_argument("dest", type=Path, help=f"a file name that ends in {TABLE_SUFFIX}")
    step.add_argument("--order", type=int, default=5, help="longest run of tokens that is counted")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
