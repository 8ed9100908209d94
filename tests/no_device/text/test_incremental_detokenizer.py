"""Pieces of text add up to the whole, and none of them has to be taken back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.text.incremental_detokenizer import IncrementalDetokenizer
from midspan.text.tokenizer import Tokenizer

TEXTS = [
    "plain words, and  two spaces",
    "Grüße, où, naïve, Ω≈ç√∫",
    "你好，世界。こんにちは 안녕하세요",  # noqa: RUF001
    "नमस्ते दुनिया मुझे हिन्दी",
    "مرحبا بالعالم שלום",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "\ttabs\r\nand\n\n\nlines\u2028",
    "\U0010ffff\ue000\u0301combining\ufeffmark",
]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    loaded: Tokenizer = request.getfixturevalue(request.param)
    return loaded


def pieces_of(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(token_id).text for token_id in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_of_a_sound_text_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = pieces_of(detokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("text", TEXTS)
def test_every_piece_is_out_as_soon_as_its_last_byte_is_in(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode(text)
    given_so_far, bytes_so_far = "", b""
    for token_id in ids:
        given_so_far += detokenizer.push(token_id).text
        bytes_so_far += tokenizer.token_bytes(token_id)
        whole = bytes_so_far.decode(errors="ignore")
        assert given_so_far == whole.removeprefix(" " if tokenizer.bytes_rule.strip_count else "")  # type: ignore[union-attr]


@settings(deadline=None, max_examples=150)
@given(data=st.data(), skip=st.booleans(), continues=st.booleans())
def test_pieces_of_any_tokens_add_up_to_their_decoding(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, skip: bool, continues: bool
) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continues_text=continues)
    text = "".join(pieces_of(detokenizer, ids)) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip, continues_text=continues)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_pieces_of_any_text_add_up_to_it(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        pieces = pieces_of(detokenizer, tokenizer.encode(text))
        assert "".join(pieces) + detokenizer.finish() == text


@settings(deadline=None, max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_decoding_is_that_of_the_library(
    byte_level: Tokenizer, published: Mapping[str, tokenizers.Tokenizer], data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=40))
    assert byte_level.decode(ids, skip_special_tokens=skip) == published["byte_level"].decode(
        ids, skip_special_tokens=skip
    )


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40), more=st.text(max_size=40), skip=st.booleans())
def test_decoding_with_byte_fallback_is_that_of_the_library(
    sentencepiece: Tokenizer, published: Mapping[str, tokenizers.Tokenizer], text: str, more: str, skip: bool
) -> None:
    ids = [*sentencepiece.encode(text), 2, *sentencepiece.encode(more)]
    assert sentencepiece.decode(ids, skip_special_tokens=skip) == published["sentencepiece"].decode(
        ids, skip_special_tokens=skip
    )


def test_bytes_that_end_in_the_middle_of_a_character_come_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(pieces_of(detokenizer, ids[:-1])) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_can_become_no_character_come_out_at_once(sentencepiece: Tokenizer) -> None:
    byte = {number: 3 + number for number in range(256)}
    detokenizer = IncrementalDetokenizer(sentencepiece, continues_text=True)
    assert detokenizer.push(byte[0xF0]).text == ""
    assert detokenizer.push(byte[0x9F]).text == ""
    assert detokenizer.push(byte[0x41]).text == "\ufffdA"
    assert detokenizer.push(byte[0xFF]).text == "\ufffd"


def test_a_special_token_within_a_character_is_skipped_without_breaking_it(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("é")
    detokenizer = IncrementalDetokenizer(sentencepiece)
    assert "".join(pieces_of(detokenizer, [*ids[:-1], 2, ids[-1]])) == "é"


def test_text_that_continues_a_prompt_keeps_its_first_space(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the fox")
    assert "".join(pieces_of(IncrementalDetokenizer(sentencepiece), ids)) == "the fox"
    assert "".join(pieces_of(IncrementalDetokenizer(sentencepiece, continues_text=True), ids)) == " the fox"


def test_ids_outside_of_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert pieces_of(detokenizer, [tokenizer.vocab_size, 2**31 - 1, 2**40]) == ["", "", ""]


def test_another_decoder_is_followed_by_its_own_decoding(word_piece: Tokenizer) -> None:
    ids = word_piece.encode("the quick brown foxes jumped over, and about Hello tokens")
    detokenizer = IncrementalDetokenizer(word_piece)
    pieces = pieces_of(detokenizer, ids)
    assert "".join(pieces) + detokenizer.finish() == word_piece.decode(ids)
    assert len([piece for piece in pieces if piece]) > 5


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each character of an ASCII text."""
    return [next(iter(tokenizer.encode(letter))) for letter in text]


def test_a_stop_string_across_tokens_ends_the_text_before_it(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["END"])
    texts, stops = [], []
    for token_id in letters(byte_level, "abENxENDyz"):
        piece = detokenizer.push(token_id)
        texts.append(piece.text)
        stops.append(piece.stop)
    assert texts == ["a", "b", "", "", "ENx", "", "", "", "", ""]
    assert stops == [None] * 7 + ["END"] * 3
    assert detokenizer.finish() == ""


def test_a_stop_string_may_be_kept(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["END"], include_stop=True)
    assert "".join(pieces_of(detokenizer, letters(byte_level, "abENDyz"))) == "abEND"


def test_what_was_held_back_for_a_stop_string_comes_out_at_the_end(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["END"])
    assert "".join(pieces_of(detokenizer, letters(byte_level, "abEN"))) == "ab"
    assert detokenizer.finish() == "EN"


def test_stop_strings_within_min_tokens_do_not_count(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["a"], min_tokens=3)
    assert "".join(pieces_of(detokenizer, letters(byte_level, "aaabab"))) == "aaab"


def test_a_stop_string_that_min_tokens_cut_counts_when_it_is_complete(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["END"], min_tokens=2)
    assert "".join(pieces_of(detokenizer, letters(byte_level, "ENDx"))) == ""


def test_a_special_token_in_the_text_can_be_a_stop_string(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("a"), *byte_level.encode("<|user|>")]
    shown = IncrementalDetokenizer(byte_level, stop=["<|user|>"], skip_special_tokens=False)
    assert [shown.push(token_id).stop for token_id in ids] == [None, "<|user|>"]
    skipped = IncrementalDetokenizer(byte_level, stop=["<|user|>"])
    assert [skipped.push(token_id).stop for token_id in ids] == [None, None]


@settings(deadline=None, max_examples=150)
@given(
    text=st.text("ab😀é ", max_size=30),
    stop=st.lists(st.text("ab😀é ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_the_text_before_a_stop_string_does_not_depend_on_tokens(
    byte_level: Tokenizer, sentencepiece: Tokenizer, text: str, stop: list[str], include: bool
) -> None:
    ends = [(text.find(each) + len(each), -len(each)) for each in stop if each in text]
    expected = text
    if ends:
        end, length = min(ends)
        expected = text[: end if include else end + length]
    for tokenizer in (byte_level, sentencepiece):
        detokenizer = IncrementalDetokenizer(tokenizer, stop=stop, include_stop=include)
        pieces = pieces_of(detokenizer, tokenizer.encode(text))
        assert "".join(pieces) + detokenizer.finish() == expected
