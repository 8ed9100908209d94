"""What sampling parameters refuse, and what they make of what they take."""

from __future__ import annotations

from typing import Any

import pytest

from midspan.decoding.sampling_params import SamplingParams
from midspan.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 10**30),
        ("n", 1.0),
        ("n", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.5),
        ("seed", 2**64),
        ("seed", 0.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("-inf")),
        ("temperature", 10**400),
        ("logit_bias", {10**400: 1}),
        ("seed", 10**400),
        ("stop", "x" * 10**6),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["7"]),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.5]),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logprobs", 21),
        ("stop", 5),
        ("stop_token_ids", 7),
        ("stop_token_ids", {7: 1}),
        ("bad_words", 1.5),
        ("allowed_token_ids", "abc"),
        ("logit_bias", [1, 2]),
        ("ignore_eos", "yes"),
        ("detokenize", None),
        ("skip_special_tokens", 1),
        ("prompt_logprobs", -1),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.parameter == field
    assert field in caught.value.message or field in ("stop", "bad_words")
    assert field in caught.value.remedy or field == "top_p"
    assert len(caught.value.message) < 250


def test_more_minimum_than_maximum_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_bad_word_may_be_given_bare() -> None:
    assert SamplingParams(bad_words="ugly").bad_words == ("ugly",)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_a_changed_copy_is_checked_again() -> None:
    params = SamplingParams(temperature=0.5)
    assert params.replace(temperature=0.0).temperature == 0.0
    with pytest.raises(InvalidRequest):
        params.replace(temperature=-1.0)
