"""Make a draft for a target from text that the target has written itself.

python -m distill corpus TARGET WORK --tokens 1000000
python -m distill table TARGET WORK DEST.ngrams.safetensors
python -m distill train TARGET WORK --depth 8 --layers 2
python -m distill export TARGET WORK DEST

All state lies in WORK; a corpus or a training that was broken off goes on where it was. What a draft is worth:
llmcad-mlx bench --target TARGET --draft DEST --variants draft:16,tree:16
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from convert import exit_code_of
from distill.batches import UNSEEN, stored_depths
from distill.checkpoint import Checkpoint, TrainingSettings
from distill.corpus import CorpusSettings, Shard, shards_to_learn_from, write_corpus
from distill.export import BITS, export_student
from distill.progress import MISSING, Bars, plot_training
from distill.table import make_counts, tokens_per_pass
from distill.training import digest_of, train
from distill.writing import Writer
from llmcad_mlx.drafting.table import TableDrafter, vocabulary_hash
from llmcad_mlx.errors import UsageError
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.store.names import TABLE_SUFFIX, resolve_target


def corpus(args: argparse.Namespace) -> None:
    loaded, model = load_tree_model(resolve_target(args.target))
    tokenizer = loaded.tokenizer
    settings = CorpusSettings(tuple(args.depths), **{name: getattr(args, name) for name in _CORPUS})
    writer = Writer(model, tokenizer.eos_token_ids, len(tokenizer.get_vocab()))
    report = functools.partial(print, flush=True)
    write_corpus(args.work / "corpus", args.tokens, writer, tokenizer, settings, report)


def table(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve_target(args.target))
    shards = [list(Shard.load(path).texts()) for path in shards_to_learn_from(args.work / "corpus")]
    unseen = shards.pop(UNSEEN)
    texts = [tokens for shard in shards for tokens, _ in shard]
    counts = make_counts(texts, args.order, vocabulary_hash(tokenizer.get_vocab()))
    counts.save(args.dest)
    made = TableDrafter(counts)
    print(f"{args.dest}: {sum(map(len, texts)):,} tokens of {len(texts):,} texts, {made.num_bytes / 1e6:.1f} MB")
    for nodes in (4, 16, 64):
        reached = tokens_per_pass(made, unseen, nodes)
        print(f"{len(unseen)} texts it has not seen, {nodes} nodes: {reached:.2f} tokens per pass")


def train_student(args: argparse.Namespace) -> None:
    loaded = load_model_folder(resolve_target(args.target), lazy=True)
    settings = _settings(args)
    folder = args.work / args.name
    bars = Bars(settings.steps)
    try:
        with bars:
            train(loaded, args.work / "corpus", folder, settings, bars.show)
    except KeyboardInterrupt:
        print(f"\nstopped at step {bars.step}; the same command goes on from step {bars.saved}", file=sys.stderr)
        raise SystemExit(130) from None
    try:
        print(plot_training(folder, f"{loaded.path.name}, {args.name}"))
    except ImportError:
        print(MISSING, file=sys.stderr)


def _settings(args: argparse.Namespace) -> TrainingSettings:
    depth = args.depth
    if depth is None:
        depths = stored_depths(args.work / "corpus")
        if not depths:
            raise UsageError("--depth: the corpus holds no activations to take it from; give the layers to keep")
        depth = depths[0]
    sources = args.from_layers or range(depth, depth + args.layers)
    return TrainingSettings(depth, tuple(sources), **{name: getattr(args, name) for name in _TRAINING})


def export(args: argparse.Namespace) -> None:
    loaded = load_model_folder(resolve_target(args.target), lazy=True)
    folder = args.work / args.name
    found = Checkpoint.find(folder)
    if found is None:
        raise UsageError(f"{folder}: no checkpoint; run the train step first")
    settings = found.settings
    found.check(settings, digest_of(loaded.model))
    num_bytes = export_student(
        loaded, found.student(loaded.model), settings, found.tokens, args.dest,
        bits=None if args.dense else args.bits, share_embedding=args.share_embedding,
    )  # fmt: skip
    print(f"{args.dest}: {num_bytes / 1e6:.1f} MB, step {found.place.step} of {settings.steps}")


_CORPUS = {"batch": "texts written at once", "max_tokens": "of an answer", "seed": "of the texts"}
_TRAINING = {
    "head_tokens": "of the vocabulary that the draft proposes",
    "steps": "of training",
    "batch_tokens": "of a step, padding included",
    "learning_rate": "the largest",
    "warmup": "steps in which the learning rate rises",
    "hard_share": "of the loss that is cross entropy with the chosen token",
    "train_head": "train the head's rows, too",
    "prompts": "learn from what the target would say inside the prompts, too",
    "check_every": "steps between two checkpoints",
    "check_tokens": "of unseen texts, for the examination with each checkpoint",
    "seed": "of the order of batches",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With defaults, and the module's docstring as it is."""


def _add_settings(step: argparse.ArgumentParser, kind: type, meanings: dict[str, str]) -> None:
    """An option for each of these fields of the settings' class `kind`, with the field's default."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(kind)}
    for name, meaning in meanings.items():
        option, default = f"--{name.replace('_', '-')}", defaults[name]
        if isinstance(default, bool):
            step.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=meaning)
        else:
            step.add_argument(option, type=type(default), default=default, help=meaning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m distill", description=__doc__, formatter_class=_Help)
    steps = parser.add_subparsers(required=True)

    def step(run: Callable[[argparse.Namespace], None], name: str, what: str) -> argparse.ArgumentParser:
        added = steps.add_parser(name, help=what, formatter_class=_Help)
        added.set_defaults(run=run)
        added.add_argument("target", help="a folder, a hub repository or a preset")
        added.add_argument("work", type=Path, help="the folder of corpus and runs")
        return added

    writing = step(corpus, "corpus", "let the target write what the draft is trained on")
    writing.add_argument("--tokens", type=int, default=1_000_000, help="answered tokens to write")
    writing.add_argument("--depths", type=int, nargs="+", default=[], help="layers whose activations are kept")
    _add_settings(writing, CorpusSettings, _CORPUS)
    counting = step(table, "table", "make an n-gram table of the corpus; its first shard is kept to test it")
    counting.add_argument("dest", type=Path, help=f"a file name that ends in {TABLE_SUFFIX}")
    counting.add_argument("--order", type=int, default=5, help="longest run of tokens that is counted")
    training = step(train_student, "train", "train a student on all shards but the first, which tests it")
    training.add_argument("--name", default="student", help="of the run's folder in WORK")
    training.add_argument("--depth", type=int, help="target layers that are kept; None: the least the corpus has")
    training.add_argument("--layers", type=int, default=2, help="trained layers, copies of the target's next")
    training.add_argument("--from-layers", type=int, nargs="+", help="the target's layers to copy instead")
    _add_settings(training, TrainingSettings, _TRAINING)
    exporting = step(export, "export", "make a draft folder of a run's last checkpoint")
    exporting.add_argument("dest", type=Path, help="the draft to make; a new or empty folder")
    exporting.add_argument("--name", default="student", help="of the run's folder in WORK")
    exporting.add_argument("--bits", type=int, choices=BITS, default=8, help="of what was trained")
    exporting.add_argument("--dense", action="store_true", help="keep what was trained in float32")
    exporting.add_argument("--share-embedding", action="store_true", help="leave it out; the target's is used")
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
