"""A live request moves between engines of other block sizes, cache types and limits, and loses and repeats nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from midspan import LLM, ContextLengthExceeded, InvalidRequest, SamplingParams
from midspan.engine.messages import AddRequest, MovedRequest, ProtocolError, SequenceEvent, SequenceStart
from midspan.engine.migration import MoveRefused, decode_moved, encode_moved
from midspan.engine.request_seeds import sequence_seed
from midspan.engine.step_loop import EngineCore
from midspan.errors import DeviceLost, OutOfDeviceMemory
from midspan.interface import Cache

MakeLLM = Callable[..., LLM]
Found = dict[tuple[str, int], list[SequenceEvent]]

PROMPT = [8 + (place * 37 + place * place * 5) % 300 for place in range(150)]
EOS = (319,)

REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (9, {"temperature": 0.0}),
    "sampled": (21, {"temperature": 1.1, "top_p": 0.95, "min_p": 0.01}),
    "penalties": (
        5,
        {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    ),
    "scored": (40, {"temperature": 0.7, "logprobs": 3, "prompt_logprobs": 2}),
    "stops": (12, {"temperature": 1.0, "ignore_eos": False, "stop_token_ids": [20, 40, 60, 80], "min_tokens": 14}),
    "edited": (7, {"temperature": 1.0, "logit_bias": {11: 4.0}, "allowed_token_ids": list(range(8, 200))}),
    "many": (30, {"temperature": 1.0, "n": 4}),
    "many scored": (18, {"temperature": 1.0, "n": 3, "prompt_logprobs": 1, "logprobs": 0}),
    "long": (150, {"temperature": 0.9}),
}
"""Name -> length of the prompt, and parameters."""


def add_request(name: str) -> AddRequest:
    length, changes = REQUESTS[name]
    number = list(REQUESTS).index(name)
    params = SamplingParams(**{"max_tokens": 24, "seed": number, "ignore_eos": True, **changes})
    return AddRequest(
        request_id=name,
        prompt_ids=[*PROMPT[number : number + length - 1], 7],
        params=params,
        sequences=[SequenceStart(index=i, seed=sequence_seed(number, i)) for i in range(params.n)],
        eos_token_ids=EOS,
        bad_word_ids=((9, 10), (33,)),
        arrival_time=float(number),
    )


def step(core: EngineCore, found: Found) -> None:
    for event in core.step().sequences:
        found.setdefault((event.request_id, event.index), []).append(event)
    core.scheduler.check_integrity()


def finish(core: EngineCore, found: Found) -> None:
    while core.has_work():
        step(core, found)


def told(found: Found) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What a client was told of each sequence, but for the moments."""
    return {
        key: (
            [token for event in events for token in event.token_ids],
            [score for event in events for score in event.scores or ()],
            [event.prompt.scores for event in events if event.prompt is not None],
            [event.finish_reason for event in events if event.finish_reason is not None],
            [event.stop_reason for event in events],
        )
        for key, events in found.items()
    }


def core_of(llm: LLM) -> EngineCore:
    assert llm._core is not None
    return llm._core


def check_empty(core: EngineCore) -> None:
    core.scheduler.check_integrity()
    now = core.statistics()
    assert (now.running, now.waiting, now.blocks_in_use) == (0, 0, 0)
    assert not core.has_work()


def move(source: EngineCore, target: EngineCore, name: str) -> int:
    """Through bytes, as between processes."""
    moved = decode_moved(encode_moved(source.detach(name)))
    source.scheduler.check_integrity()
    taken = target.attach(moved)
    target.scheduler.check_integrity()
    return taken


@pytest.fixture(scope="module")
def windowed_model(write_model: Callable[..., Path]) -> Path:
    """A model whose two layers have a window of 24 tokens each: one cache group with a window, none without."""
    return write_model(
        seed=5, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=24, num_hidden_layers=2
    )


@pytest.fixture
def models(tiny_model: Path, windowed_model: Path) -> dict[str, Path]:
    return {"full": tiny_model, "windowed": windowed_model}


@pytest.mark.parametrize("kind", ["full", "windowed"])
@pytest.mark.parametrize("sizes", [(4, 16, 1), (8, 128, 4)])
@pytest.mark.parametrize("caching", [True, False])
def test_requests_that_move_every_few_steps_give_what_they_give_at_rest(
    make_llm: MakeLLM, models: dict[str, Path], kind: str, sizes: tuple[int, ...], caching: bool
) -> None:
    settings: dict[str, Any] = {"model": models[kind], "blocks": 20000, "enable_prefix_caching": caching}
    rest = core_of(make_llm(**settings))
    expected: Found = {}
    for name in REQUESTS:
        rest.add(add_request(name))
    finish(rest, expected)
    cores = [core_of(make_llm(**settings, block_size=size, max_num_batched_tokens=40)) for size in sizes]
    found: Found = {}
    for name in REQUESTS:
        cores[0].add(add_request(name))
    place = dict.fromkeys(REQUESTS, 0)
    taken = steps = 0
    while any(core.has_work() for core in cores):
        for core in cores:
            step(core, found)
        steps += 1
        for number, name in enumerate(REQUESTS):
            source = cores[place[name]]
            if (steps + number) % 3 == 0 and name in source._indexes:
                place[name] = (place[name] + 1) % len(cores)
                taken += move(source, cores[place[name]], name)
    assert told(found) == told(expected)
    assert taken > 1000
    for core in (*cores, rest):
        check_empty(core)


def pair(make_llm: MakeLLM, **changes: Any) -> tuple[EngineCore, EngineCore]:
    return core_of(make_llm()), core_of(make_llm(**{"block_size": 16, **changes}))


def run_steps(core: EngineCore, found: Found, count: int) -> None:
    for _ in range(count):
        step(core, found)


def alone(make_llm: MakeLLM, *names: str) -> Found:
    core, found = core_of(make_llm()), {}
    for name in names:
        core.add(add_request(name))
    finish(core, found)
    return found


def test_a_request_that_waits_moves_as_one_that_waits(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm)
    source.add(add_request("many scored"))
    assert move(source, target, "many scored") == 0
    found: Found = {}
    finish(target, found)
    assert told(found) == told(alone(make_llm, "many scored"))
    check_empty(source)
    check_empty(target)


def test_a_request_moves_in_the_midst_of_its_prompt(make_llm: MakeLLM) -> None:
    """Its forks wait for it on both sides, and the logprobs of the prompt come once and whole."""
    source = core_of(make_llm(max_num_batched_tokens=7))
    target = core_of(make_llm(block_size=8, max_num_batched_tokens=5))
    source.add(add_request("many scored"))
    found: Found = {}
    run_steps(source, found, 1)
    assert not found
    assert move(source, target, "many scored") == 7
    finish(target, found)
    assert told(found) == told(alone(make_llm, "many scored"))
    check_empty(source)
    check_empty(target)


def test_a_preempted_request_moves_without_its_cache_and_is_not_counted_as_new(make_llm: MakeLLM) -> None:
    source, target = core_of(make_llm(blocks=30, max_model_len=64)), core_of(make_llm(block_size=16))
    names = ["greedy", "sampled", "penalties", "edited", "stops"]
    found: Found = {}
    for name in names:
        source.add(add_request(name))
    while not source.statistics().preemptions:
        step(source, found)
    preempted = [name for name in names if source.scheduler.get(f"0:{name}").computed_tokens == 0]  # type: ignore[union-attr]
    assert preempted
    for name in preempted:
        assert move(source, target, name) == 0
    while source.has_work():
        step(source, found)
    finish(target, found)
    assert told(found) == told(alone(make_llm, *names))
    assert target.statistics().prefix_queries == 0


def test_forks_share_their_prompt_on_the_other_side_too(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm, block_size=8)
    source.add(add_request("many"))
    found: Found = {}
    run_steps(source, found, 6)
    moved = source.detach("many")
    shared = {state.index: state.shared_tokens for state in moved.sequences}
    assert shared == {0: 0, 1: 28, 2: 28, 3: 28}
    sent = {
        state.index: sum(piece.tokens for piece in moved.pieces if piece.index == state.index)
        for state in moved.sequences
    }
    assert sent == {state.index: state.computed_tokens - shared[state.index] for state in moved.sequences}
    target.attach(moved)
    # Three full blocks of the prompt once, and two blocks of each of the four: 30 + 5 tokens are five blocks.
    assert target.statistics().blocks_in_use == 3 + 4 * 2
    finish(target, found)
    assert told(found) == told(alone(make_llm, "many"))
    check_empty(target)


def test_a_sequence_that_ended_stays_behind_and_the_others_move(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm)
    source.add(add_request("many"))
    found: Found = {}
    run_steps(source, found, 6)
    source.abort("many", 0)
    assert move(source, target, "many") > 0
    finish(target, found)
    expected = told(alone(make_llm, "many"))
    for index in (1, 2, 3):
        assert told(found)["many", index] == expected["many", index]
    check_empty(source)
    check_empty(target)


@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"blocks": 25, "max_model_len": 64}])
def test_what_finds_no_room_is_computed_again(make_llm: MakeLLM, limits: dict[str, Any]) -> None:
    source, target = pair(make_llm, block_size=4, **limits)
    names = ["greedy", "sampled", "penalties", "many", "stops"]
    found: Found = {}
    for name in names:
        source.add(add_request(name))
    run_steps(source, found, 8)
    taken = [move(source, target, name) for name in names]
    assert taken[0] > 0
    assert 0 in taken
    finish(target, found)
    assert told(found) == told(alone(make_llm, *names))
    check_empty(source)
    check_empty(target)


def test_others_never_read_what_another_engine_computed(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm, block_size=4)
    found: Found = {}
    source.add(add_request("many"))
    run_steps(source, found, 10)
    move(source, target, "many")
    other = msgspec.structs.replace(add_request("many"), request_id="other", sequences=[SequenceStart(index=0, seed=0)])
    target.add(other)
    finish(target, found)
    assert target.statistics().prefix_hits == 0
    target.add(msgspec.structs.replace(other, request_id="third"))
    finish(target, found)
    # What the target itself computed is found again.
    assert target.statistics().prefix_hits == 28


def test_a_refused_request_goes_back_to_where_it_was(make_llm: MakeLLM, write_model: Callable[..., Path]) -> None:
    source = core_of(make_llm())
    source.add(add_request("many"))
    found: Found = {}
    run_steps(source, found, 5)
    moved = source.detach("many")
    other_model = core_of(make_llm(model=write_model(seed=1, num_hidden_layers=1)))
    short = core_of(make_llm(max_model_len=53))
    small = core_of(make_llm(blocks=17, max_model_len=54))
    with pytest.raises(MoveRefused, match="another model"):
        other_model.attach(moved)
    with pytest.raises(ContextLengthExceeded, match="54 tokens; the limit here is 53"):
        short.attach(moved)
    for core in (other_model, short, small):
        check_empty(core)
    assert source.attach(moved) == sum(state.computed_tokens for state in moved.sequences)
    with pytest.raises(InvalidRequest, match="already"):
        source.attach(moved)
    finish(source, found)
    assert told(found) == told(alone(make_llm, "many"))
    check_empty(source)
    with pytest.raises(InvalidRequest, match="no live request"):
        source.detach("many")


class BrokenCache:
    """A cache that cannot be written any more after some writes."""

    def __init__(self, inner: Cache, writes: int) -> None:
        self._inner, self._writes = inner, writes
        self.layout, self.blocks = inner.layout, inner.blocks

    def read(self, *arguments: Any) -> Any:
        return self._inner.read(*arguments)

    def write(self, *arguments: Any) -> None:
        self._writes -= 1
        if self._writes < 0:
            raise OutOfDeviceMemory("no memory left")
        self._inner.write(*arguments)


def test_an_attach_that_fails_half_way_leaves_nothing(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm)
    source.add(add_request("many"))
    found: Found = {}
    run_steps(source, found, 5)
    moved = source.detach("many")
    whole = target._loaded
    target._loaded = dataclasses.replace(whole, cache=BrokenCache(whole.cache, 2))  # type: ignore[arg-type]
    with pytest.raises(OutOfDeviceMemory):
        target.attach(moved)
    check_empty(target)
    target._loaded = whole
    target.attach(moved)
    finish(target, found)
    assert told(found) == told(alone(make_llm, "many"))


class UnreadableCache(BrokenCache):
    """A cache that cannot be read."""

    def __init__(self, inner: Cache, error: Exception) -> None:
        super().__init__(inner, writes=0)
        self._error = error

    def read(self, *arguments: Any) -> Any:
        raise self._error


def test_a_request_whose_cache_cannot_be_read_moves_without_it(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm)
    found: Found = {}
    source.add(add_request("many scored"))
    run_steps(source, found, 5)
    whole = source._loaded
    source._loaded = dataclasses.replace(whole, cache=UnreadableCache(whole.cache, ValueError("a bad kernel")))  # type: ignore[arg-type]
    assert move(source, target, "many scored") == 0
    source._loaded = whole
    finish(target, found)
    assert told(found) == told(alone(make_llm, "many scored"))
    check_empty(source)
    check_empty(target)


def test_a_request_stays_where_it_is_when_its_device_is_lost(make_llm: MakeLLM) -> None:
    source, _ = pair(make_llm)
    source.add(add_request("greedy"))
    run_steps(source, {}, 3)
    whole = source._loaded
    source._loaded = dataclasses.replace(whole, cache=UnreadableCache(whole.cache, DeviceLost("it is gone")))  # type: ignore[arg-type]
    with pytest.raises(DeviceLost):
        source.detach("greedy")
    source._loaded = whole
    assert source.has_work()


def spoiled(moved: MovedRequest) -> Iterator[tuple[str, MovedRequest]]:
    """The record with one thing wrong, each with what should be said of it."""
    change = msgspec.structs.replace
    pieces, states, request = moved.pieces, moved.sequences, moved.request
    first = pieces[0]
    yield "lacks the tokens", change(moved, pieces=pieces[1:])
    yield "lacks the tokens", change(moved, pieces=[change(first, first=first.first + 1), *pieces[1:]])
    yield "bytes", change(moved, pieces=[change(first, data=first.data[:-4]), *pieces[1:]])
    yield "bytes", change(moved, pieces=[change(first, tokens=10**12), *pieces[1:]])
    yield "lacks the tokens", change(moved, pieces=[change(first, group="none"), *pieces[1:]])
    yield "computed", change(moved, sequences=[change(states[0], computed_tokens=10**9), *states[1:]])
    yield "computed", change(moved, sequences=[change(states[0], computed_tokens=-1), *states[1:]])
    yield "computed", change(moved, sequences=[change(states[0], scored_tokens=-1), *states[1:]])
    yield "shared", change(moved, sequences=[states[0], change(states[1], shared_tokens=10**9), *states[2:]])
    yield "shared", change(moved, sequences=[states[0], change(states[1], shared_tokens=-4), *states[2:]])
    yield "shared", change(moved, sequences=[change(states[0], shared_tokens=4), *states[1:]])
    for scored in (0, 3):
        state = change(states[0], score_prompt=True, scored_tokens=scored, reported=False)
        yield "scores of its prompt", change(moved, sequences=[state, *states[1:]])
    yield "states", change(moved, sequences=states[1:])
    yield "states", change(moved, sequences=[], request=change(request, sequences=[]))
    yield (
        "twice",
        change(
            moved,
            sequences=[*states, states[-1]],
            request=change(request, sequences=[*request.sequences, request.sequences[-1]]),
        ),
    )
    yield "vocabulary", change(moved, request=change(request, prompt_ids=[999, *request.prompt_ids[1:]]))


def test_a_record_whose_parts_do_not_fit_is_refused_and_changes_nothing(make_llm: MakeLLM) -> None:
    source, target = pair(make_llm)
    source.add(add_request("many"))
    run_steps(source, {}, 5)
    moved = source.detach("many")
    count = 0
    for message, wrong in spoiled(moved):
        with pytest.raises(MoveRefused, match=message):
            target.attach(decode_moved(encode_moved(wrong)))
        check_empty(target)
        count += 1
    assert count == 17
    payload = encode_moved(moved)
    for rubbish in (payload[:-1], b"", b"\xc1", payload + b"\x00", b"\x80"):
        with pytest.raises(ProtocolError, match="cannot be read"):
            decode_moved(rubbish)
    target.attach(decode_moved(payload))
    finish(target, {})
    check_empty(target)
