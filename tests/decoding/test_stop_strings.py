"""Stop strings: where the text ends does not depend on how it arrives, and nothing is held back without a reason."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fewer.decoding.stop_strings import StopStrings
from fewer.errors import UsageError

letters = st.text("ab\n🙂", max_size=24)
stop_lists = st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read letter by letter: the first moment at which the text ends with a stop string; the longest one counts."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[left:right] for left, right in zip(places, places[1:], strict=False)]


@given(letters, stop_lists, st.lists(st.integers(0, 24)))
@example("abba", ["bb", "abba"], [])
@example("ab", ["a", "ab"], [])
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    filter_ = StopStrings(stops)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += filter_.feed(piece)
    shown += filter_.finish()
    assert (shown, filter_.found is not None) == expected(text, stops)
    assert filter_.found is None or filter_.found in stops


@given(letters, stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    filter_, shown = StopStrings(stops), ""
    for index, letter in enumerate(text):
        shown += filter_.feed(letter)
        if filter_.found is not None:
            break
        held = text[len(shown) : index + 1]
        assert filter_.held == held
        assert not held or any(stop.startswith(held) for stop in stops)
        ends = [text[index + 1 - size : index + 1] for size in range(1, index + 2)]
        longest = max((len(end) for end in ends for stop in stops if stop.startswith(end)), default=0)
        assert len(held) == longest


def test_nothing_comes_after_a_stop_string() -> None:
    filter_ = StopStrings(["end"])
    assert filter_.feed("the end of it") == "the "
    assert filter_.found == "end"
    assert filter_.feed("more") == "" and filter_.finish("more") == ""


def test_the_last_piece_shows_what_was_held() -> None:
    filter_ = StopStrings(["end"])
    assert filter_.feed("the e") == "the "
    assert filter_.finish("n") == "en"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopStrings(["a", ""])
