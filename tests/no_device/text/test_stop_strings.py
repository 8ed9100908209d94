"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from midspan.text.stop_strings import StopStringMatcher


def test_without_stop_strings_text_passes_through() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("abc") == ("abc", None)
    assert matcher.finish() == ""


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopStringMatcher(["\n\nUser:"])
    assert matcher.push("hello\n") == ("hello", None)
    assert matcher.push("x") == ("\nx", None)
    assert matcher.push("\n\nUs") == ("", None)
    assert matcher.push("ed") == ("\n\nUsed", None)


def test_of_strings_that_end_together_the_longest_is_found() -> None:
    assert StopStringMatcher(["b", "ab"]).push("xab") == ("x", "ab")


def test_the_string_that_is_complete_first_is_found() -> None:
    assert StopStringMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")


def test_a_string_that_did_not_count_is_not_found_later() -> None:
    matcher = StopStringMatcher(["ab", "abcde"])
    assert matcher.push("ab", counts=False) == ("", None)
    assert matcher.push("c") == ("", None)
    assert matcher.push("x") == ("abcx", None)


letters = st.text("ab", max_size=12)


@given(
    pieces=st.lists(st.tuples(letters, st.booleans()), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_pieces_give_what_a_walk_over_the_whole_text_gives(
    pieces: list[tuple[str, bool]], stop: list[str], include: bool
) -> None:
    whole, expected, reason = "", None, None
    for text, counts in pieces:
        for letter in text:
            whole += letter
            ended = [each for each in sorted(stop, key=len, reverse=True) if counts and whole.endswith(each)]
            if ended and expected is None:
                reason = ended[0]
                expected = whole if include else whole[: -len(reason)]
    matcher = StopStringMatcher(stop, include_stop=include)
    given_out, found = "", None
    for text, counts in pieces:
        certain, found = matcher.push(text, counts=counts)
        given_out += certain
        if found is not None:
            break
    else:
        given_out += matcher.finish()
    assert found == reason
    assert given_out == (whole if expected is None else expected)
