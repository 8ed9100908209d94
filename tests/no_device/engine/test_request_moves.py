"""What crosses on the way: messages of a move and of other things that happen to the request meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import cast

from midspan import LLM, SamplingParams
from midspan.engine.live_requests import LiveRequests, LiveStream
from midspan.engine.messages import (
    Abort,
    AddRequest,
    Attach,
    Attached,
    Detach,
    Detached,
    Piece,
    SequenceStart,
    ToEngine,
)
from midspan.engine.move_desk import MoveDesk
from midspan.engine.output_processing import OutputProcessor
from midspan.engine.request_moves import RequestMoves
from midspan.engine.request_stream import RequestStream
from midspan.engine.request_validation import prepare_request
from midspan.engine.step_loop import EngineCore
from midspan.engine.supervisor import EngineSupervisor

MakeLLM = Callable[..., LLM]


class Side:
    """One engine, and the lists of those who use it; messages cross when a test says so.

    Stands where the supervisor does: the engine is real, the way to it is a queue instead of a socket.
    """

    def __init__(self, llm: LLM) -> None:
        assert llm._core is not None
        self.core: EngineCore = llm._core
        self.death = None
        self.closing = False
        self.sent: deque[ToEngine] = deque()
        self.answers: deque[Piece | Detached | Attached] = deque()
        self._llm = llm
        self._desk = MoveDesk(self.answers.append)
        self.live = LiveRequests(cast("EngineSupervisor", self))
        self.moves = RequestMoves(self.live, cast("EngineSupervisor", self))

    def is_ready(self) -> bool:
        return True

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def read(self) -> None:
        """The engine takes in what was sent."""
        while self.sent:
            message = self.sent.popleft()
            if isinstance(message, AddRequest):
                self.core.add(message)
            elif isinstance(message, Abort):
                self.core.abort(message.request_id, message.index, reason=message.reason)
            elif isinstance(message, Detach):
                self._desk.detach(self.core, message)
            elif isinstance(message, Piece):
                self._desk.take(message.piece)
            elif isinstance(message, Attach):
                self._desk.attach(self.core, message)

    def hear(self) -> None:
        """The engine's answers arrive."""
        while self.answers:
            self.moves.hear(self.answers.popleft())

    def open(self, name: str, prompt: list[int]) -> LiveStream:
        prepared = prepare_request(
            prompt,
            SamplingParams(max_tokens=20, ignore_eos=True),
            tokenizer=self._llm.get_tokenizer(),
            model=self.core.model,
            add_special_tokens=False,
        )
        number = self.live.next_number()
        wire_id = f"{number}:{name}"
        request = AddRequest(
            request_id=wire_id, prompt_ids=prompt, params=prepared.params, sequences=[start_of(number)]
        )
        processor = OutputProcessor(name, prepared, self._llm.get_tokenizer(), arrival_time=0.0)
        stream = RequestStream(name, prepared, partial(self.live.give_up, wire_id))
        self.live.open(request, name, processor, stream)
        found = self.live.find(name)
        assert found is not None
        return found

    def unread(self) -> int:
        return self.live.unread(self.core.statistics().received)


def start_of(number: int) -> SequenceStart:
    return SequenceStart(index=0, seed=number)


async def begun(moving: asyncio.Future[bool]) -> None:
    """Wait until the move's first message was sent."""
    await asyncio.sleep(0)
    assert not moving.done()


def test_a_request_that_was_still_to_be_sent_when_it_left_does_not_run_in_both_engines(make_llm: MakeLLM) -> None:
    here, there = Side(make_llm()), Side(make_llm(block_size=16))

    async def go() -> bool:
        first, second = here.open("first", [5] * 9), here.open("second", [6] * 9)
        here.sent.clear()
        here.live.lost()
        here.live.resume()  # in a fresh process the first one is on trial, and the second one waits for its turn
        moving = asyncio.ensure_future(here.moves.leave(second, there.moves))
        await begun(moving)
        here.live.generated(first.wire_id, 0)  # now it is sent, behind the message that asks for it
        here.read()
        here.hear()
        return await moving

    assert asyncio.run(go())
    for side in (here, there):
        side.read()
    assert (len(here.live), len(there.live)) == (1, 1)
    assert [side.core.statistics().waiting for side in (here, there)] == [1, 1]
    assert (here.unread(), there.unread()) == (0, 0)


def test_a_request_whose_cache_is_refused_is_computed_again_and_counted_once(make_llm: MakeLLM) -> None:
    here, there = Side(make_llm(max_num_batched_tokens=4)), Side(make_llm(max_model_len=28))

    async def move(name: str) -> None:
        live = here.open(name, [5] * 9)
        here.read()
        here.core.step()  # a part of the prompt
        moving = asyncio.ensure_future(here.moves.leave(live, there.moves))
        await begun(moving)
        here.read()
        here.hear()
        assert await moving

    asyncio.run(move("stays"))
    there.read()
    there.hear()
    assert [type(message) for message in there.sent] == [AddRequest]
    there.read()
    assert there.unread() == 0
    asyncio.run(move("leaves"))
    left = there.live.find("leaves")
    assert left is not None
    there.read()
    there.live.abort(left)
    there.hear()
    there.read()
    assert len(there.live) == 1
    assert there.unread() == 0
