"""Make a draft for a target from text that the target has written itself.

python convert/distill_draft.py corpus TARGET WORK --tokens 1000000
python convert/distill_draft.py table TARGET WORK DEST.ngrams.safetensors
python convert/distill_draft.py train TARGET WORK --depth 8 --layers 2
python convert/distill_draft.py export TARGET WORK DEST
python convert/distill_draft.py report TARGET DEST [DEST.ngrams.safetensors ...]

All state lies in WORK; a corpus or a training that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from distillation.acceptance import measure, table_of
from distillation.corpus import CorpusSettings, texts_of, write_corpus
from distillation.forecast import tokens_per_pass
from distillation.student import Student
from distillation.student_data import stored_depths
from distillation.student_export import BITS, export_student
from distillation.tables import make_counts
from distillation.training import digest_of, train
from distillation.training_plot import MISSING, plot_training
from distillation.training_progress import Bars
from distillation.training_state import Checkpoint, TrainingSettings
from distillation.writing import Writer
from mlx_lm.utils import load_tokenizer

from llmcad_mlx.drafting.table import NgramTable, vocabulary_hash
from llmcad_mlx.errors import LlmcadError, UsageError
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.measure.prompts import load_prompts
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.store.pull import TABLE_SUFFIX, resolve_target

PROMPTS = Path(__file__).parent.parent / "examples" / "four_domains.toml"


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
    counts = make_counts(texts, args.order, vocabulary_hash(tokenizer.get_vocab()))
    counts.save(args.dest)
    made = NgramTable(counts)
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
    _plot(folder, f"{loaded.path.name}, {args.name}")


def _settings(args: argparse.Namespace) -> TrainingSettings:
    depth = args.depth
    if depth is None:
        depths = stored_depths(args.work / "corpus")
        if not depths:
            raise UsageError("--depth: the corpus holds no activations to take it from; give the layers to keep")
        depth = depths[0]
    sources = args.from_layers or range(depth, depth + args.layers)
    given = {name: getattr(args, name) for name in _TRAINING if getattr(args, name) is not None}
    given |= {"train_head": args.train_head, "lens": args.lens, "prompts": args.prompts}
    return TrainingSettings(depth, tuple(sources), **given)


def _plot(folder: Path, title: str) -> None:
    try:
        file = plot_training(folder, title)
    except ImportError:
        print(MISSING, file=sys.stderr)
        return
    if file is not None:
        print(file)


def export(args: argparse.Namespace) -> None:
    loaded = load_model_folder(resolve_target(args.target), lazy=True)
    folder = args.work / args.name
    found = Checkpoint.find(folder)
    if found is None:
        raise UsageError(f"{folder}: no checkpoint; run the train step first")
    found.check(found.settings, digest_of(loaded.model))
    settings = found.settings
    student = Student(loaded.model, settings.sources, found.tokens, settings.train_head, settings.lens)
    found.restore(student)
    num_bytes = export_student(
        loaded, student, settings, found.tokens, args.dest,
        bits=None if args.dense else args.bits, share_embedding=args.share_embedding,
    )  # fmt: skip
    print(f"{args.dest}: {num_bytes / 1e6:.1f} MB, step {found.place.step} of {settings.steps}")


def report(args: argparse.Namespace) -> None:
    prompts = load_prompts(args.prompts, per_domain=args.per_domain)
    show = lambda what: print(what, file=sys.stderr, flush=True)  # noqa: E731
    measured = []
    for line in measure(args.target, args.drafts, prompts, args.nodes, args.max_tokens, show):
        measured.append(line)
        total = line.over()
        show(f"{line.name}, {line.nodes} nodes: {total.tokens_per_pass:.2f} tokens per pass")
    print(table_of(measured))


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
    _add_student_steps(steps)
    args = parser.parse_args()
    try:
        args.run(args)
    except LlmcadError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


_TRAINING = {
    "head_tokens": (int, "of the vocabulary that the draft proposes (8192)"),
    "steps": (int, "of training (1000)"),
    "batch_tokens": (int, "of a step, padding included (4096)"),
    "learning_rate": (float, "the largest (0.001)"),
    "warmup": (int, "steps in which the learning rate rises (50)"),
    "hard_share": (float, "of the loss that is cross entropy with the chosen token (0)"),
    "hidden_weight": (float, "of the distance to the target's last hidden states in the loss (0)"),
    "check_every": (int, "steps between two checkpoints (100)"),
    "check_tokens": (int, "of unseen texts looked at with each checkpoint (8192)"),
    "seed": (int, "of the order of batches (0)"),
}


def _add_student_steps(steps: Any) -> None:
    step = steps.add_parser("train", help="train a student on the corpus; its first shard is kept to test it")
    step.set_defaults(run=train_student)
    step.add_argument("target")
    step.add_argument("work", type=Path)
    step.add_argument("--name", default="student", help="of the run's folder in WORK (student)")
    step.add_argument("--depth", type=int, help="target layers that are kept (the least the corpus has)")
    step.add_argument("--layers", type=int, default=2, help="trained layers, copies of the target's next (2)")
    step.add_argument("--from-layers", type=int, nargs="+", help="the target's layers to copy instead")
    for name, (kind, what) in _TRAINING.items():
        step.add_argument(f"--{name.replace('_', '-')}", type=kind, help=what)
    step.add_argument("--train-head", action="store_true", default=False, help="train the head's rows, too")
    step.add_argument("--no-lens", dest="lens", action="store_false", help="no matrix between norm and head")
    step.add_argument("--no-prompts", dest="prompts", action="store_false", help="learn from answers alone")
    step = steps.add_parser("export", help="make a draft folder of a run's last checkpoint")
    step.set_defaults(run=export)
    step.add_argument("target")
    step.add_argument("work", type=Path)
    step.add_argument("dest", type=Path)
    step.add_argument("--name", default="student", help="of the run's folder in WORK (student)")
    step.add_argument("--bits", type=int, choices=BITS, default=8, help="of what was trained (8)")
    step.add_argument("--dense", action="store_true", help="keep what was trained in float32")
    step.add_argument("--share-embedding", action="store_true", help="leave it out; the target's is used")
    step = steps.add_parser("report", help="tokens per pass of drafts on prompts they were not trained on")
    step.set_defaults(run=report)
    step.add_argument("target")
    step.add_argument("drafts", nargs="*", help="folders of drafts, files of n-gram tables")
    step.add_argument("--prompts", type=Path, default=PROMPTS, help="a TOML file (examples/four_domains.toml)")
    step.add_argument("--per-domain", type=int, help="only so many prompts of each")
    step.add_argument("--nodes", type=int, nargs="+", default=[4, 16], help="in every pass (4 16)")
    step.add_argument("--max-tokens", type=int, default=128, help="of an answer (128)")


if __name__ == "__main__":
    main()
