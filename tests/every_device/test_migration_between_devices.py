"""A request that moves from one kind of device to another in mid-generation goes on with the same tokens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midspan import LLM, EngineSettings, SamplingParams
from midspan.engine.loading import load_model
from midspan.engine.messages import AddRequest, SequenceStart, TokenScores
from midspan.engine.migration import decode_moved, encode_moved
from midspan.engine.request_seeds import sequence_seed
from midspan.engine.step_loop import EngineCore
from midspan.runtimes.reference.random_numbers import uniform

DEVICES = ("reference", "cpu", "simulated")
BLOCK_SIZES = {"reference": 16, "cpu": 32, "simulated": 12}
OPTIONS = {"simulated": {"block_sizes": "12,20"}}
TOP_K, TEMPERATURE = 4, 0.9
PROMPTS = {"greedy": 33, "sampled": 21, "three": 50}

LOGIT_MARGIN = 5e-4
"""Sums of 32 or 48 float32 products in another order differ by some 1e-6 of their size; two layers make 5e-6 of it, and
logits are below 20 here: 1e-4."""
CHANCE_MARGIN = 1e-4
"""The same, as a difference of probabilities near the number that was drawn."""


@pytest.fixture(scope="module")
def cores(small_model: Path) -> Iterator[dict[str, EngineCore]]:
    """An engine on each device, all in this process."""
    made = {}
    for name in DEVICES:
        settings = EngineSettings(
            model=str(small_model),
            device=name,
            device_options=OPTIONS.get(name, {}),
            dtype="float32",
            block_size=BLOCK_SIZES[name],
            kv_cache_memory_bytes=4 * 2**20,
            max_num_batched_tokens=40,
        )
        made[name] = EngineCore(load_model(settings, small_model), settings)
    yield made
    for core in made.values():
        core.close()


def add_request(name: str) -> AddRequest:
    number = list(PROMPTS).index(name)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0, "logprobs": 2},
        "sampled": {"temperature": TEMPERATURE, "top_k": TOP_K, "logprobs": TOP_K + 1},
        "three": {"temperature": TEMPERATURE, "top_k": TOP_K, "logprobs": TOP_K + 1, "n": 3},
    }
    params = SamplingParams(**{"max_tokens": 30, "ignore_eos": True, "seed": number, **kinds[name]})
    return AddRequest(
        request_id=name,
        prompt_ids=[(7 + number * 13 + place * place * 3) % 300 for place in range(PROMPTS[name])],
        params=params,
        sequences=[SequenceStart(index=i, seed=sequence_seed(number, i)) for i in range(params.n)],
    )


Told = dict[tuple[str, int], list[TokenScores]]


def step(core: EngineCore, told: Told) -> None:
    for event in core.step().sequences:
        assert event.error is None
        told.setdefault((event.request_id, event.index), []).extend(event.scores or ())
    core.scheduler.check_integrity()


def tokens(told: Told) -> dict[tuple[str, int], list[int]]:
    return {key: [score.token_id for score in scores] for key, scores in told.items()}


@pytest.fixture(scope="module")
def expected(cores: dict[str, EngineCore]) -> Told:
    """What the reference gives when nothing moves."""
    told: Told = {}
    for name in PROMPTS:
        cores["reference"].add(add_request(name))
    while cores["reference"].has_work():
        step(cores["reference"], told)
    return told


def test_every_choice_stands_far_above_rounding(expected: Told) -> None:
    """Otherwise devices could rightly differ, and the tests below would prove nothing."""
    assert {key: len(scores) for key, scores in expected.items()} == {
        ("greedy", 0): 30, ("sampled", 0): 30, ("three", 0): 30, ("three", 1): 30, ("three", 2): 30
    }  # fmt: skip
    assert min(score.top[0] - score.top[1] for score in expected["greedy", 0]) > LOGIT_MARGIN
    for (name, index), scores in expected.items():
        if name == "greedy":
            continue
        seed = sequence_seed(list(PROMPTS).index(name), index)
        positions = np.arange(PROMPTS[name], PROMPTS[name] + 30, dtype=np.int64)
        drawn = uniform(np.full(30, seed, np.uint64), positions)
        for score, number in zip(scores, drawn.tolist(), strict=True):
            assert score.top[TOP_K - 1] - score.top[TOP_K] > LOGIT_MARGIN
            kept = sorted(zip(score.top_ids[:TOP_K], score.top[:TOP_K], strict=True))
            weights = np.exp(np.array([value for _, value in kept]) / TEMPERATURE)
            borders = np.cumsum(weights) / weights.sum()
            assert np.abs(borders[:-1] - number).min() > CHANCE_MARGIN
            assert kept[int((borders <= number).sum())][0] == score.token_id


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("path", list(itertools.permutations(DEVICES)), ids=" ".join)
def test_a_request_goes_through_all_devices_with_the_tokens_of_one(
    cores: dict[str, EngineCore], expected: Told, path: tuple[str, ...], steps: int
) -> None:
    """One step leaves the longest prompt half computed."""
    told: Told = {}
    for name in PROMPTS:
        cores[path[0]].add(add_request(name))
    for source, target in itertools.pairwise(path):
        for _ in range(steps):
            step(cores[source], told)
        for name in PROMPTS:
            moved = decode_moved(encode_moved(cores[source].detach(name)))
            known = sum(state.computed_tokens for state in moved.sequences)
            assert cores[target].attach(moved) == known
        assert cores[source].statistics().blocks_in_use == 0
        assert not cores[source].has_work()
    while cores[path[-1]].has_work():
        step(cores[path[-1]], told)
    assert tokens(told) == tokens(expected)
    for key, scores in told.items():
        pairs = zip(scores, expected[key], strict=True)
        assert max(abs(found.logprob - wanted.logprob) for found, wanted in pairs) < LOGIT_MARGIN / 2
    for core in cores.values():
        assert core.statistics().blocks_in_use == 0
        core.scheduler.check_integrity()


def test_a_cache_of_fewer_bits_is_taken_over_rounded(cores: dict[str, EngineCore], small_model: Path) -> None:
    settings = EngineSettings(
        model=str(small_model), device="cpu", dtype="float32", kv_cache_dtype="bfloat16", kv_cache_memory_bytes=2**21
    )
    narrow = EngineCore(load_model(settings, small_model), settings)
    told: Told = {}
    source = cores["reference"]
    source.add(add_request("greedy"))
    for _ in range(5):
        step(source, told)
    moved = source.detach("greedy")
    before = {(piece.group, piece.first): np.frombuffer(piece.data, "<f4") for piece in moved.pieces}
    assert narrow.attach(moved) == PROMPTS["greedy"] + 4
    back = narrow.detach("greedy")
    for piece in back.pieces:
        given, found = before[piece.group, piece.first], np.frombuffer(piece.data, "<f4")
        # bfloat16 keeps 8 significant bits; rounding is off by half of the last one at most.
        assert np.all(np.abs(given - found) <= np.abs(given) * 2.0**-8)
        assert np.any(given != found)
    assert narrow.attach(back) == PROMPTS["greedy"] + 4
    while narrow.has_work():
        step(narrow, told)
    assert len(told["greedy", 0]) == 30
    narrow.close()
    assert not source.has_work()


def test_engines_on_all_devices_work_at_once_in_one_process_and_outlive_each_other(small_model: Path) -> None:
    def make(name: str) -> LLM:
        return LLM(
            str(small_model),
            device=name,
            device_options=OPTIONS.get(name, {}),
            dtype="float32",
            kv_cache_memory_bytes=2**21,
        )

    prompts = [[(number * 7 + place * 3) % 300 for place in range(20)] for number in range(6)]
    greedy = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True, logprobs=2)
    llms = {name: make(name) for name in DEVICES}
    results: dict[str, list[list[int]]] = {}
    margins: dict[str, float] = {}
    begin = threading.Barrier(len(DEVICES))

    def work(name: str) -> None:
        begin.wait(60)
        outputs = [output.outputs[0] for output in llms[name].generate(prompts, greedy)]
        results[name] = [output.token_ids for output in outputs]
        gaps = []
        for output in outputs:
            for found in output.logprobs or ():
                first, second = sorted((one.logprob for one in found.values()), reverse=True)[:2]
                gaps.append(first - second)
        margins[name] = min(gaps)

    threads = [threading.Thread(target=work, args=(name,)) for name in DEVICES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert min(margins.values()) > LOGIT_MARGIN
    assert results["cpu"] == results["reference"] == results["simulated"]
    for name in DEVICES:
        llms.pop(name).close()
        for other, llm in llms.items():
            again = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
            assert again == results[other]
