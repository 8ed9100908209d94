"""What goes wrong stays where it is: numbers that are none, bad settings, damaged weights, steps that fail.

Faults of steps are injected before the device sees a batch, so that they test how the device's
program and the engine get on afterwards, on every device alike.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from midspan.conformance import loads
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_process import device_arguments, run_children
from midspan.conformance.children.closed_device import USES
from midspan.conformance.engine_drive import DriveSettings, EngineDrive, LoadRequest, engine_on
from midspan.conformance.reference_judge import ReferenceJudge
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import TinyModel, tiny_model
from midspan.errors import CheckpointError, DeviceLost, MidspanError, OutOfDeviceMemory, SettingsError
from midspan.interface import Batch, Bounds, CacheLayout, Device

LEVEL = "faults"
POISON = 0
"""A token id that no load draws and no model here chooses."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNKNOWN_TYPES = ("float16", "bfloat16", "float32", "float8_of_nobody")
UNKNOWN_KERNEL = "no-such-kernel"
CHILD_SECONDS = 120.0


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    found = [
        *(
            Check(
                level=LEVEL, name=f"not-a-number-{dtype}", run=partial(not_a_number, subject, dtype), quick=place == 0
            )
            for place, dtype in enumerate(subject.dtypes())
        ),
        Check(
            level=LEVEL,
            name="use-after-close",
            run=partial(use_after_close, subject),
            quick=True,
            waits_seconds=CHILD_SECONDS,
        ),
        Check(level=LEVEL, name="damaged-weights", run=partial(damaged_weights, subject), quick=True),
    ]
    refusals: dict[str, Callable[[Subject], None]] = {
        "unclaimed-dtype-is-refused": unclaimed_dtype,
        "unclaimed-cache-dtype-is-refused": unclaimed_cache_dtype,
        "unknown-kernel-is-refused": unknown_kernel,
    }
    found += [Check(level=LEVEL, name=name, run=partial(run, subject), quick=True) for name, run in refusals.items()]
    injected: dict[str, Exception] = {
        "a-step-that-raises": RuntimeError("This request's step is said to fail."),
        "a-request-that-never-fits": OutOfDeviceMemory("This request's step is said not to fit."),
    }
    for name, error in injected.items():
        run = partial(one_request_fails, subject, error)
        found.append(Check(level=LEVEL, name=f"{name}-fails-alone", run=run, quick=True))
    found.append(Check(level=LEVEL, name="a-lost-device-is-told", run=partial(device_lost, subject), quick=True))
    return found


def poisonable() -> TinyModel:
    """A model that never chooses the poisoned token: its logit is 0, where others reach far above."""
    plain = tiny_model("plain")
    head = plain.tensor(HEAD).copy()
    head[POISON] = 0.0
    return plain.with_tensor(HEAD, head)


def not_a_number(subject: Subject, dtype: str) -> None:
    """A token whose embedding is NaN: its request fails, its neighbours and those that get its blocks do not."""
    healthy = poisonable()
    table = healthy.tensor(EMBEDDING).copy()
    table[POISON] = np.nan
    sick = healthy.with_tensor(EMBEDDING, table)
    device = subject.device()
    settings = DriveSettings(dtype=dtype, cache_tokens=3 * 64, max_context=64)
    bounds = settings.bounds(device)
    program = device.compile(sick.graph, sick.weights(), bounds)
    try:
        with engine_on(device, program, sick, settings) as engine, _quiet():
            _fail_one(engine, healthy)
            # The blocks that held NaN are free now, and all of them are taken again.
            found = engine.run(loads.simple(healthy.graph.vocab_size, engine.bounds.max_context))
            ReferenceJudge(healthy).judge(found, engine.bounds.dtype, engine.bounds.cache_dtype)
    finally:
        program.close()


def one_request_fails(subject: Subject, error: Exception) -> None:
    """Every step with a certain token raises: the engine finds the request and goes on with the others."""

    def fail(batch: Batch) -> None:
        if POISON in batch.token_ids:
            raise error

    with _engine(subject, DriveSettings(before=fail)) as (engine, model), _quiet():
        _fail_one(engine, model)


def device_lost(subject: Subject) -> None:
    """``DeviceLost`` reaches the engine's caller as it is."""

    def fail(batch: Batch) -> None:
        raise DeviceLost("The device is said to be lost.")

    with _engine(subject, DriveSettings(before=fail)) as (engine, model):
        try:
            engine.run(loads.simple(model.graph.vocab_size, engine.bounds.max_context, count=2))
        except DeviceLost:
            return
    raise CheckFailed("A device was lost, and the engine went on.")


def damaged_weights(subject: Subject) -> None:
    """A tensor that is missing is a ``CheckpointError``; the device is as it was, and goes on."""
    model = tiny_model("plain")
    with subject.open() as device:
        bounds = DriveSettings().bounds(device)
        device.compile(model.graph, model.weights(), bounds).close()
        before = device.memory().used_bytes
        try:
            device.compile(model.graph, model.without_tensor(HEAD).weights(), bounds)
        except CheckpointError:
            pass
        else:
            raise CheckFailed("A graph was compiled although one of its weights is missing.")
        after = device.memory().used_bytes
        if after != before:
            raise CheckFailed(f"The compilation that failed left {after - before} bytes in used_bytes.")
        program = device.compile(model.graph, model.weights(), bounds)
        with engine_on(device, program, model, DriveSettings()) as engine:
            found = engine.run(loads.simple(model.graph.vocab_size, engine.bounds.max_context, count=2))
            ReferenceJudge(model).judge(found, engine.bounds.dtype, engine.bounds.cache_dtype)


def use_after_close(subject: Subject) -> None:
    """What was closed raises when it is used, and does not take the process with it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "begun"
        module = "midspan.conformance.children.closed_device"
        (end,) = run_children(module, [device_arguments(subject, file=str(file))], seconds=CHILD_SECONDS)
        begun = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    what = f"The process that was {begun[-1]}" if begun else "The process that was to use what is closed"
    silent = end.require(what)["silent"]
    if end.exit_code != 0:
        raise CheckFailed(f"The process that used what is closed ended with code {end.exit_code}.")
    if silent:
        raise CheckFailed(f"{len(silent)} of {len(USES)} uses raised nothing: {', '.join(silent)}.")


def unclaimed_dtype(subject: Subject) -> None:
    """An activation type that is not claimed."""
    other = _unclaimed(subject.capabilities.dtypes)
    _require_refusal(f"compiling for dtype '{other}'", partial(_compile, subject.device(), dtype=other))


def unclaimed_cache_dtype(subject: Subject) -> None:
    """A cache type that is not claimed, at compile and when a cache is allocated."""
    device, model = subject.device(), tiny_model("plain")
    other = _unclaimed(subject.capabilities.cache_dtypes)
    size = subject.capabilities.block_sizes[0]
    layout = CacheLayout(groups=model.graph.cache, block_size=size, dtype=other)
    _require_refusal(f"compiling for cache_dtype '{other}'", partial(_compile, device, cache_dtype=other))
    _require_refusal(f"a cache of '{other}'", lambda: device.allocate_cache(layout, (4,) * len(layout.groups)).close())


def unknown_kernel(subject: Subject) -> None:
    """A kernel that nobody has, and an operation that there is not."""
    device = subject.device()
    for kernels in ({"linear": UNKNOWN_KERNEL}, {"no_such_operation": "numpy"}):
        _require_refusal(f"compiling with kernels {kernels}", partial(_compile, device, kernels=kernels))


def _unclaimed(claimed: tuple[str, ...]) -> str:
    return next(name for name in UNKNOWN_TYPES if name not in claimed)


def _compile(device: Device, **changes: object) -> None:
    model = tiny_model("plain")
    bounds: Bounds = replace(DriveSettings().bounds(device), **changes)  # type: ignore[arg-type]
    device.compile(model.graph, model.weights(), bounds).close()


def _require_refusal(what: str, action: Callable[[], None]) -> None:
    try:
        action()
    except SettingsError as error:
        if not error.remedy:
            raise CheckFailed(f"The refusal of {what} names no remedy: {error}") from error
        return
    except MidspanError as error:
        raise CheckFailed(f"{what} raised {type(error).__name__} and not SettingsError: {error}") from error
    raise CheckFailed(f"{what} was not refused.")


@contextmanager
def _engine(subject: Subject, settings: DriveSettings) -> Iterator[tuple[EngineDrive, TinyModel]]:
    model, device = poisonable(), subject.device()
    program = device.compile(model.graph, model.weights(), settings.bounds(device))
    try:
        with engine_on(device, program, model, settings) as engine:
            yield engine, model
    finally:
        program.close()


def _fail_one(engine: EngineDrive, model: TinyModel) -> None:
    """Run a poisoned request among others: it fails, and they are right."""
    context = engine.bounds.max_context
    healthy = loads.arriving(loads.simple(model.graph.vocab_size, context, count=4), 1)
    prompt = (*loads.tokens(max(1, min(5, context - 8)), 60, model.graph.vocab_size), POISON)
    sick = LoadRequest(prompt=prompt, outputs=max(1, min(4, context - len(prompt))), enters=2)
    found = engine.run([*healthy, sick])
    if found[-1].error is None:
        raise CheckFailed(
            "The request that was to fail did not: its rows must be flagged invalid, or its step must raise."
        )
    ReferenceJudge(model).judge(found[:-1], engine.bounds.dtype, engine.bounds.cache_dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """The engine's log of errors that are meant to happen is not shown."""
    logger = logging.getLogger("midspan.engine")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
