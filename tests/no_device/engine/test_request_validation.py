"""Requests that can never succeed are refused with the reason; the others are completed."""

from __future__ import annotations

from typing import Any

import pytest

from midspan import LLM, ContextLengthExceeded, InvalidRequest, SamplingParams
from midspan.engine.request_validation import PreparedRequest, prepare_request
from midspan.engine.status import ModelInfo


@pytest.fixture
def prepare(tiny_llm: LLM) -> Any:
    def call(prompt: Any, model: ModelInfo = tiny_llm.model, **params: Any) -> PreparedRequest:
        return prepare_request(prompt, SamplingParams(**params), tokenizer=tiny_llm.get_tokenizer(), model=model)

    return call


def test_text_becomes_the_tokenizers_ids(prepare: Any, tiny_llm: LLM) -> None:
    prepared = prepare("the quick brown fox")
    assert prepared.prompt == "the quick brown fox"
    assert prepared.prompt_ids == tiny_llm.get_tokenizer().encode("the quick brown fox")
    assert prepare([5, 6]).prompt is None
    assert prepare((5, 6)).prompt_ids == [5, 6]


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(prepare: Any, prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(prompt)
    assert caught.value.parameter == "prompt"


@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"abc", {5: 6}, {5, 6}, object()], ids=lambda one: type(one).__name__)
def test_what_is_neither_text_nor_ids_is_refused(prepare: Any, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=type(prompt).__name__) as caught:
        prepare(prompt)
    assert (caught.value.parameter, bool(caught.value.remedy)) == ("prompt", True)


def test_an_absurdly_long_id_is_refused_in_few_words(prepare: Any) -> None:
    with pytest.raises(InvalidRequest, match="16610 bits") as caught:
        prepare([10**5000])
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("ids", [[320], [-1], [2**40], [1.5], ["1"], [True], [None], [[1]]])
def test_ids_out_of_the_vocabulary_are_refused_and_named(prepare: Any, ids: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare([1, *ids])
    assert caught.value.parameter == "prompt"
    assert repr(ids[0]) in caught.value.message


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("stop_token_ids", [320]), ("allowed_token_ids", [3, 500]), ("logit_bias", {320: 1.0})],
)
def test_ids_of_parameters_must_be_in_the_vocabulary(prepare: Any, parameter: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="out of the vocabulary of 320") as caught:
        prepare("the", **{parameter: value})
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("parameter", "value"), [("stop", ["\ud800"]), ("bad_words", ["a\udfff"])], ids=["stop", "bad_words"]
)
def test_half_a_surrogate_pair_is_refused_wherever_text_comes_in(prepare: Any, parameter: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        prepare("the", **{parameter: value})
    assert caught.value.parameter == parameter
    with pytest.raises(InvalidRequest, match="surrogate"):
        prepare("the \ud83d")


def test_a_prompt_that_leaves_no_room_is_refused_in_the_words_that_clients_look_for(prepare: Any) -> None:
    assert prepare([5] * 255).params.max_tokens == 1
    for length in (256, 1000):
        with pytest.raises(ContextLengthExceeded, match="This model's maximum context length is 256 tokens") as caught:
            prepare([5] * length)
        assert caught.value.code == "context_length_exceeded"
        assert str(length) in caught.value.message


def test_max_tokens_is_cut_to_the_context(prepare: Any) -> None:
    assert prepare([5] * 200, max_tokens=None).params.max_tokens == 56
    assert prepare([5] * 200, max_tokens=10**6).params.max_tokens == 56
    assert prepare([5] * 200, max_tokens=7).params.max_tokens == 7


def test_more_min_tokens_than_there_is_room_are_refused(prepare: Any) -> None:
    with pytest.raises(ContextLengthExceeded, match="min_tokens asks for 60"):
        prepare([5] * 200, max_tokens=None, min_tokens=60)


def test_more_logprobs_than_the_device_gives_are_refused(prepare: Any, tiny_llm: LLM) -> None:
    import msgspec

    model = msgspec.structs.replace(tiny_llm.model, max_logprobs=5)
    assert prepare("the", model=model, logprobs=5).params.logprobs == 5
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidRequest, match="at most 5") as caught:
            prepare("the", model=model, **{name: 6})
        assert caught.value.parameter == name


def test_stop_strings_without_text_are_refused(prepare: Any) -> None:
    with pytest.raises(InvalidRequest, match="detokenize"):
        prepare("the", stop=["x"], detokenize=False)


def test_bad_words_are_spelled_at_the_start_and_after_a_space(prepare: Any, tiny_llm: LLM) -> None:
    encode = tiny_llm.get_tokenizer().encode
    assert set(prepare("the", bad_words=["fox"]).bad_word_ids) == {tuple(encode("fox")), tuple(encode(" fox"))}
