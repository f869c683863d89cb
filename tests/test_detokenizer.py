"""Pieces of text, of every kind of tokenizer: together they are what it decodes from all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmcad_mlx.detokenizer import Detokenizer, TokenTexts, cleans_up, repair_decoder

WORDS = ["▁", "▁the", "▁x", "x", ",", "▁,", "▁▁▁", "é", "日", "ing", "'s", "▁'s", "\n", "▁return"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ADDED = ["đem", "ilÖve", "日本é", "<tool>"]


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen, SmolLM."""
    words = [*pre_tokenizers.ByteLevel.alphabet(), "Ġthe", "Ġa", "ing", "ĠĠ", "ĠĠĠ", "Ċ", "ĊĊ", "Ġ,", "n't", "Ġn"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(dict.fromkeys(words))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tekken() -> Tokenizer:
    """Mistral's, converted with the decoder of another kind."""
    tokenizer = byte_level()
    tokenizer.decoder = sentencepiece().decoder
    return tokenizer


def sentencepiece(first_blank: bool = False) -> Tokenizer:
    """Llama 2 and Mistral; Gemma keeps the first blank."""
    words = ["<unk>", *BYTES, *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if first_blank else [*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5 and others with a unigram model."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in WORDS)], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "##ing", "##s", "n", "'", "t", "s", ",", ".", "do", "not", "n't", "'m", "!", "##'"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "tekken": tekken,
    "SentencePiece": sentencepiece,
    "SentencePiece with the first blank": lambda: sentencepiece(first_blank=True),
    "Metaspace": metaspace,
    "WordPiece": wordpiece,
}


def made(kind: str, clean: bool = False) -> Any:
    """As transformers loads it and we make it ready; clean: it takes away blanks before punctuation."""
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens(ADDED)
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=clean)
    repair_decoder(loaded)
    return loaded


TOKENIZERS = {(kind, clean): made(kind, clean) for kind in KINDS for clean in (False, True)}


def streamed(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, cleans_up(tokenizer))
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@pytest.mark.parametrize(("kind", "clean"), TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_all_pieces_are_what_the_tokenizer_decodes(kind: str, clean: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind, clean]
    any_token = st.integers(0, len(tokenizer) - 1)
    few = data.draw(st.lists(any_token, min_size=1, max_size=10))
    tokens = data.draw(st.lists(st.sampled_from(few) | any_token, max_size=80))
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("kind", "words", "pieces"),
    [
        ("byte-level", ["Ġthe", "ĠĠĠ", "Ċ", "ing"], [" the", "   ", "\n", "ing", ""]),
        ("byte-level", ["Ã", "©", "đem", "日本é"], ["", "é", "đem", "日本é", ""]),
        ("tekken", ["Ġthe", "Ċ", "Ã", "©"], [" the", "\n", "", "é", ""]),
        ("SentencePiece", ["▁the", "\n", "▁▁▁", "▁return"], ["the", "\n", "   ", " return", ""]),
        (
            "SentencePiece",
            ["▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "x"],
            ["the", "", "", "", "", "😀x", ""],
        ),
        ("SentencePiece with the first blank", ["▁the", "▁x"], [" the", " x", ""]),
        ("WordPiece", ["the", "##s", ",", "do"], ["the", "s", ",", "", " do"]),
    ],
)
def test_text_comes_with_the_token_that_makes_it_certain(kind: str, words: list[str], pieces: list[str]) -> None:
    tokenizer = TOKENIZERS[kind, False]
    assert streamed(tokenizer, tokenizer.convert_tokens_to_ids(words)) == pieces


def test_long_texts_take_no_longer_for_each_token() -> None:
    decoded: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZERS["byte-level", False], name)

        def decode(self, tokens: Sequence[int]) -> str:
            decoded.append(len(tokens))
            return str(TOKENIZERS["byte-level", False].decode(tokens))

    streamed(Counting(), [*range(60, 120)] * 50)
    assert max(decoded) < 30


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_its_bytes(kind: str) -> None:
    """Together they are the text, the blank of the first word left out where the tokenizer leaves it out."""
    tokenizer = TOKENIZERS[kind, False]
    texts = TokenTexts(tokenizer)
    smile = ["ð", "Ł", "ĺ", "Ģ"] if kind in ("byte-level", "tekken") else ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    for words in (smile, ["▁the", "▁x", "x"], ["Ġthe", "ĠĠ", "đem"], ["the", "##ing", "do"], ADDED):
        tokens = tokenizer.convert_tokens_to_ids(words)
        if len(set(tokens) - {tokenizer.unk_token_id, None}) == len(words):
            whole = b"".join(map(texts.bytes_of, tokens)).decode()
            assert whole.removeprefix(" ") == tokenizer.decode(tokens).removeprefix(" ")


def test_a_lone_token_keeps_its_blank() -> None:
    for kind, word in [
        ("SentencePiece", "▁the"),
        ("byte-level", "Ġthe"),
        ("Metaspace", "▁the"),
        ("WordPiece", "the"),
    ]:
        tokenizer = TOKENIZERS[kind, False]
        assert TokenTexts(tokenizer).text(tokenizer.convert_tokens_to_ids(word)) == " the"


def test_only_the_wrong_decoder_is_replaced() -> None:
    for kind in KINDS:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
        before = repr(tokenizer.backend_tokenizer.decoder)
        repair_decoder(tokenizer)
        assert (repr(tokenizer.backend_tokenizer.decoder) != before) == (kind == "tekken")
