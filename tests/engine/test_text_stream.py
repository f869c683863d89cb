"""Tokens in, text out, and why it ended."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmcad_mlx.detokenizer import Detokenizer
from llmcad_mlx.engine.text import Piece, StopStrings, TextStream
from llmcad_mlx.settings import StopSettings
from tests.support.tiny_folder import EOS, make_tokenizer, token_ids

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer())
IDS = token_ids()


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def feed(tokens: list[int], limit: int | None = None, **stopping: object) -> list[Piece]:
    """Pieces up to the token that ends the text."""
    stream = TextStream(Detokenizer(TOKENIZER, cleans_up=False), StopSettings.of(**stopping), {EOS}, limit)
    for token in tokens:
        ended = stream.push(token)
        assert ended == (stream.finish_reason is not None)
        if ended:
            break
    pieces = stream.take()
    assert stream.take() == []
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_each_token_gives_one_piece_with_its_text() -> None:
    pieces = feed(encode("the cat"))
    assert [piece.text for piece in pieces] == ["the", " ", "c", "a", "t"]
    assert [piece.token for piece in pieces] == encode("the cat")
    assert {piece.finish_reason for piece in pieces} == {None}


def test_a_character_of_several_tokens_comes_with_its_last() -> None:
    tokens = encode("é😀")
    assert len(tokens) == 6
    assert [piece.text for piece in feed(tokens)] == ["", "é", "", "", "", "😀"]


def test_half_a_character_is_shown_as_such_at_the_end() -> None:
    pieces = feed(encode("a😀")[:-1], limit=4)
    assert text_of(pieces) == "a\N{REPLACEMENT CHARACTER}"
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("stopping", [{}, {"stop_tokens": [IDS["b"]]}])
def test_end_and_stop_tokens_are_kept_but_not_shown(stopping: dict[str, object]) -> None:
    end = IDS["b"] if stopping else EOS
    pieces = feed([IDS["a"], end, IDS["c"]], **stopping)
    assert pieces == [Piece(IDS["a"], "a", None), Piece(end, "", "stop")]


def test_the_limit_ends_with_length_unless_the_last_token_ends_the_text_anyway() -> None:
    assert feed(encode("xyz"), limit=2)[-1] == Piece(IDS["y"], "y", "length")
    assert feed([IDS["x"], EOS], limit=2)[-1].finish_reason == "stop"
    assert feed(encode("xyz"), limit=2, stop="y")[-1] == Piece(IDS["y"], "", "stop")


def test_the_first_blank_is_text() -> None:
    assert text_of(feed(encode(" the cat"))) == " the cat"
    assert feed(encode(" the cat"), stop=" the")[-1].finish_reason == "stop"


def whole_string_answer(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first prefix that ends with a stop string, the longest if several."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(
    text=st.text("ab <", max_size=30),
    stops=st.lists(st.text("ab <", min_size=1, max_size=4), max_size=3),
)
def test_stopping_does_not_depend_on_how_text_is_cut_into_tokens(text: str, stops: list[str]) -> None:
    pieces = feed([*encode("x" + text), EOS], stop=stops)
    assert text_of(pieces) == "x" + whole_string_answer(text, stops)[0]
    assert pieces[-1].finish_reason == "stop"
    assert [piece.token for piece in pieces] == [*encode("x" + text), EOS][: len(pieces)]


# -- stop strings alone --------------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab.", max_size=24)
STOPS = st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), max_size=4)


@given(TEXT, STOPS, st.lists(st.integers(0, 24), max_size=6))
def test_any_cut_gives_the_whole_string_answer(text: str, stops: list[str], cuts: list[int]) -> None:
    """And only what may begin a stop string is held back."""
    matcher, shown = StopStrings(stops), ""
    for start, end in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        shown += matcher.feed(text[start:end])
        if matcher.matched:
            break
        tails = [text[start:end] for start in range(end + 1)]
        held = next(tail for tail in tails if not tail or any(stop.startswith(tail) for stop in stops))
        assert (matcher.held, shown + held) == (held, text[:end])
    assert (shown + matcher.held, matcher.matched) == whole_string_answer(text, stops)
