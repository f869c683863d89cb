"""A tiny target of three layers, and a corpus that it has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.corpus import CorpusSettings, Ids, shards_in, write_corpus
from distill.writing import Writer
from llmcad_mlx.loader import load_tree_model
from llmcad_mlx.models.folder import LoadedModel, load_model_folder
from tests.support.tiny_folder import EOS, VOCAB, make_folder, tiny_environment


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("student") / "model", layers=3)


@pytest.fixture(scope="package")
def target(folder: Path) -> LoadedModel:
    return load_model_folder(folder)


@pytest.fixture(scope="package")
def tokens() -> Ids:
    return np.array([0, 1, 5, 6, 7, 20, 21, 22, 23, 24, 30, 31, 50, 60], np.int32)


@pytest.fixture(scope="package")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards with what the first layer says."""
    path = tmp_path_factory.mktemp("corpus")
    with tiny_environment(path / "home"):
        loaded, model = load_tree_model(folder)
        settings = CorpusSettings((1,), batch=8, max_tokens=16)
        write_corpus(path / "corpus", 400, Writer(model, [EOS], VOCAB), loaded.tokenizer, settings, report=str)
    assert len(shards_in(path / "corpus")) >= 4
    return path / "corpus"
