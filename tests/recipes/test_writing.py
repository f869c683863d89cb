"""The target writing many texts at once against it writing them one by one; the corpus in shards."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from distill.corpus import ChatForm, CorpusSettings, Shard, shards_in, write_corpus
from distill.table import make_counts, tokens_per_pass
from distill.writing import Text, Writer, loops
from llmcad_mlx import load
from llmcad_mlx.drafting.table import TableDrafter
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.models.adapt import adaptations
from tests.support.tiny import VOCAB, tiny_tree_model
from tests.support.tiny_folder import EOS, make_folder

pytestmark = pytest.mark.usefixtures("tiny_home")


def test_texts_written_together_are_those_written_alone() -> None:
    model = tiny_tree_model(seed=2)
    prompts = [[1, 2, 3], [1, 2, 9, 8, 7, 6], [1, 5], [1, 2, 3, 4]]
    texts = [Text(list(prompt), len(prompt)) for prompt in prompts]
    written = Writer(model, [], VOCAB).write(texts, 20, seed=0)
    assert written == 20 * len(texts)
    for prompt, text in zip(prompts, texts, strict=True):
        cache = model.new_cache()
        tokens = list(prompt)
        model.prefill(tokens[:-1], cache)
        while len(tokens) < len(text.tokens):
            result = model.forward(tokens[-1:], cache)
            cache.commit(list(result.slots))
            tokens.append(int(mx.argmax(result.logits[0]).item()))
        assert text.tokens == tokens


def test_a_text_ends_at_a_stop_token_and_the_others_go_on() -> None:
    model = tiny_tree_model(seed=2)
    free, texts = ([Text([1, number], 2) for number in range(2, 10)] for _ in range(2))
    Writer(model, [], VOCAB).write(free, 12, seed=0)
    stop = free[0].tokens[5]
    Writer(model, [stop], VOCAB).write(texts, 12, seed=0)
    for text, whole in zip(texts, free, strict=True):
        after = whole.tokens[2:]
        end = after.index(stop) + 1 if stop in after else len(after)
        assert text.tokens[2:] == after[:end]
    assert len({len(text.tokens) for text in texts}) > 1


def test_activations_are_kept_for_every_token_that_was_fed() -> None:
    model = tiny_tree_model(seed=2, layers=3)
    before = [adaptations(layer) for layer in model.model.layers]
    texts = [Text([1, 2, 3], 3), Text([1, 2, 4, 5, 6], 5)]
    Writer(model, [], VOCAB).write(texts, 6, seed=0, depths=[1, 3])
    for text in texts:
        assert text.hidden.keys() == {"1", "3", "final"}
        fed = len(text.tokens) - 1
        assert all(text.stacked(name).shape[0] == fed for name in text.hidden)
        # What is final gives the token that was chosen.
        logits = text.stacked("final").astype(np.float32) @ np.array(model.model.lm_head.weight).T
        assert logits.argmax(axis=1)[text.num_given - 1 :].tolist() == text.tokens[text.num_given :]
    assert [adaptations(layer) for layer in model.model.layers] == before


def test_the_same_seed_draws_the_same_texts() -> None:
    model = tiny_tree_model(seed=2)
    texts = [[Text([1, 2, 3], 3, temperature=1.0) for _ in range(4)] for _ in range(3)]
    for each, seed in zip(texts, (1, 1, 2), strict=True):
        Writer(model, [], VOCAB).write(each, 10, seed)
    drawn = [[text.tokens for text in each] for each in texts]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(map(tuple, drawn[0]))) > 1


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [([1, 2, 3] * 30, True), ([7] * 60, True), (list(range(90)), False), ([1, 2] * 10, False),
     ([*range(40), 1] * 2, False)],
)  # fmt: skip
def test_loops_are_noticed(tokens: list[int], looping: bool) -> None:
    assert loops(tokens) == looping


def test_a_corpus_goes_on_where_it_was(tmp_path: Path) -> None:
    loaded, model = load_tree_model(make_folder(tmp_path / "model", layers=2))
    tokenizer = loaded.tokenizer
    settings = CorpusSettings((1,), batch=6, max_tokens=12)
    writer = Writer(model, [EOS], len(tokenizer.get_vocab()))
    for folder, targets in ((tmp_path / "at-once", [120]), (tmp_path / "in-parts", [1, 60, 120])):
        for num_tokens in targets:
            write_corpus(folder, num_tokens, writer, tokenizer, settings, report=str)
    shards = shards_in(tmp_path / "at-once")
    assert len(shards) > 1
    assert sorted(shards) == sorted((tmp_path / "at-once").iterdir())
    in_parts = sorted((tmp_path / "in-parts").iterdir())
    for one, other in zip(shards, in_parts, strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())
    form = ChatForm.of(tokenizer)
    for tokens, given in Shard.load(shards[0]).texts():
        assert tokens[: len(form.before)].tolist() == list(form.before)
        assert tokens[given - len(form.after) : given].tolist() == list(form.after)
        assert len(tokens) > given


def test_a_forecast_lies_between_plain_decoding_and_the_size_of_the_tree(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    with load(folder, None) as engine:
        given = [[1, 2, n] for n in range(3, 9)]
        texts = [np.array([*ids, *engine.generate(ids, max_tokens=40).tokens], np.int32) for ids in given]
    table, perfect = TableDrafter(make_counts(texts, 3, "")), TableDrafter(make_counts(texts[:1], 12, ""))
    assert tokens_per_pass(perfect, [(texts[0], 3)], 64) > 5
    reached = tokens_per_pass(table, [(text, 3) for text in texts], 8)
    assert 1.0 < reached <= 8
    assert tokens_per_pass(table, [(text, 3) for text in texts], 1) == 1.0
