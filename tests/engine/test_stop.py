"""Stop strings in a stream, whatever the cuts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_mlx.engine.text import StopFeed, StopStrings
from llmcad_mlx.errors import UsageError

TEXT = st.text(alphabet="ab.", max_size=24)
STOPS = st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), max_size=4)


def whole_string_answer(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first prefix that ends with a stop string, the longest if several."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(TEXT, STOPS, st.lists(st.integers(0, 24), max_size=6))
def test_any_cut_gives_the_whole_string_answer(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    shown, matched = "", False
    borders = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(borders):
        fed = matcher.feed(text[start:end])
        shown += fed.emit
        matched = fed.matched
    shown += matcher.flush()
    assert (shown, matched) == whole_string_answer(text, stops)


@given(TEXT, STOPS)
def test_only_what_may_begin_a_stop_is_held(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        fed = matcher.feed(character)
        shown += fed.emit
        if fed.matched:
            return
        tails = [text[start:end] for start in range(end + 1)]
        held = next(tail for tail in tails if not tail or any(stop.startswith(tail) for stop in stops))
        assert shown + held == text[:end]


def test_across_pieces() -> None:
    matcher = StopStrings(["</end>"])
    assert matcher.feed("text <") == StopFeed("text ", False)
    assert matcher.feed("/en") == StopFeed("", False)
    assert matcher.feed("d> more") == StopFeed("", True)
    assert matcher.feed("more") == StopFeed("", True)
    assert matcher.flush() == ""


def test_false_start_is_released() -> None:
    matcher = StopStrings(["aab"])
    assert matcher.feed("xaa") == StopFeed("x", False)
    assert matcher.feed("a") == StopFeed("a", False)
    assert matcher.flush() == "aa"
    assert matcher.flush() == ""


def test_complete_first_wins() -> None:
    assert StopStrings(["long stop", "g s"]).feed("a long stop") == StopFeed("a lon", True)
    assert StopStrings(["b", "ab"]).feed("xab") == StopFeed("x", True)


def test_no_stops_hold_nothing() -> None:
    assert StopStrings([]).feed("anything") == StopFeed("anything", False)


@pytest.mark.parametrize("stops", ["stop", [""], ["a", 3], [None], None, 3])
def test_what_is_no_list_of_strings_is_refused(stops: object) -> None:
    with pytest.raises(UsageError, match=r"^stop: "):
        StopStrings(stops)  # type: ignore[arg-type]
