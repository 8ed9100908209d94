"""Of the requests that were live when the engine process died, the one that it dies of is found, and no other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.messages import AddRequest, SequenceStart
from midspan.engine.restart_policy import RestartPolicy
from midspan.engine.resumption import Resumption


def request(name: str, n: int = 1) -> AddRequest:
    starts = [SequenceStart(index=index, seed=0) for index in range(n)]
    return AddRequest(request_id=name, prompt_ids=[1], params=SamplingParams(n=n), sequences=starts)


def test_new_requests_are_sent_at_once_while_nobody_is_on_trial() -> None:
    sent: list[str] = []
    resumption = Resumption(lambda message: sent.append(message.request_id))
    resumption.let_in(request("a"))
    resumption.let_in(request("b"))
    assert sent == ["a", "b"]
    assert resumption.lost() is None


def test_the_next_one_is_let_in_when_the_one_on_trial_has_generated_or_ended() -> None:
    sent: list[str] = []
    resumption = Resumption(lambda message: sent.append(message.request_id))
    resumption.begin([request("a"), request("b"), request("c"), request("d")])
    resumption.let_in(request("new"))
    assert sent == ["a"]
    resumption.generated("a", 0)
    resumption.generated("a", 0)
    assert sent == ["a", "b"]
    assert not resumption.ended("b")
    assert sent == ["a", "b", "c"]
    assert resumption.ended("d")
    resumption.generated("c", 0)
    assert sent == ["a", "b", "c", "new"]
    resumption.generated("new", 0)
    resumption.let_in(request("newer"))
    assert sent[-1] == "newer"


def test_a_request_is_on_trial_until_all_its_sequences_have_generated() -> None:
    sent: list[str] = []
    resumption = Resumption(lambda message: sent.append(message.request_id))
    resumption.begin([request("a", n=3), request("b")])
    for index in (1, 1, 0):
        resumption.generated("a", index)
    assert sent == ["a"]
    resumption.generated("a", 2)
    assert sent == ["a", "b"]


def test_one_that_was_not_alone_is_tried_first_the_next_time() -> None:
    sent: list[str] = []
    resumption = Resumption(lambda message: sent.append(message.request_id))
    resumption.begin([request("a"), request("b")])
    resumption.generated("a", 0)
    assert resumption.lost() is None
    sent.clear()
    resumption.begin([request("a"), request("b")])
    assert sent == ["b"]
    assert resumption.lost() == "b"


@given(count=st.integers(1, 12), data=st.data())
def test_every_guilty_request_is_found_with_two_deaths_more_and_no_other_is_blamed(
    count: int, data: st.DataObject
) -> None:
    names = [str(number) for number in range(count)]
    guilty = data.draw(st.sets(st.sampled_from(names)))
    inside: list[str] = []
    resumption = Resumption(lambda message: inside.append(message.request_id))
    for name in names:
        resumption.let_in(request(name))
    resumption.lost()
    live, found, deaths = list(names), set(), 0
    while True:
        inside.clear()
        resumption.begin([request(name) for name in live])
        tried = 0
        while tried < len(inside) and inside[tried] not in guilty:
            resumption.generated(inside[tried], 0)
            tried += 1
        if tried == len(inside):
            break
        deaths += 1
        culprit = resumption.lost()
        if culprit is not None:
            found.add(culprit)
            live.remove(culprit)
    assert found == guilty
    assert inside == live
    assert deaths <= 2 * len(guilty)


def test_restarts_for_a_known_cause_do_not_count() -> None:
    policy = RestartPolicy(restarts=2, seconds=10.0)
    assert [policy.allows(now) for now in (0.0, 1.0)] == [True, True]
    policy.forgive()
    assert [policy.allows(now) for now in (2.0, 3.0, 4.0)] == [True, True, False]
