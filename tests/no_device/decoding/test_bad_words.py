"""Words as token sequences, and when their last token is forbidden."""

from __future__ import annotations

from midspan.decoding.bad_words import BadWordMatcher, bad_word_ids


def letters(text: str) -> list[int]:
    """One token for each character."""
    return [ord(letter) for letter in text]


def test_a_word_is_listed_bare_and_after_a_space() -> None:
    assert bad_word_ids(letters, ["ab"]) == (tuple(b"ab"), tuple(b" ab"))


def test_a_word_given_with_its_space_is_listed_once() -> None:
    assert bad_word_ids(letters, [" ab", "ab"]) == (tuple(b" ab"), tuple(b"ab"))


def test_a_word_that_encodes_to_nothing_forbids_nothing() -> None:
    assert bad_word_ids(lambda text: [], ["ab"]) == ()


def test_the_last_token_is_forbidden_only_after_the_others() -> None:
    matcher = BadWordMatcher([(1, 2, 3)], [])
    assert matcher.forbidden() == set()
    for token_id in (1, 1, 2):
        matcher.append(token_id)
    assert matcher.forbidden() == {3}
    matcher.append(9)
    assert matcher.forbidden() == set()


def test_a_word_of_one_token_is_always_forbidden() -> None:
    assert BadWordMatcher([(5,)], [1, 2]).forbidden() == {5}


def test_a_word_that_the_prompt_begins_is_not_completed() -> None:
    assert BadWordMatcher([(1, 2, 3), (2, 4), (7, 8)], [9, 1, 2]).forbidden() == {3, 4}
