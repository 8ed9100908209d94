"""What the journal, the restart policy, the seeds and the setting names promise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.journal import Journal
from midspan.engine.keyword_settings import settings_from_keywords
from midspan.engine.messages import AddRequest, SequenceStart
from midspan.engine.model_text import default_params
from midspan.engine.request_seeds import request_seed, sequence_seed
from midspan.engine.restart_policy import RestartPolicy
from midspan.errors import SettingsError


def request(name: str, n: int = 2, **params: Any) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_ids=[1, 2, 3],
        params=SamplingParams(n=n, max_tokens=9, **params),
        sequences=[SequenceStart(index=index, seed=10 + index) for index in range(n)],
    )


def test_a_resumption_holds_what_each_live_sequence_emitted_and_its_seed() -> None:
    journal = Journal()
    first, second = journal.open(request("a")), journal.open(request("b", n=1))
    first.emit(0, [5, 6])
    first.emit(1, [7])
    first.end(0)
    first.emit(0, [99])
    first.emit(1, [8])
    resumed = journal.resumptions()
    assert [message.request_id for message in resumed] == ["a", "b"]
    assert resumed[0].sequences == [SequenceStart(index=1, seed=11, emitted_ids=[7, 8])]
    assert resumed[0].prompt_ids == [1, 2, 3]
    assert resumed[1] == second.request


def test_what_ended_is_not_resumed() -> None:
    journal = Journal()
    journal.open(request("a"))
    journal.open(request("b"))
    journal.close("a")
    journal.close("a")
    assert [message.request_id for message in journal.resumptions()] == ["b"]
    assert len(journal) == 1


def test_a_resumption_is_not_changed_by_what_is_emitted_later() -> None:
    entry = Journal().open(request("a", n=1))
    entry.emit(0, [5])
    resumed = entry.resumption()
    entry.emit(0, [6])
    assert resumed.sequences[0].emitted_ids == [5]
    assert entry.emitted(0) == [5, 6]


def test_prompt_logprobs_that_were_given_are_not_asked_for_again() -> None:
    entry = Journal().open(request("a", n=1, prompt_logprobs=2, logprobs=1))
    assert entry.resumption().params.prompt_logprobs == 2
    entry.emit(0, [5], prompt_scored=True)
    assert entry.resumption().params.prompt_logprobs is None
    assert entry.resumption().params.logprobs == 1


def test_restarts_are_counted_within_their_span() -> None:
    policy = RestartPolicy(restarts=2, seconds=10.0)
    assert [policy.allows(now) for now in (0.0, 1.0, 2.0, 9.9)] == [True, True, False, False]
    assert policy.allows(10.5)
    assert not policy.allows(10.6)
    assert not RestartPolicy(restarts=0).allows(0.0)


@given(st.integers(-(2**63), 2**64 - 1))
def test_the_first_sequence_has_the_requests_own_seed_and_the_others_their_own(seed: int) -> None:
    seeds = [sequence_seed(seed, index) for index in range(16)]
    assert seeds[0] == seed % 2**64
    assert len(set(seeds)) == 16
    assert all(0 <= value < 2**64 for value in seeds)


def test_neighbouring_requests_and_sequences_have_unrelated_seeds() -> None:
    seeds = {
        sequence_seed(request_seed(engine, number), i) for engine in range(4) for number in range(64) for i in range(4)
    }
    assert len(seeds) == 4 * 64 * 4
    # Each of 64 bits is set in about half of 1024 seeds; 6 standard deviations are 96.
    for bit in range(64):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 512) < 96


def test_settings_take_vllms_names() -> None:
    settings = settings_from_keywords(
        "m", {"gpu_memory_utilization": 0.5, "max_model_len": 7, "tensor_parallel_size": 1}
    )
    assert (settings.model, settings.memory_utilization, settings.max_model_len) == ("m", 0.5, 7)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"max_modle_len": 5}, "Did you mean 'max_model_len'"),
        ({"gpu_memory_utilisation": 0.5}, "Did you mean 'gpu_memory_utilization'"),
        ({"zzz": 1}, "Settings: model, "),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported"),
        ({"max_num_seqs": 0}, "max_num_seqs must be between 1 and"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be an integer, not 'many'"),
        ({"enable_prefix_caching": None}, "enable_prefix_caching must be true or false, not None"),
        ({"max_model_len": 1.5}, "max_model_len must be an integer, not 1.5"),
        ({"max_model_len": True}, "max_model_len must be an integer, not True"),
        ({"max_num_batched_tokens": 2**31}, "max_num_batched_tokens must be between"),
        ({"kv_cache_memory_bytes": float("inf")}, "kv_cache_memory_bytes must be an integer"),
        ({"kv_cache_memory_bytes": 2**63}, "kv_cache_memory_bytes must be between"),
        ({"memory_utilization": float("nan")}, "memory_utilization must be above 0"),
        ({"memory_utilization": "half"}, "memory_utilization must be a number"),
        ({"seed": 2**64}, "seed must be between"),
        ({"max_queued_requests": -1}, "max_queued_requests must be between 0"),
        ({"device": None}, "device must be a text"),
        ({"device_options": {"threads": 4}}, "device_options must map texts to texts"),
        ({"kernels": 5}, "kernels must be a mapping"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be true or false"),
        ({"served_model_name": "one"}, "served_model_name must be a list"),
    ],
)
def test_settings_that_cannot_work_say_why(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_from_keywords("m", keywords)


def test_defaults_come_from_the_generation_config_and_absurd_ones_are_left_out() -> None:
    config = {
        "temperature": 0.6,
        "top_p": 7.0,
        "top_k": 50,
        "min_p": None,
        "max_new_tokens": 100,
        "repetition_penalty": "x",
        "do_sample": True,
        "eos_token_id": [1, 2],
    }
    assert default_params(config) == {"temperature": 0.6, "top_k": 50, "max_tokens": 100}
