"""Which token ends a sequence, and what it is called."""

from __future__ import annotations

from midspan.decoding.sampling_params import SamplingParams
from midspan.decoding.stopping import Stop, StopRule, stop_rule


def test_end_of_sequence_stops_without_a_reason() -> None:
    rule = StopRule(max_tokens=10, eos_token_ids=frozenset({2, 3}))
    assert rule.check(1, 3) == Stop(finish_reason="stop")
    assert rule.check(1, 4) is None


def test_a_stop_token_is_named_as_the_reason() -> None:
    rule = StopRule(max_tokens=10, eos_token_ids=frozenset({2}), stop_token_ids=frozenset({7}))
    assert rule.check(4, 7) == Stop(finish_reason="stop", stop_reason=7)


def test_ignored_end_of_sequence_goes_on_unless_the_request_lists_it() -> None:
    ignoring = StopRule(max_tokens=10, eos_token_ids=frozenset({2}), ignore_eos=True)
    assert ignoring.check(1, 2) is None
    listed = StopRule(max_tokens=10, eos_token_ids=frozenset({2}), stop_token_ids=frozenset({2}), ignore_eos=True)
    assert listed.check(1, 2) == Stop(finish_reason="stop", stop_reason=2)


def test_no_token_stops_before_min_tokens_but_the_length_does() -> None:
    rule = StopRule(max_tokens=3, eos_token_ids=frozenset({2}), stop_token_ids=frozenset({7}), min_tokens=3)
    assert rule.check(1, 2) is None
    assert rule.check(2, 7) is None
    assert rule.check(3, 2) == Stop(finish_reason="length")


def test_the_first_token_after_min_tokens_may_stop() -> None:
    rule = StopRule(max_tokens=9, eos_token_ids=frozenset({2}), min_tokens=3)
    assert rule.check(3, 2) is None
    assert rule.check(4, 2) == Stop(finish_reason="stop")


def test_a_stop_on_the_last_allowed_token_is_a_stop_and_not_the_length() -> None:
    rule = StopRule(max_tokens=2, eos_token_ids=frozenset({2}))
    assert rule.check(2, 2) == Stop(finish_reason="stop")
    assert rule.check(2, 5) == Stop(finish_reason="length")


def test_the_context_limits_what_the_request_leaves_open() -> None:
    assert stop_rule(SamplingParams(max_tokens=None), eos_token_ids=(2,), max_tokens=100).max_tokens == 100
    assert stop_rule(SamplingParams(max_tokens=5), eos_token_ids=(2,), max_tokens=100).max_tokens == 5
    assert stop_rule(SamplingParams(max_tokens=500), eos_token_ids=(2,), max_tokens=100).max_tokens == 100
