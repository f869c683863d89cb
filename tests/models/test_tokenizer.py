"""A tokenizer that is loaded without Python objects of its file is the one that mlx-lm loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, processors

from llmcad_mlx.models import tokenizer as loading
from llmcad_mlx.models.tokenizer import load_by_mlx_lm, load_tokenizer, tokenizer_loading_bytes
from tests.support.tiny_folder import EOS, SPECIAL, make_folder, make_tokenizer

TEXT = "the inn, an ann\non a the <|im_start|>on<|im_end|> <unk>"
OWN_VOCABULARY = ("Qwen2Tokenizer", "GPT2Tokenizer", "CohereTokenizer")  # built anew, from vocabulary and merges


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def change_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> None:
    """Set keys of tokenizer_config.json, or write another tokenizer.json."""
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def backend(wrapper: Any) -> dict[str, Any]:
    """All of the tokenizer, an absent prefix or suffix being an empty one."""
    content: dict[str, Any] = json.loads(wrapper._tokenizer.backend_tokenizer.to_str())
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        content["model"][name] = content["model"].get(name) or None
    return content


def assert_the_same(folder: Path, eos: Any = EOS) -> None:
    ours, theirs = load_tokenizer(folder, eos), load_by_mlx_lm(folder, {"trust_remote_code": False}, eos)
    assert type(ours._tokenizer) is type(theirs._tokenizer)
    assert backend(ours) == backend(theirs)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(theirs.encode(TEXT))
    for name in (
        "eos_token_ids",
        "all_special_ids",
        "chat_template",
        "think_start",
        "tool_call_start",
        "bos_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours._tokenizer) == len(theirs._tokenizer)


def without_objects(folder: Path) -> bool:
    """Whether it is loaded in two steps."""
    return loading._without_objects(folder, EOS) is not None


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", *OWN_VOCABULARY])
def test_it_is_what_mlx_lm_loads(folder: Path, name: str) -> None:
    change_tokenizer(folder, tokenizer_class=name)
    assert without_objects(folder)
    assert_the_same(folder)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", *OWN_VOCABULARY])
def test_new_and_special_tokens_get_the_same_ids(folder: Path, name: str) -> None:
    """Some are in the vocabulary, some in tokenizer.json alone, some in the configuration alone."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|later|>", "<|last|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A <|last|>",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in (SPECIAL[0], "<|last|>")],
    )
    change_tokenizer(
        folder, tokenizer, tokenizer_class=name, pad_token="<pad>", bos_token="th", unk_token="<|later|>"
    )
    assert_the_same(folder)
    change_tokenizer(folder, extra_special_tokens=["<more>", "an"])
    assert_the_same(folder)


def test_the_eos_tokens_of_the_config_are_heeded(folder: Path) -> None:
    for eos in (None, 3, [3, 4]):
        assert_the_same(folder, eos)


def test_other_kinds_are_loaded_as_mlx_lm_does(folder: Path) -> None:
    for tokenizer in (
        Tokenizer(models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>")),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0)], unk_id=0)),
    ):
        change_tokenizer(folder, tokenizer)
        assert not without_objects(folder)
        assert load_tokenizer(folder, EOS).get_vocab().items() >= tokenizer.get_vocab().items()
    change_tokenizer(folder, make_tokenizer(), fix_mistral_regex=True)
    assert not without_objects(folder)


def test_a_family_whose_prefix_is_another_is_loaded_as_mlx_lm_does(folder: Path) -> None:
    merges = [("t", "h")]
    bpe = models.BPE({"t": 0, "h": 1, "th": 2, "##h": 3}, merges, continuing_subword_prefix="")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Lowercase()
    change_tokenizer(folder, tokenizer, tokenizer_class="GPT2Tokenizer")
    assert_the_same(folder)


def test_nobody_parses_the_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 tokens, what transformers and mlx-lm see is a few."""
    vocabulary = {f"word{number}": number for number in range(20_000)}
    change_tokenizer(folder, Tokenizer(models.BPE(vocabulary, [])))
    sizes = []

    def small(path: Path, *arguments: Any) -> Any:
        sizes.append((path / "tokenizer.json").stat().st_size)
        return load_by_mlx_lm(path, *arguments)

    monkeypatch.setattr(loading, "load_by_mlx_lm", small)
    assert len(load_tokenizer(folder, EOS).get_vocab()) == 20_001  # and the end of a text
    assert len(sizes) == 1
    assert sizes[0] < 2000
    assert tokenizer_loading_bytes(folder) == round(11.2 * (folder / "tokenizer.json").stat().st_size)
    (folder / "tokenizer.json").unlink()
    assert tokenizer_loading_bytes(folder) == 0
