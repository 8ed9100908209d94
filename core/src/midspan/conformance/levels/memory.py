"""What a device says of its memory, whether it gives it back, and what it does when there is none left.

Everything happens on devices of the level's own. What a program or a cache occupies is held against what
it claims with room for an allocator's granularity; what is given back must come back to the byte, after a
first round in which a device may set up what it keeps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from midspan.conformance import loads
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_process import device_arguments, run_children
from midspan.conformance.children.closing_device import STEPS_BEFORE
from midspan.conformance.engine_drive import DriveSettings, ProgramShelf, drive
from midspan.conformance.reference_judge import ReferenceJudge
from midspan.conformance.stepping import Stepping
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import TinyModel, tiny_model
from midspan.errors import OutOfDeviceMemory
from midspan.interface import CACHE_ELEMENT_BYTES, Batch, Device, MemoryReport, block_bytes

LEVEL = "memory"
VOCABULARY = 16384
"""Of the model whose weights are to be seen among other things: 6 MiB in float32."""
CACHE_BYTES = 8 * 2**20
GRANULARITY = 2 * 2**20
"""Bytes by which an allocator may round an object up, beside a sixteenth of it."""
LEAST_WEIGHT_BYTES = 0.5
"""For each number of a weight: no format here has fewer than four bits."""
ROUNDS = 3
ABSURD = 64
"""Times the device's memory."""
CLOSING_SECONDS = 20.0
"""In which a thread that runs steps must have ended once its device was closed."""
CLOSING_CHILD_SECONDS = 3 * CLOSING_SECONDS * len(STEPS_BEFORE)
STEP_TOKENS = 5
"""Tokens of a step that is let through where memory is said to run out."""


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    own_pages = None if subject.capabilities.shares_host_memory else "shares_host_memory is not claimed"
    plain = [
        ("program-and-cache-are-counted", partial(counted, subject), None),
        ("memory-comes-back", partial(comes_back, subject), None),
        ("host-memory-comes-back", partial(host_memory_comes_back, subject), own_pages),
        ("a-cache-too-large-is-refused", partial(too_large, subject), None),
        ("a-step-too-large-is-cut", partial(step_is_cut, subject), None),
    ]
    return [
        *(Check(level=LEVEL, name=name, run=run, unclaimed=unclaimed, quick=True) for name, run, unclaimed in plain),
        Check(
            level=LEVEL,
            name="closing-under-load",
            run=partial(closing, subject),
            quick=True,
            waits_seconds=CLOSING_CHILD_SECONDS,
        ),
    ]


def large_model() -> TinyModel:
    """The plain model with many more tokens."""
    return tiny_model("plain", vocab_size=VOCABULARY)


def counted(subject: Subject) -> None:
    """``used_bytes`` follows what programs and caches claim, up and down."""
    model = large_model()
    with subject.open() as device:
        _use_once(device, model)
        start = _memory(device).used_bytes
        stepping = Stepping(device, model, cache_bytes=CACHE_BYTES)
        stepping.fill_cache()
        stepping.step()
        both = _memory(device).used_bytes
        program_claim, cache_claim = stepping.program.memory_bytes(), stepping.cache.memory_bytes()
        stepping.cache.close()
        alone = _memory(device).used_bytes
        stepping.program.close()
        end = _memory(device).used_bytes
    weights = int(LEAST_WEIGHT_BYTES * sum(math.prod(weight.shape) for weight in model.graph.weights.values()))
    element = CACHE_ELEMENT_BYTES.get(stepping.layout.dtype, 1)
    blocks = zip(stepping.layout.groups, stepping.cache.blocks, strict=True)
    numbers = sum(count * block_bytes(group, stepping.layout.block_size, element) for group, count in blocks)
    _within("program", program_claim, weights, alone - start)
    _within("cache", cache_claim, numbers, both - alone)
    if end != start:
        raise CheckFailed(f"used_bytes was {start} before, and is {end} after program and cache were closed.")


def comes_back(subject: Subject) -> None:
    """Opening, compiling, running and closing again and again takes no more and no more."""
    with subject.open() as watcher:
        _rounds(subject, 1)
        start = _memory(watcher).used_bytes
        inside = _rounds(subject, ROUNDS)
        end = _memory(watcher).used_bytes
    if end != start:
        raise CheckFailed(
            f"used_bytes of a device that did nothing went from {start} to {end} while others came and went."
        )
    if len(set(inside)) > 1:
        raise CheckFailed(f"used_bytes with the same program and cache grows from round to round: {inside}.")


def host_memory_comes_back(subject: Subject) -> None:
    """The process does not grow by what each round took."""
    if not Path("/proc/self/statm").exists():
        return
    _rounds(subject, 2)
    before = _resident_bytes()
    _rounds(subject, ROUNDS)
    grown = _resident_bytes() - before
    taken = ROUNDS * (CACHE_BYTES + 2 * VOCABULARY * 48)
    if grown > taken // 2:
        raise CheckFailed(f"{ROUNDS} rounds took about {taken} bytes together, and the process kept {grown} of them.")


def too_large(subject: Subject) -> None:
    """A cache that no device of this size can hold is refused, and the device goes on."""
    model = tiny_model("plain")
    with subject.open() as device:
        stepping = Stepping(device, model)
        before = _memory(device)
        blocks = ABSURD * before.total_bytes // sum(device.block_bytes(stepping.layout)) + 1
        try:
            device.allocate_cache(stepping.layout, (blocks,) * len(stepping.layout.groups))
        except OutOfDeviceMemory:
            pass
        else:
            raise CheckFailed(f"A cache of {ABSURD} times the device's memory was allocated.")
        after = _memory(device)
        if after.used_bytes != before.used_bytes:
            raise CheckFailed(f"The refused cache left {after.used_bytes - before.used_bytes} bytes in used_bytes.")
        stepping.step()
        _run_and_judge(device, model, DriveSettings())


def step_is_cut(subject: Subject) -> None:
    """A step that does not fit is run in parts, and gives the same tokens."""

    def refuse(batch: Batch) -> None:
        if len(batch.token_ids) > STEP_TOKENS:
            raise OutOfDeviceMemory("This step is said not to fit.", remedy="It is a test.")

    _run_and_judge(subject.device(), tiny_model("windowed"), DriveSettings(before=refuse))


def closing(subject: Subject) -> None:
    """A device that is closed while a thread runs steps: an error in that thread, no hang and no crash."""
    module = "midspan.conformance.children.closing_device"
    arguments = device_arguments(subject, seconds=CLOSING_SECONDS)
    (end,) = run_children(module, [arguments], seconds=CLOSING_CHILD_SECONDS)
    rounds = end.require("The process in which the device was closed under load")["rounds"]
    if end.exit_code != 0:
        raise CheckFailed(f"The process in which the device was closed under load ended with code {end.exit_code}.")
    wrong = {"hangs": "hung", "goes on": "went on as if the device were open", "never ran": "never came to a step"}
    for steps, outcome in zip(STEPS_BEFORE, rounds, strict=True):
        if outcome in wrong:
            raise CheckFailed(
                f"When the device was closed after {steps} steps, the thread that ran them {wrong[outcome]}."
            )


def _run_and_judge(device: Device, model: TinyModel, settings: DriveSettings) -> None:
    with drive(ProgramShelf(device), model, settings) as engine:
        found = engine.run(loads.simple(model.graph.vocab_size, engine.bounds.max_context, count=4))
        ReferenceJudge(model).judge(found, engine.bounds.dtype, engine.bounds.cache_dtype)


def _rounds(subject: Subject, count: int) -> list[int]:
    """Open, compile, run and close; ``used_bytes`` in the midst of each round."""
    model, found = large_model(), []
    for _ in range(count):
        with subject.open() as device:
            empty = _memory(device).used_bytes
            _use_once(device, model, lambda: found.append(_memory(device).used_bytes - empty))  # noqa: B023
    return found


def _use_once(device: Device, model: TinyModel, look: Callable[[], None] | None = None) -> None:
    stepping = Stepping(device, model, cache_bytes=CACHE_BYTES)
    stepping.fill_cache()
    stepping.step()
    if look is not None:
        look()
    stepping.close()


def _within(what: str, claim: int, least: int, used: int) -> None:
    most = claim + claim // 16 + GRANULARITY
    if claim < least:
        raise CheckFailed(f"The {what} claims {claim} bytes; what it holds has {least} at least.")
    if not least - least // 16 <= used <= most:
        raise CheckFailed(
            f"The {what} claims {claim} bytes and holds {least} at least; used_bytes went by {used}, which is not "
            f"from {least - least // 16} to {most}."
        )


def _memory(device: Device) -> MemoryReport:
    device.synchronize()
    found = device.memory()
    if not (0 <= found.free_bytes <= found.total_bytes and 0 <= found.used_bytes <= found.total_bytes):
        raise CheckFailed(f"The memory report contradicts itself: {found}.")
    return found


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
