"""N-gram tables against counting by hand, and a table as the draft of a tiny model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.table import make_counts
from llmcad_mlx import VocabularyError, load
from llmcad_mlx.drafting.table import NgramCounts, TableDrafter, vocabulary_hash
from llmcad_mlx.errors import ModelError
from llmcad_mlx.store.convert import convert_folder

PROMPT = [1, 2, 3]


def arrays(texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(text, np.int32) for text in texts]


def _table(texts: Sequence[Sequence[int]], order: int, drop_known: bool = True) -> TableDrafter:
    return TableDrafter(make_counts(arrays(texts), order, "v", drop_known))


def by_hand(texts: Sequence[Sequence[int]], order: int, context: Sequence[int]) -> dict[int, float]:
    """Witten and Bell's interpolation, from the definition."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for end in range(1, len(text)):
            for length in range(1, min(order, end + 1)):
                counts[tuple(text[end - length : end])][text[end]] += 1
    suffixes = [tuple(context[len(context) - n :]) for n in range(1, min(order, len(context) + 1))]
    found = [counts[suffix] for suffix in suffixes if counts[suffix]]
    probabilities = {token: 0.0 for entries in found for token in entries}
    for entries in found:
        for token, lower in probabilities.items():
            total, kinds = entries.total(), len(entries)
            probabilities[token] = (entries[token] + kinds * lower) / (total + kinds)
    return probabilities


@settings(deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=6),
    order=st.integers(2, 5),
    context=st.lists(st.integers(0, 6), min_size=1, max_size=6),
)
def test_probabilities_are_those_of_the_definition(texts: list[list[int]], order: int, context: list[int]) -> None:
    if all(len(text) < 2 for text in texts):
        return
    table = _table(texts, order, drop_known=False)
    found = dict(zip(*table.candidates(context, 100), strict=True))
    expected = by_hand(texts, order, context)
    assert found.keys() == expected.keys()
    for token, probability in expected.items():
        assert found[token] == pytest.approx(probability)
    assert sum(found.values()) <= 1.0 + 1e-9


def test_candidates_come_best_first_and_no_more_than_asked() -> None:
    table = _table([[1, 2, 1, 2, 1, 2, 1, 3, 1, 3, 1, 4]], 3)
    tokens, probabilities = table.candidates([9, 1], 2)
    assert tokens == [2, 3]
    assert probabilities[0] > probabilities[1]
    assert table.candidates([7], 5) == ([], [])
    assert table.candidates([], 5) == ([], [])


def test_what_a_shorter_context_knows_is_left_out() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    whole, short = (_table([text], 4, drop) for drop in (False, True))
    assert short.num_bytes < whole.num_bytes
    for end in range(1, len(text)):
        assert short.candidates(text[:end], 1)[0] == [text[end]]


def test_a_table_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = make_counts([rng.integers(0, 50, 400).astype(np.int32) for _ in range(5)], 4, "the vocabulary")
    path = tmp_path / "x.ngrams.safetensors"
    counts.save(path)
    read = NgramCounts.load(path)
    table, again = TableDrafter(counts), TableDrafter(read)
    assert (again.order, read.vocabulary) == (4, "the vocabulary")
    for _ in range(100):
        context = rng.integers(0, 50, 5).tolist()
        assert again.candidates(context, 8) == table.candidates(context, 8)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing", "starts", "kinds", "empty"])
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.ngrams.safetensors"
    make_counts(arrays([[1, 2, 3, 1, 2, 4]]), 3, "v").save(path)
    content, (found, metadata) = path.read_bytes(), mx.load(str(path), return_metadata=True)
    if damage in ("cut", "empty"):
        path.write_bytes(content[:-5] if damage == "cut" else b"")
    else:
        if damage == "foreign":
            metadata["format"] = "another"
        elif damage == "missing":
            del found["counts"]
        elif damage == "kinds":  # would divide by zero in the midst of a text
            found |= {name: mx.zeros_like(found[name]) for name in ("kinds", "totals")}
        else:
            found["starts"] = found["starts"] + 1
        mx.save_safetensors(str(path), found, metadata)
    with pytest.raises(ModelError, match=r"x\.ngrams\.safetensors: not an n-gram table"):
        NgramCounts.load(path)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_table_of_the_targets_text_drafts_it(
    own_home: Path, folder: Path, tmp_path: Path, temperature: float, streamed: bool
) -> None:
    """Beside a target in memory, and a checked and streamed one."""
    if streamed:
        convert_folder(folder, tmp_path / "bundle")
        folder = tmp_path / "bundle"
    options = {"max_tokens": 60, "temperature": temperature, "seed": 4}
    with load(folder, None) as engine:
        plain = engine.generate(PROMPT, **options).tokens
        vocabulary = vocabulary_hash(engine.tokenizer.get_vocab())
    draft = tmp_path / "draft.ngrams.safetensors"
    make_counts(arrays([[*PROMPT, *plain]]), 5, vocabulary).save(draft)
    memory: dict[str, Any] = {"pinned": 0, "verify": True} if streamed else {}
    with load(folder, str(draft), **memory) as engine:
        result = engine.generate(PROMPT, tree_nodes=8, **options)
    assert result.tokens == plain
    assert result.stats.tokens_per_pass > 2


def test_a_table_for_other_tokens_is_refused(own_home: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "draft.ngrams.safetensors"
    make_counts(arrays([[1, 2, 3, 1, 2, 4]]), 3, "another vocabulary").save(path)
    with pytest.raises(VocabularyError, match="made with other tokens"):
        load(folder, str(path))
