"""The models of a pair: load them, find out what they can do, compare their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.drafting.drafter import Drafter
from llmcad_mlx.drafting.model_drafter import ModelDrafter
from llmcad_mlx.drafting.ngram_drafter import NgramDrafter
from llmcad_mlx.drafting.ngram_table import NgramCounts, NgramTable, vocabulary_hash
from llmcad_mlx.drafting.table_drafter import TableDrafter
from llmcad_mlx.drafting.vocabulary import check_same_tokens
from llmcad_mlx.errors import ModelError, VocabularyError
from llmcad_mlx.models.host import prepare_for_host
from llmcad_mlx.models.loading import LoadedModel, load_model_folder
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.probe_cache import cached_probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.models.trimmed_head import FILE as DRAFT_TOKENS
from llmcad_mlx.models.trimmed_head import check_token_list
from llmcad_mlx.sources.cache_folder import home_folder
from llmcad_mlx.sources.resolve import TABLE_SUFFIX


def load_tree_model(
    path: Path, like: LoadedModel | None = None, alone: bool = False
) -> tuple[LoadedModel, TreeModel]:
    """Load one folder and find out what the model can do. like, alone: see `load_model_folder`."""
    loaded = load_model_folder(path, like=like, alone=alone)
    prepare_for_host(loaded.model)
    report = cached_probe(loaded.model, loaded.config, probe_folder(), probe)
    return loaded, TreeModel(loaded.model, loaded.config, report)


def load_drafters(path: Path | None, target: LoadedModel, model: TreeModel, vocab_size: int) -> list[Drafter]:
    """Who drafts for `model`, which was loaded as `target`, cheapest first: the n-gram drafter, then what is at
    `path`, if anything: an n-gram table, or a draft model's folder with tables in it or none; nobody for a model
    that cannot verify a draft.

    Raises ModelError or VocabularyError for an unfit draft model.
    """
    if model.capability == "plain":
        return []
    drafters: list[Drafter] = [NgramDrafter()]
    if path is not None and path.name.endswith(TABLE_SUFFIX):
        drafters.append(_load_table(path, target))
    elif path is not None:
        drafters += [_load_table(table, target) for table in sorted(path.glob(f"*{TABLE_SUFFIX}"))]
        drafters.append(_load_drafter(path, target, vocab_size))
    return drafters


def _load_table(path: Path, target: LoadedModel) -> TableDrafter:
    counts = NgramCounts.load(path)
    if counts.vocabulary != vocabulary_hash(target.tokenizer.get_vocab()):
        raise VocabularyError(f"{path}: the table was made with other tokens than the target's; make one for it")
    return TableDrafter(NgramTable(counts))


def _load_drafter(path: Path, target: LoadedModel, vocab_size: int) -> ModelDrafter:
    loaded, model = load_tree_model(path, like=target)
    made_for = (loaded.config.get("llmcad") or {}).get("vocabulary")
    if made_for not in (None, vocabulary_hash(target.tokenizer.get_vocab())):
        raise VocabularyError(
            f"{path}: the draft was made for other tokens than the target's; choose another draft"
        )
    check_same_tokens(target.tokenizer.get_vocab(), loaded.tokenizer.get_vocab())
    tokens = loaded.draft_tokens
    if tokens is not None:
        check_token_list(tokens, vocab_size, str(path / DRAFT_TOKENS))  # padding is not proposed either
    elif model.vocab_size < vocab_size:
        raise ModelError(
            f"{path}: the draft has {model.vocab_size} logits for {vocab_size} tokens; choose another draft"
        )
    first = model.forward([0], model.new_cache()).logits
    if not bool(mx.all(mx.isfinite(first)).item()):  # the probe's report may stem from other weights
        raise ModelError(
            f"{path}: cannot be used as a draft: its logits are not finite; choose another draft or 'ngram'"
        )
    try:
        return ModelDrafter(model, vocabulary=tokens)
    except ValueError as error:
        raise ModelError(f"{path}: cannot be used as a draft: {error}; choose another draft or 'ngram'") from None


def real_tokens(loaded: LoadedModel, model: TreeModel) -> int:
    """Ids beyond the largest the tokenizer knows are padding. Raises ModelError for what cannot be a target."""
    if loaded.drafts_only:
        raise ModelError(f"{loaded.path}: can only draft: {loaded.drafts_only}; give it as --draft")
    ids: Sequence[int] = list(loaded.tokenizer.get_vocab().values())
    largest = max(ids, default=-1)
    if largest < 0:
        raise ModelError(f"{loaded.path}: the tokenizer has no tokens; download the folder again")
    return min(largest + 1, model.vocab_size)


def probe_folder() -> Path:
    """Where reports of probes are kept."""
    return home_folder() / "probes"
